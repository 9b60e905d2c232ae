"""The checkers of notebook 12 accept the solution and reject wrong answers, each with its own diagnosis."""

import pytest
import torch

from tpa_minimal.course import checks


def todo(*_):
    raise NotImplementedError


@pytest.mark.parametrize("checker", [checks.ex12_1, checks.ex12_2, checks.ex12_3, checks.ex12_4])
def test_an_empty_stub_is_todo(checker):
    assert checker(todo) == "todo"


def heads(weight, d_head):
    return weight.clone().view(-1, d_head, weight.shape[1])


def negate(weight, d_head, rows):
    per_head = heads(weight, d_head)
    per_head[:, rows] *= -1
    return per_head.view_as(weight)


def in_place(weight, d_head):
    weight.neg_()
    return weight


@pytest.mark.parametrize(
    "attempt,message",
    [
        (lambda W, d: negate(W, d, slice(d // 2, None)), "[ok]"),
        (lambda W, d: negate(W, d, slice(0, d // 2)), "[ok]"),
        (lambda W, d: heads(W, d).roll(d // 2, 1).view_as(W), "[ok]"),  # exchanging the halves turns it round as well
        (lambda W, d: W.clone(), "the weight is as it was"),
        (lambda W, d: -W, "cancels"),
        (lambda W, d: torch.cat((W[: len(W) // 2], -W[len(W) // 2 :])), "second half of its own"),
        (lambda W, d: torch.cat((W[:, :5], -W[:, 5:]), 1), "columns"),
        (lambda W, d: negate(W, d, slice(1, None, 2)), "every other feature"),
        (lambda W, d: negate(W, d, slice(0, 1)), "differs from LLaMA's"),
        (lambda W, d: W[:3], "of the shape"),
        (in_place, "in place"),
    ],
)
def test_ex12_1(capsys, attempt, message):
    checks.ex12_1(attempt)
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt,message",
    [
        (lambda W, gain: W * gain, "[ok]"),
        (lambda W, gain: W * gain[:, None], "outputs"),
        (lambda W, gain: W / gain, "divided out"),
        (lambda W, gain: W, "is lost"),
        (lambda W, gain: (W * gain).T, "transposed"),
        (lambda W, gain: W + gain, "for an x of your choice"),
    ],
)
def test_ex12_2(capsys, attempt, message):
    checks.ex12_2(attempt)
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    "attempt,message",
    [
        (lambda W, h, R: W.unflatten(0, (h, R)).transpose(0, 1).flatten(0, 1), "[ok]"),
        (lambda W, h, R: W, "as they were"),
        (lambda W, h, R: W.unflatten(0, (R, h)).transpose(0, 1).flatten(0, 1), "first split is into heads"),
        (lambda W, h, R: W.flip(0), "reversed"),
        (lambda W, h, R: W.roll(1, 0), "row r · h + i"),
    ],
)
def test_ex12_3(capsys, attempt, message):
    checks.ex12_3(attempt)
    assert message in capsys.readouterr().out


def largest(numbers, bound):
    return max(R for R in range(1000) if numbers * R < bound)


def ranks(h, d, G):
    return largest(2 * d, 2 * G * d), largest(2 * (h + d), 2 * G * d)


@pytest.mark.parametrize(
    "attempt,message",
    [
        (ranks, "[ok]"),
        (lambda h, d, G: (G, ranks(h, d, G)[1]), "not less"),
        (lambda h, d, G: (h - 1, ranks(h, d, G)[1]), "not with all h"),
        (lambda h, d, G: (G - 1, G - 1), "cached too"),
        (lambda h, d, G: (G - 1, largest(2 * (h + d), 2 * h * d)), "not with MHA's"),
        (lambda h, d, G: (G - 1, ranks(h, d, G)[1] + 1), "as much or more"),
        (lambda h, d, G: (G - 1, largest(2 * (h + d), G * d)), "keys and values"),
        (lambda h, d, G: (G - 1, 0), "the largest R with"),
        (lambda h, d, G: G - 1, "two numbers"),
        (lambda h, d, G: tuple(map(float, ranks(h, d, G))), "whole numbers"),
    ],
)
def test_ex12_4(capsys, attempt, message):
    checks.ex12_4(attempt)
    assert message in capsys.readouterr().out
