"""State over a mesh: what each device holds, moves and sends, as compiled, and on paper for larger models.

Run `python -m benchmarks sharding`, or only some of its parts: `compiled host time paper`. It forces 8
host devices, and compiles for 8 accelerators that are not there (see `benchmarks.devices`). The
formulas of the part `paper` are those that the part `compiled` puts beside the compilers' figures.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import gdx
from benchmarks.devices import (
    OPTIONS,
    abstract_state,
    available,
    collectives,
    compiled_step,
    devices,
    nbytes_moved,
    nbytes_over_link,
)
from benchmarks.measure import came_out, interleaved, ratio, table
from benchmarks.storage import OPTIMIZERS
from gdx.compat import to_varying

jax.config.update("jax_num_cpu_devices", 8)

P = PartitionSpec
STATES = {name: OPTIMIZERS[name][0] for name in ("f32", "bf16 state", "8-bit state")}
# bytes of state for each parameter: two moments; in 8 bits, each with a float32 scale for 256 of them
BYTES = {"f32": 8.0, "bf16 state": 4.0, "8-bit state": 2 + 2 * 4 / 256}
KINDS = ["cpu", "tpu", "h100"]


class Costs(NamedTuple):
    """What a training step of data-parallel devices costs each of them, in bytes; parameters and gradients in float32.

    Attributes:
      params: held of parameters and gradients.
      state: held of the optimizer's state.
      sent: of gradients, reduced and scattered, and the same again of updates, gathered.
      moved: read and written by the optimizer's step, the gradient's apart.
    """

    params: float
    state: float
    sent: float
    moved: float


def costs(count: float, data: int, model: int, state: float) -> Costs:
    r"""On paper: $P$ parameters on $D \times M$ devices, with $s$ bytes of state each.

    Parameters and gradients take $8 P / M$, the state $s P / D M$. Of $4 P / M$ gradients a device sends, or receives,
    all but its own part, as of the updates: $2 \cdot 4 P / M \cdot (D - 1) / D$. Its part of the step reads the
    state, parameters and gradients and writes the state and updates, $(2 s + 12) P / D M$; the gather reads
    a part and writes all, and adding reads updates and parameters and writes these: $4 P / D M + 16 P / M$. (Where
    $D = 1$ nothing is gathered, and the new parameters are written instead of the updates.)
    """
    whole, part = count / model, count / (data * model)
    gathered = 4 * part + 16 * whole if data > 1 else 0
    return Costs(8 * whole, state * part, 8 * (whole - part), (2 * state + 12) * part + gathered)


def shapes(layers: int, width: int) -> list[dict[str, tuple[int, ...]]]:
    """The matrices of a network of residual blocks."""
    return [{"up": (width, 4 * width), "down": (4 * width, width)}] * layers


# how they are split over a model axis
SPECS = {"up": P(None, "model"), "down": P("model")}


def loss(params: Any, x: jax.Array) -> jax.Array:
    """Of residual blocks, on a batch that is split over the data axis."""
    for block in params:
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    return jnp.mean(x**2)


class Setting(NamedTuple):
    """A sharded optimizer with its abstract arguments on a mesh."""

    tx: Any
    params: Any
    state: Any
    batch: Any


def setting(tx: Any, mesh: Mesh, layers: int, width: int, batch: int) -> Setting:
    """The network of `shapes` on a mesh with the axes data and model."""
    specs = [SPECS] * layers
    params = jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)),
        shapes(layers, width),
        specs,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    state = abstract_state(tx, params, mesh)
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return Setting(gdx.sharding.shard_state(tx, mesh, specs=specs), params, state, x)


def training_step(tx: Any) -> Callable[..., Any]:
    """As anyone writes it: the sharded optimizer in it is all there is to sharding."""

    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def scattered_step(tx: Any, mesh: Mesh) -> Callable[..., Any]:
    """The same with gradients that are reduced and scattered explicitly, each on the dimension of its moments."""

    def scattered_gradient(params: Any, x: Any) -> Any:
        own = to_varying(params, {"data"})  # else the gradient is summed over the whole
        gradients = jax.grad(loss)(own, x)
        return jax.tree.map(lambda g: jax.lax.psum_scatter(g, "data", tiled=True) / mesh.shape["data"], gradients)

    gradient = jax.shard_map(scattered_gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))

    def step(params: Any, state: Any, x: Any) -> Any:
        updates, state = tx.update(gradient(params, x), state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure_compiled(kinds: list[str]) -> None:
    """Prints the first table."""
    layers, width, batch = 4, 512, 1024
    count = sum(math.prod(shape) for block in shapes(layers, width) for shape in block.values())
    rows = []
    for kind in available(kinds, 8):
        for (data, model), (name, tx) in ((grid, item) for grid in ((8, 1), (4, 2), (1, 8)) for item in STATES.items()):
            if model > 1 and name != "f32":
                continue
            mesh = Mesh(np.array(devices(kind, 8)).reshape(data, model), ("data", "model"))
            sharded, params, state, x = setting(tx, mesh, layers, width, batch)
            paper = costs(count, data, model, BYTES[name])
            step = compiled_step(sharded, params, state, OPTIONS[kind])
            memory = step.memory_analysis()
            held = memory.argument_size_in_bytes - paper.params
            whole = jax.jit(training_step(sharded), donate_argnums=(0, 1)).lower(params, state, x)
            sent = collectives(whole.compile(OPTIONS[kind]), 4 * count // 100)
            rows.append(
                (
                    f"{kind} {data}x{model} {name}",
                    *(f"{size / count:.3f}" for size in (held, paper.state)),
                    *(
                        (f"{nbytes_moved(step) / count:.1f}", f"{paper.moved / count:.1f}")
                        if kind == "tpu"
                        else ("", "")
                    ),
                    f"{memory.temp_size_in_bytes / count:.2f}",
                    " ".join(f"{operation} {size / count:.2f}" for operation, size in sorted(sent.items())),
                )
            )
    print("Bytes per parameter on each of 8 devices, as compiled and on paper; what the training step sends\n")
    header = ["devices, state", "state", "paper", "moved", "paper", "temporary", "collective operations"]
    print(table(header, rows), "\n")
    moved = {row[0]: float(row[3]) for row in rows if row[3]}
    if moved:
        print(came_out("bytes moved per parameter", 24, moved), "\n")


def measure_time(rounds: int) -> None:
    """Prints the second table."""
    layers, width, batch = 4, 512, 1024
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((batch, width), np.float32), NamedSharding(mesh, P("data")))
    tx = gdx.adamw(1e-3)
    sharded = gdx.sharding.shard_state(tx, mesh)

    def start(chosen: Any, make: Callable[..., Any]) -> Callable[[], None]:
        params = [
            {
                name: jax.device_put(random.standard_normal(s, np.float32) / width, everywhere)
                for name, s in block.items()
            }
            for block in shapes(layers, width)
        ]
        state = chosen.init(params)
        step = jax.jit(make, donate_argnums=(0, 1)).lower(params, state, x).compile()
        carry = (params, state)
        sent[len(sent)] = collectives(step)

        def run() -> None:
            nonlocal carry
            carry = step(*carry, x)
            jax.block_until_ready(carry)

        return run

    sent: dict[int, dict[str, int]] = {}
    runs = {
        "state on every device": start(tx, training_step(tx)),
        "shard_state": start(sharded, training_step(sharded)),
        "shard_state, psum_scatter": start(sharded, scattered_step(sharded, mesh)),
    }
    count = sum(math.prod(shape) for block in shapes(layers, width) for shape in block.values())
    seconds = interleaved(runs, rounds)
    rows = [
        (
            name,
            ratio(seconds, name, "state on every device"),
            " ".join(f"{operation} {size / count:.2f}" for operation, size in sorted(operations.items())),
        )
        for name, operations in zip(runs, sent.values())
    ]
    print("Time of a training step on 8 devices of one CPU, as a ratio, and the bytes per parameter that it sends\n")
    print(table(["training step", "time", "collective operations"], rows), "\n")


def measure_host(kinds: list[str]) -> None:
    """Prints the table of state in the host's memory."""
    leaves, width = 12, 2048
    count = leaves * width**2
    rows, refused, at_once = [], list[str](), {}
    for kind in available(kinds):
        mesh = Mesh(np.array(devices(kind)), ("data",))
        params = {
            f"{i:02}": jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=NamedSharding(mesh, P()))
            for i in range(leaves)
        }
        for (name, tx), place in itertools.product(STATES.items(), ("device", "host")):
            placed = gdx.sharding.offload_state(tx) if place == "host" else tx
            state = abstract_state(placed, params, mesh)
            try:
                step = compiled_step(placed, params, state, OPTIONS[kind])
            except jax.errors.JaxRuntimeError as error:
                rows.append((f"{kind} {name}, {place}", *[""] * 5))
                refused.append(f"{kind} {name}, {place}: {str(error).splitlines()[0]}")
                continue
            memory = step.memory_analysis()
            temporary = memory.temp_size_in_bytes
            sizes = memory.argument_size_in_bytes, temporary, memory.host_argument_size_in_bytes
            link = nbytes_over_link(step)
            rows.append((f"{kind} {name}, {place}", *(f"{size / count:.3f}" for size in (*sizes, *link))))
            if place == "host":
                at_once[f"{kind} {name}"] = temporary * leaves / memory.host_argument_size_in_bytes
    print(f"AdamW's step on {leaves} leaves of {width}x{width}: bytes per parameter; parameters and gradients take 8\n")
    print(table(["state", "on the device", "temporary", "on the host", "fetched", "sent back"], rows), "\n")
    print(*(f"Not compiled: {line}" for line in refused), sep="\n")
    print(came_out("leaves whose moments are on the device at a time", 1.1, at_once), "\n")


