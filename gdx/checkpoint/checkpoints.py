"""The checkpoints of a run in a directory: saved while training goes on, restored with everything compared."""

import contextlib
import functools
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checkpoint import manifest
from gdx.checkpoint.checksums import checksum, plain
from gdx.checks import kind_of, nodes_of, state_kinds
from gdx.compat import wrap_key_data
from gdx.extra import needs
from gdx.fields import to_integer
from gdx.transform import Transform
from gdx.trees import is_array, path_text


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, foreign, or one of another optimizer or model."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: the number of steps taken.
      params: the parameters.
      state: the optimizer's state.
      extra: what was saved beside them.
    """

    step: int
    params: Any
    state: Any
    extra: Any


class RestoredParams(NamedTuple):
    """What a checkpoint holds of a model, and what not.

    Attributes:
      step: the number of steps taken.
      params: the parameters.
      extra: what was saved beside them.
      skipped: the paths of the parameters that are those passed, as patterns said.
      unread: the paths of the parameters of the checkpoint that were not read.
    """

    step: int
    params: Any
    extra: Any
    skipped: tuple[str, ...]
    unread: tuple[str, ...]


class Checkpoints:
    """The newest checkpoints of a run, in one directory, by their steps.

    A checkpoint gets its name when all of it is written: a process that is killed leaves the ones before. In a
    program of several processes each makes its own `Checkpoints` and calls the same methods in the same order;
    each writes the parts of the arrays that it holds.

    Leaving it as a context manager waits for what is being written, unless an error leaves it in one of several
    processes: the others might never come.

    Args:
      directory: where they are, a path of the file system, seen by all processes; made with the first one.
      keep: how many of the newest stay.

    Raises:
      TypeError: keep is no integer, or directory no path.
      ValueError: keep is less than 1, or directory empty, an address such as gs://bucket/run, or no path.
      MissingExtra: Orbax is not installed.

    >>> import gdx, jax.numpy as jnp, tempfile
    >>> tx, params = gdx.adam(0.1), {"w": jnp.ones(3)}
    >>> folder = tempfile.TemporaryDirectory()
    >>> with gdx.checkpoint.Checkpoints(folder.name, keep=1) as checkpoints:
    ...     for step in (100, 200):
    ...         checkpoints.save(step, tx, params, tx.init(params), extra={"epoch": step / 50})
    ...     checkpoints.wait()
    ...     checkpoints.steps, checkpoints.restore(tx, params, tx.init(params)).extra
    ([200], {'epoch': 4.0})
    >>> folder.cleanup()
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        self.keep = _integer("Checkpoints: keep", keep, 1)
        with needs("checkpoint"):
            import orbax.checkpoint  # noqa: F401 - missing now rather than at the first save
        is_path, path = isinstance(directory, str | os.PathLike), None
        # pathlib makes one slash of two, and a drive is one letter
        if is_path and not re.match(r"$|\w{2,}:/|.*\0", str(directory)):
            with contextlib.suppress(RuntimeError):  # ~ of nobody
                path = Path(directory).expanduser().absolute()
        if path is None:
            raise (ValueError if is_path else TypeError)(
                f"Checkpoints: directory is {str(directory) if is_path else directory!r}; expected a path of the file "
                f"system, such as 'run', or that under which a bucket is mounted"
            )
        self.directory = path
        self._is_closed = False

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints in the directory, oldest first, and the one that this object is writing."""
        # pathlib's raises where a name is too long
        if not os.path.exists(self.directory):
            return []
        # Orbax's list has the step that is being written, but not what others wrote, nor all after a failed write
        if not self._manager.is_saving_in_progress():
            self._manager.reload()
        return sorted(step for step in self._manager.all_steps() if not self._is_empty(step))

    def _is_empty(self, step: int) -> bool:
        """Whether there is a folder for a step with nothing in it, which Orbax takes for a checkpoint."""
        folder = self.directory / str(step)
        return folder.is_dir() and not any(folder.iterdir())

    def save(
        self, step: int, tx: optax.GradientTransformation, params: Any = ..., state: Any = ..., *, extra: Any = None
    ) -> None:
        """Starts to write a checkpoint, and returns as soon as the arrays may be donated.

        Args:
          step: the number of steps taken.
          tx: the optimizer, whose fields are saved too.
          params: the parameters.
          state: the optimizer's state, or what holds it, such as a pair of it and an average. What `tx.init(params)`
            makes must be in it, as its NamedTuples show, without arrays of shapes that are not there; where none is
            in it, as in flax's `nnx.state(optimizer)`, nothing is compared.
          extra: what else the run needs to go on, as JSON has it: numbers, texts, lists and dictionaries.

        Raises:
          CheckpointError: there is a checkpoint of this step or a later one, or it could not be written.
          TypeError: step is no integer, tx no optimizer, a leaf no array or traced, or extra is not JSON; params or
            state is missing, or in the place of the other; the state is that of another optimizer.
          ValueError: step is negative, two leaves have the same path, an array was donated, or `close` was called; the
            state is that of other parameters.
        """
        import orbax.checkpoint as ocp

        step = _integer("save: step", step, 0)
        _check_order("save(step, tx, params, state)", tx, params, state)
        _check_state(tx, params, state)
        if self._is_closed:
            raise ValueError(
                f"save: these Checkpoints of {self.directory} are closed, by close() or the end of their `with`; "
                f"save before that, or make new ones: Checkpoints({str(self.directory)!r})"
            )
        newest = max(self.steps, default=-1)
        if step <= newest:
            raise CheckpointError(
                f"save: the step is {step}, but {self.directory} has a checkpoint of step {newest}; "
                f"restore that one and go on from there, or give another directory"
            )
        for other in self._manager.all_steps():
            if other >= step:
                raise CheckpointError(
                    f"save: {self.directory / str(other)} is an empty folder with the name of a later checkpoint, "
                    f"beside which Orbax saves none; remove it"
                )
        arrays = {path: plain(f"save: {path}", x) for path, x in manifest.leaves(params, state).items()}
        # those on the host may change while they are written
        arrays = {path: x.copy() if isinstance(x, np.ndarray) else x for path, x in arrays.items()}
        content = manifest.manifest(step, tx, params, state, extra, {path: checksum(x) for path, x in arrays.items()})
        # Orbax takes no array without elements, and no tree without arrays
        data = _nested({path: _global(x) for path, x in arrays.items() if x.size}) or {"none": np.zeros(1)}
        items = ocp.args.Composite(arrays=ocp.args.PyTreeSave(data), manifest=ocp.args.JsonSave(content))
        with self._writing():
            self._manager.save(step, args=items)

    def restore(
        self,
        tx: optax.GradientTransformation,
        params: Any = ...,
        state: Any = ...,
        *,
        step: int | None = None,
        allow: Sequence[str] = (),
    ) -> Restored:
        """Reads a checkpoint, onto the devices where `params` and `state` are, after comparing all of it.

        Args:
          tx: the optimizer to go on with, compared with the saved one. Schedules that are functions are told apart
            by their values at 22 steps up to 5,000,000, other functions by their names. Of what is
            optax's only the transforms of gdx in it are compared, and the arrays.
          params: what the parameters are to be like: arrays, which stay as they are, or `jax.ShapeDtypeStruct`s with
            shardings, on a mesh of any size and shape.
          state: the same for the state: `tx.init(params)`, or of its shapes and shardings.
          step: which one; None for the newest.
          allow: the fields that may differ, by their names in `tx.hyperparams`; those of tx are gone on with.

        Raises:
          TypeError: step is no integer, tx no optimizer, or allow no sequence of names; params or state is missing, or
            in the place of the other.
          CheckpointError: there is none, it is not what was saved, it was saved with another optimizer, or it holds
            other arrays. To take it into another storage format, restore it with the optimizer that saved it, then
            use `gdx.storage.convert`; to take it into another model, `restore_params`.
        """
        allow = _sequence("restore: allow", allow, "names, such as ['learning_rate']")
        _check_order("restore(tx, params, state)", tx, params, state)
        step, content = self._read("restore", step)
        problem = manifest.check(content, tx, params, state, allow)
        if problem:
            raise CheckpointError(f"restore: {self._name(step)} {problem}")
        values = self._arrays("restore", step, content["arrays"], manifest.leaves(params, state))
        params, state = jax.tree.unflatten(jax.tree.structure((params, state)), values)
        return Restored(step, params, state, content["extra"])

    def restore_params(self, params: Any, *, step: int | None = None, skip: Sequence[str] = ()) -> RestoredParams:
        """Reads the parameters alone, or some of them, onto the devices where `params` are.

        Neither the optimizer nor its state is compared, nor needed. What is read has been compared and checked as in
        `restore`.

        Args:
          params: what the parameters are to be like, as for `restore`. What only the checkpoint has is not read.
          step: which one; None for the newest.
          skip: patterns, regular expressions that are searched in the paths of `params` (`head/kernel`, as for
            `gdx.groups`): where one matches, the array that is passed stays, such as that of a new head.

        Raises:
          TypeError: step is no integer, skip no sequence of patterns, or params holds something else than arrays.
          ValueError: two parameters have the same path; a pattern is no regular expression, or matches nothing; it
            matches what has no value, such as a `jax.ShapeDtypeStruct`; nothing is left to be read.
          CheckpointError: there is none, it is not what was saved, or it lacks a parameter in this shape and dtype.

        >>> import gdx, jax.numpy as jnp, tempfile
        >>> tx, params = gdx.adam(0.1), {"body": jnp.ones(3), "head": jnp.ones(10)}
        >>> folder = tempfile.TemporaryDirectory()
        >>> with gdx.checkpoint.Checkpoints(folder.name) as checkpoints:
        ...     checkpoints.save(1, tx, params, tx.init(params))
        ...     found = checkpoints.restore_params({"body": jnp.zeros(3), "head": jnp.zeros(2)}, skip=["^head"])
        >>> found.params["body"].tolist(), found.params["head"].tolist(), found.skipped, found.unread
        ([1.0, 1.0, 1.0], [0.0, 0.0], ('head',), ('head',))
        >>> folder.cleanup()
        """
        skip = _sequence("restore_params: skip", skip, "patterns, such as ['^head']")
        _check_params("restore_params: params", params)
        targets = manifest.leaves(params, None, "restore_params")
        skipped = dict.fromkeys(manifest.skipped(skip, manifest.of_params(targets)))
        step, content = self._read("restore_params", step)
        wanted = {path: x for path, x in targets.items() if path.partition("/")[2] not in skipped}
        problem = manifest.check_params(content, manifest.of_params(wanted), skip)
        if problem:
            raise CheckpointError(f"restore_params: {self._name(step)} {problem}")
        found = dict(zip(wanted, self._arrays("restore_params", step, content["arrays"], wanted)))
        params = jax.tree.unflatten(jax.tree.structure(params), [found.get(path, x) for path, x in targets.items()])
        unread = manifest.of_params({path: x for path, x in content["arrays"].items() if path not in wanted})
        return RestoredParams(step, params, content["extra"], tuple(skipped), tuple(unread))

    def wait(self) -> None:
        """Returns when all is written.

        Raises:
          CheckpointError: something went wrong on the way, such as a full disk.
        """
        self._wait("save")

    def _wait(self, method: str) -> None:
        if "_manager" in vars(self):
            with self._writing(method):
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self, method: str = "save") -> Iterator[None]:
        """One kind of error, whatever Orbax and the system call it."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{method}: a checkpoint in {self.directory} could not be written; the ones before are intact. "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """Waits, and ends the threads that write: after it, one can restore but not save. Again, it does nothing."""
        self._is_closed = True
        if "_manager" in vars(self):
            with self._writing():
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or jax.process_count() == 1:
            self.close()

    @functools.cached_property
    def _manager(self) -> Any:
        """Made when it is needed: it creates the directory."""
        import orbax.checkpoint as ocp

        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = "is no directory" if os.path.isfile(self.directory) else f"cannot be made ({_line(error)})"
            raise CheckpointError(f"{self.directory} {problem}; give Checkpoints one that can be written") from error
        policy = ocp.checkpoint_managers.LatestN(self.keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        return ocp.CheckpointManager(self.directory, options=options, item_names=("arrays", "manifest"))

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self.directory}"

    def _chosen(self, method: str, step: int | None) -> int:
        if os.path.isfile(self.directory):
            raise CheckpointError(f"{method}: {self.directory} is no directory; give Checkpoints that of a run")
        steps = self.steps
        if not steps:
            raise CheckpointError(f"{method}: there is no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise CheckpointError(
                f"{method}: {self.directory} has no checkpoint of step {step}; choose from {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step

    def _damaged(self, method: str, step: int, what: str) -> CheckpointError:
        others = [str(other) for other in self.steps if other != step]
        mend = f". Take another one: pass step={' or '.join(others)}" if others else ""
        return CheckpointError(f"{method}: {self._name(step)} is damaged, or not one of gdx: {what}{mend}")

    def _read(self, method: str, step: int | None) -> tuple[int, dict[str, Any]]:
        """The step of a checkpoint, and its manifest."""
        step = None if step is None else _integer(f"{method}: step", step, 0)
        self._wait(method)
        step = self._chosen(method, step)
        return step, self._manifest(method, step)

    def _manifest(self, method: str, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        try:
            found = self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))
            content = found["manifest"]
            version, intact = content["format"], content["digest"] == manifest.digest(content)
        except Exception as error:
            raise self._damaged(method, step, f"its manifest cannot be read ({_line(error)})") from error
        if version != manifest.FORMAT:
            raise CheckpointError(
                f"{method}: {self._name(step)} has format {version!r}; this version of gdx reads {manifest.FORMAT}"
            )
        if not intact or content["step"] != step:
            raise self._damaged(method, step, "its manifest is not what was saved with it")
        return content

    def _arrays(self, method: str, step: int, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> list[Any]:
        """The arrays at the targets' paths, placed as they are."""
        import orbax.checkpoint as ocp

        wanted = dict[str, Any]()
        for path, target in targets.items():
            sharding = _sharding(target)
            if not np.size(target):
                continue
            if sharding is None or manifest.is_key(target) or _is_local(sharding):
                wanted[path] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                wanted[path] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=target.shape)
        tree = _nested(wanted)
        try:
            args = ocp.args.PyTreeRestore(jax.tree.map(lambda _: 0, tree), restore_args=tree, partial_restore=True)
            found = self._manager.restore(step, args=ocp.args.Composite(arrays=args))["arrays"] if wanted else {}
            read = {path: functools.reduce(operator.getitem, path.split("/"), found) for path in wanted}
        except Exception as error:
            raise self._damaged(method, step, f"its arrays cannot be read ({_line(error)})") from error
        for path, x in read.items():
            if checksum(x) != saved[path][2]:
                raise self._damaged(method, step, f"{path} is not what was saved")
        return [_placed(read.get(path), target) for path, target in targets.items()]


