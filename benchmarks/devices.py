"""Compiling for accelerators that are not there, and what a compiled step holds, moves and sends.

`tpu` needs `libtpu`, `h100` the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt`.
"""

import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

import gdx
from benchmarks.step import train_step

# no accelerator is looked for, here or by libtpu
jax.config.update("jax_platforms", "cpu")
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 } runtime_version { major: 12 minor: 6 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# how each device is to be compiled for
OPTIONS: dict[str, dict[str, Any] | None] = {"tpu": {"xla_msa_enable": False}, "h100": None, "cpu": None}


@functools.cache
def devices(kind: str, count: int = 1) -> tuple[Any, ...]:
    """Devices of this kind, "cpu", "tpu" (v5e) or "h100", which need not be there.

    Raises:
      Exception: of many types: what it needs is not installed.
    """
    if kind == "cpu":
        return tuple(jax.devices("cpu")[:count])
    from jax.experimental import topologies

    if kind == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2" if count <= 4 else "v5e:2x4")
    else:
        import jax_plugins.xla_cuda12  # type: ignore[import-not-found]  # noqa: F401

        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100, topology=f"1x1x{count}"
        )
    return tuple(found.devices[:count])


def available(kinds: list[str], count: int = 1) -> Iterator[str]:
    """Those of the kinds that can be compiled for; says why the others cannot."""
    for kind in kinds:
        try:
            devices(kind, count)
        except Exception as error:
            print(f"{kind} cannot be compiled for: {str(error).splitlines()[0]}")
        else:
            yield kind


def abstract_state(tx: Any, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """The optimizer's state for these abstract parameters, abstract too, where it lies on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        gdx.sharding.state_shardings(tx, params, mesh),
    )


def compiled_step(tx: Any, params: Any, state: Any, options: dict[str, Any] | None = None) -> Any:
    """The optimizer's step, compiled; arrays may be abstract."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        return train_step(tx, params, state, grads)

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile(options)


_BYTES = {"s4": 0.5, "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def nbytes_moved(compiled: Any) -> float:
    """What a compiled program reads and writes on each device."""
    cost = compiled.cost_analysis()
    return cost["bytes accessed"] if cost else _bytes_in(compiled.as_text())


def _bytes_in(text: str) -> int:
    """What the kernels of a compiled program read and write, from its text: each operand and result once."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0].splitlines()[1:]
    sizes, total = {}, 0
    for line in entry:
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", line)
        if found is None:
            continue
        name, shapes, operation, operands = found.groups()
        sizes[name] = _size_of(shapes)
        if operation not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast"):
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
    return total


def nbytes_over_link(compiled: Any) -> tuple[int, int]:
    """What a compiled program fetches from the host's memory and sends there, each reading of an array counted."""
    text, fetched, sent = compiled.as_text(), 0, 0
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    on_host: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, shapes, operation, operands in re.findall(
        r"%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|\n)", entry
    ):
        sizes[name] = _size_of(shapes)
        # all that copies start with has a tuple's type, and what it is of is the operand
        if "S(5)" in shapes and not shapes.startswith("("):
            on_host[name] = sizes[name]
        if operation in ("parameter", "tuple", "get-tuple-element", "bitcast", "copy-done", "opt-barrier"):
            continue
        taken = re.findall(r"%([\w.\-]+)", operands)
        fetched += sum(on_host.get(operand, 0) for operand in taken)
        if "S(5)" in shapes and not any(operand in on_host for operand in taken):
            sent += sum(sizes.get(operand, 0) for operand in taken)
    return fetched, sent


def _size_of(shapes: str) -> int:
    return sum(
        math.ceil(_BYTES[dtype] * math.prod(map(int, filter(None, shape.split(",")))))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def collectives(compiled: Any, least: int = 1024) -> dict[str, int]:
    """Bytes that go into or come out of each kind of collective operation on each device, whichever is more.

    An all-reduce of which each device keeps a part counts as "reduce-scatter": TPUs fuse it into one,
    CPUs send the whole.

    Args:
      compiled: the program.
      least: operations on fewer bytes are left out.
    """
    text = compiled.as_text()
    sizes = {name: _size_of(shapes) for name, shapes in re.findall(r"%([\w.\-]+) = (\(.*?\)|\S+) [\w\-]+\(", text)}
    found: dict[str, int] = {}
    seen = set()
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        is_scatter = computation.startswith("%all-reduce-scatter")
        for shapes, operation, start, operands, channel in re.findall(_COLLECTIVE, computation):
            # TPUs spread one gather over several fusions, which have its channel
            is_part = operation == "all-gather" and channel in seen
            taken = sum(sizes.get(name, 0) for name in re.findall(r"%([\w.\-]+)", operands))
            # what starts an operation has its operands too among its results, but for an all-reduce
            given = _size_of(shapes) - (taken if start and operation != "all-reduce" else 0)
            if max(taken, given) >= least and not is_part:
                kind = "reduce-scatter" if is_scatter else operation
                found[kind] = found.get(kind, 0) + max(taken, given)
            seen.add(channel)
    return found


_COLLECTIVE = (
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\((.*?)\),"
    r".*?channel_id=(\d+)"
)