def show_paper() -> None:
    """Prints the third and fourth tables."""
    held, traffic = [], []
    for size, count, model in (("1B", 1e9, 1), ("70B", 70e9, 8), ("1T", 1e12, 64)):
        for devices_count in (8, 256, 8192):
            across = min(model, devices_count)
            data = devices_count // across
            found = {name: costs(count, data, across, state) for name, state in BYTES.items()}
            first = found["f32"]
            label = f"{size}, {devices_count:,} = {data} x {across}"
            held.append(
                (label, _size(first.params), _size(8 * count / across), *(_size(c.state) for c in found.values()))
            )
            traffic.append((label, _size(first.sent), *(_size(c.moved) for c in found.values())))
    names = list(BYTES)
    print("Held by each device: parameters and gradients; the f32 state without shard_state; the state with it\n")
    print(table(["parameters, devices = data x model", "params, grads", "without", *names], held), "\n")
    print("Sent by each device in a training step, and read and written by the optimizer\n")
    print(table(["parameters, devices = data x model", "sent", *names], traffic))
    _check_paper()


def _check_paper() -> None:
    """The layout of a model of a trillion parameters on 8,192 devices, leaf by leaf, against the formula."""
    layers, width, mesh = 300, 20480, AbstractMesh((128, 64), ("data", "model"))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes(layers, width),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    print(f"\n{count / 1e12:.3f}T parameters in {2 * layers} matrices on 128 x 64 devices, gdx.describe:\n")
    for name, tx in STATES.items():
        found = gdx.describe(tx, params, mesh, specs=[SPECS] * layers)
        paper = costs(count, 128, 64, BYTES[name]).state
        print(
            f"{name:12} {_size(found.nbytes_per_device)} on each device, {_size(paper)} on paper, "
            f"{found.nbytes_replicated} bytes not split along data"
        )


def _size(nbytes: float) -> str:
    """Bytes with three digits and a unit."""
    exponent = min(int(math.log10(max(nbytes, 1)) / 3), 4)
    return f"{nbytes / 1000**exponent:.3g} {['B', 'kB', 'MB', 'GB', 'TB'][exponent]}"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["compiled", "host", "time", "paper"]
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(parts)}; all by default")
    parser.add_argument(
        "--devices", nargs="+", default=KINDS, choices=KINDS, help="what the parts compiled and host compile for"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    args = parser.parse_args()
    chosen = args.parts or parts
    if not set(chosen) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}")
    if "compiled" in chosen:
        measure_compiled(args.devices)
    if "host" in chosen:
        measure_host([kind for kind in args.devices if kind != "cpu"])
    if "time" in chosen:
        measure_time(args.rounds)
    if "paper" in chosen:
        show_paper()
