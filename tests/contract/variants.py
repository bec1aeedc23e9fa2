"""Shows that the tests can fail: breaks one behaviour of gdx at a time and reports whether its test catches it.

Run by hand, about a quarter of an hour: `python -m tests.contract.variants [--only WORDS]`. A variant puts a wrong
function in the place of a right one, wherever that was imported, in a process of its own. So it names functions and
their parameters, never a line of their text.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx.averages import averaging
from gdx.checkpoint.describe import describe
from gdx.compat import contracts_all
from gdx.links.adam import _correction
from gdx.links.rounding import _to_bfloat16
from gdx.storage.dither import lowbias32
from gdx.transform import CountedState

ROOT = Path(__file__).parents[2]


class Variant(NamedTuple):
    """What is wrong, the test that catches it, the place of the right function in gdx, and the wrong function.

    The wrong one takes the right one before the arguments; instead of a property or of the function that a class of
    calls keeps, it is made into another of these.
    """

    what: str
    test: str
    place: str
    wrong: Any


class Instead(NamedTuple):
    """What is put in the place of something that is no function, in that module alone."""

    value: Any


# What several wrong functions do.


def like(module: Any, **names: Any) -> Instead:
    """A module with some of its names changed."""
    return Instead(types.SimpleNamespace(**{**vars(module), **names}))


def quiet(error: type[Exception]) -> Any:
    """The right function, but this error is not raised."""

    def wrong(right: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(error):
            return right(*args, **kwargs)

    return wrong


def then(change: Any) -> Any:
    """The right function, with this done to what it returns."""
    return lambda right, *args, **kwargs: change(right(*args, **kwargs))


def ordered(*order: int) -> Any:
    """The right chain with its links in another order, those not named left out."""
    return then(lambda made: gdx.chain(*(made.transforms[i] for i in order)))


def with_slope(value: Any, x: Any, slope: Any) -> Any:
    """A value with another slope in x."""
    return jax.lax.stop_gradient(value) + (x - jax.lax.stop_gradient(x)) * jax.lax.stop_gradient(slope)


def but(value: Any, **fields: Any) -> Any:
    """A value with other fields, unchecked."""
    copy = jax.tree.map(lambda x: x, value)
    vars(copy).update(fields)
    return copy


def by_chance_below_the_first_code(right: Any, self: Any, x: Any, scales: Any, bits: Any) -> Any:
    share = abs(x) / scales * float(self.top) ** 4
    return jnp.where(share < 1, (bits < share * 2**16).astype(x.dtype), right(self, x, scales, bits))


def as_bfloat16(u: Any) -> Any:
    return u.astype("bfloat16").astype(u.dtype)


def cast_between_links(right: Any, links: tuple, states: tuple, updates: Any, params: Any) -> Any:
    new = []
    for link, state in zip(links, states):
        updates, (state,) = right((link,), (state,), updates, params)
        updates = jax.tree.map(as_bfloat16, updates)
        new.append(state)
    return updates, tuple(new)


def state_in_the_computed_dtype(
    right: Any, link: Any, shared: Any, g: Any, p: Any, moments: Any, formats: Any, dtype: Any, dither: Any
) -> Any:
    u, *new = right(link, shared, g, p, moments, formats, dtype, dither)
    return u, *(x.astype(dtype) if format is None else x for x, format in zip(new, formats))


def not_averaged_from_the_start(right: Any, self: Any, updates: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    updates, new = right(self, updates, state._replace(measured=state.measured + 10**6), *args, **kwargs)
    return updates, new._replace(measured=new.measured - 10**6)


def skipped_is_averaged(right: Any, tx: Any, *args: Any) -> Any:
    is_made, factor, scalars = right(tx, *args)
    made = right(but(tx, threshold=jnp.full_like(scalars.mean, jnp.inf)), *args)[2]
    return is_made, factor, scalars._replace(mean=made.mean, deviation=made.deviation)


def skip_is_counted(right: Any, tx: Any, updates: Any, value: Any, state: Any) -> Any:
    is_made, factor, scalars = right(tx, updates, value, state)
    return is_made, factor, scalars._replace(count=optax.safe_increment(state.count))


def counts_move_on_a_skip(right: Any, self: Any, updates: Any, state: Any, *args: Any) -> Any:
    updates, new = right(self, updates, state, *args)
    move = lambda old, new: optax.safe_increment(old) if old.dtype == np.int32 else new  # noqa: E731
    return updates, new._replace(inner_state=jax.tree.map(move, state.inner_state, new.inner_state))


def with_defaults(right: Any, self: Any) -> Any:
    restored, (*origin, _, children) = right(self)
    return restored, (*origin, {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, children)


ORACLE = "test_optimizers.py::test_float64_matches_the_oracle"
STRUCTURE = "test_states_of_optax.py::test_has_the_structure_and_dtypes_of_optaxs"
SLOPES = "test_schedules.py::test_slopes_are_finite_in_every_number_and_nothing_is_nan_on_the_way"
VALUE, CALL = "values:Value", "transform:Call"

# fmt: off
VARIANTS = list(map(Variant._make, (
    # The formulas.
    ("epsilon inside the root", f"{ORACLE}[adam-6]", "links.adam:scale_by_adam.direction",
     lambda right, self, shared, g, p, mu, nu: mu * shared.from_mu / jnp.sqrt(nu * shared.from_nu + shared.eps)),
    ("eps_root ignored", f"{ORACLE}[adam-8]", "links.adam:scale_by_adam.direction",
     lambda right, self, *args: right(but(self, eps_root=0 * self.eps_root), *args)),
    ("first moment not corrected", f"{ORACLE}[adam-6]", "links.adam:scale_by_adam.shared",
     lambda right, self, count: right(self, count)._replace(from_mu=jnp.ones_like(self.b1))),
    ("second moment not corrected", f"{ORACLE}[adam-6]", "links.adam:scale_by_adam.shared",
     lambda right, self, count: right(self, count)._replace(from_nu=jnp.ones_like(self.b1))),
    ("correction by b1 for both", f"{ORACLE}[adam-6]", "links.adam:scale_by_adam.shared",
     lambda right, self, count: right(self, count)._replace(from_nu=1 / _correction(self.b1, count))),
    ("correction with cancellation", "contract/test_06_accurate.py::test_adam_step_at_any_count[0.0-0.999-False]",
     "links.adam:_correction", lambda right, b, t: 1 - b**t),
    ("correction of a constant", "contract/test_03_same_bits.py::test_many_decays_as_constants[True-scale_by_adam]",
     "links.adam:_correction", lambda right, b, t: -jnp.expm1(t * jnp.log1p(b - 1))),
    ("division by a scalar", "contract/test_03_same_bits.py::test_a_constant_in_a_closure[scale_by_adam-2]",
     "links.adam:scale_by_adam.direction", lambda right, self, shared, g, p, mu, nu:
     right(self, shared._replace(from_mu=jnp.ones_like(self.b1)), g, p, mu / (1 / shared.from_mu), nu)),
    ("moment weights swapped", f"{ORACLE}[adam-6]", "links.adam:scale_by_adam.accumulate",
     lambda right, self, shared, *args: right(but(self, b1=shared.w1), shared._replace(w1=self.b1), *args)),
    ("second moment of g, not of its square", f"{ORACLE}[adam-6]", "links.adam:_square", lambda right, x: abs(x)),
    ("nesterov adam ignored", f"{ORACLE}[adam-9]", "links.adam:scale_by_adam.shared",
     lambda right, self, count: right(but(self, nesterov=False), count)),
    ("nesterov adam corrected one step late", f"{ORACLE}[adam-9]", "links.adam:scale_by_adam.shared",
     lambda right, self, count: right(self, count)._replace(from_mu=self.b1 / _correction(self.b1, count))),
    ("zero over zero", "contract/test_07_finite.py::test_adam_with_eps_zero_rests_where_the_gradient_is_zero",
     "links.adam:scale_by_adam.shared", lambda right, self, count: right(self, count)._replace(eps=self.eps)),
    ("slope of the root at zero",
     "contract/test_09_differentiable.py::test_slopes_are_finite_where_a_gradient_is_zero[scale_by_adam-0]",
     "links.adam:_sqrt", lambda right, x: jnp.sqrt(x)),
    ("slope of the correction",
     "contract/test_09_differentiable.py::test_gradients_match_finite_differences[scale_by_adam-0]",
     "links.adam:_correction", lambda right, b, t: with_slope(right(b, t), b, -t * b**t)),
    ("complex second moment", "contract/test_12_any_pytree.py::test_complex_parameters_follow_optax",
     "storage.formats:moment_like", lambda right, p, dtype=None, *, real=False: right(p, dtype)),
    ("momentum with factor 1 - mu", f"{ORACLE}[momentum-4]", "links.momentum:scale_by_momentum.accumulate",
     lambda right, self, shared, g, *args: right(self, shared, (1 - self.momentum) * g, *args)),
    ("nesterov ignored", f"{ORACLE}[nesterov-5]", "links.momentum:scale_by_momentum.direction",
     lambda right, self, shared, g, p, trace: trace),
    ("nesterov with the old velocity", f"{ORACLE}[nesterov-5]", "links.momentum:scale_by_momentum.direction",
     lambda right, self, shared, g, p, trace: right(self, shared, g, p, trace - g)),
    ("decay with the wrong sign", f"{ORACLE}[adamw-10]", "links.decay:add_decoupled_weight_decay.step",
     lambda right, self, shared, g, p: right(self, shared, g, -p)),
    ("mask ignored", "test_optimizers.py::test_adamw_decays_the_parameters_and_not_the_gradient",
     "links.decay:add_decoupled_weight_decay.acts_on", lambda right, self, params: True),
    ("mask inverted", "test_optimizers.py::test_adamw_decays_the_parameters_and_not_the_gradient",
     "links.decay:add_decoupled_weight_decay.acts_on",
     then(lambda mask: mask if isinstance(mask, bool) else jax.tree.map(lambda acts: not acts, mask))),
    ("a module as a mask is called", "test_transform.py::test_a_module_given_as_a_mask_is_a_tree",
     "leafwise:_is_function", lambda right, mask: callable(mask)),
    ("ascent", f"{ORACLE}[gradient_descent-0]", "links.descent:scale_by_learning_rate.shared",
     lambda right, self, count: -right(self, count)),
    ("decay not scaled by the rate", f"{ORACLE}[adamw-10]", "links.adam:adamw._function", ordered(0, 2, 1)),
    ("L2 instead of decoupled", f"{ORACLE}[adamw-10]", "links.adam:adamw._function", ordered(1, 0, 2)),
    ("L2 instead of Loshchilov & Hutter's decay", f"{ORACLE}[adamw-12]", "links.adam:adamw._function",
     ordered(2, 0, 1, 3)),
    ("rate outside the velocity",
     "test_optimizers.py::test_the_rate_inside_the_velocity_differs_from_sgd_only_under_a_schedule",
     "links.momentum:momentum._function", ordered(1, 0)),
    # The same bits, and none but finite ones.
    ("moments contracted freely", "contract/test_03_same_bits.py::test_a_scalar_leaf_with_constants[scale_by_adam-0]",
     "links.adam:scale_by_adam.accumulate", lambda right, self, shared, g, p, mu, nu:
     (self.b1 * mu + shared.w1 * g, self.b2 * nu + shared.w2 * g * g)),
    ("velocity contracted freely",
     "test_sharding.py::test_steps_have_the_bits_of_an_unsharded_run[momentum-AxisType.Auto-8]",
     "links.momentum:scale_by_momentum.accumulate", lambda right, self, shared, g, p, trace:
     (self.momentum * trace + g,)),
    ("overflow unseen", "contract/test_07_finite.py::test_what_overflows_or_is_not_finite_is_seen",
     "numerics:uncontracted", lambda right, product: jnp.where(product <= jnp.inf, product, jnp.nan)),
    ("guard that debug_nans stops at", "test_transform.py::test_without_jit_under_debug_nans",
     "numerics:uncontracted", lambda right, product: jnp.where(product < jnp.inf, product, jnp.nan)),
    # from jax 0.12 on nothing is contracted that is not to be
    *[("half precision multiplied in",
       "contract/test_03_same_bits.py::test_powers_of_two_as_constants[gradient_descent-float16]",
       "transform:cast_like", lambda right, u, g: u.astype(jnp.result_type(g)))] * contracts_all(),
    ("decoded products contracted",
     "test_sharding.py::test_steps_have_the_bits_of_an_unsharded_run[8bit momentum-AxisType.Auto-8]",
     "storage.blocks:Blocks.decode_blocks",
     lambda right, self, stored: self.values(stored.codes.astype("float32")) * stored.scales),
    # The door, the count and the state.
    ("update in the computed dtype",
     "contract/test_05_stable_state.py::test_dtypes_never_drift[float32-float64-scale_by_learning_rate-0]",
     "transform:cast_like", lambda right, u, g: u),
    ("gradients not widened", "test_compose.py::test_a_small_decay_counts_in_any_of_them[bfloat16]",
     "transform:widened", lambda right, g: g),
    ("cast between links", "test_compose.py::test_a_small_decay_counts_in_any_of_them[bfloat16]",
     "leafwise:update_leaves", cast_between_links),
    ("a foreign link rounds what passes", "test_compose.py::test_a_small_decay_counts_in_any_of_them[bfloat16]",
     "transform:foreign_update", then(lambda out: (jax.tree.map(as_bfloat16, out[0]), out[1]))),
    ("a foreign state not held to its dtype", "test_compose.py::test_a_foreign_state_keeps_its_dtype",
     "transform:_like", lambda right, new, old: new),
    ("rounding within a call cast to the gradient's dtype",
     "test_compose.py::test_the_result_does_not_depend_on_how_it_is_put_together[bfloat16-bfloat16]",
     f"{CALL}.rounds", lambda right, self: False),
    ("count stands still", f"{ORACLE}[adam-6]", "leafwise:optax", like(optax, safe_increment=lambda count: count)),
    ("count wraps", "contract/test_11_saturates.py::test_counts_saturate[scale_by_momentum-4]", "leafwise:optax",
     like(optax, safe_increment=lambda count: count + 1)),
    ("state in the computed dtype",
     "contract/test_05_stable_state.py::test_dtypes_never_drift[float32-float32-scale_by_momentum-3]",
     "storage.stepping:_step",
     state_in_the_computed_dtype),
    ("computed in the leaf's dtype", "test_leafwise.py::test_everything_comes_in_one_dtype[bfloat16-float32]",
     "leafwise:_dtypes", lambda right, g, p, moments: (g,) * len(moments)),
    ("moments in the parameter's dtype",
     "contract/test_05_stable_state.py::test_moments_of_half_precision_parameters_are_float32",
     "storage.formats:moment_like",
     lambda right, p, dtype=None, *, real=False: right(p, jnp.result_type(p) if dtype is None else dtype, real=real)),
    ("state with a count by itself", "contract/test_11_saturates.py::test_counts_saturate[scale_by_momentum-4]",
     "leafwise:Leafwise._packed",
     then(lambda state: state.inner_state if isinstance(state, CountedState) else state)),
    ("state of a mask not masked", f"{STRUCTURE}[adamw-1-constant]", "leafwise:Leafwise._packed",
     then(lambda state: state.inner_state if isinstance(state, optax.MaskedState) else state)),
    ("sgd of one link", f"{STRUCTURE}[sgd-0-constant]", "links.momentum:sgd._function", ordered(1)),
    # Checks.
    ("tree not compared", "contract/test_10_refuses.py::test_gradients_unlike_the_parameters", "checks:check_like",
     lambda right, tx, updates, name, tree:
     right(tx, updates, name, tree) if jax.tree.structure(updates) == jax.tree.structure(tree) else None),
    ("shapes not compared", "contract/test_10_refuses.py::test_gradients_unlike_the_parameters", "checks:check_like",
     lambda right, tx, updates, name, tree:
     None if jax.tree.structure(updates) == jax.tree.structure(tree) else right(tx, updates, name, tree)),
    ("state not checked", "contract/test_10_refuses.py::test_states_of_another_kind", "checks:check_state",
     quiet(TypeError)),
    ("state of a chain not checked", "test_compose.py::test_a_foreign_state_is_refused", "checks:check_chain_state",
     quiet(TypeError)),
    ("sums still to be made", "storage/test_blocks.py::test_a_gradient_that_is_still_to_be_summed_is_refused",
     "checks:check_formats", quiet(ValueError)),
    ("formats not compared", "storage/test_blocks.py::test_a_state_in_another_format_is_refused",
     "checks:check_formats", quiet(TypeError)),
    ("formats of a link not checked", "test_leafwise.py::test_a_links_own_mistakes_are_its_own",
     "leafwise:check_own_formats", lambda right, tx, names: None),
    ("numbers not checked where a step is narrow",
     "test_transform.py::test_numbers_of_float64_that_float32_does_not_have",
     "transform:Transform.check_narrow", lambda right, self, dtype: None),
    ("a block's root is part of what is divided by it",
     "storage/test_blocks.py::test_of_five_million_numbers_none_has_another_code", "storage.blocks:_rounded",
     lambda right, x: x),
    ("nearest second moment allowed", "contract/test_10_refuses.py::test_invalid_settings",
     "links.adam:scale_by_adam.validate", lambda right, self: None),
    ("rounding to one allowed", "contract/test_10_refuses.py::test_invalid_settings", "fields:jnp",
     like(jnp, result_type=lambda *types: np.dtype(float) if types == (float,) else jnp.result_type(*types))),
    # Values.
    ("weak-typed hyperparameters", "test_transform.py::test_building_an_optimizer_makes_no_array",
     "fields:to_number", lambda right, value: value if isinstance(value, jax.Array) else float(value)),
    ("hyperparameters kept in float32", "test_transform.py::test_float64_mode_keeps_float64_hyperparameters",
     "fields:to_number", lambda right, value: value if isinstance(value, jax.Array) else np.float32(value)),
    ("array dtypes kept",
     "test_transform.py::test_arrays_are_held_as_their_numbers_and_tracers_in_the_default_dtype",
     "fields:to_number", lambda right, value: value if isinstance(value, jax.Array) else right(value)),
    ("static fields not compared", "test_transform.py::test_equal_values_are_equal_and_hash_alike",
     "fields:Setting._compared", lambda right, self: ()),
    ("structures compared without their types", "test_transform.py::test_structures_are_compared_with_their_types",
     "fields:Setting._compared", lambda right, self: tuple(jax.tree.leaves(self.value, is_leaf=lambda x: x is None))),
    ("values compared in float64", "test_transform.py::test_a_round_trip_through_jit_changes_nothing_to_be_seen",
     "fields:in_default_dtype", lambda right, number, dtype=None: np.asarray(number)),
    ("tracers compared as numbers", "test_transform.py::test_comparing_tracers_does_not_crash",
     "fields:same", lambda right, a, b: bool(a == b)),
    ("dtypes by another name", "test_transform.py::test_structures_are_compared_with_their_types",
     "values:_to_dtype", lambda right, value: value),
    ("defaults pickled", "test_value.py::test_is_a_value[optax.contrib.adopt]", f"{VALUE}.__reduce__", with_defaults),
    ("names not qualified", "test_transform.py::test_names_are_the_shortest_that_tell_apart", "values:names_of",
     lambda right, value: {each.labels[-1]: each for each in value._walk()}),
    ("changes checked one by one", "test_schedules.py::test_changes_are_made_before_they_are_checked", f"{VALUE}._put",
     lambda right, self, changes: functools.reduce(lambda value, change: right(value, [change]), changes, self)),
    ("containers kept by reference",
     "test_value.py::test_numbers_and_arrays_changed_from_outside_change_no_value",
     "values:_copied", lambda right, label, value: value),
    ("booleans taken for numbers", "test_value.py::test_what_is_no_number_is_refused_in_the_call[True]",
     "annotations:_types_in", lambda right, annotation: [*right(annotation), bool]),
    ("no array has a shape", "test_value.py::test_a_default_may_have_a_shape", "annotations:read_parameter",
     lambda right, parameter: dataclasses.replace(right(parameter), arrays=False)),
    ("keys compared by nothing", "test_value.py::test_a_random_key_is_a_child[add_noise-rbg]", "fields:is_key",
     lambda right, value: False),
    ("annotations ignored", "test_value.py::test_a_function_of_ones_own", "annotations:read_parameter",
     lambda right, parameter: dataclasses.replace(right(parameter), floats=isinstance(parameter.default, float))),
    ("what was made of traced numbers kept", "test_value.py::test_a_number_on_the_device_leaves_no_tracer_behind",
     f"{CALL}.made", lambda right, self: vars(self).setdefault("_made", right(self))),
    ("made anew in each step", "test_value.py::test_the_function_is_called_once_for_the_same_constants",
     f"{CALL}.made", lambda right, self: right(but(self, _made=None))),
    ("numbers wider than the program's",
     "test_value.py::test_numbers_are_no_wider_than_the_program",
     "transform:Call._arguments_in", lambda right, self, dtype: self._given()),
    ("errors under the link's name", "test_value.py::test_refuses", f"{CALL}._named",
     lambda right, self: contextlib.nullcontext()),
    ("in use at the first level only", "test_transform.py::test_hyperparameters_in_use", f"{CALL}._counts",
     lambda right, self, state: iter(())),
    # Schedules.
    ("schedule one step ahead", "test_optimizers.py::test_schedules_match_the_oracle", "transform:Transform.at",
     lambda right, self, count: right(self, None if count is None else count + 1)),
    ("schedule not counted", "test_transform.py::test_an_outside_class_gets_every_view", "transform:optax",
     like(optax, safe_increment=lambda count: count)),
    # from jax 0.12 on what is folded rounds alike
    *[("numbers of a schedule folded", "test_schedules.py::test_same_bits_as_constants_arguments_and_lanes",
       "schedules:Schedule._made",
       lambda right, self, convert: right(self, lambda number: jnp.asarray(number, jnp.result_type(float))))
      ] * contracts_all(),
    ("numbers of a schedule unnamed", "test_schedules.py::test_names_and_replaces_like_hyperparameters",
     "schedules:Schedule._walk", lambda right, self, containers=False: iter(())),
    ("numbers of a schedule not checked", "test_schedules.py::test_refuses", "schedules:Schedule.validate",
     lambda right, self: None),
    ("slope of a power at zero", SLOPES, "schedules:_power",
     lambda right, base, exponent: base**exponent),
    ("no steps divided by", SLOPES, "schedules:_progress",
     lambda right, count, begin, steps: jnp.clip(count - jnp.maximum(begin, 0), 0, steps) / steps),
    # Few bits.
    ("compensation ignored", "links/test_rounding.py::test_compensated_follows_its_formula",
     "links.rounding:round_with_compensation.step",
     lambda right, self, shared, g, p, compensation, **rest: right(self, shared, g, p, 0 * compensation, **rest)),
    ("compensation with the wrong sign", "links/test_rounding.py::test_compensated_follows_its_formula",
     "links.rounding:round_with_compensation.step",
     then(lambda out: (out[0], -out[1]))),
    ("correction ignored", "links/test_rounding.py::test_corrected_does_not_stand_still", "links.rounding:_joined",
     lambda right, p, correction: p),
    ("correction to nearest", "links/test_rounding.py::test_corrected_does_not_stand_still",
     "links.rounding:rounded_at_random", lambda right, x, bits, width: right(x, 0 * bits + 2 ** (width - 1), width)),
    ("correction of zero with the wrong sign",
     "links/test_rounding.py::test_corrected_where_something_else_changes_it", "links.rounding:jnp",
     like(jnp, maximum=lambda x, least: x)),
    ("master rounded", "links/test_rounding.py::test_master_is_the_float32_run_rounded",
     "links.rounding:round_with_master.step",
     then(lambda out: (out[0], _to_bfloat16(out[1])))),
    ("left to the caller to round", "links/test_rounding.py::test_compensated_follows_its_formula",
     "links.rounding:_to_bfloat16", lambda right, x: x),
    ("rounding always down", "storage/test_formats.py::test_unbiased_with_the_variance_of_two_neighbours",
     "storage.formats:rounded_at_random", lambda right, x, bits, *width: right(x, 0 * bits, *width)),
    ("NaN rounded", "storage/test_formats.py::test_every_nan_stays_one", "storage.formats:rounded_at_random",
     lambda right, x, bits, width=16: jax.lax.bitcast_convert_type(
         (jax.lax.bitcast_convert_type(x, "uint32") + bits) & jnp.uint32(0xFFFF0000), "float32")),
    ("parameters and moments share random bits", "storage/test_dither.py::test_independent[first and third field]",
     "storage.dither:Dither.bits", lambda right, self, *args: right(self._replace(field=self.field % 2), *args)),
    ("both moments share random bits", "storage/test_dither.py::test_independent[first and other field]",
     "storage.dither:Dither.bits", lambda right, self, *args: right(self._replace(field=self.field // 2 * 2), *args)),
    ("leaves share random bits", "storage/test_dither.py::test_independent[first and next leaf]",
     "storage.dither:Dither.bits", lambda right, self, *args: right(self._replace(leaf=np.uint32(0)), *args)),
    ("steps share random bits", "storage/test_dither.py::test_independent[first and next step]",
     "storage.dither:Dither.bits", lambda right, self, *args: right(self._replace(step=np.uint32(0)), *args)),
    ("seeds and leaves added", "storage/test_dither.py::test_independent[next leaf and other seed]",
     "storage.dither:Dither.bits",
     lambda right, self, shape, seed: right(self._replace(leaf=self.leaf + np.uint32(seed)), shape, 0)),
    ("codes rounded evenly between themselves", "storage/test_blocks.py::test_unbiased_in_value",
     "storage.blocks:_FourthRoot8.codes", lambda right, self, x, scales, bits:
     jnp.sign(x) * jnp.floor(self.top * (abs(x) / scales) ** 0.25 + bits.astype(x.dtype) / 2**16)),
    ("a second moment of 0", "storage/test_blocks.py::test_a_positive_second_moment_stays_positive",
     "storage.blocks:_FourthRoot8.codes", lambda right, self, x, scales, bits:
     jnp.where(abs(x) < scales * float(self.top) ** -4, 0, right(self, x, scales, bits))),
    ("chance below the first code", "storage/test_blocks.py::test_below_the_first_code_nothing_is_left_to_chance",
     "storage.blocks:_FourthRoot8.codes", by_chance_below_the_first_code),
    ("a first moment rounded to nearest", "storage/test_blocks.py::test_unbiased_in_value",
     "storage.blocks:_FourthRoot8.codes", lambda right, self, x, scales, bits:
     right(self, x, scales, jnp.full_like(bits, 2**15) if self.signed else bits)),
    ("powers of two rounded to the nearest",
     "storage/test_four_bits.py::test_one_of_two_neighbours_without_bias[format1]",
     "storage.blocks:_rounded_exponent", lambda right, x, bits: right(x, jnp.full_like(bits, 2**15))),
    ("errors of 4 bits add up", "storage/test_four_bits.py::test_errors_do_not_add_up_in_the_parameters",
     "storage.stepping:_used", lambda right, format, exact, held, lasting: right(format, exact, held, None)),
    ("moments of nnx not reassembled", "test_integration.py::test_flax_nnx_optimizer_with_few_bits",
     "storage.blocks:reassembled", lambda right, tree, format: tree),
    ("explicit types within a block",
     "storage/test_blocks.py::test_sharded_like_the_parameter_with_the_same_bits[spec3-AxisType.Explicit]",
     "mesh:untyped", lambda right, function, mesh, out: function),
    ("types that differ in shard_map", "storage/test_blocks.py::test_inside_shard_map[adam-AxisType.Auto]",
     "mesh:varying_alike", lambda right, tree: tree),
    ("infinite scales", "storage/test_blocks.py::test_what_is_not_finite_makes_its_block_nan[inf-format1]",
     "storage.blocks:Blocks.encode_blocks", lambda right, self, x, largest, bits: dataclasses.replace(
         packed := right(self, x, largest, bits), scales=jnp.where(largest == jnp.inf, largest, packed.scales))),
    ("the larger scale of row and column",
     "storage/test_rows_and_columns.py::test_against_the_formula[shape0-axes0]", "storage.blocks:smallest",
     lambda right, scales: jnp.maximum(*scales) if isinstance(scales, tuple) else scales),
    ("small leaves in 8 bits", "storage/test_blocks.py::test_small_leaves_stay_float32", "storage.blocks:Blocks.fits",
     lambda right, self, shape: right(dataclasses.replace(self, minimum_size=1), shape)),
    ("blocks that are not whole", "storage/test_layouts.py::test_every_number_is_in_one_block_of_the_right_size",
     "storage.blocks:Layout.missing", Instead(0)),
    ("parts of blocks on devices", "storage/test_layouts.py::test_moments_are_split_between_blocks_only",
     "sharding.placement:_split", lambda right, shape, own, mesh, axis, units=(): right(shape, own, mesh, axis)),
    ("silence where nothing fits", "storage/test_layouts.py::test_nothing_in_few_bits_is_said_at_init",
     "leafwise:check_held", lambda right, tx, params, names, rows: None),
    ("the update reads what was not rounded", "storage/test_blocks.py::test_the_update_is_that_of_the_stored_moments",
     "storage.formats:with_slope_of", lambda right, x, value: x),
    ("slopes that codes have lost", "storage/test_slopes.py::test_what_the_codes_have_lost_is_refused[rate-grad]",
     "storage.blocks:_with_mark", lambda right, scales, x: scales),
    ("no slope of what is simulated",
     "storage/test_slopes.py::test_slopes_of_simulated_are_those_of_exact_moments_on_average",
     "storage.formats:Simulated.encode", lambda right, self, x, dither: right(self, jax.lax.stop_gradient(x), dither)),
    # What is around an optimizer.
    ("a frozen group keeps state",
     "test_grouping.py::test_the_state_is_as_large_as_without_groups_and_frozen_leaves_less", "grouping:_freeze",
     lambda right, *args: gdx.sgd(0.0, momentum=0.9)),
    ("the last pattern counts",
     "test_grouping.py::test_the_first_pattern_counts_and_paths_are_spelled_alike_everywhere", "grouping:assigned_to",
     lambda right, patterns, structure:
     tuple(max(len(patterns) - 1 - i, -1) % (len(patterns) + 1) for i in right(patterns[::-1], structure))),
    ("a path without what leads to it",
     "test_grouping.py::test_the_first_pattern_counts_and_paths_are_spelled_alike_everywhere", "grouping:leaf_paths",
     lambda right, tree: (path.rpartition("/")[2] for path in right(tree))),
    ("a multiple of a schedule that stands still",
     "test_grouping.py::test_each_group_has_the_bits_of_its_own_optimizer[a schedule-False]", "grouping:_multiplied",
     lambda right, value, factor: right(value(0) if callable(value) else value, factor)),
    ("a schedule of a group read at another's count", "test_grouping.py::test_schedules_are_read_where_they_are",
     "grouping:groups._counts", lambda right, self, state: ((path, 0 * count) for path, count in right(self, state))),
    ("what is skipped is in the averages", "test_guards.py::test_norms_are_judged_as_numpy_does", "guards:_judged",
     skipped_is_averaged),
    ("a skip moves the count of the steps", "test_guards.py::test_in_every_place[gdx.chain]",
     "guards:_judged", skip_is_counted),
    ("a skip moves the counts inside", "test_guards.py::test_in_every_place[gdx.chain]",
     "guards:skip_spikes._update", counts_move_on_a_skip),
    ("a skipped update of 0.0", "test_guards.py::test_a_skipped_step_changes_no_bit_of_a_parameter[True-float32]",
     "guards:jnp", like(jnp, zeros_like=lambda x: -jnp.zeros_like(x))),
    ("norm by squares as they are", "test_guards.py::test_norms_whose_squares_overflow_or_vanish[float32-1e+25]",
     "guards:norm", lambda right, tree, like: optax.tree.norm(tree).astype(like.dtype)),
    ("skips without end", "test_guards.py::test_it_gives_up_on_what_is_nan_for_good[False]", "guards:_judged",
     lambda right, tx, updates, value, state: right(tx, updates, value, state._replace(in_a_row=0 * state.in_a_row))),
    ("an average not corrected for its start",
     "test_averages.py::test_is_the_weighted_mean_of_what_the_parameters_were[0-1-0.999]", "averages:_moved",
     lambda right, state, params, decay, *rest: (moved := right(state, params, decay, *rest))._replace(
         weight=moved.weight if decay is None else jnp.minimum(moved.weight, 1 - decay))),
    ("weights of an average one step late",
     "test_averages.py::test_is_the_weighted_mean_of_what_the_parameters_were[0-1-0.5]", "averages:_moved",
     lambda right, state, *args: (moved := right(state, *args))._replace(
         weight=jnp.where(state.total > 0, state.weight, moved.weight))),
    ("an average without the newest parameters",
     "test_averages.py::test_is_the_weighted_mean_of_what_the_parameters_were[0-1-0.5]", "averages:_read",
     lambda right, weight, *args: right(jnp.where(weight < 1, 0, weight), *args)),
    ("a mean of all that loses what is rounded",
     "test_averages.py::test_stays_exact_over_a_million_steps[None-1e-07]", "averages:_link",
     lambda right, weight, decay, dtype: averaging(weight, dtype)),
    ("the ratio of norms upside down", "test_watching.py::test_the_numbers_are_those_of_the_run_in_float64[all]",
     "watching:_of_part", then(lambda row: (*row[:3], 1 / row[3], *row[4:]))),
    ("groups with each other's leaves", "test_watching.py::test_the_numbers_are_those_of_the_run_in_float64[group]",
     "watching:watch._parts",
     then(lambda parts: [(name, leaves) for (name, _), (_, leaves) in zip(parts, reversed(parts))])),
    ("measured in every step", "test_watching.py::test_the_numbers_are_those_of_the_run_in_float64[all]",
     "watching:either", lambda right, condition, this, other: this()),
    ("rates that are not those in use", "test_watching.py::test_the_numbers_are_those_of_the_run_in_float64[all]",
     "watching:watch._in_use", then(lambda in_use: {name: 0 * x for name, x in in_use.items()})),
    ("curves of the steps between", "test_watching.py::test_train_collects_the_curves_of_a_loop",
     "training:watch_state", then(lambda state: state._replace(count=state.watched.step))),
    ("the whole on each device", "test_describing.py::test_it_counts_what_devices_hold", "describing:_part",
     lambda right, shape, *args: (shape, right(shape, *args)[1])),
    ("silence about what is whole", "test_describing.py::test_it_says_what_stays_whole", "describing:_noted",
     lambda right, notes, path: ""),
    ("moments that are not told apart",
     "test_describing.py::test_moments_are_told_from_attributes_of_parameters", "describing:_moment",
     lambda right, path, node, own: next((key.name for key in reversed(path) if hasattr(key, "name")), "")),
    ("multiples shown as they are", "test_describing.py::test_groups_are_found_wherever_they_are[alone]",
     "describing:times", Instead(types.NoneType)),
    # Populations and training.
    ("another order of the grid", "test_population.py::test_a_grid_is_every_combination_in_order", "population:grid",
     lambda right, make, **settings: right(make, **dict(reversed(settings.items())))),
    ("programs not compared", "test_population.py::test_refuses[another kind]", "population:stack",
     lambda right, optimizers: jax.tree.map(lambda *values: np.stack(values), *optimizers)),
    ("labels of one member", "test_population.py::test_schedules_are_points_too", "population:labels",
     then(lambda labels: labels[:1] * len(labels))),
    ("members in another order", "test_training.py::test_a_sweep_trains_each_member[None]", "stages:_in_one",
     then(lambda trained: jax.tree.map(lambda x: x[::-1], trained))),
    ("copies counted as diverged",
     "test_training.py::test_progress_ends_with_the_last_step_and_leaves_out_copies", "progress:reporting",
     lambda right, step, progress, total, before=0, is_copy=False, lanes=0:
     right(step, progress, total, before, jnp.zeros_like(is_copy), lanes)),
    ("a state stored in another's place", "test_rematerialising.py::test_slopes_of_all_that_a_run_is_made_of",
     "rematerialising:_put", lambda right, stored, row, state: right(stored, row ^ 1, state)),
    ("states stored in equal distances", "test_rematerialising.py::test_no_plan_makes_fewer_steps",
     "rematerialising:split", lambda right, steps, states: steps - 1 if states == 1 else -(-steps // (states + 1))),
    ("what is taken exactly sampled again",
     "curvature/test_spectrum.py::test_a_trace_with_exact_directions_is_unbiased_and_has_less_error",
     "curvature.spectrum:apart", lambda right, vector, basis: vector),
    ("smallest eigenpairs for largest",
     "curvature/test_spectrum.py::test_the_largest_eigenpairs_are_those_of_the_dense_matrix",
     "curvature.spectrum:_pairs", lambda right, *args: right(*args[:5], tuple(-1 - i for i in args[5]), *args[6:])),
    ("several starts of which all are one",
     "curvature/test_spectrum.py::test_what_has_converged_has_close_and_repeated_eigenvalues_too[float32]",
     "curvature.spectrum:_pairs", lambda right, *args: right(*args[:7], 1, *args[8:])),
    ("a block of all that it is not",
     "curvature/test_spectrum.py::test_the_block_of_a_layer_is_that_of_the_dense_matrix",
     "curvature.operators:leaf_paths", lambda right, tree: list(right(tree))[::-1]),
    ("neighbours on both sides of the slope", "test_smoothness.py::test_is_the_formula_in_float64",
     "smoothness:jnp", like(jnp, split=lambda x, parts: jnp.split(x[::-1], parts))),
    ("every seed the same", "test_real_models.py::test_a_sweep_over_seeds_is_the_runs_alone[None]",
     "stages:_in_one", lambda right, plan, optimizers, keys, arrays:
     right(plan, optimizers, keys[jnp.zeros(len(keys), int)], arrays)),
    ("the better half dropped", "test_real_models.py::test_halving_drops_the_worse_half[None-None]", "stages:jnp",
     like(jnp, argsort=lambda x: jnp.argsort(-x))),
    ("a state of the model that stands still", "test_real_models.py::test_a_loss_with_state_keys_and_aux[False-False]",
     "training:_returned", lambda right, name, returned, model_state:
     (*(found := right(name, returned, model_state))[:1], *model_state, *([None] * (not model_state)), *found[2:])),
    ("evaluated with the state of the start", "test_real_models.py::test_a_loss_with_state_keys_and_aux[False-False]",
     "training:evaluation", lambda right, name, evaluate, parts:
     lambda params, variables: right(name, evaluate, parts)(params, jax.tree.map(jnp.zeros_like, variables))),
    ("what a module writes into itself lost",
     "test_real_models.py::test_a_module_of_flax_is_trained_as_it_trains_itself", "modules:Parts.rest_of",
     lambda right, self, model, rest: rest),
    ("nothing rematerialised", "test_training.py::test_rematerialisation_keeps_memory_for_thirty_steps",
     "training:rematerialised_scan", lambda right, step, carry, inputs, **kept: jax.lax.scan(step, carry, inputs)),
    ("state of before forgotten", "test_training.py::test_goes_on_from_a_state", "training:train",
     lambda right, *args, state=None, **rest: right(*args, **rest)),
    ("divergence of the end unseen", "test_training.py::test_a_member_whose_last_step_diverges_is_marked",
     "sweeping:Sweep.diverged", lambda right, self: ~jnp.isfinite(self.losses[:, -1])),
    ("what was skipped counted as diverged", "test_together.py::test_a_transformer_is_trained[in_equinox]",
     "sweeping:Sweep.diverged", lambda right, self: ~jnp.all(jnp.isfinite(self.losses), axis=1)),
    ("edge one rate too far", "test_training.py::test_the_range_test_finds_the_edge_of_a_bowl",
     "range_tests:range_test",
     then(lambda found: found._replace(edge=found.edge * (found.learning_rates[1] / found.learning_rates[0])))),
    # Noise and curvature.
    ("batches of one order", "noise/test_batches.py::test_an_epoch_has_every_example_once",
     "noise.batches:_permutations", lambda right, key, size, number: jnp.tile(right(key, size, 1), (number, 1))),
    ("padding counted", "noise/test_batches.py::test_padded_epochs_weigh_every_example_once",
     "noise.batches:padded_epochs",
     then(lambda batches: batches._replace(weights=jnp.ones_like(batches.weights)))),
    ("variance as with replacement", "noise/test_batches.py::test_variance_of_what_is_drawn",
     "noise.estimates:Noise.variance", lambda right, self, batch_size, examples=None: right(self, batch_size)),
    ("noise of the large batch", "noise/test_estimates.py::test_estimates_are_unbiased_with_replacement",
     "noise.estimates:estimate", lambda right, small, big, *, small_batch, big_batch:
     (noise := right(small, big, small_batch=small_batch, big_batch=big_batch))._replace(
         covariance_trace=noise.covariance_trace * (small_batch / big_batch))),
    ("one gradient too many", "noise/test_estimates.py::test_the_direct_definition", "noise.estimates:of_gradients",
     lambda right, gradients, batch_size=1: (noise := right(gradients, batch_size))._replace(
         covariance_trace=noise.covariance_trace * (1 - 1 / len(jax.tree.leaves(gradients)[0])))),
    ("noise not averaged from the first step", "noise/test_measuring.py::test_averages_are_those_of_the_formula",
     "noise.measuring:measure_noise.update_tree", not_averaged_from_the_start),
    ("filling counts like examples",
     "noise/test_measuring.py::test_filled_up_batches_have_the_gradient_of_their_examples",
     "noise.measuring:Batches", Instead(types.NoneType)),
    ("the rate of every batch size alike", "noise/test_critical.py::test_a_branch_is_the_run_with_that_batch_size",
     "noise.critical:_accumulated", lambda right, tx, number, steps:
     right(tx.replace(learning_rate=tx.hyperparams["learning_rate"] / number), number, steps)),
    ("the branch of half the examples goes on",
     "noise/test_critical.py::test_a_noisy_quadratic_has_the_critical_batch_size_of_its_exact_moments",
     "noise.critical:_accumulated", lambda right, tx, number, steps: right(tx, number, 1e6)),
    ("errors of branches too large", "noise/test_critical.py::test_what_lies_between_two_sizes_and_what_is_certain",
     "noise.critical:mean_and_error", lambda right, scores: (right(scores)[0], right(scores)[1] + 0.1)),
    ("best rate by the largest alone", "test_theory.py::test_the_best_rate_contracts_as_predicted",
     "curvature.rates:best_learning_rate", lambda right, smallest, largest, *args:
     right(smallest, largest, *args)._replace(learning_rate=jnp.asarray(2 / largest))),
    ("edge of momentum of gradient descent",
     "test_theory.py::test_divergence_exactly_beyond_the_edge[sgd with momentum]", "curvature.rates:stability_edge",
     lambda right, tx: jnp.asarray(2 / tx.learning_rate)),
    ("Hessian of one batch", "curvature/test_operators.py::test_hessian_products_are_those_of_the_dense_matrix",
     "curvature.operators:_Averaged.__call__", lambda right, self, vector:
     right(dataclasses.replace(self, batches=jax.tree.map(lambda x: x[:1], self.batches)), vector)),
    ("squares of eigenvalues", "curvature/test_spectrum.py::test_a_spectrum_in_another_unit_is_the_same",
     "curvature.krylov:near", lambda right, x: jnp.ones((), x.dtype)),
    ("a basis that is not orthogonal",
     "curvature/test_krylov.py::test_the_basis_is_orthonormal_and_has_the_operator_in_it[float32-repeated]",
     "curvature.krylov:apart", lambda right, vector, basis: vector),
    ("apart but once", "curvature/test_krylov.py::test_what_is_apart_is_orthogonal_however_little_it_is",
     "curvature.krylov:apart", lambda right, vector, basis: vector - (basis @ vector) @ basis),
    ("eigenvectors of NaN gone on from",
     "curvature/test_tracking.py::test_what_is_nan_once_is_seen_and_not_gone_on_from[None]",
     "curvature.tracking:jnp", like(jnp, where=lambda condition, this, other: this)),
    # Width.
    ("one rate at any width", "test_width.py::test_a_step_moves_outputs_as_far_at_any_width[adam]",
     "width:Leaf.changes", lambda right, self, like: {**right(self, like), "learning_rate": 1.0}),
    ("rate of SGD for Adam", "test_width.py::test_a_step_moves_outputs_as_far_at_any_width[adam]",
     "width:Leaf.changes", lambda right, self, like: right(self, "sgd")),
    ("a readout that starts like a hidden layer",
     "test_width.py::test_modules_of_equinox_whose_weights_are_the_other_way_round",
     "width:Leaf.start", lambda right, self: self.fan_in**-0.5),
    # Machines.
    ("split inside a block", "test_placement.py::test_codes_and_scales_agree", "sharding.placement:_split",
     lambda right, shape, own, mesh, axis, units=None: right(shape, own, mesh, axis)),
    ("updates left split", "test_sharding.py::test_where_it_was_born_it_stays[momentum-AxisType.Auto-8]",
     "sharding.placement:plan_of",
     then(lambda plan: plan._replace(params=plan.moments))),
    ("places not in the checksum", "checkpoint/test_checksums.py::test_sees_what_a_plain_sum_does_not",
     "checkpoint.checksums:_hashed", lambda right, word, salt: lowbias32(word ^ lowbias32(jnp.uint32(salt)))),
    ("fields not compared on restore",
     "checkpoint/test_checkpoints.py::test_another_optimizer_is_named_field_by_field[rate]",
     "checkpoint.manifest:check",
     lambda right, saved, tx, *rest: right({**saved, "fields": describe(tx)}, tx, *rest)),
)))
# fmt: on


# How one is put in its place.


def right_one(variant: Variant) -> tuple[Any, str, Any]:
    """What holds the right function, under which name, and the function (or property, or what a class keeps)."""
    module, _, names = variant.place.partition(":")
    *path, name = names.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(f"gdx.{module}"))
    return owner, name, inspect.getattr_static(owner, name)


def function_of(right: Any) -> Any:
    """The function itself, of a property or of what a class of calls keeps."""
    return right.fget if isinstance(right, property) else right[0] if isinstance(right, tuple) else right


def put(variant: Variant, setattr: Any = setattr) -> None:
    """Breaks gdx in this process."""
    owner, name, right = right_one(variant)
    if isinstance(variant.wrong, Instead):
        setattr(owner, name, variant.wrong.value)
        return
    function = function_of(right)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return variant.wrong(function, *args, **kwargs)

    new = property(wrong) if isinstance(right, property) else (wrong,) if isinstance(right, tuple) else wrong
    setattr(owner, name, new)
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "gdx"]:
        for other in [other for other, held in vars(module).items() if held is right]:
            setattr(module, other, new)


# A plugin of pytest, for the processes that this starts.


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--variant", default=None, help="break gdx as the variant of this name does")


def pytest_configure(config: Any) -> None:
    for variant in VARIANTS:
        if variant.what == config.getoption("--variant"):
            put(variant)


def run(tests: list[str], *options: str) -> str | None:
    """The first of these tests that fails; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", __spec__.name, "--tb=no", "-q"]
    outcome = subprocess.run(
        [*command, *options, *(f"tests/{test}" for test in tests)], cwd=ROOT, capture_output=True, text=True
    )
    if outcome.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(options)}: {outcome.stdout}{outcome.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", outcome.stdout, re.MULTILINE)
    return found[1] if found else None


def caught_by(variant: Variant) -> str | None:
    return run([variant.test], "--variant", variant.what)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the variants in whose name, test or place this is")
    parser.add_argument("--jobs", type=int, default=2, help="how many processes at a time")
    options = parser.parse_args()
    chosen = [variant for variant in VARIANTS if options.only in " ".join(variant[:3])]
    broken = run(sorted({variant.test for variant in chosen}))
    if broken:
        raise SystemExit(f"{broken} fails without any variant")
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for variant, test in zip(chosen, pool.map(caught_by, chosen)):
            survivors += test is None
            print(f"{variant.what:55} {test or 'SURVIVES'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
