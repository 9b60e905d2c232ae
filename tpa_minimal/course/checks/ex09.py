"""Checkers of notebook 09's exercises."""

import math

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices


@exercise
def ex09_1(attempt):
    """The bytes of a TPA model's cache, some layers of which look back a window only."""

    def right(n_layer, n_head, d_head, rank_k, rank_v, context, batch_size, bytes_per_number, n_local, window):
        positions = (n_layer - n_local) * context + n_local * min(context, window)
        return (rank_k + rank_v) * (n_head + d_head) * positions * batch_size * bytes_per_number

    def numbers(count):
        return lambda L, h, d, k, v, M, B, size, n, w: count(h, d, k, v) * (((L - n) * M + n * min(M, w)) * B * size)

    def positions(count):
        return lambda L, h, d, k, v, M, B, size, n, w: (k + v) * (h + d) * count(L, n, M, w) * B * size

    judge(
        attempt,
        right,
        [
            (80, 64, 128, 1, 3, 131_072, 1, 2, 0, 0),
            (12, 34, 64, 2, 3, 1024, 8, 4, 0, 0),
            (62, 32, 128, 2, 1, 50_000, 2, 1, 52, 1024),
            (32, 32, 128, 1, 4, 1000, 2, 2, 16, 4096),
            (26, 8, 96, 3, 2, 5000, 3, 2, 9, 512),
        ],
        [
            (numbers(lambda h, d, k, v: 2 * h * d),
             "that is MHA's cache, 2 h d_h per token and layer; TPA caches (R_K + R_V)(h + d_h)"),
            (numbers(lambda h, d, k, v: (k + v) * h * d),
             "a pair of factors is h + d_h numbers, not h · d_h: the outer product is never stored"),
            (numbers(lambda h, d, k, v: 2 * k * (h + d)),
             "ranks are counted separately, R_K for the keys and R_V for the values: their sum, not twice R_K"),
            (numbers(lambda h, d, k, v: (k + v) * d), "the head factors are cached too: h + d_h numbers per rank"),
            (lambda *case: right(*case[:6], 1, *case[7:]), "each sequence of the batch has a cache of its own"),
            (lambda *case: right(*case[:7], 1, *case[8:]), "those are numbers: multiply by bytes_per_number"),
            (positions(lambda L, n, M, w: L * M), "local layers cache `window` tokens, not the whole context"),
            (positions(lambda L, n, M, w: (L - n) * M + n * w),
             "a context shorter than the window fills local layers with the context only: min(context, window)"),
            (positions(lambda L, n, M, w: n * M + (L - n) * min(M, w)),
             "n_local layers are the ones with a window, the other n_layer - n_local cache all: yours are swapped"),
            (positions(lambda L, n, M, w: L * M + n * min(M, w)),
             "local layers are counted twice: only n_layer - n_local layers cache the whole context"),
            (positions(lambda L, n, M, w: n * min(M, w)),
             "only the local layers are counted; the others cache the whole context"),
            (positions(lambda L, n, M, w: (L - n) * M),
             "the local layers are missing: they cache min(context, window)"),
            (positions(lambda L, n, M, w: M), "every layer has a cache of its own"),
        ],
        "(R_K + R_V)(h + d_h) numbers for each token that a layer caches",
    )  # fmt: skip


@exercise
def ex09_2(attempt):
    """The largest R = R_K = R_V at which TPA caches at least `times` times less than G shared heads."""

    def ratio(n_head, d_head, n_kv_head, times):
        return n_kv_head * d_head / (times * (n_head + d_head))

    def right(n_head, d_head, n_kv_head, times):
        return math.floor(ratio(n_head, d_head, n_kv_head, times))

    judge(
        attempt,
        right,
        [(64, 128, 8, 2), (64, 128, 8, 1), (12, 64, 12, 1), (64, 64, 64, 8), (128, 128, 2, 3), (32, 128, 8, 1.5),
         (16, 48, 4, 1.5), (40, 40, 10, 2.5), (32, 96, 6, 1.5)],
        [
            (ratio, "there is no fraction of a rank: round down"),
            (lambda *case: math.ceil(ratio(*case)),
             "rounded up: at that rank the saving is smaller than was asked for"),
            (lambda *case: round(ratio(*case)),
             "rounded to the nearest: where that is up, the saving is smaller than was asked for"),
            (lambda h, d, G, times: ratio(h, d, G, 1) // 1 // times,
             "rounded down twice: divide by everything first, then round"),
            (lambda *case: max(0, math.ceil(ratio(*case)) - 1),
             "one rank too few where the saving is met exactly: `at least` includes equality"),
            (lambda h, d, G, times: right(h, d, h, times),
             "the baseline is what the model ships, its n_kv_head shared heads, not MHA with n_head"),
            (lambda h, d, G, times: right(h, d, 2 * G, times),
             "keys and values both have rank R, so TPA caches 2 R (h + d_h) numbers per token"),
            (lambda h, d, G, times: right(h, d, G, 2 * times),
             "half of the right rank: the shipped model caches keys and values, 2 G d_h"),
            (lambda *case: max(1, right(*case)), "where even rank 1 saves too little, the answer is 0"),
            (lambda h, d, G, times: right(h, d, G, 1 / times),
             "multiplied by `times`: TPA's cache times `times` must fit into the shipped one, so divide"),
            (lambda h, d, G, times: right(h, d, G, 1), "`times` is not used: that is break-even"),
            (lambda h, d, G, times: math.floor(G / times), "the head factors are cached too: h + d_h numbers per rank"),
        ],
        "2 R (h + d_h) · times must fit into 2 n_kv_head d_h",
    )  # fmt: skip


@exercise
def ex09_3(attempt):
    """Six sentences of an advertisement, and the baseline that each needs."""
    judge_choices(
        attempt(),
        dict(
            a=("baseline",
               "per token and layer: MHA with 64 heads 16,384, the shipped GQA 2,048, TPA 384. Which two give 42.7?"),
            b=("true", "(2 + 2)(64 + 128) numbers, 80 layers, 2 bytes, 131,072 tokens: work it out"),
            c=("false", "70.6 billion weights (66.4 with TPA) at 2 bytes each come before any cache"),
            d=("false", "how many GB is the cache of 1,000 tokens at 328 kB each, and how many are the weights?"),
            e=("baseline", "392 numbers with 34 heads. The MHA of the comparison has 12 heads; which MHA has 4,352 "
                "numbers?"),
            f=("false", "DeepSeek-V3 ships no shared heads: its latent is 576 numbers; with 128 heads TPA caches "
               "4 · (128 + 128)"),
        ),
        options=("true", "false", "baseline"),
    )  # fmt: skip
