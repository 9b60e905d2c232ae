"""What several test files use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Real input that the project does not contain; tests that need it skip, saying so, where it is missing.
SHARED = Path(os.environ.get("TPA_SHARED", Path(__file__).parents[2] / "shared"))


def exactly(actual, expected, tolerance=1e-10):
    """Equal to `tolerance`, relative to the scale of what is expected."""
    assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def storages(cache) -> dict[int, int]:
    """Bytes of each storage that a cache really keeps, by address; a list of tensors counts as its tensors."""
    kept = []
    for value in vars(cache).values():
        kept += value if isinstance(value, (list, tuple)) else [value]
    kept = [tensor.untyped_storage() for tensor in kept if isinstance(tensor, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def random_factors(B, T, M, h, d_h, ranks, scale=1.0, dtype=torch.float64):
    """a_q, b_q (T queries), a_k, b_k, a_v, b_v (M positions), in the order of factor_attention's arguments."""
    shapes = [(B, length, rank, width) for length, rank in zip((T, M, M), ranks) for width in (h, d_h)]
    return [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]


def interpreter_marks(interpreted: bool):
    """For tests of Triton's kernels, and for the one that runs them in the interpreter's process."""
    here = pytest.mark.skipif(not interpreted and DEVICE == "cpu", reason="runs in the interpreter's own process")
    return here, pytest.mark.skipif(interpreted or DEVICE == "cuda", reason="the tests below run in this process")


def passed_in_the_interpreter(file) -> int:
    """Run a test file in a process in which Triton interprets its kernels; returns how many tests passed there."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    return run.stdout.count(".")
