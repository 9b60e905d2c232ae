"""The checkers of notebook 06 accept the solutions and say what is wrong with wrong answers."""

import pytest
import torch

from tpa_minimal.course import checks


def merge(one, two, *, which=torch.maximum, sense=1, both=True, scale_s=True, scale_y=True):
    (m_1, s_1, y_1), (m_2, s_2, y_2) = one, two
    m = which(m_1, m_2)
    f_1, f_2 = (sense * (m_1 - m)).exp(), (sense * (m_2 - m)).exp()
    if not both:
        f_2 = torch.ones_like(f_2)
    s = s_1 * f_1 + s_2 * f_2 if scale_s else s_1 + s_2
    y = y_1 * f_1[:, None] + y_2 * f_2[:, None] if scale_y else y_1 + y_2
    return m, s, y


def merge_with_exp2(one, two):
    m = torch.maximum(one[0], two[0])
    f_1, f_2 = (one[0] - m).exp2(), (two[0] - m).exp2()
    return m, one[1] * f_1 + two[1] * f_2, one[2] * f_1[:, None] + two[2] * f_2[:, None]


def only_the_first_may_be_empty(one, two):
    return merge(one, two) if two[1].all() else two


def mean_of_averages(one, two):
    m, s, _ = merge(one, two)
    return m, s, s[:, None] * (one[2] / one[1][:, None] + two[2] / two[1][:, None]) / 2


def through_the_averages(one, two):  # divides by the s of an empty part
    m, s, _ = merge(one, two)
    f_1, f_2 = one[1] * (one[0] - m).exp(), two[1] * (two[0] - m).exp()
    return m, s, one[2] / one[1][:, None] * f_1[:, None] + two[2] / two[1][:, None] * f_2[:, None]


def merge_without_subtracting(one, two):
    m = torch.maximum(one[0], two[0])
    f_1, f_2 = one[0].exp() / m.exp(), two[0].exp() / m.exp()
    return m, one[1] * f_1 + two[1] * f_2, one[2] * f_1[:, None] + two[2] * f_2[:, None]


def already_divided(one, two):
    m, s, y = merge(one, two)
    return m, s, y / s[:, None]


def order(h, d_h, rank_q):
    return "table" if rank_q * (d_h + h) < h * (d_h + 1) else "queries"


def largest(h, d_h, rank_k, rank_v, *, weighing=True, values=True, strict=True):
    left = 2 * h * d_h - (h * rank_v * d_h if values else 0)
    per_rank = rank_k * (d_h + (h if weighing else 0))
    return max(0, (left - strict) // per_rank)


def todo(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    "check, solution",
    [(checks.ex06_1, merge), (checks.ex06_2, order), (checks.ex06_3, largest)],
    ids=["06.1", "06.2", "06.3"],
)
def test_accepts_the_solution_and_knows_a_stub(check, solution):
    assert check(solution) == "ok"
    assert check(todo) == "todo"


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda a, b: merge(a, b, scale_s=False, scale_y=False), "different maxima"),
        (lambda a, b: merge(a, b, scale_y=False), "s is right and y is not"),
        (lambda a, b: merge(a, b, scale_s=False), "y is right and s is not"),
        (lambda a, b: merge(a, b, sense=-1), "wrong way round"),
        (lambda a, b: merge(a, b, both=False), "only one part"),
        (lambda a, b: merge(a, b, which=lambda x, y: x), "exp may overflow"),
        (lambda a, b: (a[0] + b[0], merge(a, b)[1], a[2]), "larger of the two"),
        (mean_of_averages, "mean of the two averages"),
        (through_the_averages, "seen nothing"),
        (only_the_first_may_be_empty, "seen nothing"),
        (merge_with_exp2, "natural exponentials"),
        (merge_without_subtracting, "exp(m) overflows"),
        (already_divided, "divided by s already"),
        (lambda a, b: merge(a, b)[2] / merge(a, b)[1][:, None], "three tensors"),
    ],
)
def test_06_1_diagnoses(attempt, says, capsys):
    assert checks.ex06_1(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda h, d, q: "queries" if order(h, d, q) == "table" else "table", "other way round"),
        (lambda h, d, q: "table" if q * d < h * d else "queries", "weighs its table"),
        (lambda h, d, q: "table" if q < d else "queries", "R_Q against d_h"),
        (lambda h, d, q: "table" if q * (d + h) <= h * (d + 1) else "queries", "both cost 36"),
        (lambda h, d, q: "table" if q * (d + h) < h * d else "queries", "a_k weighs each"),
        (lambda h, d, q: "table" if q * (d + h) <= h * d else "queries", "you say queries"),
        (lambda h, d, q: "table", "depends on R_Q"),
        (lambda h, d, q: q * d < h * d, 'return "table"'),
        (lambda h, d, q: "table" if q < 2 else "queries", "you say queries"),
    ],
)
def test_06_2_diagnoses(attempt, says, capsys):
    assert checks.ex06_2(attempt) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt, says",
    [
        (lambda h, d, k, v: largest(h, d, k, v, strict=False), "fewer, not as many"),
        (lambda h, d, k, v: largest(h, d, k, v, values=False), "values are missing"),
        (lambda h, d, k, v: largest(h, d, k, v, weighing=False), "weighing of P"),
        (lambda h, d, k, v: largest(h, d, 1, v), "R_K is missing"),
        (lambda h, d, k, v: largest(h, d, k, 1), "R_V is missing"),
        (lambda h, d, k, v: (2 * h * d - h * v * d - 1) // (k * (d + h)), "negative"),
        (lambda h, d, k, v: 1.0, "whole number"),
        (lambda h, d, k, v: 6, "you say 6"),
    ],
)
def test_06_3_diagnoses(attempt, says, capsys):
    assert checks.ex06_3(attempt) == "fail"
    assert says in capsys.readouterr().out
