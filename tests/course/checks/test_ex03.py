"""The checkers of notebook 03 accept the solution and reject wrong answers, each with its own diagnosis."""

import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.tpa import apply_rope, rope_tables


def diagnosis(capsys, checker, attempt):
    status = checker(attempt)
    return status, capsys.readouterr().out


def todo(*_):
    raise NotImplementedError


@pytest.mark.parametrize("checker", [checks.ex03_1, checks.ex03_2, checks.ex03_3, checks.ex03_4])
def test_an_empty_stub_is_todo(capsys, checker):
    assert diagnosis(capsys, checker, todo)[0] == "todo"


TRUTH = dict(mix_ranks=True, feature_matrix=False, feature_gain=False, unit_length=True, bias=False, number=True)


def test_what_commutes_is_true():
    """The table that ex03_1 holds the reader to, tried out."""
    torch.manual_seed(0)
    b, left, right, row = (torch.randn(*s).double() for s in ((1, 1, 3, 8), (3, 3), (8, 8), (8,)))
    operations = dict(
        mix_ranks=lambda x: left @ x,
        feature_matrix=lambda x: x @ right,
        feature_gain=lambda x: x * row,
        unit_length=lambda x: x / x.norm(dim=-1, keepdim=True),
        bias=lambda x: x + row,
        number=lambda x: 1.7 * x,
    )
    tables = rope_tables(torch.tensor([5]), 8, 100.0, torch.float64)
    for name, operation in operations.items():
        same = torch.allclose(apply_rope(operation(b), *tables), operation(apply_rope(b, *tables)))
        assert same == TRUTH[name], name


def test_ex03_1(capsys):
    assert diagnosis(capsys, checks.ex03_1, lambda: TRUTH)[0] == "ok"
    said = set()
    for name in TRUTH:
        status, out = diagnosis(capsys, checks.ex03_1, lambda name=name: {**TRUTH, name: not TRUTH[name]})
        assert status == "fail" and name in out
        said.add(out)
    assert len(said) == len(TRUTH)
    assert "exactly these keys" in diagnosis(capsys, checks.ex03_1, lambda: {"bias": True})[1]
    assert "True or False" in diagnosis(capsys, checks.ex03_1, lambda: {**TRUTH, "bias": None})[1]


def halves(x, cos, sin, sense=1):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sense * sin[:, None]
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


def without_an_axis(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1).flatten(-2)


def overwrites_x1(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    x1 = x1 * cos[:, None] + x2 * sin[:, None]
    return torch.stack((x1, x2 * cos[:, None] - x1 * sin[:, None]), -1).flatten(-2)


def test_ex03_2(capsys):
    right = lambda x, cos, sin: torch.stack(halves(x, cos, sin), -1).flatten(-2)  # noqa: E731
    assert diagnosis(capsys, checks.ex03_2, right)[0] == "ok"
    wrong = {
        "half-split layout again": apply_rope,
        "in the wrong places": lambda x, cos, sin: torch.cat(halves(x, cos, sin), -1),
        "turns the other way": lambda x, cos, sin: torch.stack(halves(x, cos, sin, -1), -1).flatten(-2),
        "not a rotation": overwrites_x1,
        "column j": lambda x, cos, sin: right(x, cos.flip(-1), sin.flip(-1)),
        "must have shape": lambda x, cos, sin: torch.stack(halves(x, cos, sin), -1),
        "return a tensor": lambda x, cos, sin: halves(x, cos, sin),
        "IndexError": lambda x, cos, sin: cos[10],
        "an axis for `any`": without_an_axis,
        "of type ndarray": lambda x, cos, sin: right(x, cos, sin).numpy(),
        "RuntimeError: Expected size": lambda x, cos, sin: x @ x[..., :2],
    }
    for words, attempt in wrong.items():
        status, out = diagnosis(capsys, checks.ex03_2, attempt)
        assert status == "fail" and words in out


def turn(b, positions, base, dtype=torch.float64):
    return apply_rope(b, *rope_tables(positions, b.shape[-1], base, dtype))


def test_ex03_3(capsys):
    assert diagnosis(capsys, checks.ex03_3, lambda b, by, base: turn(b, torch.tensor([-by]), base))[0] == "ok"
    wrong = {
        "b_k.dtype": lambda b, by, base: turn(b, torch.tensor([-by]), base, torch.float32),
        "still at their old": lambda b, by, base: b,
        "moved forward": lambda b, by, base: turn(b, torch.tensor([by]), base),
        "already rotated": lambda b, by, base: turn(b, torch.arange(b.shape[1]), base),
        "all tokens are at position 0": lambda b, by, base: turn(b, -torch.arange(by, by + b.shape[1]), base),
        "use the base": lambda b, by, base: turn(b, torch.tensor([-by]), 10000.0),
        "T_(s - by)": lambda b, by, base: turn(b, torch.tensor([-by + 1]), base),
        "not a rotation": lambda b, by, base: turn(b, torch.tensor([-by]), base) * 1.1,
    }
    for words, attempt in wrong.items():
        status, out = diagnosis(capsys, checks.ex03_3, attempt)
        assert status == "fail" and words in out


def shift_test(layer, relative=True):
    x = torch.randn(1, 32, layer.d_model, dtype=torch.float64)
    pairs = zip(layer(x, start=0), layer(x, start=1000))
    return [((new - old).norm() / (old.norm() if relative else 1)).item() for old, new in pairs]


def judge(logits, out):
    if logits > 1e-6:
        return "only keys rotated" if logits > 0.1 else "bfloat16 tables"
    return "values rotated too" if out > 1e-6 else "right"


def test_ex03_4(capsys):
    assert diagnosis(capsys, checks.ex03_4, lambda layer: judge(*shift_test(layer)))[0] == "ok"
    wrong = {
        "look at the outputs too": lambda layer: judge(shift_test(layer)[0], 0),
        "only its outputs do": lambda layer: judge(shift_test(layer)[1], shift_test(layer)[1]),
        "divide the change by": lambda layer: judge(*shift_test(layer, relative=False)),
        "well below 1e-3": lambda layer: judge(*(change if change > 0.1 else 0 for change in shift_test(layer))),
        "at start=1000": lambda layer: "right",
        "answer one of": lambda layer: "wrong",
    }
    for words, attempt in wrong.items():
        status, out = diagnosis(capsys, checks.ex03_4, attempt)
        assert status == "fail" and words in out, out


def test_strict_mode_raises(monkeypatch):
    monkeypatch.setenv("TPA_STRICT", "1")
    with pytest.raises(AssertionError, match=r"\[todo\] ex03_1"):
        checks.ex03_1(todo)


def test_a_latent_carries_rope_only_without_compression():
    """No S gives S W_i = W_i T_s for all heads, unless the latent is as wide as all keys together (notebook 03)."""
    torch.manual_seed(0)
    h, d_head = 4, 8
    for d_c, exact in ((8, False), (24, False), (32, True)):
        W = torch.randn(h, d_c, d_head, dtype=torch.float64)
        rotated = apply_rope(W.transpose(0, 1).unsqueeze(0), *rope_tables(torch.tensor([9]), d_head, 100.0, W.dtype))[0]
        plain, rotated = W.transpose(0, 1).flatten(1), rotated.flatten(1)  # (d_c, h · d_h)
        S = torch.linalg.lstsq(plain.T, rotated.T).solution.T
        error = (S @ plain - rotated).norm() / rotated.norm()
        assert error < 1e-9 if exact else error > 0.3
