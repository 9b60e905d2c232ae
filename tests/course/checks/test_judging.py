"""What all checkers have in common: three states, agreement up to rounding, and whose fault an error is."""

import sys

import numpy as np
import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.course.checks import judging
from tpa_minimal.course.checks.judging import agree, exercise, judge


@exercise
def doubled(attempt):
    judge(attempt, lambda x: 2 * x, [(judging.normal(3),)], [(lambda x: x**2, "that is the square")], "think of x + x")


@pytest.mark.parametrize(
    "got, expected",
    [
        (0.1, torch.tensor(0.1, dtype=torch.float64)),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (np.float64(0.1), 0.1),
        (np.float32(0.1), 0.1),
        (torch.tensor(0.1), 0.1),
        (np.int64(3), 3),
        (3.0, 3),
        (torch.tensor(3), 3),
        (np.bool_(True), True),
        ([], []),
        ([0.1, 0.2], (0.1, 0.2)),
        (np.array([0.1, 0.2]), (0.1, 0.2)),
        (torch.tensor([0.1, 0.2]), (0.1, 0.2)),
        ([[0.1], [0.2]], torch.tensor([[0.1], [0.2]], dtype=torch.float64)),
        (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0], dtype=torch.float64)),
        (10**30, 10**30),
        (np.uint64(3), 3),
        (np.longdouble(3), 3),
        (np.array([3, 4], dtype=np.uint64), (3, 4)),
        (np.array([0.2, 0.1])[::-1], torch.tensor([0.1, 0.2], dtype=torch.float64)),
        (np.array([1, 2], dtype=">i4"), torch.tensor([1, 2])),
        ([np.array([1.0, 2.0]), torch.tensor([3.0, 4.0])], torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        ([0.1, 0.2], torch.tensor([0.1, 0.2])),
        ({"a": np.int64(1)}, {"a": 1}),
    ],
)
def test_what_agrees(got, expected):
    assert agree(got, expected)


@pytest.mark.parametrize(
    "got, expected",
    [
        (0.1 + 1e-9, 0.1),
        (0.1 + 1e-9, torch.tensor(0.1, dtype=torch.float64)),
        (torch.tensor(0.1001), 0.1),
        (torch.tensor([0.1]).bfloat16(), torch.tensor([0.1], dtype=torch.float64)),
        (np.float16(0.1), 0.1),
        (True, 1),
        (1, True),
        ("3", 3),
        (float("nan"), 1.0),
        (1 + 1e-9j, 1.0),
        (torch.tensor([1.0 + 1e-9j]), torch.tensor([1.0])),
        (torch.ones(2, 1), torch.ones(2, 2)),
        (torch.ones(1), 1.0 + 1e-3),
        ([0.1], (0.1, 0.2)),
        ([], (0.1,)),
        ([0.1], []),
        (10**30 + 1, 10**30),
        ({1.0, 2.0}, (1.0, 2.0)),
        (object(), 1),
        (None, 1),
    ],
)
def test_what_does_not_agree(got, expected):
    assert not agree(got, expected)


def not_implemented_in_torch(x):
    return torch.nn.Module()(x)  # Python code that raises NotImplementedError


def not_implemented_in_cpp(x):
    return torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), x[:1], (3,)).logsumexp(0)


def helper():
    raise NotImplementedError


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda x: 2 * x, "[ok] doubled: well done"),
        (lambda x: x**2, "[fail] doubled: that is the square"),
        (lambda x: 3 * x, "think of x + x"),
        (lambda x: x.mul_(2), "in place"),
        (lambda x: None, "returned None: is there a `return`?"),
        (lambda x: x[7], "your code raised IndexError"),
        (lambda x: 2 * x[:2], "expected shape (3,), not (2,)"),
        (lambda x: 2 * x / 0, "contains nan or inf"),
        (lambda x: sys.exit(), "your code raised SystemExit"),
        (lambda x: helper(), "[todo]"),
        (not_implemented_in_torch, "[fail] doubled: your code raised NotImplementedError"),
        (not_implemented_in_cpp, "[fail] doubled: your code raised NotImplementedError"),
        (lambda x, y: x, "your code raised TypeError"),
    ],
)
def test_one_line_says_what_happened(attempt, says, capsys):
    doubled(attempt)
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1


def test_a_crash_of_the_checker_is_not_blamed_on_the_readers_code(capsys):
    @exercise
    def broken(attempt):
        len(attempt())

    assert broken(lambda: 3) == "fail"
    out = capsys.readouterr().out
    assert "your code raised" not in out and "not of the kind that the exercise asks for" in out


def test_earlier_wrong_answers_say_more_than_a_later_crash(capsys):
    @exercise
    def squared(attempt):
        judge(attempt, lambda x: x * x, [(3,), (0,)], [(lambda x: x + x, "a product, not a sum")])

    assert squared(lambda x: x + x if x else 1 / 0) == "fail"
    assert "a product, not a sum" in capsys.readouterr().out
    assert squared(lambda x: x * x if x else 1 / 0) == "fail"
    assert "your code raised ZeroDivisionError" in capsys.readouterr().out


def test_the_mistake_that_explains_all_answers_comes_before_one_that_explains_the_wrong_ones(capsys):
    @exercise
    def floor(attempt):
        mistakes = [(lambda x: -int(-x // 1), "rounded up"), (round, "rounded to the nearest")]
        judge(attempt, int, [(1.2,), (1.7,)], mistakes)

    assert floor(round) == "fail"
    assert "rounded to the nearest" in capsys.readouterr().out


def test_a_class_as_an_attempt_is_a_todo_until_its_methods_are_written():
    class Unwritten(torch.nn.Module):
        def __init__(self, config):
            self.widths()

        def widths(self):
            raise NotImplementedError

    assert checks.ex11_2(Unwritten) == "todo"


def test_strict_mode_raises(monkeypatch):
    monkeypatch.setenv("TPA_STRICT", "1")
    for attempt in (lambda x: 0, lambda x: helper()):
        with pytest.raises(AssertionError, match="doubled"):
            doubled(attempt)
