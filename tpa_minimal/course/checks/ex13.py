"""Checkers of notebook 13's exercises."""

import math

import torch

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices, normal


@exercise
def ex13_1(attempt):
    """The sum of log p of the tokens from n_context on, from the logits of the whole row."""

    def right(logits, tokens, n_context):
        log_p = logits.log_softmax(-1)
        return sum(log_p[i - 1, tokens[i]].item() for i in range(n_context, len(tokens)))

    def of(table, first=0, shift=1):
        """Like `right`, from another table, another first token, or other places."""
        return lambda logits, tokens, n: sum(
            table(logits)[i - shift, tokens[i]].item() for i in range(max(n + first, shift), len(tokens))
        )

    def log_p(logits):
        return logits.log_softmax(-1)

    row = torch.tensor([3, 7, 1, 0, 11, 5, 5, 2, 8])
    judge(
        attempt,
        right,
        [(2 * normal(9, 12), row, 6), (normal(5, 12, seed=1), row[:5], 4), (3 * normal(8, 12, seed=2), row[1:], 2)],
        [
            (
                of(log_p, shift=0),
                "the logits at a place are about the *next* token: token i is predicted at place i - 1",
            ),
            (of(log_p, first=-99), "the context is scored too: take only the tokens from n_context on"),
            (of(log_p, first=1), "the ending's first token is missing: it is predicted at the context's last place"),
            (of(log_p, first=-1), "one token too many: the context's last token is not part of the ending"),
            (
                of(lambda logits: logits),
                "these are no log-probabilities yet: take log_softmax over the vocabulary first",
            ),
            (
                of(lambda logits: logits.log_softmax(0)),
                "softmax over the places (dim 0): it belongs over the vocabulary",
            ),
            (of(lambda logits: logits.softmax(-1)), "probabilities multiply, so their logarithms add: you added p"),
            (lambda *case: math.exp(right(*case)), "this is a probability: return its logarithm"),
            (lambda *case: -right(*case), "the sign: a log-likelihood is negative"),
            (
                lambda logits, tokens, n: right(logits, tokens, n) / (len(tokens) - n),
                "that is the mean: return the sum",
            ),
            (lambda *case: right(*case) / math.log(2), "that is in bits: take the natural logarithm"),
        ],
        "add log p of each token of the ending, given all tokens before it",
    )


@exercise
def ex13_2(attempt):
    """The ending that is most likely, and the one that is most likely per letter."""

    def right(log_likelihoods, endings):
        per_letter = [score / len(ending.strip()) for score, ending in zip(log_likelihoods, endings)]
        return best(log_likelihoods), best(per_letter)

    def best(scores):
        return scores.index(max(scores))

    def by_length(length):
        return lambda scores, endings: (best(scores), best([x / length(end) for x, end in zip(scores, endings)]))

    def lowest(scores, endings):
        return tuple(best([-x / n for x, n in zip(scores, by)]) for by in ([1] * 9, [len(e.strip()) for e in endings]))

    judge(
        attempt,
        right,
        [
            ([-3.0, -6.0, -7.0], [" yes", " certainly", " no"]),
            ([-9.0, -8.0, -20.0], [" a b c d e f", " lamp", " it was there all the time"]),
            ([-2.0, -2.6, -9.0], [" on", " iron", " a ladder of iron"]),
            ([-4.0, -12.1, -13.0], [" hat", " hat and box", " the road was long"]),
            ([-5.0, -6.5, -7.0], [" is", " an ox", " a mouse"]),
            ([-4.0, -5.0, -4.5], [" the road was long", " on", " a bell"]),
            ([-3.0, -5.0, -30.0], [" no", " certainly", " it was there all the time"]),
            ([-2.0, -4.4, -9.0], [" an", " iron", " a mouse"]),
            ([-2.4, -3.0, -9.0], [" été", " lamp", " a mouse"]),
        ],
        [
            (lowest, "the lowest is picked: log-likelihoods are negative, and the one nearest to 0 is the highest"),
            (lambda s, e: (right(s, e)[0],) * 2, "both picks are by the sum: divide by the characters for acc_norm"),
            (lambda s, e: (right(s, e)[1],) * 2, "both picks are per letter: acc compares the sums"),
            (lambda s, e: right(s, e)[::-1], "the two are exchanged: the pick by acc comes first"),
            (lambda s, e: (right(s, e)[0], lowest(s, e)[1]), "per letter you pick the lowest"),
            (by_length(lambda end: len(end.split())), "divided by words: acc_norm divides by characters"),
            (by_length(lambda end: len(end.strip().encode())), "divided by bytes: acc_norm divides by characters"),
            (lambda s, e: (right(s, e)[0], best([len(end) for end in e])),
             "the longest ending is picked: divide its sum by its characters, once"),
            (by_length(len), "the space before an ending is none of its characters: strip it"),
            (by_length(lambda end: 1 / len(end.strip())), "multiplied by the characters: divide"),
            (lambda s, e: (max(s), max(x / len(end.strip()) for x, end in zip(s, e))),
             "these are the scores: return their places in the list"),
            (lambda s, e: tuple(e[n] for n in right(s, e)), "these are the endings: return their places in the list"),
            (lambda s, e: tuple(n + 1 for n in right(s, e)), "places are counted from 0"),
        ],
        "two places in the list, counted from 0: of the highest sum, and of the highest sum per letter",
    )  # fmt: skip


