"""Fixtures that several test files share."""

import pytest
import torch

import tpa_minimal.tpa


@pytest.fixture(scope="session")
def tpa():
    """The module under test; tests/test_mutants.py passes wrong ones to the same tests."""
    return tpa_minimal.tpa


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
