"""The checkers of notebook 01 accept what is right and say what is wrong."""

import math

import pytest
import torch
import torch.nn.functional as F

from tpa_minimal.course import checks


def attend(q, k, v, diagonal=0, scale=None, axis=-1):
    logits = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q) + diagonal)
    return torch.einsum("hts,shd->thd", logits.masked_fill(~mask, -math.inf).softmax(axis), v)


# ------------------------------------------------------------------------------------ 1: what stays true

KEY = dict(a=True, b=True, c=False, d=True, e=True, f=False)


def held(tokens, causal):
    """Keys of two random layers, from an implementation that the notebook does not use."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(200, 8, dtype=torch.float64, generator=generator)
    layers = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    x, keys = table[tokens], []
    for w_q, w_k, w_v in layers:
        keys.append(x @ w_k)
        x = x + F.scaled_dot_product_attention((x @ w_q)[None], (x @ w_k)[None], (x @ w_v)[None], is_causal=causal)[0]
    return keys


def test_the_answer_key_is_what_a_model_does():
    old, replaced = torch.arange(100), torch.arange(100)
    replaced[50] = 150
    longer = torch.arange(101)

    def same(before, after, places):
        return torch.allclose(before[places], after[places], rtol=0, atol=1e-12)

    past = slice(0, 100)
    causal, both_ways = held(old, True), held(old, False)
    assert KEY == dict(
        a=same(causal[1], held(longer, True)[1], past),
        b=same(both_ways[0], held(longer, False)[0], past),
        c=same(both_ways[1], held(longer, False)[1], past),
        d=same(causal[1], held(replaced, True)[1], slice(0, 50)),
        e=same(causal[0], held(replaced, True)[0], slice(51, 100)),
        f=same(causal[1], held(replaced, True)[1], slice(51, 100)),
    )
    assert checks.ex01_1(lambda: dict(KEY)) == "ok"


@pytest.mark.parametrize("case", KEY)
def test_each_wrong_choice_has_its_own_reason(case, capsys):
    assert checks.ex01_1(lambda: {**KEY, case: not KEY[case]}) == "fail"
    line = capsys.readouterr().out
    assert f"case {case}: not {not KEY[case]}" in line and len(line) > 80


@pytest.mark.parametrize("answer", [{**KEY, "a": ...}, {"a": True}, None, {**KEY, "c": 0}])
def test_unfinished_choices_fail(answer):
    assert checks.ex01_1(lambda: answer) == "fail"


def test_a_choice_in_quotes_is_diagnosed(capsys):
    assert checks.ex01_1(lambda: {**KEY, "a": "True"}) == "fail"
    assert "case a: give True or False, not the str 'True'" in capsys.readouterr().out


# --------------------------------------------------------------------------------- 2: the longest context


def longest(memory, weights, n_layer, n_kv_head, d_head, batch_size, bytes_per_number):
    return max(0, memory - weights) // (2 * n_kv_head * d_head * n_layer * bytes_per_number * batch_size)


CONTEXT = {
    "a key and a value": lambda m, w, n, g, d, b, y: max(0, m - w) // (g * d * n * y * b),
    "every layer has its own": lambda m, w, n, g, d, b, y: max(0, m - w) // (2 * g * d * y * b),
    "each of the batch_size": lambda m, w, n, g, d, b, y: max(0, m - w) // (2 * g * d * n * y),
    "subtract them": lambda m, w, n, g, d, b, y: m // (2 * g * d * n * y * b),
    "numbers, not bytes": lambda m, w, n, g, d, b, y: max(0, m - w) // (2 * g * d * n * b),
    "bits": lambda m, w, n, g, d, b, y: max(0, m - w) // (16 * g * d * n * y * b),
    "not a negative": lambda m, w, n, g, d, b, y: (m - w) // (2 * g * d * n * y * b),
    "round down": lambda m, w, n, g, d, b, y: math.ceil(max(0, m - w) / (2 * g * d * n * y * b)),
    "whole tokens only": lambda m, w, n, g, d, b, y: max(0, m - w) / (2 * g * d * n * y * b),
    "return an int": lambda *case: float(longest(*case)),
    "expected a number": lambda *case: None,
    "what is left": lambda *case: 1000,
}


def test_the_right_context_is_accepted():
    assert checks.ex01_2(longest) == "ok"


@pytest.mark.parametrize("says", CONTEXT)
def test_a_wrong_context_is_diagnosed(says, capsys):
    assert checks.ex01_2(CONTEXT[says]) == "fail"
    assert says in capsys.readouterr().out


# --------------------------------------------------------------------------------- 3: a chunk of new tokens


def top_left(q, k, v):
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1)


CHUNK = {
    "aligned with the first key": top_left,
    "causal mask is missing": lambda q, k, v: attend(q, k, v, diagonal=len(k)),
    "its own key": lambda q, k, v: attend(q, k, v, diagonal=-1),
    "one key too many": lambda q, k, v: attend(q, k, v, diagonal=1),
    "not divided by": lambda q, k, v: attend(q, k, v, scale=1),
    "not by its square root": lambda q, k, v: attend(q, k, v, scale=1 / q.shape[-1]),
    "softmax runs over the queries": lambda q, k, v: attend(q, k, v, axis=-2),
    "expected shape": lambda q, k, v: attend(q, k, v).transpose(0, 1),
    "expected a tensor": lambda q, k, v: None,
    "RuntimeError": lambda q, k, v: q @ v,
}


def test_right_chunks_are_accepted():
    def with_sdpa(q, k, v):
        mask = torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k))[:, None]
        heads_first = [x.transpose(0, 1) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)

    assert checks.ex01_3(attend) == checks.ex01_3(with_sdpa) == "ok"


@pytest.mark.parametrize("says", CHUNK)
def test_a_wrong_chunk_is_diagnosed(says, capsys):
    assert checks.ex01_3(CHUNK[says]) == "fail"
    assert says in capsys.readouterr().out


# --------------------------------------------------------------------------------------- 4: grouped queries


def spread(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def dealt(x, q):
    return x.repeat(1, q.shape[1] // x.shape[1], 1)


GROUPED = {
    "`repeat_interleave`": lambda q, k, v: attend(q, dealt(k, q), dealt(v, q)),
    "not their values": lambda q, k, v: attend(q, spread(k, q), dealt(v, q)),
    "averaged": lambda q, k, v: attend(q, *(x.mean(1, keepdim=True).expand_as(q) for x in (k, v))),
    "causal mask is missing": lambda q, k, v: attend(q, spread(k, q), spread(v, q), diagonal=9),
    "not divided by": lambda q, k, v: attend(q, spread(k, q), spread(v, q), scale=1),
    "RuntimeError": lambda q, k, v: attend(q, k, v),
}


def test_right_grouping_is_accepted():
    assert checks.ex01_4(lambda q, k, v: attend(q, spread(k, q), spread(v, q))) == "ok"
    builtin = lambda q, k, v: F.scaled_dot_product_attention(  # noqa: E731
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    assert checks.ex01_4(builtin) == "ok"


@pytest.mark.parametrize("says", GROUPED)
def test_wrong_grouping_is_diagnosed(says, capsys):
    assert checks.ex01_4(GROUPED[says]) == "fail"
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("check", [checks.ex01_1, checks.ex01_2, checks.ex01_3, checks.ex01_4])
def test_an_unwritten_exercise_is_a_todo(check):
    def stub(*_):
        raise NotImplementedError

    assert check(stub) == "todo"


def test_shared_keys_have_low_rank():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 8, 12, dtype=torch.float64, generator=generator)  # (tokens, h, d_h)
    for G in (1, 2, 4, 8):
        shared = keys[:, :G].repeat_interleave(8 // G, dim=1)
        assert torch.linalg.matrix_rank(shared).unique().tolist() == [G]
        assert torch.linalg.matrix_rank(shared.flatten(1)) == min(40, 12 * G)
