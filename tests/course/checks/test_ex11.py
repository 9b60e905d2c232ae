"""The checkers of notebook 11 accept the solution and reject wrong answers, each with its own diagnosis."""

import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.tpa import TensorProductAttention, apply_rope

RIGHT = {
    "shared A": lambda R, h, d: R * (h + 2 * d),
    "shared both": lambda R, h, d: R * (h + d),
    "fixed a_k": lambda R, h, d: R * (h + 2 * d),
    "shared B, fixed A": lambda R, h, d: R * d,
}


def todo(*_):
    raise NotImplementedError


@pytest.mark.parametrize("checker", [checks.ex11_1, checks.ex11_2, checks.ex11_3, checks.ex11_4])
def test_an_empty_stub_is_todo(checker):
    assert checker(todo) == "todo"


@pytest.mark.parametrize(
    "change,message",
    [
        ({}, "[ok]"),
        ({"shared A": lambda R, h, d: 2 * R * (h + d)}, "TPA's own cache"),
        ({"shared B, fixed A": lambda R, h, d: R * (d + 2 * h)}, "constants"),
        ({"fixed a_k": lambda R, h, d: R * (2 * h + 2 * d)}, "TPA's own cache"),
        ({"shared B, fixed A": lambda R, h, d: 2 * R * d}, "b is needed once only"),
        ({"shared A": lambda R, h, d: R * (2 * h + d)}, "that is shared B"),
        ({"shared both": lambda R, h, d: h + d}, "each of the R rows"),
        ({"shared A": lambda R, h, d: R * (h + d)}, "one a and one b"),
        ({"shared both": lambda R, h, d: 7}, "cross out"),
    ],
)
def test_ex11_1(capsys, change, message):
    answers = {**RIGHT, **change}
    checks.ex11_1(lambda variant, R, h, d_head: answers[variant](R, h, d_head))
    assert message in capsys.readouterr().out


class Shared(TensorProductAttention):
    def factor_widths(self):
        h, d_head = self.config.n_head, self.config.d_head
        return h, d_head, 0, d_head, h, d_head

    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        return a_q, b_q, a_v, b_k, a_v, b_v


class KeepsBoth(Shared):
    def factor_widths(self):
        return (self.config.n_head, self.config.d_head) * 3


class KeepsKey(Shared):
    def factor_widths(self):
        h, d_head = self.config.n_head, self.config.d_head
        return h, d_head, h, d_head, 0, d_head


class KeepsNothing(Shared):
    def factor_widths(self):
        return 0, 6, 0, 6, 0, 6


class LeavesEmpty(Shared):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        return a_q, b_q, a_k, b_k, a_v, b_v


class TurnsAgain(Shared):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        tables = self.rope(torch.arange(1, 1 + b_k.shape[1]), b_k.dtype)
        return a_q, b_q, a_v, apply_rope(b_k, *tables), a_v, b_v


class Halves(Shared):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        return a_q, b_q, a_v / 2, b_k, a_v, b_v


class Returns(Shared):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        return a_v


class Remembers(Shared):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        return a_q, b_q, a_v if start == 0 else 2 * a_v, b_k, a_v, b_v


@pytest.mark.parametrize(
    "attempt,message",
    [
        (Shared, "[ok]"),
        (KeepsBoth, "both projected and cached"),
        (KeepsKey, "give a_k the width 0"),
        (KeepsNothing, "should keep all but a_k"),
        (LeavesEmpty, "a_k empty"),
        (TurnsAgain, "has turned b_k already"),
        (Halves, "changes a_k"),
        (Returns, "all six factors"),
        (Remembers, "own cache"),
        (TensorProductAttention, "both projected and cached"),
    ],
)
def test_ex11_2(capsys, attempt, message):
    checks.ex11_2(attempt)
    assert message in capsys.readouterr().out


def turn(b, cos, sin):
    b1, b2 = b.chunk(2, dim=-1)
    return torch.cat((b1 * cos + b2 * sin, b2 * cos - b1 * sin), dim=-1)


def vec(b, c):
    return (c[:, :, None] * b[:, None, :]).flatten(1)


@pytest.mark.parametrize(
    "attempt,message",
    [
        (lambda b, c, cos, sin: vec(turn(b, cos, sin), c), "[ok]"),
        (lambda b, c, cos, sin: vec(c, turn(b, cos, sin)), "stacks columns"),
        (lambda b, c, cos, sin: vec(b, c), "nothing is rotated"),
        (lambda b, c, cos, sin: vec(b, turn(c, cos, sin)), "you rotated c"),
        (lambda b, c, cos, sin: vec(turn(b, cos, sin), turn(c, cos, sin)), "both b and c"),
        (lambda b, c, cos, sin: vec(turn(b, cos, -sin), c), "the other way"),
        (lambda b, c, cos, sin: vec(turn(b, cos, sin), 2 * c), "try it with sin = 0"),
        (lambda b, c, cos, sin: turn(b, cos, sin), "expected shape"),
    ],
)
def test_ex11_3(capsys, attempt, message):
    checks.ex11_3(attempt)
    assert message in capsys.readouterr().out


def test_ex11_4(capsys):
    truth = dict(a=True, b=True, c=True, d=False, e=False, f=True)
    assert checks.ex11_4(lambda: truth) == "ok"
    said = set()
    for case in truth:
        capsys.readouterr()
        assert checks.ex11_4(lambda case=case: {**truth, case: not truth[case]}) == "fail"
        said.add(capsys.readouterr().out)
    assert len(said) == len(truth)
