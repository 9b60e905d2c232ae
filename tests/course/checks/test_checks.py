"""Every exercise's checker accepts right answers however they are written, and says what is wrong with wrong ones.

ANSWERS has for each exercise some right answers and at least eight wrong ones, each with words of its diagnosis.
"""

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tpa_minimal.course import checks
from tpa_minimal.experiments import train
from tpa_minimal.memory import MODELS, Layer, Model, ratios
from tpa_minimal.tpa import (
    T6,
    T6Config,
    TensorProductAttention,
    apply_rope,
    assemble,
    factor_bound,
    rms_norm,
    rope_tables,
)


def choices(key: dict, wrong=lambda right: not right) -> list:
    """Wrong answers to a choice: each case alone, some left open, quoted or missing, and no choice at all."""
    cases = [((lambda case=case: {**key, case: wrong(key[case])}), f"{case} is not") for case in key]
    first = next(iter(key))
    return cases + [
        (lambda: {**key, first: ...}, "still open"),
        (lambda: {**key, first: "perhaps"}, "not 'perhaps'"),
        (lambda: {first: key[first]}, "exactly these keys"),
        (lambda: list(key.values()), "exactly these keys"),
    ]


# ------------------------------------------------------------------------------------------------ 01: attention


def attend(q, k, v, diagonal=0, scale=None, axis=-1):
    logits = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q) + diagonal)
    return torch.einsum("hts,shd->thd", logits.masked_fill(~mask, -math.inf).softmax(axis), v)


def with_sdpa(q, k, v, causal=False, **options):
    mask = None if causal else torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k))[:, None]
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=causal, **options).transpose(0, 1)


