"""Fixtures that several test files share."""

import signal
import threading

import pytest
import torch

import tpa_minimal.tpa

# A shell that starts the tests in the background has Ctrl-C ignored, by them and by all that they start.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tpa():
    """The module under test; tests/test_mutants.py passes wrong ones to the same tests."""
    return tpa_minimal.tpa


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
