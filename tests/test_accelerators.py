"""What the compilers for a TPU and an H100 make of a step, without either: where those are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from benchmarks.devices import OPTIONS, abstract_state, compiled_step, devices, nbytes_moved
from gdx.storage import FourthRoot8, SignedFourthRoot8


def eight_bits(block):
    return {"mu_dtype": SignedFourthRoot8(block=block), "nu_dtype": FourthRoot8(block=block)}


def step_on(kind, shapes, around=lambda tx: tx, **formats):
    """AdamW's step of float32 parameters, compiled for a device of this kind."""
    try:
        mesh = Mesh(np.array(devices(kind)), ("data",))
    except Exception as error:
        pytest.skip(f"{kind} cannot be compiled for: {error}")
    tx = around(gdx.adamw(1e-3, **formats))
    params = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P())) for shape in shapes]
    return compiled_step(tx, params, abstract_state(tx, params, mesh), OPTIONS[kind])


@pytest.mark.parametrize("shape", [(8192, 4096), (2048, 8192), (4096, 2048)], ids=str)
@pytest.mark.parametrize(("kind", "block"), [("tpu", None), ("h100", None), ("h100", 256)])
def test_codes_are_made_in_the_kernel_that_reads_the_moments(kind, block, shape):
    """So that a step moves 22 bytes per parameter."""
    step, size = step_on(kind, [shape], **eight_bits(block)), np.prod(shape)
    assert nbytes_moved(step) < 22.5 * size
    assert step.memory_analysis().temp_size_in_bytes < 0.2 * size


@pytest.mark.parametrize("kind", ["tpu", "h100"])
def test_a_step_in_float32_reads_and_writes_each_number_once(kind):
    assert nbytes_moved(step_on(kind, [(8192, 4096)])) < 28.1 * 8192 * 4096


@pytest.mark.parametrize("formats", [{}, {"mu_dtype": "bfloat16"}, eight_bits(256)], ids=["float32", "mixed", "8 bits"])
def test_moments_on_the_host_are_fetched_for_one_leaf_at_a_time(formats):
    memory = step_on("h100", [(2048, 2048)] * 12, gdx.sharding.offload_state, **formats).memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * memory.host_argument_size_in_bytes / 12