def spread(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def dealt(x, q):
    return x.repeat(1, q.shape[1] // x.shape[1], 1)


def longest(m, w, n, g, d, b, y):
    return max(0, m - w) // (2 * g * d * n * y * b)


# ------------------------------------------------------------------------------------------------ 02: factors


def factors(change, largest=True):
    def best(matrix, R):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        keep = slice(0, R) if largest else slice(-R, None)
        return change(u[:, keep].mT, s[keep, None], vh[keep], R)

    return best


def predict(config, sum_of_ranks=1, divide=2, per_bound=3, fan=1, dots=1, init=None):
    """The logits' standard deviation with mistakes to choose from; none by default."""
    if init:
        config = type(config)(**{**vars(config), "init": init})
    variance = float(config.d_head) ** (dots - 1)
    for rank in (config.rank_q, config.rank_k):
        for width, is_head_factor in ((config.n_head, True), (config.d_head, False)):
            variance *= factor_bound(config, rank, width, is_head_factor) ** 2 / per_bound * config.d_model**fan
        variance *= rank ** (sum_of_ranks - divide)
    return math.sqrt(variance)


def power(f, x, c=2.0):
    return math.log((f(c * x).norm() / f(x).norm()).item()) / math.log(c)


# --------------------------------------------------------------------------------------------------- 03: RoPE


def commutes(operation, d_head, positions=(1, 2, 5), rtol=1e-9, same=None):
    b = torch.randn(1, len(positions), 3, d_head, dtype=torch.float64)
    tables = rope_tables(torch.tensor(positions), d_head, 100.0, b.dtype)
    one, two = operation(apply_rope(b, *tables)), apply_rope(operation(b), *tables)
    return (same or (lambda x, y: torch.allclose(x, y, rtol=rtol, atol=rtol)))(one, two)


def halves(x, cos, sin, sense=1):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sense * sin[:, None]
    return x1 * cos + x2 * sin, x2 * cos - x1 * sin


def interleaved(x, cos, sin):
    return torch.stack(halves(x, cos, sin), -1).flatten(-2)


def interleaved_in_place(x, cos, sin):
    x[..., 0::2], x[..., 1::2] = (part.clone() for part in halves(x, cos, sin))
    return x


def by_complex_numbers(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, -sin)[:, None]).flatten(-2)


def overwrites_x1(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    x1 = x1 * cos[:, None] + x2 * sin[:, None]
    return torch.stack((x1, x2 * cos[:, None] - x1 * sin[:, None]), -1).flatten(-2)


def rotate(b, positions, base, dtype=torch.float64):
    return apply_rope(b, *rope_tables(positions, b.shape[-1], base, dtype))


def shift_test(layer, relative=True, out_only=False):
    x = torch.randn(1, 32, layer.d_model, dtype=torch.float64)
    pairs = zip(layer(x, start=0), layer(x, start=1000))
    return [((new - old).norm() / (old.norm() if relative else 1)).item() for old, new in pairs]


def name(logits, out):
    if logits > 1e-6:
        return "only keys rotated" if logits > 0.1 else "bfloat16 tables"
    return "values rotated too" if out > 1e-6 else "right"


# ----------------------------------------------------------------------------------------------- 04: special cases


def masks(reads):
    return F.one_hot(torch.tensor(reads), max(reads) + 1).T.double()


def by_loop(reads):
    rows = [[0.0] * len(reads) for _ in range(max(reads) + 1)]
    for i, row in enumerate(reads):
        rows[row][i] = float(len(rows))
    return rows


def largest(h, fits):
    return max((G for G in range(1, h + 1) if h % G == 0 and fits(G)), default=1)


def routing(a_from=0, b_from=4, a=1.0):
    W_a, W_b = torch.zeros(4, 20), torch.zeros(8, 20)
    W_a[:, a_from : a_from + 4] = a * torch.eye(4)
    W_b[:, b_from : b_from + 8] = torch.eye(8)
    return W_a, W_b


def mechanism(K, one=None, many=None, distinct=None):
    """The solution, with any of its three measurements replaced by a wrong one."""
    h, rank = K.shape[1], torch.linalg.matrix_rank
    one = rank(K[0]).item() if one is None else one
    many = rank(K.transpose(0, 1).flatten(1)).item() if many is None else many
    distinct = len(torch.unique(K[0].round(decimals=9), dim=0)) if distinct is None else distinct
    if many > one:
        return "contextual A"
    if many == h:
        return "MHA"
    return "fixed A" if distinct == h else "MQA" if distinct == 1 else "GQA"


def confused(true, said):
    return lambda K: said if mechanism(K) == true else mechanism(K)


# --------------------------------------------------------------------------------------------------- 05: the cache


def append(room, length, new, check=True, shapes=slice(None), strict=False, at=0, error=ValueError, fits=bool):
    end = length + new.shape[2]
    if check and (end >= room.shape[2] if strict else end > room.shape[2]):
        raise error("full")
    place = room[:, :, length + at : end + at]
    if place.shape[shapes] != new.shape[shapes] or (fits is not bool and fits(place) != fits(new)):
        raise error("shape")
    place.copy_(new[:, :, : place.shape[2]])
    return room[:, :, :end]


def write_then_check(room, length, new):
    end = min(length + new.shape[2], room.shape[2])
    room[:, :, length:end] = new[:, :, : end - length]
    if new.shape[:2] != room.shape[:2] or length + new.shape[2] > room.shape[2] or new.shape[3] != room.shape[3]:
        raise ValueError("too late")
    return room[:, :, :end]


def numbers(c):
    return (c.rank_k + c.rank_v) * (c.n_head + c.d_head) * c.n_layer


def context(c, n, b, w):
    return n // (numbers(c) * b * w)


def diagnose(patients, batches=(1, 2), length=40):
    def error(patient, batch_size):
        x = torch.randn(batch_size, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cache = patient.new_cache(batch_size)
        cached = torch.cat([patient(part, cache) for part in x.split([length // 2] + [1] * (length // 2), 1)], 1)
        return (cached - patient(x)).abs().max()

    words = []
    for patient in patients:
        alone, together = error(patient, batches[0]), error(patient, batches[1])
        ill = "batch" if alone < 1e-10 else "rounding" if alone < 0.05 else "window"
        words.append("healthy" if together < 1e-10 else ill)
    return words


# ------------------------------------------------------------------------------------------ 06: online softmax


def merge(one, two, which=torch.maximum, sense=1, power=torch.exp, f=(True, True), scale_s=True, scale_y=True):
    (m_1, s_1, y_1), (m_2, s_2, y_2) = one, two
    m = which(m_1, m_2)
    f_1, f_2 = (power(sense * (old - m)) if scale else torch.ones_like(m) for old, scale in zip((m_1, m_2), f))
    s = s_1 * f_1 + s_2 * f_2 if scale_s else s_1 + s_2
    return m, s, y_1 * f_1[:, None] + y_2 * f_2[:, None] if scale_y else y_1 + y_2


def merge_in_place(one, two):
    (m_1, s_1, y_1), (m_2, s_2, y_2) = one, two
    m = torch.maximum(m_1, m_2)
    s_1 *= (m_1 - m).exp()
    y_1 *= (m_1 - m).exp()[:, None]
    return m, s_1 + s_2 * (m_2 - m).exp(), y_1 + y_2 * (m_2 - m).exp()[:, None]


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


def order(rule):
    return lambda h, d, q: "P first" if rule(h, d, q) else "queries first"


def rank_q(h, d, k, v, weighing=True, products=True, values=True, strict=True):
    left = 2 * h * d - (h * v * d if values else 0)
    return max(0, (left - strict) // (k * ((d if products else 0) + (h if weighing else 0))))


# --------------------------------------------------------------------------------------------------- 07: the model


def nucleus(logits, p, descending=True, inclusive=True, unsort=True, flat=False):
    shape, logits = logits.shape, logits.view(1, -1) if flat else logits
    ordered, places = logits.sort(dim=-1, descending=descending)
    probabilities = ordered.softmax(-1)
    total = probabilities.cumsum(-1)
    outside = total - probabilities >= p if inclusive else total > p
    if unsort:
        outside = torch.zeros_like(outside).scatter(-1, places, outside)
    return logits.masked_fill(outside, -math.inf).view(shape)


def nucleus_by_loop(logits, p):
    out = torch.full_like(logits, -math.inf)
    for row, probabilities in enumerate(logits.softmax(-1)):
        held = 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if held >= p:
                break
            held += probabilities[token].item()
            out[row, token] = logits[row, token]
    return out


def by_threshold(logits, p):
    ordered = logits.sort(dim=-1, descending=True).values
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    lowest = ordered.masked_fill(before >= p, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, -math.inf)


def sums_of_logits(logits, p):
    ordered, places = logits.sort(dim=-1, descending=True)
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, places, ordered.cumsum(-1) - ordered >= p)
    return logits.masked_fill(outside, -math.inf)


# --------------------------------------------------------------------------------------------------- 08: training


def windows(shift=1, first=0, extra=0):
    def cut(tokens, starts, seq_len):
        rows = [tokens[s + first : s + first + seq_len + extra] for s in starts.tolist()]
        moved = [tokens[s + first + shift : s + first + shift + seq_len + extra] for s in starts.tolist()]
        return torch.stack(rows), torch.stack(moved)

    return cut


def schedule(rise=1, low=0.05, shape=lambda p: (1 + math.cos(math.pi * p)) / 2, whole=False, peak_=None, span_=None):
    def rate(step, steps, warmup, peak):
        peak = peak_ or peak
        if step < warmup:
            return peak * (step + rise) / warmup
        progress = step / steps if whole else (step - warmup) / (span_ or steps - warmup)
        return peak * (low + (1 - low) * shape(progress))

    return rate


def hard_coded_floor(step, steps, warmup, peak):
    return schedule()(step, steps, warmup, peak) if step < warmup else 0.1 + (peak - 0.1) * schedule(low=0)(
        step, steps, warmup, 1.0
    )  # fmt: skip


def interval(sign=1, power=0.5, correction=1, paired=True, absolute=False, t_=None, dtype=torch.float64):
    def of(first, second, t):
        first, second = (torch.tensor(x, dtype=dtype) for x in (first, second))
        d = sign * (first - second)
        d = d.abs() if absolute else d
        s = d.std(correction=correction) if paired else (first.var() + second.var()).sqrt()
        half = (t_ or t) * s / len(d) ** power
        return d.mean() - half, d.mean() + half

    return of


def by_statistics(first, second, t):
    d = [x - y for x, y in zip(first, second)]
    return [statistics.mean(d) + sign * t * statistics.stdev(d) / math.sqrt(len(d)) for sign in (-1, 1)]


# --------------------------------------------------------------------------------------------- 09 and 10: memory


def places(L, n, M, w):
    return (L - n) * M + n * min(M, w)


def by_trial(h, d, G, t):
    return max((R for R in range(1, 999) if 2 * R * (h + d) * t <= 2 * G * d), default=0)


def merge_many(m, s, y, power=torch.exp2, common=True, rescale_s=True, rescale_y=True, divide=True):
    shrink = power(m - m.amax(0)) if common else power(m)
    y = ((shrink if rescale_y else torch.ones_like(s))[..., None] * y).sum(0)
    return y / ((shrink if rescale_s else 1) * s).sum(0)[:, None] if divide else y


def merge_one_by_one(m, s, y):
    m_, s_, y_ = torch.full_like(m[0], -1e30), torch.zeros_like(s[0]), torch.zeros_like(y[0])
    for m_i, s_i, y_i in zip(m, s, y):
        new = torch.maximum(m_, m_i)
        f, f_i = torch.exp2(m_ - new), torch.exp2(m_i - new)
        m_, s_, y_ = new, f * s_ + f_i * s_i, f[:, None] * y_ + f_i[:, None] * y_i
    return y_ / s_[:, None]


def mean_of_outputs(m, s, y):
    weights = (torch.exp2(m - m.amax(0)) * s)[..., None]
    return (weights * (y / s[..., None])).sum(0) / weights.sum(0)


def least_ms(B, M, h, d, k, v, size, speed):
    return B * M * (k + v) * (h + d) * size / speed / 1e6


# ------------------------------------------------------------------------------------------- 11: variants

CACHED = {
    "shared A": lambda R, h, d: R * (h + 2 * d),
    "shared both": lambda R, h, d: R * (h + d),
    "fixed a_k": lambda R, h, d: R * (h + 2 * d),
    "shared B, fixed A": lambda R, h, d: R * d,
}


def cached(**change):
    rules = {**CACHED, **{key.replace("_AND_", ", ").replace("_", " "): rule for key, rule in change.items()}}
    rules["fixed a_k"] = rules.pop("fixed a k", rules["fixed a_k"])
    return lambda variant, R, h, d_head: rules[variant](R, h, d_head)


def shared(widths=lambda h, d: (h, d, 0, d, h, d), own=True, change=lambda a_q, b_q, a_k, b_k, a_v, b_v: (
    a_q, b_q, a_v, b_k, a_v, b_v), pass_padding=True, pass_start=True):  # fmt: skip
    """A layer with shared head factors, and mistakes to choose from."""

    class Shared(TensorProductAttention):
        def factor_widths(self):
            return widths(self.config.n_head, self.config.d_head)

        if own:

            def attend(self, *args, padding=None):
                *six, start, padding = (*args, padding)[:8] if len(args) > 7 else (*args, padding)
                start = start if pass_start else 0
                return super().attend(*change(*six), start, padding if pass_padding else None)

    return Shared


def rotate_pairs(b, cos, sin):
    b1, b2 = b.chunk(2, dim=-1)
    return torch.cat((b1 * cos + b2 * sin, b2 * cos - b1 * sin), dim=-1)


def vec(b, c):
    return (c[:, :, None] * b[:, None, :]).flatten(1)


# ----------------------------------------------------------------------------------------- 12: other models


def heads(weight, d_head):
    return weight.clone().view(-1, d_head, weight.shape[1])


def negate(weight, d_head, rows):
    per_head = heads(weight, d_head)
    per_head[:, rows] *= -1
    return per_head.view_as(weight)


def moved(W, h, R):
    return W.unflatten(0, (h, R)).transpose(0, 1).flatten(0, 1)


def most(numbers, bound):
    return max(R for R in range(1000) if numbers * R < bound)


def ranks(h, d, G):
    return most(2 * d, 2 * G * d), most(2 * (h + d), 2 * G * d)


# --------------------------------------------------------------------------------------------- all exercises

ILL = ["rounding", "batch", "healthy", "window"]
MOVED = {"embedding", "out_proj", "down_proj"}
LEAFLET = dict(a="baseline", b="true", c="false", d="false", e="baseline", f="false")

ANSWERS = {  # exercise: (right answers, [(wrong answer, words of its diagnosis)])
    "ex00_1": (
        [lambda h, d: 2 * h * d, lambda n_head, d_head: sum(d_head for _ in range(n_head) for _ in "kv")],
        [
            (lambda h, d: h * d, "keys only"),
            (lambda h, d: 2 * d, "each of the n_head heads"),
            (lambda h, d: 3 * h * d, "queries are not cached"),
            (lambda h, d: 2 * h, "not their numbers"),
            (lambda h, d: 4 * h * d, "16-bit"),
            (lambda h, d: 8 * h * d, "32-bit"),
            (lambda h, d: 2 * (h + d), "product, not the sum"),
            (lambda h, d: h * 128, "draw one token's"),
            (lambda h, d: 24 * d, "draw one token's"),
            (lambda h, d: 1536, "right for 12 heads"),
            (lambda h, d: "2hd", "expected a number"),
            (lambda h: h, "your code raised TypeError"),
        ],
    ),
    "ex01_1": ([lambda: dict(a=True, b=True, c=False, d=True, e=True, f=False)],
               choices(dict(a=True, b=True, c=False, d=True, e=True, f=False))),
    "ex01_2": (
        [longest, lambda m, w, n, g, d, b, y: 0 if w > m else math.floor((m - w) / (2 * g * d * n * y * b))],
        [
            (lambda m, w, n, g, d, b, y: max(0, m - w) // (g * d * n * y * b), "a key and a value"),
            (lambda m, w, n, g, d, b, y: longest(m, w, 1, g, d, b, y), "every layer has its own"),
            (lambda m, w, n, g, d, b, y: longest(m, w, n, 1, d, b, y), "n_kv_head heads"),
            (lambda m, w, n, g, d, b, y: longest(m, w, n, g, d, 1, y), "each of the batch_size"),
            (lambda m, w, n, g, d, b, y: longest(m, 0, n, g, d, b, y), "subtract them"),
            (lambda m, w, n, g, d, b, y: longest(m, w, n, g, d, b, 1), "numbers, not bytes"),
            (lambda m, w, n, g, d, b, y: longest(m, w, n, g, d, b, 8 * y), "bits"),
            (lambda m, w, n, g, d, b, y: (m - w) // (2 * g * d * n * y * b), "not a negative"),
            (lambda m, w, n, g, d, b, y: math.ceil(max(0, m - w) / (2 * g * d * n * y * b)), "round down"),
            (lambda m, w, n, g, d, b, y: max(0, m - w) / (2 * g * d * n * y * b), "whole tokens only"),
            (lambda *case: 1000, "what is left"),
        ],
    ),
    "ex01_3": (
        [attend, with_sdpa],
        [
            (lambda q, k, v: with_sdpa(q, k, v, causal=True), "aligned with the first key"),
            (lambda q, k, v: attend(q, k, v, diagonal=len(k)), "causal mask is missing"),
            (lambda q, k, v: attend(q, k, v, diagonal=-1), "its own key"),
            (lambda q, k, v: attend(q, k, v, diagonal=1), "one key too many"),
            (lambda q, k, v: attend(q, k, v, scale=1), "not divided by"),
            (lambda q, k, v: attend(q, k, v, scale=1 / q.shape[-1]), "not by its square root"),
            (lambda q, k, v: attend(q, k, v, axis=-2), "softmax runs over the queries"),
            (lambda q, k, v: attend(q, k, k), "weighs the values"),
            (lambda q, k, v: attend(q, k, v).transpose(0, 1), "expected shape"),
            (lambda q, k, v: attend(q, k, v).bfloat16(), "digits are lost"),
            (lambda q, k, v: q @ v, "RuntimeError"),
        ],
    ),
    "ex01_4": (
        [lambda q, k, v: attend(q, spread(k, q), spread(v, q)),
         lambda q, k, v: with_sdpa(q, k, v, causal=True, enable_gqa=True)],
        [
            (lambda q, k, v: attend(q, dealt(k, q), dealt(v, q)), "`repeat_interleave`"),
            (lambda q, k, v: attend(q, spread(k, q), dealt(v, q)), "not their values"),
            (lambda q, k, v: attend(q, *(x.mean(1, keepdim=True).expand_as(q) for x in (k, v))), "averaged"),
            (lambda q, k, v: attend(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)), "that is MQA"),
            (lambda q, k, v: attend(q, spread(k, q), spread(v, q), diagonal=9), "causal mask is missing"),
            (lambda q, k, v: attend(q, spread(k, q), spread(v, q), diagonal=-1), "its own key"),
            (lambda q, k, v: attend(q, spread(k, q), spread(v, q), scale=1), "not divided by"),
            (lambda q, k, v: attend(q, spread(k, q), spread(v, q), axis=-2), "over the queries"),
            (lambda q, k, v: attend(q, k, v), "RuntimeError"),
        ],
    ),
    "ex02_1": (
        [factors(lambda u, s, v, R: (R * u * s, v)), factors(lambda u, s, v, R: [u, R * s * v]),
         factors(lambda u, s, v, R: (-((R * s).sqrt()) * u, -((R * s).sqrt()) * v))],
        [
            (factors(lambda u, s, v, R: (u * s, v)), "divides by R"),
            (factors(lambda u, s, v, R: (R * u * s, R * v)), "not to both"),
            (factors(lambda u, s, v, R: (R * u * s, s * v)), "into both factors: s into one"),
            (factors(lambda u, s, v, R: (u * s, s * v)), "R into none"),
            (factors(lambda u, s, v, R: (R * u, v)), "values are missing"),
            (factors(lambda u, s, v, R: (u, v)), "the factor R are missing"),
            (factors(lambda u, s, v, R: (R * u * s.sqrt(), v)), "√s stands in one factor only"),
            (factors(lambda u, s, v, R: (R * u * s, v), largest=False), "smallest singular values"),
            (factors(lambda u, s, v, R: ((R * u * s).mT, v)), "rank-major"),
            (factors(lambda u, s, v, R: (R * u * s, v.flip(-1))), "differs from the best fit by"),
            (lambda matrix, R: (matrix.mT, matrix), "a has shape (10, 6), not (3, 6)"),
            (lambda matrix, R: matrix, "return two tensors"),
        ],
    ),
    "ex02_2": (
        [lambda h, d: (h * d - 1) // (h + d),
         lambda h, d: max((R for R in range(1, 200) if 2 * R * (h + d) < 2 * h * d), default=0),
         lambda h, d: np.ceil(h * d / (h + d)) - 1],
        [
            (lambda h, d: h * d // (h + d), "both take equally much"),
            (lambda h, d: (2 * h * d - 1) // (h + d), "twice too large"),
            (lambda h, d: (h * d - 1) // (2 * (h + d)), "half of the right rank"),
            (min, "largest rank there is"),
            (lambda h, d: h * d / (h + d), "whole ranks only"),
            (lambda h, d: -(-h * d // (h + d)), "rounded up"),
            (lambda h, d: max(1, (h * d - 1) // (h + d)), "the answer is 0"),
            (lambda h, d: h - 1, "needs a head factor too"),
            (lambda h, d: 1, "compare R(h + d_h)"),
        ],
    ),
    "ex02_3": (
        [power, lambda f, x: round(power(f, x)), lambda f, x: power(f, x, 3.0)],
        [
            (lambda f, x: 2 ** power(f, x), "when x doubles"),
            (lambda f, x: 3 ** power(f, x), "factor for 3 x"),
            (lambda f, x: power(f, x) * math.log(2), "natural logarithm"),
            (lambda f, x: power(f, x) * math.log10(2), "to base 10"),
            (lambda f, x: -power(f, x), "upside down"),
            (lambda f, x: 2 * power(f, x), "twice too large"),
            (lambda f, x: power(f, x) / 2, "half of it"),
            (lambda f, x: 1, "a linear map"),
            (lambda f, x: 2, "not everything is quadratic"),
            (lambda f, x: f(2 * x) / f(x), "for function = mha_key"),
            (lambda f, x: round(power(f, x)) + 1, "as a power of 2"),
        ],
    ),
    "ex02_4": (
        [predict, lambda config: np.sqrt(predict(config) ** 2)],
        [
            (lambda config: predict(config) ** 2, "this is the variance"),
            (lambda config: predict(config, divide=0), "1/R divides the whole sum"),
            (lambda config: predict(config, divide=1), "divides the variance by R²"),
            (lambda config: predict(config, sum_of_ranks=0), "is R times that of one"),
            (lambda config: predict(config, per_bound=1), "bound²/3"),
            (lambda config: predict(config, per_bound=12), "interval of width bound"),
            (lambda config: predict(config, fan=0), "sums d_model products"),
            (lambda config: predict(config, dots=2), "logit is q · k / √d_h"),
            (lambda config: predict(config, dots=0), "q · k sums d_h products"),
            (lambda config: predict(config, init="paper"), 'wrong for "authors"'),
            (lambda config: predict(T6Config(**{**vars(config), "rank_k": config.rank_q})), "R_K, not R_Q"),
            (lambda config: predict(T6Config(**{**vars(config), "rank_q": config.rank_k})), "R_Q, not R_K"),
            (lambda config: 1.0, "times the right value"),
        ],
    ),
    "ex03_1": (
        [commutes, lambda operation, d: bool(commutes(operation, d, positions=(700,), rtol=1e-7))],
        [
            (lambda operation, d: commutes(operation, d, positions=(0,)), "everything commutes"),
            (lambda operation, d: True, "everything commutes"),
            (lambda operation, d: False, "nothing commutes"),
            (lambda operation, d: commutes(operation, d, same=torch.equal), "nothing commutes|use torch.allclose"),
            (lambda operation, d: commutes(operation, d, rtol=1e-2), "almost a number"),
            (lambda operation, d: commutes(operation, d, same=lambda x, y: torch.allclose(x[..., 0], y[..., 0])),
             "compare all features"),
            (lambda operation, d: list(range(10**5)), "return True or False"),
            (lambda operation, d: commutes(operation, d, same=lambda x, y: x.shape == y.shape), "everything commutes"),
            (lambda operation, d: not commutes(operation, d), "mixing the ranks"),
            (lambda operation, d: "yes", "return True or False"),
            (lambda operation, d: operation(torch.ones(2, 2)), "RuntimeError"),
        ],
    ),
    "ex03_2": (
        [interleaved, by_complex_numbers],
        [
            (apply_rope, "half-split layout again"),
            (lambda x, cos, sin: torch.cat(halves(x, cos, sin), -1), "in the wrong places"),
            (lambda x, cos, sin: torch.stack(halves(x, cos, sin, -1), -1).flatten(-2), "rotates the other way"),
            (overwrites_x1, "must use the old x1"),
            (lambda x, cos, sin: interleaved(x, cos.flip(-1), sin.flip(-1)), "reverse order"),
            (lambda x, cos, sin: interleaved(x, sin, cos), "exchanged"),
            (lambda x, cos, sin: interleaved(x, cos, sin) * 1.1, "lengths change"),
            (lambda x, cos, sin: torch.stack(halves(x, cos, sin), -1), "expected shape"),
            (lambda x, cos, sin: halves(x, cos, sin), "expected a tensor"),
            (lambda x, cos, sin: interleaved(x, cos, sin).bfloat16(), "keep the type"),
            (lambda x, cos, sin: interleaved(x.bfloat16(), cos, sin).bfloat16(), "keep the type"),
            (interleaved_in_place, "changed the input in place"),
            (lambda x, cos, sin: cos[10], "IndexError"),
        ],
    ),
    "ex03_3": (
        [lambda b, by, base: rotate(b, torch.tensor([-by]), base),
         lambda b, by, base: rotate(b, torch.full((b.shape[1],), -by), base)],
        [
            (lambda b, by, base: b, "still at their old"),
            (lambda b, by, base: rotate(b, torch.tensor([by]), base), "moved forward"),
            (lambda b, by, base: rotate(b, torch.arange(b.shape[1]), base), "already rotated"),
            (lambda b, by, base: rotate(b, -torch.arange(by, by + b.shape[1]), base), "at position 0"),
            (lambda b, by, base: rotate(b, torch.tensor([-by]), 10000.0), "use the base"),
            (lambda b, by, base: rotate(b, torch.tensor([-by]), base, torch.float32), "b_k.dtype"),
            (lambda b, by, base: rotate(b, torch.tensor([1 - by]), base), "Θ_(s - by)"),
            (lambda b, by, base: rotate(b, torch.tensor([-by]), base) * 1.1, "lengths change"),
            (lambda b, by, base: rotate(b, torch.tensor([-by]), base).bfloat16(), "keep the type"),
            (lambda b, by, base: rotate(b, torch.tensor([-by]), base).float(), "keep the type"),
        ],
    ),
    "ex03_4": (
        [lambda layer: name(*shift_test(layer)), lambda layer: "".join(name(*shift_test(layer)))],
        [
            (lambda layer: name(shift_test(layer)[0], 0), "look at the outputs too"),
            (lambda layer: name(shift_test(layer)[1], shift_test(layer)[1]), "only its outputs do"),
            (lambda layer: name(*shift_test(layer, relative=False)), "divide the change by"),
            (lambda layer: name(*(x if x > 0.1 else 0 for x in shift_test(layer))), "well below 1e-3"),
            (lambda layer: "right", "at start=1000"),
            (lambda layer: "only keys rotated", "logits do not change"),
            (lambda layer: "values rotated too", "outputs do not change"),
            (lambda layer: "bfloat16 tables", "about 1e-15"),
            (lambda layer: "wrong", "answer one of"),
        ],
    ),
    "ex04_1": (
        [lambda reads: (max(reads) + 1) * masks(reads), by_loop],
        [
            (masks, "R times too small"),
            (lambda reads: (max(reads) + 1) * masks(reads).T, "the transpose"),
            (lambda reads: len(reads) * masks(reads), "h is right only for MHA"),
            (lambda reads: torch.ones(max(reads) + 1, len(reads)), "mixes several"),
            (lambda reads: (max(reads) + 1) * masks(reads).roll(1, 0), "must be R in row"),
            (lambda reads: (max(reads) + 1) * masks(sorted(reads)), "must be R in row"),
            (lambda reads: ((max(reads) + 1) * masks(reads)).long(), "must be a float tensor"),
            (lambda reads: masks(reads) / (max(reads) + 1), "divide by R"),
            (lambda reads: (max(reads) + 1) ** 0.5 * masks(reads), "√R is not enough"),
            (lambda reads: "A", "expected a tensor"),
        ],
    ),
    "ex04_2": (
        [lambda h, d, R: largest(h, lambda G: G * d <= R * (h + d)),
         lambda h, d, R: next(G for G in range(h, 0, -1) if h % G == 0 and 2 * G * d <= 2 * R * (h + d))],
        [
            (lambda h, d, R: largest(h, lambda G: G * d < R * (h + d)), "includes an equal number"),
            (lambda h, d, R: largest(h, lambda G: G <= R), "caches its head factors too"),
            (lambda h, d, R: largest(h, lambda G: G * d <= 2 * R * (h + d)), "on both sides"),
            (lambda h, d, R: largest(h, lambda G: 2 * G * d <= R * (h + d)), "on both sides"),
            (lambda h, d, R: R * (h + d) // d, "must divide h"),
            (lambda h, d, R: min(h, R * (h + d) // d), "must divide h"),
            (lambda h, d, R: R * (h + d) / d, "whole number"),
            (lambda h, d, R: h, "caches more than TPA"),
            (lambda h, d, R: 1, "the largest G"),
            (lambda h, d, R: 3, "you say 3, and it is"),
        ],
    ),
    "ex04_3": (
        [routing, lambda: [W.tolist() for W in routing()]],
        [
            (lambda: tuple(W.T for W in routing()), "the transpose"),
            (lambda: (torch.ones(4, 20), routing()[1]), "heads [0, 1, 2, 3] see"),
            (lambda: (torch.zeros(4, 20), routing()[1]), "no head can see"),
            (lambda: (routing()[0].roll(1, 0), routing()[1]), "one-hot at the speaker"),
            (lambda: (routing()[0], routing()[1] + routing(b_from=12)[1]), "b must read entries 4 to 11"),
            (lambda: routing(b_from=12), "is not the topic"),
            (lambda: routing(a=2.0), "2 times"),
            (lambda: routing()[0], "return two tensors"),
            (lambda: routing()[::-1], "in the other order"),
            (lambda: (routing()[0], routing()[0]), "W_b must have shape"),
        ],
    ),
    "ex04_4": (
        [mechanism, lambda K: mechanism(K + 0.0)],
        [
            (lambda K: mechanism(K, many=torch.linalg.matrix_rank(K[0]).item()), "put many tokens side by side"),
            (lambda K: mechanism(K, one=torch.linalg.matrix_rank(K.transpose(0, 1).flatten(1)).item()), "low rank"),
            (lambda K: mechanism(K, distinct=K.shape[1]), "count the different rows"),
            (confused("fixed A", "GQA"), "no two heads have equal keys"),
            (confused("GQA", "MQA"), "there are several groups"),
            (confused("MQA", "GQA"), "there is one group"),
            (confused("MHA", "fixed A"), "full rank h"),
            (lambda K: "MQA" if torch.linalg.matrix_rank(K[0]) == 1 else mechanism(K), "MQA's are *equal*"),
            (lambda K: "TPA", "answer one of"),
        ],
    ),
    "ex05_1": (
        [append, lambda room, n, new: append(room.flatten(0, 1)[None], n, new.flatten(0, 1)[None])[0].unflatten(
            0, room.shape[:2]) if new.shape[:2] == room.shape[:2] else append(room, n, new)],
        [
            (lambda room, n, new: append(room, n, new)[:, :, n:], "new positions only"),
            (lambda room, n, new: append(room, n, new) is None or room, "whole room"),
            (lambda room, n, new: append(room, n, new).clone(), "a copy"),
            (lambda room, n, new: torch.cat((room[:, :, :n], new), dim=2), "write into it"),
            (lambda room, n, new: append(room, n, new, at=-1 if n else 0), "earlier positions"),
            (lambda room, n, new: append(room, n, new, strict=True), "use > and not >="),
            (lambda room, n, new: append(room, n, new, check=False, shapes=slice(0)), "5 cached and 2 new"),
            (lambda room, n, new: append(room, n, new, shapes=slice(0)), "broadcasts silently|PyTorch noticed"),
            (lambda room, n, new: append(room, n, new, shapes=slice(3)), "heads of width 1"),
            (lambda room, n, new: append(room, n, new, shapes=slice(0), fits=lambda x: x.numel() // x.shape[2]),
             "heads and sequences exchanged: PyTorch noticed"),
            (lambda room, n, new: append(room, n, new, shapes=slice(0), fits=lambda x: (
                x.shape[0], min(x.shape[1], 3), x.shape[3])), "four heads"),
            (lambda room, n, new: append(room, n, new, shapes=slice(2), fits=lambda x: min(x.shape[3], 4)),
             "heads of width 8"),
            (lambda room, n, new: append(room, n, new, error=AssertionError), "skipped under python -O"),
            (lambda room, n, new: append(room, n, new, error=RuntimeError), "PyTorch noticed"),
            (write_then_check, "only after writing"),
        ],
    ),
    "ex05_2": (
        [context, lambda c, n, b, w: int(n / (numbers(c) * b * w))],
        [
            (lambda c, n, b, w: n / (numbers(c) * b * w), "whole tokens only"),
            (lambda c, n, b, w: context(c, n * c.n_layer, b, w), "n_layer"),
            (lambda c, n, b, w: context(c, n * b, b, w), "batch_size"),
            (lambda c, n, b, w: context(c, n * w, b, w), "bytes_per_number"),
            (lambda c, n, b, w: n // (2 * c.n_head * c.d_head * c.n_layer * b * w), "MHA's cache"),
            (lambda c, n, b, w: n // ((c.rank_k + c.rank_v) * c.d_head * c.n_layer * b * w), "only the b factors"),
            (lambda c, n, b, w: n // (2 * c.rank_k * (c.n_head + c.d_head) * c.n_layer * b * w), "can differ"),
            (lambda c, n, b, w: context(c, n, b, w) + 1, "rounded up"),
            (lambda c, n, b, w: context(c, n, b * (c.rank_q + c.rank_k + c.rank_v), w / (c.rank_k + c.rank_v)), "R_Q"),
            (lambda c, n, b, w: min(context(c, n, b, w), c.max_len), "max_len has no place"),
            (lambda c, n, b, w: 7, "you say 7"),
        ],
    ),
    "ex05_3": (
        [diagnose, lambda patients: tuple(diagnose(patients, batches=(1, 3)))],
        [
            (lambda patients: ILL, "another order"),
            (lambda patients: ["rounding", "healthy", "batch", "window"], "decode two different ones"),
            (lambda patients: ["healthy", "batch", "rounding", "window"], "fourth digit"),
            (lambda patients: ["rounding", "batch", "healthy", "rounding"], "while the context is short"),
            (lambda patients: ["window", "batch", "healthy", "rounding"], "a little wrong"),
            (lambda patients: ["batch", "batch", "healthy", "window"], "wrong for a single sequence too"),
            (lambda patients: ["rounding", "batch", "window", "window"], "however long the context"),
            (lambda patients: diagnose(patients, batches=(1, 1)), "decode two different ones"),
            (lambda patients: diagnose(patients, length=8), "context is short"),
            (lambda patients: ["healthy"], "four patients"),
            (lambda patients: ["ill"] * 4, "is not one of the words"),
            (lambda patients: "healthy", "a list of four words"),
        ],
    ),
    "ex06_1": (
        [merge, lambda one, two: list(merge(two, one))],
        [
            (lambda a, b: merge(a, b, scale_s=False, scale_y=False), "different maxima"),
            (lambda a, b: merge(a, b, scale_y=False), "s is right and y is not"),
            (lambda a, b: merge(a, b, scale_s=False), "y is right and s is not"),
            (lambda a, b: merge(a, b, sense=-1), "wrong way round"),
            (lambda a, b: merge(a, b, f=(True, False)), "only the first part"),
            (lambda a, b: merge(a, b, f=(False, True)), "only the second part"),
            (lambda a, b: merge(a, b, which=lambda x, y: x), "may overflow"),
            (lambda a, b: (a[0] + b[0], *merge(a, b)[1:]), "larger of the two"),
            (mean_of_averages, "mean of the two averages"),
            (through_the_averages, "seen nothing"),
            (lambda a, b: merge(a, b) if b[1].all() else b, "seen nothing"),
            (lambda a, b: merge(a, b, power=torch.exp2), "natural exponentials"),
            (merge_without_subtracting, "overflows"),
            (lambda a, b: (*merge(a, b)[:2], merge(a, b)[2] / merge(a, b)[1][:, None]), "divided by s already"),
            (lambda a, b: merge(a, b)[2], "return 3 values"),
            (merge_in_place, "in place"),
        ],
    ),
    "ex06_2": (
        [order(lambda h, d, q: q * (d + h) < h * (d + 1)), order(lambda h, d, q: 3 * q * (d + h) < 3 * h * d + 3 * h)],
        [
            (order(lambda h, d, q: q * (d + h) >= h * (d + 1)), "other way round"),
            (order(lambda h, d, q: q * d < h * d), "each head also weighs P"),
            (order(lambda h, d, q: q < d), "R_Q against d_h"),
            (order(lambda h, d, q: q * (d + h) <= h * (d + 1)), "both cost 36"),
            (order(lambda h, d, q: q * (d + h) < h * d), "a_k weighs each"),
            (order(lambda h, d, q: q * d * h < h * (d + 1)), "no head index"),
            (order(lambda h, d, q: True), "depends on R_Q"),
            (order(lambda h, d, q: False), "depends on R_Q"),
            (lambda h, d, q: q * d < h * d, 'return "P first"'),
            (order(lambda h, d, q: q < 5), "you say"),
        ],
    ),
    "ex06_3": (
        [rank_q, lambda h, d, k, v: sum(q * k * (d + h) + h * v * d < 2 * h * d for q in range(1, 999))],
        [
            (lambda h, d, k, v: rank_q(h, d, k, v, strict=False), "fewer, not as many"),
            (lambda h, d, k, v: rank_q(h, d, k, v, values=False), "values are missing"),
            (lambda h, d, k, v: rank_q(h, d, k, v, weighing=False), "weighing of P"),
            (lambda h, d, k, v: rank_q(h, d, k, v, products=False), "products for P"),
            (lambda h, d, k, v: rank_q(h, d, 1, v), "R_K is missing"),
            (lambda h, d, k, v: rank_q(h, d, k, 1), "R_V is missing"),
            (lambda h, d, k, v: (2 * h * d - h * v * d - 1) // (k * (d + h)), "negative"),
            (lambda h, d, k, v: max(0, 2 * h * d - h * v * d) / (k * (d + h)), "whole ranks only"),
            (lambda h, d, k, v: 6, "you say 6"),
        ],
    ),
    "ex07_1": (
        [lambda d, w, q, r: round((4 * d - (q + r) * w) / (q + 2 * r + w)),
         lambda d, w, q, r: min(range(1, 999), key=lambda h: abs((q + 2 * r + w) * h + (q + r) * w - 4 * d))],
        [
            (lambda d, w, q, r: round((4 * d - (q + 2 * r) * w) / (q + 2 * r + w)), "computed once"),
            (lambda d, w, q, r: round((4 * d - (q + r) * w) / (q + r + w)), "head factors too"),
            (lambda d, w, q, r: round((4 * d - (q + 2 * r) * w) / (q + r + w)), "head factors instead"),
            (lambda d, w, q, r: round((4 * d - (q + r) * w) / (q + 2 * r)), "output projection is missing"),
            (lambda d, w, q, r: round(4 * d / (q + 2 * r + w)), "feature factors are missing"),
            (lambda d, w, q, r: (4 * d - (q + r) * w) // (q + 2 * r + w), "rounded down"),
            (lambda d, w, q, r: -(-(4 * d - (q + r) * w) // (q + 2 * r + w)), "rounded up"),
            (lambda d, w, q, r: (4 * d - (q + r) * w) / (q + 2 * r + w), "whole number"),
            (lambda d, w, q, r: d // w, "MHA's own head count"),
            (lambda d, w, q, r: 46, "you say 46"),
        ],
    ),
    "ex07_2": (
        [nucleus, nucleus_by_loop],
        [
            (lambda x, p: nucleus(x, p, unsort=False), "sorted order"),
            (lambda x, p: nucleus(x, p, inclusive=False), "crosses p"),
            (lambda x, p: nucleus(x, p, descending=False), "most likely token is gone"),
            (lambda x, p: nucleus(x, p).log_softmax(-1), "values changed"),
            (lambda x, p: nucleus(x.log_softmax(-1), p), "values changed"),
            (lambda x, p: nucleus(x, p, flat=True), "by itself"),
            (lambda x, p: x.copy_(nucleus(x, p)), "in place"),
            (sums_of_logits, "probabilities (softmax), not logits"),
            (lambda x, p: nucleus(x, p)[:1], "shape"),
            (lambda x, p: x.masked_fill(x.softmax(-1) < p, -math.inf), "p is no threshold"),
            (lambda x, p: x.masked_fill(x.softmax(-1) < 1 - p, -math.inf), "1 - p is no threshold"),
            (lambda x, p: nucleus(x, p).masked_fill(nucleus(x, p).isinf(), 0), "must be -inf"),
            (lambda x, p: x, "nothing is filtered"),
            (lambda x, p: nucleus(x, p + 1e-4), "stop at p or more"),
            (by_threshold, "equal tokens"),
            (lambda x, p: nucleus(x, p).softmax(-1), "looks like probabilities"),
            (lambda x, p: nucleus(x, p).exp(), "looks like probabilities"),
            (lambda x, p: nucleus(x, min(p, 0.9)), "p = 1"),
            (lambda x, p: x.sort(dim=7), "IndexError"),
        ],
    ),
    "ex07_3": (
        [lambda: MOVED, lambda: sorted(MOVED)],
        [
            (lambda: MOVED | {"factor_proj"}, "through out_proj"),
            (lambda: MOVED | {"gate_proj"}, "through down_proj"),
            (lambda: MOVED | {"up_proj"}, "through down_proj"),
            (lambda: MOVED - {"down_proj"}, "what it multiplies"),
            (lambda: MOVED - {"out_proj"}, "what it multiplies"),
            (lambda: MOVED - {"embedding"}, "residual stream"),
            (lambda: "all", "set of names"),
            (lambda: {"norm"}, "set of names"),
        ],
    ),
    "ex08_1": (
        [windows(), lambda tokens, starts, n: tuple(
            tokens.unfold(0, n + 1, 1)[starts][:, part] for part in (slice(None, -1), slice(1, None)))],
        [
            (windows(extra=1), "a window holds seq_len + 1"),
            (windows(extra=-1), "one token too few"),
            (windows(first=1), "begin at the start itself"),
            (windows(shift=0), "repeating what it sees"),
            (windows(shift=-1), "predict the past"),
            (windows(shift=2), "the token that follows"),
            (lambda *case: windows()(*case)[::-1], "exchanged"),
            (lambda *case: (windows()(*case)[0], windows()(*case)[0] + 1), "added 1 to the tokens"),
            (lambda *case: (windows()(*case)[0], windows()(*case)[0].roll(-1, 1)), "instead of rolling"),
            (lambda *case: windows()(*case)[0], "return 2 values"),
        ],
    ),
    "ex08_2": (
        [schedule(), lambda *case: np.float64(schedule()(*case)), lambda *case: torch.tensor(schedule()(*case))],
        [
            (schedule(rise=0), "its batch is wasted"),
            (schedule(rise=2), "the warm-up runs ahead"),
            (schedule(whole=True), "where the warm-up ends"),
            (schedule(low=0.0), "ends at 0"),
            (schedule(low=0.1), "ends at peak / 10"),
            (schedule(shape=lambda p: 1 - p), "along a straight line"),
            (schedule(shape=lambda p: 1 - p**2), "then half a cosine"),
            (schedule(shape=lambda p: math.cos(math.pi * p)), "from 1 to -1"),
            (schedule(shape=lambda p: math.cos(math.pi * p / 2)), "a quarter of a cosine"),
            (lambda step, steps, warmup, peak: schedule()(max(step, warmup), steps, warmup, peak), "no warm-up"),
            (lambda step, *run: schedule()(min(step, run[1]), *run), "stays at the peak"),
            (lambda *case: max(schedule(low=0)(*case), case[3] / 20), "cut off"),
            (schedule(peak_=2.0), "then half a cosine"),
            (schedule(span_=100), "then half a cosine"),
            (hard_coded_floor, "then half a cosine"),
            (lambda step, steps, warmup, peak: peak / 20, "then half a cosine"),
        ],
    ),
    "ex08_3": (
        [lambda: dict(weights=True, moments=True, step=True, gradients=False, validation_losses=False)],
        choices(dict(weights=True, moments=True, step=True, gradients=False, validation_losses=False)),
    ),
    "ex08_4": (
        [interval(), by_statistics, interval(dtype=torch.float32)],
        [
            (interval(sign=-1), "sign is turned round"),
            (interval(power=0), "too wide"),
            (interval(power=1), "not by n"),
            (interval(correction=0), "divides by n - 1"),
            (interval(paired=False), "not paired"),
            (interval(absolute=True), "abs loses"),
            (interval(t_=3.0), "t is handed in"),
            (lambda a, b, t: interval()(sorted(a), sorted(b), t), "tears the pairs apart"),
            (lambda a, b, t: (a.sort(), b.sort(), interval()(a, b, t))[-1], "tears the pairs apart"),
            (lambda a, b, t: interval()(a, b, t)[::-1], "low is above high"),
            (lambda a, b, t: (0.0, 1.0), "mean ± t"),
            (lambda a, b, t: interval()(a, b, 1.96), "t is handed in"),
            (lambda a, b, t: interval()(a, b, 1.0), "t is missing"),
            (lambda a, b, t: interval()(a, b, t)[0], "return 2 values"),
        ],
    ),
    "ex09_1": (
        [lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * places(L, n, M, w) * B * s,
         lambda L, h, d, k, v, M, B, s, n, w: sum(
             B * s * (k + v) * (h + d) * (min(M, w) if layer < n else M) for layer in range(L))],
        [
            (lambda L, h, d, k, v, M, B, s, n, w: 2 * h * d * places(L, n, M, w) * B * s, "MHA's cache"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * h * d * places(L, n, M, w) * B * s, "h + d_h numbers"),
            (lambda L, h, d, k, v, M, B, s, n, w: 2 * k * (h + d) * places(L, n, M, w) * B * s, "counted separately"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * places(L, n, M, w) * s, "each sequence"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * L * M * B * s, "local layers cache"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * ((L - n) * M + n * w) * B * s, "shorter than"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * n * min(M, w) * B * s, "only the local layers"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * places(L, L - n, M, w) * B * s, "swapped"),
            (lambda L, h, d, k, v, M, B, s, n, w: (k + v) * (h + d) * (L * M + n * min(M, w)) * B * s, "counted twice"),
            (lambda *_: 1, "and it is"),
        ],
    ),
    "ex09_2": (
        [by_trial, lambda h, d, G, t: math.floor(G * d / (t * (h + d))), lambda h, d, G, t: G * d // (t * (h + d))],
        [
            (lambda h, d, G, t: math.ceil(G * d / (t * (h + d))), "rounded up"),
            (lambda h, d, G, t: round(G * d / (t * (h + d))), "rounded to the nearest"),
            (lambda h, d, G, t: max(0, math.ceil(G * d / (t * (h + d))) - 1), "includes equality"),
            (lambda h, d, G, t: math.floor(h * d / (t * (h + d))), "not MHA"),
            (lambda h, d, G, t: math.floor(2 * G * d / (t * (h + d))), "both have rank R"),
            (lambda h, d, G, t: max(1, math.floor(G * d / (t * (h + d)))), "the answer is 0"),
            (lambda h, d, G, t: math.floor(G * d / (h + d)), "`times` is not used"),
            (lambda h, d, G, t: math.floor(G * d * t / (h + d)), "multiplied by `times`"),
            (lambda h, d, G, t: G * d / (t * (h + d)), "no fraction of a rank"),
            (lambda h, d, G, t: G * d // (h + d) // t, "rounded down twice"),
            (lambda h, d, G, t: 7, "and it is"),
        ],
    ),
    "ex09_3": ([lambda: LEAFLET], choices(LEAFLET, lambda right: "true" if right == "false" else "false")),
    "ex10_1": (
        [merge_many, merge_one_by_one],
        [
            (lambda m, s, y: y.sum(0) / s.sum(0)[:, None], "different maxima"),
            (lambda m, s, y: merge_many(m, s, y, power=torch.exp), "exp2, not exp"),
            (lambda m, s, y: merge_many(m, s, y, power=lambda x: torch.exp2(-x)), "wrong way round"),
            (lambda m, s, y: merge_many(torch.zeros_like(m), s, y), "different maxima"),
            (lambda m, s, y: merge_many(m, s, y, rescale_s=False), "y is rescaled and s is not"),
            (lambda m, s, y: merge_many(m, s, y, rescale_y=False), "s is rescaled and y is not"),
            (lambda m, s, y: merge_many(m, s, y, divide=False), "not divided"),
            (lambda m, s, y: merge_many(m, s, y, common=False), "subtract the largest m"),
            (lambda m, s, y: (y / s[..., None]).nan_to_num().mean(0), "a mean of"),
            (lambda m, s, y: merge_many(m, torch.ones_like(s), (y / s[..., None]).nan_to_num()), "2^(m_i - m) alone"),
            (mean_of_outputs, "an empty one by 0"),
            (lambda m, s, y: y[0].mT, "expected shape"),
        ],
    ),
    "ex10_2": (
        [least_ms, lambda *case: np.float64(least_ms(*case)), lambda *case: torch.tensor(least_ms(*case))],
        [
            (lambda B, M, h, d, k, v, size, speed: 2 * B * M * h * d * size / speed / 1e6, "MHA's cache"),
            (lambda B, M, h, d, k, v, size, speed: B * M * (k + v) * d * size / speed / 1e6, "head factors"),
            (lambda B, M, h, d, k, v, size, speed: B * M * (k + v) * h * d * size / speed / 1e6, "not their product"),
            (lambda B, M, h, d, k, v, size, speed: 2 * B * M * k * (h + d) * size / speed / 1e6, "different ranks"),
            (lambda B, M, h, d, k, v, size, speed: least_ms(1, M, h, d, k, v, size, speed), "one sequence"),
            (lambda B, M, h, d, k, v, size, speed: least_ms(B, M, h, d, k, v, 1, speed), "as if they were bytes"),
            (lambda *sizes: least_ms(*sizes) / 1000, "those are seconds"),
            (lambda *sizes: least_ms(*sizes) * 1e9 / 2**30, "not 2^30"),
            (lambda *sizes: 1.0, "you say 1"),
        ],
    ),
    "ex10_3": ([lambda: dict(a=False, b=True, c=True, d=False, e=False)],
               choices(dict(a=False, b=True, c=True, d=False, e=False))),
    "ex11_1": (
        [cached(), lambda *case: float(cached()(*case))],
        [
            (lambda name, R, h, d: 2 * R * (h + d), "TPA's own cache"),
            (cached(shared_A=lambda R, h, d: 2 * R * (h + d)), "TPA's own cache"),
            (cached(shared_B_AND_fixed_A=lambda R, h, d: R * (d + 2 * h)), "constants"),
            (cached(fixed_a_k=lambda R, h, d: R * (2 * h + 2 * d)), "TPA's own cache"),
            (cached(shared_B_AND_fixed_A=lambda R, h, d: 2 * R * d), "b is needed once only"),
            (cached(shared_A=lambda R, h, d: R * (2 * h + d)), "that is shared B"),
            (cached(shared_both=lambda R, h, d: h + d), "each of the R rows"),
            (cached(shared_A=lambda R, h, d: R * (h + d)), "one a and one b"),
            (cached(shared_A=lambda R, h, d: R * 2 * d), "cached once, not never"),
            (cached(shared_both=lambda R, h, d: 7), "cross out"),
        ],
    ),
    "ex11_2": (
        [shared(), shared(change=lambda a_q, b_q, a_k, b_k, a_v, b_v: (a_q, b_q, a_v.clone(), b_k, a_v, b_v))],
        [
            (TensorProductAttention, "both projected and cached"),
            (shared(widths=lambda h, d: (h, d, h, d, 0, d)), "give a_k the width 0"),
            (shared(widths=lambda h, d: (0, d) * 3), "should hold all but a_k"),
            (shared(own=False), "put a_v in the place of a_k"),
            (shared(change=lambda a_q, b_q, a_k, b_k, a_v, b_v: (a_q, b_q, a_v / 2, b_k, a_v, b_v)), "equal a_k and"),
            (shared(change=lambda a_q, b_q, a_k, b_k, a_v, b_v: (a_q, b_q, a_v, b_v, a_v, b_k)), "equal a_k and a_v"),
            (shared(change=lambda a_q, b_q, a_k, b_k, a_v, b_v: (a_q, b_q, a_v, b_k, a_v.flip(1), b_v)), "equal a_k"),
            (shared(pass_padding=False), "pass `padding` on"),
            (lambda config: torch.nn.Identity(), "expected a subclass"),
            (shared(change=lambda *six: six[:3]), "TypeError"),
        ],
    ),
    "ex11_3": (
        [lambda b, c, cos, sin: vec(rotate_pairs(b, cos, sin), c),
         lambda b, c, cos, sin: torch.einsum("tj,ti->tji", c, rotate_pairs(b, cos, sin)).reshape(len(b), -1)],
        [
            (lambda b, c, cos, sin: vec(c, rotate_pairs(b, cos, sin)), "stacks columns"),
            (lambda b, c, cos, sin: vec(b, c), "nothing is rotated"),
            (lambda b, c, cos, sin: vec(b, rotate_pairs(c, cos, sin)), "you rotated c"),
            (lambda b, c, cos, sin: vec(rotate_pairs(b, cos, sin), rotate_pairs(c, cos, sin)), "both b and c"),
            (lambda b, c, cos, sin: vec(rotate_pairs(b, cos, -sin), c), "the other way"),
            (lambda b, c, cos, sin: vec(rotate_pairs(b, sin, cos), c), "exchanged"),
            (lambda b, c, cos, sin: vec(rotate_pairs(b, cos, sin), 2 * c), "try it with sin = 0"),
            (lambda b, c, cos, sin: rotate_pairs(b, cos, sin), "expected shape"),
            (lambda b, c, cos, sin: c[:, :, None] * rotate_pairs(b, cos, sin)[:, None], "flatten the last two"),
        ],
    ),
    "ex11_4": ([lambda: dict(a=True, b=True, c=True, d=False, e=False, f=True)],
               choices(dict(a=True, b=True, c=True, d=False, e=False, f=True))),
    "ex12_1": (
        [lambda W, d: negate(W, d, slice(d // 2, None)), lambda W, d: negate(W, d, slice(0, d // 2)),
         lambda W, d: heads(W, d).roll(d // 2, 1).view_as(W)],  # exchanging the halves does it as well
        [
            (lambda W, d: W.clone(), "the weight is as it was"),
            (lambda W, d: -W, "cancels"),
            (lambda W, d: torch.cat((W[: len(W) // 2], -W[len(W) // 2 :])), "second half of its own"),
            (lambda W, d: torch.cat((W[:, : W.shape[1] // 2], -W[:, W.shape[1] // 2 :]), 1), "columns"),
            (lambda W, d: negate(W, d, slice(1, None, 2)), "every other feature"),
            (lambda W, d: negate(W, d, slice(0, 1)), "differs from LLaMA's"),
            (lambda W, d: W.flip(0), "reversed the order"),
            (lambda W, d: 2 * negate(W, d, slice(0, d // 2)), "differs from LLaMA's"),
            (lambda W, d: W[:3], "of the shape"),
            (lambda W, d: W.neg_(), "in place"),
        ],
    ),
    "ex12_2": (
        [lambda W, g: W * g, lambda W, g: W @ torch.diag(g)],
        [
            (lambda W, g: W * g[:, None], "outputs"),
            (lambda W, g: W / g, "divided out"),
            (lambda W, g: W, "is lost"),
            (lambda W, g: (W * g).T, "transposed"),
            (lambda W, g: W + g, "not a term"),
            (lambda W, g: W * (1 + g), "other models"),
            (lambda W, g: W * g**2, "twice"),
            (lambda W, g: W @ g, "return a matrix"),
            (lambda W, g: W * g.flip(0), "for an x of your choice"),
            (lambda W, g: W * g.abs(), "its sign belongs to it"),
            (lambda W, g: W * g.clamp(min=0.5), "for an x of your choice"),
            (lambda W, g: W * g.clamp(max=2), "for an x of your choice"),
            (lambda W, g: W.mul_(g), "in place"),
        ],
    ),
    "ex12_3": (
        [moved, lambda W, h, R: W[[i * R + r for r in range(R) for i in range(h)]]],
        [
            (lambda W, h, R: W, "as they were"),
            (lambda W, h, R: moved(W, R, h), "first split is into heads"),
            (lambda W, h, R: W.flip(0), "reversed"),
            (lambda W, h, R: W.unflatten(0, (h, R)).flip(0).flatten(0, 1), "reversed the heads"),
            (lambda W, h, R: W.unflatten(0, (h, R)).flip(1).flatten(0, 1), "reversed the ranks"),
            (lambda W, h, R: W.unflatten(0, (h, R)).transpose(0, 1), "flatten again"),
            (lambda W, h, R: W.T, "rows and columns"),
            (lambda W, h, R: W.roll(1, 0), "row r · h + i"),
        ],
    ),
    "ex12_4": (
        [ranks, lambda h, d, G: [G - 1, math.ceil(G * d / (h + d)) - 1]],
        [
            (lambda h, d, G: (G, ranks(h, d, G)[1]), "not less"),
            (lambda h, d, G: (h - 1, ranks(h, d, G)[1]), "not with all h"),
            (lambda h, d, G: (G - 1, G - 1), "cached too"),
            (lambda h, d, G: (G - 1, most(2 * (h + d), 2 * h * d)), "not with MHA's"),
            (lambda h, d, G: (G - 1, ranks(h, d, G)[1] + 1), "as much or more"),
            (lambda h, d, G: (G - 1, most(2 * (h + d), G * d)), "keys and values"),
            (lambda h, d, G: ranks(h, d, G)[::-1], "comes first"),
            (lambda h, d, G: (G - 1, 0), "2 R (h + d_h) < 2 G d_h"),
            (lambda h, d, G: G - 1, "return 2 values"),
        ],
    ),
}  # fmt: skip


def numpys(x):
    """The same answer in NumPy's types, and lists for tuples."""
    if isinstance(x, (tuple, list)):
        return [numpys(part) for part in x]
    if isinstance(x, dict):
        return {key: numpys(value) for key, value in x.items()}
    if isinstance(x, torch.Tensor):
        return x.detach().numpy()
    return np.array(x)[()] if isinstance(x, (bool, int, float)) else x


def singles(x):
    """The same answer in torch's types, float32 where it is a float, and tuples for lists."""
    if isinstance(x, (tuple, list)):
        return tuple(singles(part) for part in x)
    if isinstance(x, torch.Tensor):
        return x.float() if x.is_floating_point() else x
    return torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else None) if type(x) in (int, float) else x


def rarer(x):
    """The same answer in types that torch does not take as they are, and lists of rows for tensors."""
    if isinstance(x, (tuple, list)):
        return [rarer(part) for part in x]
    if isinstance(x, torch.Tensor):
        rows = x.detach().numpy()
        return [*rows.astype(rows.dtype.newbyteorder(">"))[..., ::-1][..., ::-1]] if rows.ndim else rows
    if type(x) is int and x >= 0:
        return np.uint64(x)
    return np.longdouble(x) if type(x) is float else x


OF_ONE_TYPE = {"ex03_2", "ex03_3", "ex05_1", "ex05_3", "ex11_2"}  # the type is part of what is asked


@pytest.mark.parametrize("exercise", ANSWERS)
def test_right_answers_are_accepted_in_every_type(exercise, capsys):
    check = getattr(checks, exercise)
    for right in ANSWERS[exercise][0]:
        torch.manual_seed(0)
        assert check(right) == "ok", capsys.readouterr().out
        for convert in (numpys, singles, rarer) if exercise not in OF_ONE_TYPE else ():
            converted = lambda *args, right=right, convert=convert: convert(right(*args))  # noqa: E731
            assert check(converted) == "ok", (convert.__name__, capsys.readouterr().out)


@pytest.mark.parametrize("exercise", ANSWERS)
def test_wrong_answers_are_told_apart(exercise, capsys):
    check, wrong = getattr(checks, exercise), ANSWERS[exercise][1]
    assert len(wrong) >= 8
    for number, (attempt, words) in enumerate(wrong):
        torch.manual_seed(0)
        assert check(attempt) == "fail", (number, words)
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and any(part in out for part in words.split("|")), (number, words, out)
        assert "the checker stopped" not in out and ("your code raised" not in out or "Error" in words), out


@pytest.mark.parametrize("exercise", ANSWERS)
def test_no_attempt_and_no_return(exercise, capsys):
    def stub(*_):
        raise NotImplementedError

    check = getattr(checks, exercise)
    assert check(stub) == "todo" and capsys.readouterr().out.startswith("[todo]")
    assert check(lambda *_: None) == "fail" and "is there a `return`?" in capsys.readouterr().out
    for strange in ("strange", [], {}, -1, math.nan, object(), {"a": [1]}, (1, "x"), torch.ones(2, 3)):
        assert check(lambda *_, strange=strange: strange) == "fail"
        assert "your code raised" not in capsys.readouterr().out


# ------------------------------------------------------------- what the exercises say is true of the module


def keys_of(tokens, causal):
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
    causal, both_ways = keys_of(old, True), keys_of(old, False)
    truth = dict(
        a=same(causal[1], keys_of(longer, True)[1], past),
        b=same(both_ways[0], keys_of(longer, False)[0], past),
        c=same(both_ways[1], keys_of(longer, False)[1], past),
        d=same(causal[1], keys_of(replaced, True)[1], slice(0, 50)),
        e=same(causal[0], keys_of(replaced, True)[0], slice(51, 100)),
        f=same(causal[1], keys_of(replaced, True)[1], slice(51, 100)),
    )
    assert checks.ex01_1(lambda: truth) == "ok"


def test_shared_keys_have_low_rank():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, 8, 12, dtype=torch.float64, generator=generator)  # (tokens, h, d_h)
    for G in (1, 2, 4, 8):
        shared = keys[:, :G].repeat_interleave(8 // G, dim=1)
        assert torch.linalg.matrix_rank(shared).unique().tolist() == [G]
        assert torch.linalg.matrix_rank(shared.flatten(1)) == min(40, 12 * G)


@pytest.mark.parametrize("init", ["paper", "authors"])
def test_the_prediction_is_what_the_layer_does(init):
    torch.manual_seed(0)
    config = T6Config.preset("small-124M", init=init)
    with torch.no_grad():
        x = rms_norm(torch.randn(1, 128, config.d_model))
        a_q, b_q, a_k, b_k, _, _ = TensorProductAttention(config).factors(x)
    logits = torch.einsum("bthd,bshd->bhts", assemble(a_q, b_q), assemble(a_k, b_k)) / math.sqrt(config.d_head)
    assert logits.std().item() == pytest.approx(predict(config), rel=0.05)


def test_two_notions_of_low_rank():
    """Contextual factors bound each token's rank and not the stack's; a low-rank weight does the opposite."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = draw(100, 20)
    contextual = assemble((x @ draw(20, 12)).unflatten(-1, (2, 6)), (x @ draw(20, 16)).unflatten(-1, (2, 8)))
    static = (x @ draw(20, 2) @ draw(2, 48)).unflatten(-1, (6, 8))
    ranks = [[int(torch.linalg.matrix_rank(m)) for m in (y[0], y.flatten(1))] for y in (contextual, static)]
    assert ranks == [[2, 48], [6, 2]]


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


def test_the_patients_are_as_ill_as_the_exercise_says():
    torch.manual_seed(1)
    assert diagnose(checks.ex05.patients()) == ["rounding", "batch", "healthy", "window"]


def test_the_schedule_asked_for_is_the_one_that_trains():
    assert [schedule()(s, 110, 11, 2.0) for s in range(110)] == pytest.approx(
        [train.learning_rate(s, 110, 2.0) for s in range(110)]
    )


def by_the_accountant(L, h, d, k, v, context, B, size, n_local, window):
    layer = Layer("tpa", 8, h, d, rank_k=k, rank_v=v)
    model = Model("", layer, L, 0, 0, "", n_local=n_local, window=window)
    return model.cache_bytes(context, B, {1: "int8", 2: "float16", 4: "float32"}[size])


def test_the_cache_with_windows():
    assert checks.ex09_1(by_the_accountant) == "ok"


def test_the_leaflet_by_the_accountant():
    llama, deepseek = MODELS["Llama 3 70B"], MODELS["DeepSeek-V3"]
    one, two = llama.with_tpa(16, 1, 1), llama.with_tpa(16, 2, 2)
    shipped, mha = (round(ratio, 1) for ratio in ratios(one.layer, llama.layer).values())
    _, own, same = (round(r, 1) for r in ratios(Layer("tpa", 768, 34, 64), Layer("mha", 768, 12, 64)).values())
    total = [model.weight_bytes() + model.cache_bytes(1000) for model in (llama, one)]
    assert LEAFLET == dict(
        a="baseline" if mha == 42.7 != shipped else "",
        b="true" if round(two.cache_bytes(131_072) / 1e9, 1) == 16.1 else "false",
        c="true" if two.weight_bytes() + two.cache_bytes(131_072) <= 80e9 else "false",
        d="true" if total[1] < total[0] / 2 else "false",
        e="baseline" if same == 11.1 != own else "",
        f="true" if deepseek.with_tpa(16, 2, 2).layer.cached_numbers < deepseek.layer.cached_numbers else "false",
    )


def test_the_weights_that_move_first_are_the_models():
    model = T6(T6Config(vocab_size=16, n_layer=2, d_model=16, n_head=2, d_head=8))
    tokens = torch.arange(12).view(2, 6)
    F.cross_entropy(model(tokens).flatten(0, 1), (tokens + 1).flatten()).backward()
    moving = [key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    names = MOVED | {"factor_proj", "gate_proj", "up_proj"}
    assert MOVED == {name for name in names if any(name in key for key in moving)}
