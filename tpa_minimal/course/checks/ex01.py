"""Checkers of notebook 01's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge, judge_choices


@exercise
def ex01_1(attempt):
    """Which cached keys and values stay right when the text changes."""
    judge_choices(
        attempt(),
        dict(a=True, b=True, c=False, d=True, e=True, f=False),
        dict(
            a="With the causal mask an old token has never depended on what follows it, at any depth",
            b="What does a key of the first layer depend on? Only on its own token's embedding",
            c="Layer 2 reads what layer 1 mixed; without a mask the new token went into that mixture",
            d="With the causal mask, tokens before 50 cannot know that token 50 has changed",
            e="A key of the first layer depends on its own token alone, and these tokens were not replaced",
            f="These tokens attended to token 50 in layer 1, so the input of layer 2 has changed",
        ),
    )


@exercise
def ex01_2(attempt):
    """The longest context that fits a memory."""
    cases = [
        (80 * 10**9, 13_476_831_232, 32, 32, 128, 7, 4),
        (80 * 10**9, 13_476_831_232, 32, 32, 128, 1, 2),
        (24 * 10**9, 16_060_522_496, 32, 8, 128, 3, 1),
        (10**9, 2 * 10**9, 12, 12, 64, 1, 2),
    ]
    for case in cases:
        memory, weights, n_layer, n_kv_head, d_head, batch_size, bytes_per_number = case
        free, numbers = max(0, memory - weights), 2 * n_kv_head * d_head * n_layer * batch_size
        per_token = numbers * bytes_per_number
        got = attempt(*case)
        if isinstance(got, (int, float)) and got < 0:
            raise WrongAnswer("the weights alone exceed the memory here: return 0, not a negative length")
        judge(
            got,
            free // per_token,
            {
                "twice too long: a token leaves a key and a value": free // (per_token // 2),
                "too long: every layer has its own cache": free * n_layer // per_token,
                "too long: each of the batch_size sequences needs its own cache": free * batch_size // per_token,
                "the weights occupy memory too: subtract them first": memory // per_token,
                "you counted numbers, not bytes": free // numbers,
                "these are bits: memory is given in bytes, and so is bytes_per_number": free // (8 * per_token),
                "one token too many: round down, a part of a token cannot be cached": -(-free // per_token),
                "whole tokens only: round down to an int": free / per_token,
            },
            "count the bytes that one more token of every sequence costs, and divide what is left by them",
        )
        if not isinstance(got, int):
            raise WrongAnswer(f"whole tokens only: return an int, not {got!r}")


def _attend(q, k, v, mask, scale=None, axis=-1):
    logits = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("hts,shd->thd", logits.masked_fill(~mask, -math.inf).softmax(axis), v)


def _attention_mistakes(q, k, v):
    """Wrong causal attention of the last T of M tokens, by diagnosis; q (T, h, d_h), k and v (M, h, d_h)."""
    T, M = len(q), len(k)
    everything = torch.ones(T, M, dtype=torch.bool)
    return {
        "the mask is aligned with the first key: query t of the chunk stands at position M - T + t, not t": _attend(
            q, k, v, everything.tril()
        ),
        "queries see keys of their own future: the causal mask is missing": _attend(q, k, v, everything),
        "a query does not see its own key: the diagonal belongs to the past": _attend(
            q, k, v, everything.tril(M - T - 1)
        ),
        "each query sees one key too many: the first key of its future": _attend(q, k, v, everything.tril(M - T + 1)),
        "the logits are not divided by √d_h": _attend(q, k, v, everything.tril(M - T), scale=1),
        "the logits are divided by d_h, not by its square root": _attend(
            q, k, v, everything.tril(M - T), scale=1 / q.shape[-1]
        ),
        "the softmax runs over the queries: the weights of one query, over all its keys, must sum to 1": _attend(
            q, k, v, everything.tril(M - T), axis=-2
        ),
    }


@exercise
def ex01_3(attempt):
    """Causal attention for a chunk of new tokens against a longer past."""
    generator = torch.Generator().manual_seed(0)
    for T, M in ((3, 8), (5, 5), (1, 7)):
        q = torch.randn(T, 4, 6, dtype=torch.float64, generator=generator)
        k, v = torch.randn(2, M, 4, 6, dtype=torch.float64, generator=generator)
        right = _attend(q, k, v, torch.ones(T, M, dtype=torch.bool).tril(M - T))
        judge(attempt(q, k, v), right, _attention_mistakes(q, k, v), f"wrong for {T} queries and {M} keys")


@exercise
def ex01_4(attempt):
    """Grouped-query attention."""
    generator = torch.Generator().manual_seed(0)
    for G in (4, 2, 1):
        q = torch.randn(5, 4, 6, dtype=torch.float64, generator=generator)
        k, v = torch.randn(2, 5, G, 6, dtype=torch.float64, generator=generator)
        own = [x.repeat_interleave(4 // G, dim=1) for x in (k, v)]
        dealt = [x.repeat(1, 4 // G, 1) for x in (k, v)]
        mean = [x.mean(1, keepdim=True).expand(-1, 4, -1) for x in (k, v)]
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        mistakes = {
            "head i reads group i % G, as cards are dealt; neighbours should share: `repeat_interleave`, not "
            "`repeat`": _attend(q, *dealt, mask),
            "the groups share their keys, but not their values": _attend(q, own[0], dealt[1], mask),
            "keys and values are averaged over the groups: each head reads its own group only": _attend(q, *mean, mask),
        }
        judge(
            attempt(q, k, v),
            _attend(q, *own, mask),
            {**mistakes, **_attention_mistakes(q, *own)},
            f"wrong for 4 query heads and {G} key heads",
        )
