"""What several test files use."""

import os
from pathlib import Path

import torch
from torch.testing import assert_close

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