def _integer(label: str, value: Any, minimum: int) -> int:
    """A whole number of any kind, also in an array."""
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            value = operator.index(value)
    return to_integer(label, value, minimum=minimum)


def _sequence(label: str, value: Any, what: str) -> tuple[Any, ...]:
    """A sequence of texts, which is no text itself."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{label} is {value!r}; expected a sequence of {what}")
    return tuple(value)


def _check_params(label: str, params: Any) -> None:
    """Raises unless it is a tree of arrays, or of their shapes."""
    found = jax.tree_util.tree_leaves_with_path(params)
    # a lone number is more likely a step
    strange = [(path, x) for path, x in found if not is_array(x) or (not path and not hasattr(x, "shape"))]
    if strange or not found or isinstance(params, Transform):
        path, x = strange[0] if strange else ((), params)
        raise TypeError(
            f"{label} is {reprlib.repr(x)} at {path_text(path)}; expected a tree of arrays or jax.ShapeDtypeStructs "
            f"like the saved parameters: of modules, nnx.state(model) or eqx.filter(model, eqx.is_array)"
        )


def _check_order(call: str, tx: Any, params: Any, state: Any) -> None:
    """Raises where an argument is missing or stands in the place of another."""
    problem, bundles = "", "; of a TrainState they are its tx, params and opt_state, of flax's nnx the optimizer's tx, "
    bundles += "nnx.state(model) and nnx.state(optimizer)"
    # a dictionary has an `update` too
    if isinstance(tx, type) or not all(callable(getattr(tx, name, None)) for name in ("init", "update")):
        problem = f"tx is {reprlib.repr(tx)}; expected an optimizer, such as gdx.adam(0.1)"
    elif params is ... or params is None or state is ...:
        problem = f"{'params' if params is ... or params is None else 'state'} is missing"
    elif _is_state(tx, params, state) and not _is_state(tx, state, params):
        problem, bundles = "params is what tx.init makes of state: they are in each other's place", ""
    if problem:
        raise TypeError(f"{call.partition('(')[0]}: {problem}. The order of the arguments is {call}{bundles}")


def _check_state(tx: Any, params: Any, state: Any) -> None:
    """Raises where the state cannot be, nor hold, one that the optimizer has for these parameters."""
    # parameters may be NamedTuples themselves, and only some of them the optimizer's
    others = {optax.MaskedNode, *state_kinds(params)}

    def kinds(tree: Any) -> list[type]:
        return [kind for kind in state_kinds(tree) if kind not in others]

    made = _made(tx, params) if jax.tree.leaves(params) else None  # they may be in the state
    own, arrays = kinds(made), {path: np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(made)}
    found = [node for node in (nodes_of(state) if arrays else [state]) if kinds(node) == own]
    if (arrays and not jax.tree.leaves(state)) or (own and kinds(state) and not found):
        raise TypeError(
            f"save: state is {kind_of(state)}, and holds none of {type(tx).__name__}, {kind_of(made)}; expected what "
            f"tx.init(params) or the last update returned, or that with something beside it in a dictionary"
        )

    def strange(node: Any) -> list[str]:
        # a batch of states has many counts
        leaves = jax.tree_util.tree_leaves_with_path(node) if own and arrays else []
        at = [(path, np.shape(x)) for path, x in leaves if arrays.get(path) != ()]
        return [f"{shape} at {path_text(path)}" for path, shape in at if shape not in arrays.values()]

    unlike = [strange(node) for node in found]
    if unlike and all(unlike):
        raise ValueError(
            f"save: state has the shape {unlike[-1][0]}, which tx.init(params) makes nowhere; expected the state of "
            f"these parameters"
        )


def _is_state(tx: Any, tree: Any, params: Any) -> bool:
    """Whether a tree has the structure of the optimizer's state for these parameters."""
    made, structure = _made(tx, params), cast(Any, jax.tree.structure(tree))
    return made is not None and bool(structure == jax.tree.structure(made))


