"""The tests are only as good as the mistakes they catch: each wrong TPA must fail an ordinary test."""

import inspect
import sys
import types
from pathlib import Path

import pytest
import test_tpa
import torch

import tpa_minimal.tpa

sys.path.insert(0, str(Path(__file__).parent / "mutants"))
from wrong_tpas import MUTANTS  # noqa: E402

SLOW = {"test_config_defaults_and_presets", "test_torch_compile_captures_the_model_whole"}
ORDINARY = [
    test
    for name, test in vars(test_tpa).items()
    if name.startswith("test_") and name not in SLOW and list(inspect.signature(test).parameters) == ["tpa"]
]


def wrong_module(mutant):
    text = test_tpa.SOURCE.read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, f"tpa.py no longer has exactly one {mutant.right!r}: renew this mutant"
    module = types.ModuleType("wrong_tpa")
    sys.modules["wrong_tpa"] = module  # dataclasses look their module up
    exec(compile(text.replace(mutant.right, mutant.wrong), mutant.name, "exec"), module.__dict__)
    return module


def first_failure(module):
    """Name of the first ordinary test that a module fails, or None."""
    for test in ORDINARY:
        torch.manual_seed(0)
        try:
            test(tpa=module)
        except (Exception, pytest.fail.Exception):
            return test.__name__
    return None


def test_there_are_at_least_a_dozen_mutants_and_as_many_tests():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert len(ORDINARY) >= 12


def test_the_right_tpa_fails_none():
    assert first_failure(tpa_minimal.tpa) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_each_wrong_tpa_fails_an_ordinary_test(mutant):
    assert first_failure(wrong_module(mutant)) is not None, f"no test notices: {mutant.name}"
