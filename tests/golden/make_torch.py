"""Writes torch.npz: trajectories of torch's optimizers on fixed gradients.

Run by hand where torch is installed: `python tests/golden/make_torch.py`. All keys are strings:

  gradients            float64 (100, 7): row t - 1 is the gradient in step t, one kind per column:
                       normal, normal * 1e-3, alternating +-1, spiking to 1e6 every 17th step,
                       1e-9, zero, zero until step 50 and then normal. Every value is exact in
                       float32, and both dtypes are given the same gradients.
  start                float64 (7,): the parameters before the first step, exact in float32.
  steps                int64 (6,): the steps after which the parameters are stored.
  cases                JSON, a list of {"name", "optimizer", "arguments"}: a torch.optim class and
                       the keyword arguments that it was called with.
  <name>/<dtype>       <dtype> (6, 7): the parameters after each of `steps`, for <dtype> float32
                       and float64.
  torch                the version of torch.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS = [1, 2, 5, 10, 50, 100]

CASES: list[dict[str, Any]] = [
    {"name": "sgd", "optimizer": "SGD", "arguments": {"lr": 0.1}},
    {"name": "sgd_momentum", "optimizer": "SGD", "arguments": {"lr": 0.1, "momentum": 0.9}},
    {"name": "sgd_nesterov", "optimizer": "SGD", "arguments": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
    {"name": "adam", "optimizer": "Adam", "arguments": {"lr": 1e-3}},
    {"name": "adam_betas", "optimizer": "Adam", "arguments": {"lr": 0.1, "betas": [0.5, 0.9], "eps": 1e-3}},
    {"name": "adam_no_beta1", "optimizer": "Adam", "arguments": {"lr": 1e-3, "betas": [0.0, 0.99]}},
    {"name": "adam_no_betas", "optimizer": "Adam", "arguments": {"lr": 1e-3, "betas": [0.0, 0.0]}},
    {"name": "adamw", "optimizer": "AdamW", "arguments": {"lr": 1e-3, "weight_decay": 0.01}},
    {"name": "adamw_no_decay", "optimizer": "AdamW", "arguments": {"lr": 1e-3, "weight_decay": 0.0}},
    {"name": "adamw_strong_decay", "optimizer": "AdamW", "arguments": {"lr": 0.1, "weight_decay": 0.5}},
    {
        "name": "adamw_betas",
        "optimizer": "AdamW",
        "arguments": {"lr": 0.01, "betas": [0.8, 0.9999], "weight_decay": 0.1},
    },
]


def make_gradients() -> np.ndarray:
    """The gradients of 100 steps, one kind per column; exact in float32."""
    random, t = np.random.default_rng(0), np.arange(1, 101)
    normal = random.normal(size=(3, t.size))
    columns = [
        normal[0],
        1e-3 * normal[1],
        np.where(t % 2, 1.0, -1.0),
        np.where(t % 17, 1.0, 1e6),
        np.full(t.size, 1e-9),
        np.zeros(t.size),
        np.where(t < 50, 0.0, normal[2]),
    ]
    return np.stack(columns, axis=1).astype(np.float32).astype(np.float64)


def run(case: dict[str, Any], gradients: np.ndarray, start: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The parameters after each of STEPS, from torch's plain loop over tensors."""
    p = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = getattr(torch.optim, case["optimizer"])([p], foreach=False, **case["arguments"])
    kept = []
    for t, gradient in enumerate(gradients, start=1):
        p.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        if t in STEPS:
            kept.append(p.detach().numpy().copy())
    return np.stack(kept)


def main() -> None:
    """Writes torch.npz beside this file."""
    gradients = make_gradients()
    start = np.array([1.0, -0.5, 0.25, 100.0, 1e-3, -2.0, 0.0]).astype(np.float32).astype(np.float64)
    arrays = {
        f"{case['name']}/{name}": run(case, gradients, start, getattr(torch, name))
        for case in CASES
        for name in ("float32", "float64")
    }
    path = Path(__file__).with_name("torch.npz")
    np.savez_compressed(
        path,
        gradients=gradients,
        start=start,
        steps=np.array(STEPS),
        cases=json.dumps(CASES),
        torch=torch.__version__,
        **arrays,  # type: ignore[arg-type]
    )
    print(f"{path}: {len(arrays)} trajectories, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