def _made(tx: Any, params: Any) -> Any:
    """The optimizer's state for these parameters, in shapes; None where they are none."""
    try:
        return jax.eval_shape(tx.init, params)
    except Exception:
        return None


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dictionaries, with a folder for each slash in the paths."""
    tree = dict[str, Any]()
    for path, x in leaves.items():
        *folders, name = path.split("/")
        folder = tree
        for inner in folders:
            folder = folder.setdefault(inner, {})
        folder[name] = x
    return tree


def _sharding(target: Any) -> Any:
    """Where an array is to be; None where JAX may choose, and for arrays of numpy."""
    if isinstance(target, jax.Array) and not target.committed:
        return None
    return getattr(target, "sharding", None)


def _is_local(sharding: Any) -> bool:
    """Whether it is of one process among several: Orbax knows only those of all."""
    return jax.process_count() > 1 and sharding.is_fully_addressable


def _global(x: Any) -> Any:
    """An array as Orbax takes it: what each process has for itself, and is the same in all, the first one writes."""
    return np.array(x) if isinstance(x, jax.Array) and _is_local(x.sharding) else x


def _placed(value: Any, target: Any) -> Any:
    """A restored array, or None for one without elements, of the kind and in the place of the target."""
    if value is None:
        value = np.zeros(np.shape(target), getattr(target, "dtype", None))
    if manifest.is_key(target):
        value = wrap_key_data(value, target.dtype)
    if isinstance(value, jax.Array) and not manifest.is_key(target):
        return value
    sharding = _sharding(target)
    if sharding is not None:
        return jax.device_put(value, sharding)
    # uncommitted, as it was: it may still be used together with arrays of any mesh
    return jnp.asarray(value) if isinstance(target, jax.Array | jax.ShapeDtypeStruct) else value


def _line(error: Exception) -> str:
    """An error's first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
