"""Says where a GPU or TPU of this machine stays unused: without its plugin, or with one of another version."""

import os
from pathlib import Path

import jax


def unused(devices: Path = Path("/dev")) -> str:
    """What to do where JAX computes on the CPU beside a GPU or TPU, and nobody said that it should; otherwise "".

    Args:
      devices: the folder of the system's device files.
    """
    if jax.config.jax_platforms == "cpu" or jax.default_backend() != "cpu":
        return ""
    if any(devices.glob("nvidia[0-9]*")):
        name, extra = "GPU", "cuda12"
    elif any(devices.glob("accel[0-9]*")) or "TPU_ACCELERATOR_TYPE" in os.environ:
        name, extra = "TPU", "tpu"
    else:
        return ""
    return (
        f"This machine has a {name}, but jax {jax.__version__} computes on the CPU: its plugin is missing, or of "
        f'another version. Run this, then restart the runtime:\n%pip install "jax[{extra}]=={jax.__version__}"'
    )
