"""The tests are only as good as the mistakes they catch: each wrong TPA must fail an ordinary test."""

import functools
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


def runs(test):
    """Calls of a test with each of its parameters; none if it wants another fixture than `tpa`."""
    names, rows = [], [()]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            new = [name.strip() for name in mark.args[0].split(",")]
            values = [value if len(new) > 1 else (value,) for value in mark.args[1]]
            names, rows = names + new, [(*row, *value) for row in rows for value in values]
    if set(inspect.signature(test).parameters) == {"tpa", *names}:
        for row in rows:
            yield functools.partial(test, **dict(zip(names, row)))


TESTS = {name: test for name, test in vars(test_tpa).items() if name.startswith("test_") and name not in SLOW}
ORDINARY = [run for test in TESTS.values() for run in runs(test)]


def wrong_module(mutant):
    text = test_tpa.SOURCE.read_text(encoding="utf-8")
    assert text.count(mutant.right) == 1, f"tpa.py no longer has exactly one {mutant.right!r}: renew this mutant"
    module = types.ModuleType("wrong_tpa")
    sys.modules["wrong_tpa"] = module  # dataclasses look their module up
    exec(compile(text.replace(mutant.right, mutant.wrong), mutant.name, "exec"), module.__dict__)
    return module


def first_failure(module):
    """Name of the first ordinary test whose assertion a module fails, or None; a crash is no kill."""
    for test in ORDINARY:
        torch.manual_seed(0)
        try:
            test(tpa=module)
        except (AssertionError, pytest.fail.Exception):  # also of `pytest.raises` and of a failed `match`
            return test.func.__name__
        except Exception:  # noqa: S112
            continue
    return None


def test_there_are_at_least_a_dozen_mutants_and_as_many_tests():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 12
    assert len(ORDINARY) >= 12


def test_the_right_tpa_fails_none():
    assert first_failure(tpa_minimal.tpa) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_each_wrong_tpa_fails_an_ordinary_test(mutant):
    assert first_failure(wrong_module(mutant)) is not None, f"no test notices: {mutant.name}"