@exercise
def ex13_3(attempt):
    """z² (p (1 - p) + q (1 - q)) / (p - q)², rounded up."""

    def exact(p, q):
        return 1.96**2 * (p * (1 - p) + q * (1 - q)) / (p - q) ** 2

    def right(p, q):
        return math.ceil(exact(p, q))

    def with_variance(of):
        return lambda p, q: math.ceil(1.96**2 * of(p, q) / (p - q) ** 2)

    def deviation(p):
        return math.sqrt(p * (1 - p))

    judge(
        attempt,
        right,
        [(0.462, 0.463), (0.25, 0.35), (0.9, 0.8), (0.4811, 0.4793), (0.3, 0.6)],
        [
            (exact, "there is no fraction of a question: round up (math.ceil)"),
            (lambda p, q: round(exact(p, q)), "rounded to the nearest: where that is down, a question is missing"),
            (lambda p, q: math.floor(exact(p, q)), "rounded down: the difference is then within 1.96 standard errors"),
            (with_variance(lambda p, q: p * (1 - p)), "both models are measured: add the variance of the second"),
            (with_variance(lambda p, q: q * (1 - q)), "both models are measured: add the variance of the first"),
            (with_variance(lambda p, q: (deviation(p) + deviation(q)) ** 2),
             "the standard errors are added: independent errors add as squares"),
            (with_variance(lambda p, q: (p * (1 - p) + q * (1 - q)) / 2),
             "the variances are averaged: that of a difference is their sum"),
            (with_variance(lambda p, q: p + q), "the variance of an answer is p (1 - p), not p"),
            (lambda p, q: math.ceil(exact(p, q) * abs(p - q)), "divide by (p - q)²: half the difference, four times n"),
            (lambda p, q: math.ceil(exact(p, q) / 1.96), "1.96 is squared too, as it stands before a square root"),
            (lambda p, q: math.ceil(exact(p, q) / 1.96**2), "1.96 is missing: that is for one standard error"),
            (lambda p, q: math.ceil(math.sqrt(exact(p, q))), "that is √n: square it"),
        ],
        "solve |p - q| = 1.96 · √((p (1 - p) + q (1 - q)) / n) for n, and round up",
    )  # fmt: skip


@exercise
def ex13_4(attempt):
    """What the paper's averages support, given a standard error of up to 0.61 points for a difference."""
    judge_choices(
        attempt(),
        dict(
            a=(False, "46.21 is ahead of 46.20 and 46.19 by 0.02 at most: how many standard errors is that?"),
            b=(True, "47.93 - 45.21 is 2.72 points, more than four standard errors of a difference"),
            c=(False, "48.11 - 47.93 is 0.18 points: within the error, and so no proof for either side"),
            d=(False, "KV-only has 53.52 and MLA 53.32 there, against TPA's 53.10"),
            e=(True, "look for the largest gap between TPA and the best of its row: 0.42 points, at large"),
            f=(False, "the standard error is about other questions; each number is of one training run, with one seed"),
        ),
    )
