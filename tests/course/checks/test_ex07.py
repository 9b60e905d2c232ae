"""The checkers of notebook 07 accept the solutions and say what is wrong with wrong answers."""

import math

import pytest
import torch

from tpa_minimal.course import checks


def heads(d_model, d_head, rank_q, rank):
    return round((4 * d_model - (rank_q + rank) * d_head) / (rank_q + 2 * rank + d_head))


def nucleus(logits, p, *, descending=True, inclusive=True, unsort=True, flat=False):
    shape, logits = logits.shape, logits.view(1, -1) if flat else logits
    ordered, order = logits.sort(dim=-1, descending=descending)
    probabilities = ordered.softmax(-1)
    total = probabilities.cumsum(-1)
    outside = total - probabilities >= p if inclusive else total > p
    if unsort:
        outside = torch.zeros_like(outside).scatter(-1, order, outside)
    return logits.masked_fill(outside, -math.inf).view(shape)


def by_threshold(logits, p):
    ordered = logits.sort(dim=-1, descending=True).values
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    lowest = ordered.masked_fill(before >= p, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, -math.inf)


def in_place(logits, p):
    return logits.copy_(nucleus(logits, p))


def sums_of_logits(logits, p):
    ordered, order = logits.sort(dim=-1, descending=True)
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered >= p)
    return logits.masked_fill(outside, -math.inf)


MOVED = {"embedding", "out_proj", "down_proj"}


@pytest.mark.parametrize(
    "check, solution",
    [(checks.ex07_1, heads), (checks.ex07_2, nucleus), (checks.ex07_3, lambda: MOVED)],
    ids=["07.1", "07.2", "07.3"],
)
def test_accepts_the_solution(check, solution):
    assert check(solution) == "ok"


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda d, w, q, r: round((4 * d - (q + 2 * r) * w) / (q + 2 * r + w)), "computed once"),
        (lambda d, w, q, r: round((4 * d - (q + r) * w) / (q + r + w)), "head factors too"),
        (lambda d, w, q, r: round((4 * d - (q + 2 * r) * w) / (q + r + w)), "head factors instead"),
        (lambda d, w, q, r: round((4 * d - (q + r) * w) / (q + 2 * r)), "output matrix is missing"),
        (lambda d, w, q, r: round(4 * d / (q + 2 * r + w)), "feature factors are missing"),
        (lambda d, w, q, r: (4 * d - (q + r) * w) // (q + 2 * r + w), "rounded down"),
        (lambda d, w, q, r: -(-(4 * d - (q + r) * w) // (q + 2 * r + w)), "rounded up"),
        (lambda d, w, q, r: (4 * d - (q + r) * w) / (q + 2 * r + w), "whole number"),
        (lambda d, w, q, r: d // w, "you say 12"),
    ],
)
def test_07_1_diagnoses(attempt, says, capsys):
    assert checks.ex07_1(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda x, p: nucleus(x, p, unsort=False), "sorted order"),
        (lambda x, p: nucleus(x, p, inclusive=False), "keeps nothing"),
        (lambda x, p: nucleus(x, p, descending=False), "likeliest token is gone"),
        (lambda x, p: nucleus(x, p).softmax(-1).log(), "values changed"),
        (lambda x, p: nucleus(x, p, flat=True), "by itself"),
        (in_place, "have changed"),
        (sums_of_logits, "probabilities (softmax), not logits"),
        (lambda x, p: nucleus(x, p)[:1], "shape"),
        (lambda x, p: nucleus(x, p + 1e-3), "stop at p or more"),
        (by_threshold, "equal tokens"),
        (lambda x, p: nucleus(x, p).softmax(-1), "looks like probabilities"),
        (lambda x, p: nucleus(x, p).exp(), "looks like probabilities"),
        (lambda x, p: nucleus(x, min(p, 0.9)), "p = 1"),
    ],
)
def test_07_2_diagnoses(attempt, says, capsys):
    assert checks.ex07_2(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, says",
    [
        (MOVED | {"factor_proj"}, "through out_proj"),
        (MOVED | {"gate_proj", "up_proj"}, "through down_proj"),
        (MOVED - {"down_proj"}, "what it multiplies"),
        (MOVED - {"embedding"}, "residual stream"),
        ("all", "set of names"),
        ({"norm"}, "set of names"),
    ],
)
def test_07_3_diagnoses(answer, says, capsys):
    assert checks.ex07_3(lambda: answer) == "fail"
    assert says in capsys.readouterr().out


def test_07_3_with_gradients_off():
    with torch.no_grad():
        assert checks.ex07_3(lambda: MOVED) == "ok"


def test_todo_and_broken_code(capsys):
    def stub(*_):
        raise NotImplementedError

    assert [check(stub) for check in (checks.ex07_1, checks.ex07_2, checks.ex07_3)] == ["todo"] * 3
    assert checks.ex07_2(lambda x, p: x.sort(dim=7)) == "fail"
    assert "IndexError" in capsys.readouterr().out
