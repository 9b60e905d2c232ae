"""Checkers of notebook 01's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices, normal


@exercise
def ex01_1(attempt):
    """Which cached keys and values stay right when the text changes."""
    judge_choices(
        attempt(),
        dict(
            a=(True, "with the causal mask an old token has never depended on what follows it, at any depth"),
            b=(True, "what does a key of the first layer depend on? Only on its own token's embedding"),
            c=(False, "layer 2 reads what layer 1 mixed; without a mask the new token went into that mixture"),
            d=(True, "with the causal mask, tokens before 50 cannot know that token 50 has changed"),
            e=(True, "a key of the first layer depends on its own token alone, and these tokens were not replaced"),
            f=(False, "these tokens attended to token 50 in layer 1, so the input of layer 2 has changed"),
        ),
    )


@exercise
def ex01_2(attempt):
    """The longest context that fits a memory."""

    def right(memory, weights, n_layer, n_kv_head, d_head, batch_size, bytes_per_number):
        return max(0, memory - weights) // (2 * n_layer * n_kv_head * d_head * batch_size * bytes_per_number)

    judge(
        attempt,
        right,
        [
            (80 * 10**9, 13_476_831_232, 32, 32, 128, 7, 4),
            (80 * 10**9, 13_476_831_232, 32, 32, 128, 1, 2),
            (24 * 10**9, 16_060_522_496, 32, 8, 128, 3, 1),
            (10**9, 2 * 10**9, 12, 12, 64, 1, 2),
            (48 * 10**9, 3 * 10**9, 26, 4, 96, 5, 2),
        ],
        [
            (lambda m, w, L, G, d, B, size: (m - w) // (2 * L * G * d * B * size),
             "the weights alone can exceed the memory: return 0 then, not a negative length"),
            (lambda m, w, L, G, d, B, size: max(0, m - w) // (L * G * d * B * size),
             "twice too long: a token leaves a key and a value"),
            (lambda m, w, L, G, d, B, size: right(m, w, 1, G, d, B, size),
             "too long: every layer has its own cache"),
            (lambda m, w, L, G, d, B, size: right(m, w, L, 1, d, B, size),
             "too long: each of the n_kv_head heads has its own keys and values"),
            (lambda m, w, L, G, d, B, size: right(m, w, L, G, d, 1, size),
             "too long: each of the batch_size sequences needs its own cache"),
            (lambda m, w, L, G, d, B, size: right(m, 0, L, G, d, B, size),
             "the weights occupy memory too: subtract them first"),
            (lambda m, w, L, G, d, B, size: right(m, w, L, G, d, B, 1), "you counted numbers, not bytes"),
            (lambda m, w, L, G, d, B, size: right(m, w, L, G, d, B, 8 * size),
             "these are bits: memory is given in bytes, and so is bytes_per_number"),
            (lambda m, w, L, G, d, B, size: -(-max(0, m - w) // (2 * L * G * d * B * size)),
             "one token too many: round down, a part of a token cannot be cached"),
            (lambda m, w, L, G, d, B, size: max(0, m - w) / (2 * L * G * d * B * size),
             "whole tokens only: round down"),
        ],
        "count the bytes that one more token of every sequence costs, and divide what is left by them",
    )  # fmt: skip


def attend(q, k, v, shift=0, scale=None, axis=-1):
    """Attention of the last T of M tokens, q (T, h, d_h), k and v (M, h, d_h), the mask's edge moved by `shift`."""
    T, M = len(q), len(k)
    logits = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.ones(T, M, dtype=torch.bool).tril(M - T + shift)
    return torch.einsum("hts,shd->thd", logits.masked_fill(~mask, -math.inf).softmax(axis), v)


ATTENTION_MISTAKES = [
    (lambda q, k, v: attend(q, k, v, shift=len(q) - len(k)),
     "the mask is aligned with the first key: query t of the chunk stands at position M - T + t, not t"),
    (lambda q, k, v: attend(q, k, v, shift=len(k)), "queries see keys of their own future: the causal mask is missing"),
    (lambda q, k, v: attend(q, k, v, shift=-1), "a query does not see its own key: the diagonal belongs to the past"),
    (lambda q, k, v: attend(q, k, v, shift=1), "each query sees one key too many: the first key of its future"),
    (lambda q, k, v: attend(q, k, v, scale=1), "the logits are not divided by √d_h"),
    (lambda q, k, v: attend(q, k, v, scale=1 / q.shape[-1]), "the logits are divided by d_h, not by its square root"),
    (lambda q, k, v: attend(q, k, v, axis=-2),
     "the softmax runs over the queries: the weights of one query, over all its keys, must sum to 1"),
    (lambda q, k, v: attend(q, k, k), "you summed keys: the softmax weighs the values"),
]  # fmt: skip


@exercise
def ex01_3(attempt):
    """Causal attention for a chunk of new tokens against a longer past."""
    sizes = ((3, 8, 4, 6), (5, 5, 4, 6), (1, 7, 2, 3), (2, 9, 3, 5))
    cases = [(normal(T, h, d, seed=1), *normal(2, M, h, d, seed=2)) for T, M, h, d in sizes]
    judge(attempt, attend, cases, ATTENTION_MISTAKES, "not causal attention of the last T of M tokens")


@exercise
def ex01_4(attempt):
    """Grouped-query attention."""

    def grouped(change, q, k, v):
        share = q.shape[1] // k.shape[1]
        return change(q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1))

    def dealt(x, q):
        return x.repeat(1, q.shape[1] // x.shape[1], 1)

    def mean(x, q):
        return x.mean(1, keepdim=True).expand(-1, q.shape[1], -1)

    def first(x, q):
        return x[:, :1].expand(-1, q.shape[1], -1)

    sizes = ((5, 4, 4, 6), (5, 4, 2, 6), (4, 6, 3, 5), (3, 4, 1, 6), (6, 6, 2, 4))
    judge(
        attempt,
        lambda q, k, v: grouped(attend, q, k, v),
        [(normal(T, h, d, seed=1), *normal(2, T, G, d, seed=2)) for T, h, G, d in sizes],
        [
            (lambda q, k, v: attend(q, dealt(k, q), dealt(v, q)),
             "head i reads group i % G, as cards are dealt; neighbours should share: `repeat_interleave`, not "
             "`repeat`"),
            (lambda q, k, v: attend(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), dealt(v, q)),
             "the groups share their keys, but not their values"),
            (lambda q, k, v: attend(q, mean(k, q), mean(v, q)),
             "keys and values are averaged over the groups: each head reads its own group only"),
            (lambda q, k, v: attend(q, first(k, q), first(v, q)), "all heads read group 0: that is MQA"),
            *((lambda q, k, v, wrong=wrong: grouped(wrong, q, k, v), say) for wrong, say in ATTENTION_MISTAKES),
        ],
        "not causal attention with neighbouring heads in groups",
    )  # fmt: skip
