"""Promise 10: bad input is refused before anything is done, by a message that names the leaf and the mend."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from tests.contract.table import ROWS, every_row, tree

INVALID = [(row, *case) for row in ROWS for case in row.invalid]


@pytest.mark.parametrize(
    ("row", "settings", "error", "words"), INVALID, ids=[f"{row.name}-{case}" for row, case, *_ in INVALID]
)
def test_invalid_settings(row, settings, error, words):
    with pytest.raises(error, match=words) as caught:
        row.make(**settings)
    if isinstance(row.make, type):
        assert str(caught.value).startswith(f"{row.name}: ")


def _without(name):
    return lambda good: {key: leaf for key, leaf in good.items() if key != name}


GRADIENTS = {
    "missing": (_without("b"), ValueError, r"no gradient for \['b'\]"),
    "None": (lambda good: {**good, "b": None}, ValueError, r"no gradient for \['b'\]"),
    "extra": (lambda good: {**good, "c": good["b"]}, ValueError, r"nothing in params for the gradient at \['c'\]"),
    "other container": (lambda good: list(good.values()), ValueError, r"no gradient for \['b'\]"),
    "broadcasts": (
        lambda good: {**good, "w": good["w"][:1]},
        ValueError,
        r"\['w'\] has shape \(1, 33\), .* \(16, 33\)",
    ),
    "scalar": (lambda good: {**good, "w": good["s"]}, ValueError, r"\['w'\] has shape \(\), .* \(16, 33\)"),
    "integers": (lambda good: {**good, "b": jnp.zeros(7, int)}, TypeError, r"gradient at \['b'\] is int32\[7\]"),
    "booleans": (lambda good: {**good, "b": jnp.zeros(7, bool)}, TypeError, r"gradient at \['b'\] is bool\[7\]"),
    "float0": (
        lambda good: {**good, "b": np.zeros(7, jax.dtypes.float0)},
        TypeError,
        r"gradient at \['b'\] is float0\[7\], expected a floating-point array\. Differentiate",
    ),
    "text": (lambda good: {**good, "b": "b"}, TypeError, r"gradient at \['b'\] is str 'b'"),
    "complex": (
        lambda good: {**good, "b": good["b"].astype("complex64")},
        TypeError,
        r"gradient at \['b'\] is complex, but the parameter is real",
    ),
}


@every_row
@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_unlike_the_parameters(row, case, jitted):
    change, error, words = GRADIENTS[case]
    if jitted and case in ("text", "float0"):
        pytest.skip("jit itself takes no text")
    tx, params = row.tx, tree()
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(error, match=f"{type(tx).__name__}: .*{words}"):
        update(change(params), tx.init(params), params)


@every_row
@pytest.mark.parametrize("case", ["missing", "extra", "broadcasts"])
def test_gradients_unlike_the_state_without_parameters(row, case):
    tx, params = row.tx, tree()
    if (
        not any(map(np.ndim, jax.tree.leaves(tx.init(params))))
        or "weight_decay" in tx.hyperparams
        or row.dtype == "bfloat16"
    ):
        pytest.skip("keeps nothing to compare with, or needs the parameters")
    change, error, words = GRADIENTS[case]
    with pytest.raises(error, match=words.replace("params", r"state\.\w+")):
        tx.update(change(params), tx.init(params))


PARAMETERS = {
    "integers": (jnp.zeros(3, int), r"parameter at \['x'\] is int32\[3\], expected a floating-point array"),
    "booleans": (np.zeros(3, bool), r"parameter at \['x'\] is bool\[3\]"),
    "a key": (jax.random.key(0), r"parameter at \['x'\] is key<"),
    "text": ("x", r"parameter at \['x'\] is str 'x'.* take the others out"),
    "a function": (len, r"parameter at \['x'\] is builtin_function_or_method"),
    "an integer": (1, r"parameter at \['x'\] is int 1"),
}


@every_row
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_that_cannot_be_trained(row, case):
    leaf, words = PARAMETERS[case]
    with pytest.raises(TypeError, match=f"{type(row.tx).__name__}: the {words}"):
        row.tx.init({"w": jnp.ones(2), "x": leaf})


@every_row
def test_states_of_another_kind(row):
    tx, params = row.tx, tree()
    state = tx.init(params)
    if isinstance(state, optax.EmptyState):
        wrong = [None, (), {}, {"count": 0}, optax.TraceState(params)]
    elif row.name == "wrapped":  # a chain of optax's has the first word
        wrong = [(), (optax.EmptyState(), {}), (optax.EmptyState(), state)]
    elif type(state) is tuple:
        wrong = [None, {}, state[:-1], (*state, state), list(state), gdx.scale_by_adam().init(params)]
    else:
        wrong = [None, {}, tuple(state), state._asdict(), (state,), optax.EmptyState(), params]
    for other in wrong:
        with pytest.raises((TypeError, ValueError), match=r"state is|number of updates and states"):
            tx.update(params, other, params)
    # swapped arguments
    with pytest.raises((TypeError, ValueError), match=r"state is|gradient at|gradients' tree|number of updates"):
        tx.update(state, params, params)


class forward(gdx.Transform):
    """Keeps nothing, and never looks at its state."""

    def init_tree(self, params):
        return optax.EmptyState()

    def update_tree(self, updates, state, params=None, **extra_args):
        return updates, state


SIX = [make(0.1) for make in (gdx.gradient_descent, gdx.sgd, gdx.momentum, gdx.nesterov, gdx.adam, gdx.adamw)]
OTHERS = [
    *SIX,
    gdx.sgd(0.1, 0.9),
    gdx.adam(gdx.schedules.constant_schedule(0.1)),
    *(chained for tx in SIX for chained in (gdx.chain(optax.clip(1.0), tx), gdx.chain(tx, forward()))),
    *(gdx.value(make)(0.1) for make in (optax.sgd, optax.adam, optax.amsgrad, optax.adabelief, optax.yogi)),
    *(gdx.value(optax.MultiSteps)(tx, 2) for tx in (SIX[1], SIX[4])),
]


@pytest.mark.parametrize("tx", OTHERS, ids=repr)
def test_states_of_every_other_transform(tx):
    params, refused = {"w": jnp.ones(3)}, 0
    own = jax.tree.structure(tx.init(params))
    for state in (other.init(params) for other in OTHERS):
        if jax.tree.structure(state) == own:
            tx.update(params, state, params)
        else:
            with pytest.raises((TypeError, ValueError), match=r"^\w+: .*(state is|number of updates and s)"):
                tx.update(params, state, params)
            refused += 1
    assert refused > len(OTHERS) // 2


def test_states_that_a_transform_leaves_or_extends():
    def update(updates, state, params=None):
        return updates, {**state, len(state): jnp.zeros(())}

    params, kept = {"w": jnp.ones(3)}, {0: jnp.ones(2)}
    growing = gdx.chain(optax.GradientTransformation(lambda params: kept, update), gdx.sgd(0.1))
    state = growing.init(params)
    for steps in range(1, 4):
        _, state = growing.update(params, state, params)
        assert len(state[0]) == 1 + steps


KEEPING = [
    gdx.scale_by_momentum(),
    gdx.sgd(0.1, momentum=0.9),
    gdx.nesterov(lambda count: 0.1),
    gdx.scale_by_adam(),
    gdx.adamw(0.1, mask={"w": True, "b": False, "s": True}),
    gdx.adam(0.1, mu_dtype="bfloat16"),
    gdx.sgd(0.1, 0.9, accumulator_dtype=gdx.storage.SignedFourthRoot8()),  # whose leaves here are too small for it
    gdx.chain(optax.clip(1.0), gdx.adam(0.1, nu_dtype=gdx.storage.StochasticBfloat16())),
]


@pytest.mark.filterwarnings("ignore:scale_by_momentum. no leaf fits:UserWarning")
@pytest.mark.parametrize("tx", KEEPING, ids=repr)
@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_moments_of_another_dtype(tx, dtype):
    params = tree()
    state = jax.tree.map(lambda x: x.astype(dtype) if x.shape == params["w"].shape else x, tx.init(params))
    with pytest.raises(TypeError, match=rf"state\.(mu|trace) at \['w'\] is {dtype}\[16,33\], which .*storage\.convert"):
        tx.update(tree(), state, params)
    wide = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, tx.init(params))
    if [x.dtype for x in jax.tree.leaves(wide)] != [x.dtype for x in jax.tree.leaves(tx.init(params))]:
        with pytest.raises(TypeError, match=r"state\.(mu|nu) at .* is float32.*holds it"):
            tx.update(tree(), wide, params)
    tx.update(tree(), gdx.storage.convert(wide, tx.init(params)), params)


def test_without_x64_float64_means_float32():
    tx, params = gdx.adam(0.1, mu_dtype="float64"), tree()
    with pytest.warns(UserWarning, match="float64"):  # JAX's own
        state = tx.init(params)
    tx.update(tree(), state, params)


@pytest.mark.parametrize(
    ("make", "given", "words"),
    [
        (gdx.adamw, {"lr": 0.1}, "adamw: there is no argument 'lr'; did you mean learning_rate\\?"),
        (gdx.adamw, {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "'betas'; did you mean b1, b2\\?"),
        (gdx.adamw, {"learning_rate": 0.1, "wd": 0.1}, "'wd'; did you mean weight_decay\\?"),
        (gdx.sgd, {"learning_rate": 0.1, "nestorov": True}, "'nestorov'; did you mean nesterov\\?"),
        (gdx.sgd, {"learning_rate": 0.1, "weight_decay": 0.1}, "expected learning_rate, momentum, nesterov, "),
        (gdx.scale_by_adam, {"epsilon": 0.1}, "'epsilon'; did you mean eps\\?"),
        (gdx.value(optax.lion), {"lr": 0.1}, "lion: there is no argument 'lr'; did you mean learning_rate\\?"),
        (gdx.schedules.linear_schedule, {"start_value": 0.1}, "'start_value'; did you mean init_value\\?"),
    ],
)
def test_arguments_by_another_name(make, given, words):
    with pytest.raises(TypeError, match=words):
        make(**given)


def test_other_mistakes_are_told_what_to_do():
    with pytest.raises(ValueError, match=r"sgd: learning_rate is -0\.1; .*; to ascend, descend on the negative of the"):
        gdx.sgd(-0.1)
    with pytest.raises(
        TypeError, match=r"schedule: got constant_schedule.*; what returns a number is one already: give it to the"
    ):
        gdx.schedule(gdx.schedules.constant_schedule(0.1))
    for made_of in (gdx.schedules.linear_schedule, optax.linear_schedule, lambda: 0.1, float):
        with pytest.raises(TypeError, match=r"sgd: learning_rate is <.*>, which is no function of the step count"):
            gdx.sgd(made_of)
    with pytest.raises(ValueError, match=r"mask is a function that was made anew for each, so define it once"):
        gdx.grid(lambda rate: gdx.adamw(rate, mask=lambda params: params), rate=[0.1, 0.2])
    with pytest.raises(TypeError, match=r"round_with_master: init copies .*jax\.eval_shape\(tx\.init, params\)"):
        gdx.round_with_master().init(jax.ShapeDtypeStruct((3,), "bfloat16"))


@pytest.mark.parametrize("count", [jnp.float32(3), jnp.zeros(2, int)])
def test_a_count_that_is_no_integer_scalar(count):
    tx = gdx.scale_by_adam()
    state = tx.init(tree())._replace(count=count)
    with pytest.raises(TypeError, match=r"scale_by_adam: state\.count is .*expected an integer scalar.*cast it back"):
        tx.update(tree(), state)


@pytest.mark.parametrize("tx", [gdx.add_decoupled_weight_decay(0.1), gdx.adamw(0.1)])
def test_update_without_the_parameters(tx):
    with pytest.raises(ValueError, match=r"update needs the parameters; call update\(gradients, state, params\)"):
        tx.update(tree(), tx.init(tree()))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        ({"w": True}, ValueError, r"the mask has leaves at \['w'\], the parameters at \['b'\], \['s'\], \['w'\]"),
        ({"w": 1, "b": True, "s": True}, TypeError, r"the mask at \['w'\] is 1, expected True \(acts\) or False"),
        (lambda params: {"w": jnp.bool_(True)}, TypeError, r"the mask at \['w'\] is .*expected True"),
        ({"w": "yes"}, TypeError, r"the mask at \['w'\] is 'yes'"),
    ],
)
def test_masks(mask, error, words):
    with pytest.raises(error, match=f"adamw: {words}"):
        gdx.adamw(0.1, mask=mask).init(tree())


@pytest.mark.parametrize("make", [lambda: gdx.adamw(0.1), lambda: gdx.momentum(0.1), lambda: gdx.gradient_descent(0.1)])
def test_a_state_in_the_place_of_the_parameters(make):
    tx, params = make(), tree()
    with pytest.raises(
        (TypeError, ValueError), match=r"\. A state goes before the parameters: update\(gradients, state"
    ):
        tx.update(params, params, tx.init(params))
    with pytest.raises(TypeError, match=r"^(?!.*A state goes)"):
        tx.update(params, tx.init(params), jax.tree.map(lambda p: p.astype(int), params))


def test_masks_in_other_containers_and_of_values():
    with pytest.raises(
        ValueError, match=r"adamw: the mask has leaves at \[0\], the parameters at \[0\] \(in other conta"
    ):
        gdx.adamw(0.1, mask=[True]).init((jnp.ones(3),))
    tx = gdx.adamw(0.1, mask=lambda params: jax.tree.map(lambda p: bool(jnp.all(p == 1)), params))
    tx.init(tree())
    with pytest.raises(
        TypeError, match="adamw: the mask needs values of the parameters, which are traced; let it decide"
    ):
        jax.jit(tx.init)(tree())


@pytest.mark.parametrize(
    ("schedule", "error", "words"),
    [
        (lambda count: jnp.ones(3), ValueError, r"has shape \(3,\)"),
        (lambda count: -0.1, ValueError, r"is -0\.1"),
        (lambda count: None, TypeError, r"is None"),
        (lambda count: "fast", TypeError, r"is 'fast'"),
        (lambda count: 0.1j, TypeError, r"is 0\.1j"),
    ],
)
def test_schedules(schedule, error, words):
    with pytest.raises(error, match=r"sgd: learning_rate, as returned by the schedule <.*>, " + words):
        gdx.sgd(schedule).init(tree())


def test_a_state_made_without_the_schedule():
    with pytest.raises(TypeError, match=r"sgd: the state is a EmptyState, expected ScaleByScheduleState\(count\)"):
        gdx.sgd(lambda count: 0.1).update(tree(), gdx.sgd(0.1).init(tree()))


def test_inject_hyperparams_that_rounds_b2_to_one():
    """optax casts hyperparameters to the parameters' dtype; 0.999 is 1 in bfloat16, and Adam divides by 1 - b2."""
    with pytest.raises(ValueError, match=r"adam: b2 is 1\.0; expected a finite number in \[0, 1\)"):
        optax.inject_hyperparams(gdx.adam)(0.1).init(tree(dtype="bfloat16"))


def test_inject_hyperparams_that_rounds_b2_to_one_inside_jit():
    with pytest.raises(
        TypeError, match=r"adam: b1 is a traced bfloat16, in which values near 1 round to it; pass it in"
    ):
        jax.jit(optax.inject_hyperparams(gdx.adam)(0.1).init)(tree(dtype="bfloat16"))
    optax.inject_hyperparams(gdx.adam, hyperparam_dtype=jnp.float32)(0.1).init(tree(dtype="bfloat16"))


def test_messages_stay_short():
    """The habit of torch: sgd(parameters, rate)."""
    for wrong in (
        lambda: gdx.sgd(tree(), 0.1),
        lambda: gdx.sgd([jnp.ones(3)] * 500, 0.1),
        lambda: gdx.chain([1] * 500),
    ):
        with pytest.raises(TypeError) as caught:
            wrong()
        assert len(str(caught.value)) < 400


def test_nothing_is_half_done():
    """The first leaves are fine and the last is not: no count, moment or parameter has changed."""
    tx, params = gdx.adam(0.1), tree()
    state = tx.init(params)
    before = jax.tree.map(np.array, state)
    with pytest.raises(ValueError, match=re.escape("['w']")):
        tx.update({**params, "w": params["w"][0]}, state, params)
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(before)))


def test_there_are_at_least_forty_cases():
    assert len({str(case[1:]) for case in INVALID}) + len(GRADIENTS) + len(PARAMETERS) >= 40
