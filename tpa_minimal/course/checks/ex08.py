"""Checkers of notebook 08's exercises."""

import math
import statistics

import torch

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices


def windows(tokens, starts, seq_len, first=0, shift=1, extra=0):
    """Windows of tokens and of the tokens `shift` further on."""
    places = starts[:, None] + first + torch.arange(seq_len + extra)
    return tokens[places], tokens[places + shift]


@exercise
def ex08_1(attempt):
    """Inputs tokens[s : s + seq_len], targets one further on."""
    cases = []
    for seed, (starts, seq_len) in enumerate((([3, 1, 11], 5), ([20, 4], 7), ([9], 3))):
        tokens = torch.randperm(40, generator=torch.Generator().manual_seed(seed)) + 100
        cases.append((tokens, torch.tensor(starts), seq_len))
    judge(
        attempt,
        windows,
        cases,
        [
            (lambda t, s, n: windows(t, s, n, shift=0),
             "the targets equal the inputs: the model would be rewarded for repeating what it sees"),
            (lambda t, s, n: windows(t, s, n, shift=-1),
             "the targets lie one token before the inputs: the model would learn to predict the past"),
            (lambda t, s, n: windows(t, s, n, shift=2),
             "each target should be the token that follows its input, not the "
             "one after that"),
            (lambda t, s, n: windows(t, s, n, first=1), "the inputs should begin at the start itself, tokens[s]"),
            (lambda t, s, n: windows(t, s, n, shift=n),
             "the targets are the next window; they should overlap the inputs, "
             "one token further on"),
            (lambda t, s, n: windows(t, s, n)[::-1], "inputs and targets are exchanged"),
            (lambda t, s, n: (windows(t, s, n)[0], windows(t, s, n)[0] + 1),
             "you added 1 to the tokens; the target is the token at the next place"),
            (lambda t, s, n: windows(t, s, n, extra=1),
             "one token too many: inputs and targets both have seq_len tokens, "
             "and a window holds seq_len + 1"),
            (lambda t, s, n: windows(t, s, n, extra=-1),
             "one token too few: inputs and targets both have seq_len tokens, "
             "so a window holds seq_len + 1"),
            (lambda t, s, n: (windows(t, s, n)[0], windows(t, s, n)[0].roll(-1, 1)),
             "the last target is the first input: take one more token from the text instead of rolling"),
        ],
        "inputs[i] = tokens[s_i : s_i + seq_len], and targets the same one place further",
    )  # fmt: skip


def schedule(step, steps, warmup, peak, rise=1, floor=0.05, fall=None, span=None, start=0):
    """Linear warm-up, then a fall from the peak to floor · peak, with what people do wrong as options."""
    if step < warmup:
        return peak * (start + (1 - start) * (step + rise) / warmup)
    progress = span(step, steps, warmup) if span else (step - warmup) / (steps - warmup)
    fallen = (fall or (lambda p: (1 + math.cos(math.pi * p)) / 2))(progress)
    return peak * (floor + (1 - floor) * fallen)


@exercise
def ex08_2(attempt):
    """Linear warm-up from peak / warmup, then half a cosine from peak to peak / 20."""

    def right(step, steps, warmup, peak):
        return schedule(step, steps, warmup, peak)

    def wrong(**options):
        return lambda *case: schedule(*case, **options)

    runs = ((110, 10, 2.0), (200, 20, 1e-3), (57, 7, 0.3))
    judge(
        attempt,
        right,
        [(step, *run) for run in runs for step in range(run[0] + 1)],
        [
            (wrong(rise=0), "step 0 has rate 0, so its batch is wasted: count the first step as 1 of warmup"),
            (wrong(rise=2), "the warm-up runs ahead: step 0 has peak / warmup, and step warmup - 1 the peak"),
            (wrong(floor=0.0), "the rate ends at 0: it should end at peak / 20, so the cosine spans peak / 20 to peak"),
            (wrong(floor=0.1), "the rate ends at peak / 10: it should end at peak / 20"),
            (wrong(fall=lambda p: 1 - p), "that falls along a straight line: take (1 + cos(π · progress)) / 2"),
            (wrong(fall=lambda p: math.cos(math.pi * p / 2)),
             "a quarter of a cosine: half a one, cos(π · progress), starts and ends flat"),
            (wrong(fall=lambda p: math.cos(math.pi * p)),
             "cos goes from 1 to -1: (1 + cos(π · progress)) / 2 from 1 to 0"),
            (wrong(span=lambda step, steps, warmup: step / steps),
             "progress is 0 where the warm-up ends: (step - warmup) / (steps - warmup)"),
            (wrong(span=lambda step, steps, warmup: (step - warmup) / steps),
             "progress is 1 at the last step: divide by steps - warmup"),
            (lambda step, steps, warmup, peak: schedule(max(step, warmup), steps, warmup, peak), "there is no warm-up"),
            (lambda step, steps, warmup, peak: max(schedule(step, steps, warmup, peak, floor=0.0), peak / 20)
             if step >= warmup else schedule(step, steps, warmup, peak),
             "the cosine is cut off at peak / 20; it should span the whole way from peak to peak / 20"),
            (lambda step, steps, warmup, peak: peak if step >= warmup else schedule(step, steps, warmup, peak),
             "after the warm-up the rate stays at the peak; it should fall to peak / 20"),
        ],
        lambda got, best: "the warm-up goes from peak / warmup to peak in `warmup` steps, then half a cosine from "
            "peak to "
        "peak / 20, with progress = (step - warmup) / (steps - warmup)",
    )  # fmt: skip


@exercise
def ex08_3(attempt):
    """Weights, moments and the step number are what a step depends on."""
    judge_choices(
        attempt(),
        dict(
            weights=(True, "training would begin anew from the initial ones"),
            moments=(True, "AdamW divides by them; from zero, its next steps have other lengths and directions"),
            step=(True, "it decides the batch, the learning rate and AdamW's bias correction"),
            gradients=(False, "they are set to zero after every update, so there is nothing to lose"),
            validation_losses=(False, "they are looked at and not used: no update depends on them"),
        ),
    )


@exercise
def ex08_4(attempt):
    """mean ± t · s / √n of the differences."""

    def interval(first, second, t, power=0.5, deviation=None, differ=lambda x, y: x - y):
        differences = [differ(x, y) for x, y in zip(first, second)]
        s = deviation(first, second) if deviation else statistics.stdev(differences)
        half = t * s / len(first) ** power
        return statistics.fmean(differences) - half, statistics.fmean(differences) + half

    def right(first, second, t):
        return interval(first, second, t)

    def wrong(**options):
        return lambda first, second, t: interval(first, second, t, **options)

    def populations(first, second):
        return statistics.pstdev(x - y for x, y in zip(first, second))

    def unpaired(first, second):
        return (statistics.variance(first) + statistics.variance(second)) ** 0.5

    judge(
        attempt,
        right,
        [
            ([2.0, 5.0, 3.0, 4.5], [2.9, 4.4, 3.5, 4.1], 3.0),
            ([3.61, 3.72, 3.58], [3.92, 3.85, 4.03], 4.303),
            ([1.0, 7.0, 2.0, 6.0, 4.0], [0.5, 4.0, 3.5, 5.5, 6.5], 2.776),
        ],
        [
            (lambda *case: right(*case)[::-1], "low is above high: return (low, high)"),
            (lambda x, y, t: interval(y, x, t), "the sign is turned round: take first - second"),
            (wrong(power=0), "too wide: the mean of n differences is √n times less uncertain than one; divide by √n"),
            (wrong(power=1), "too narrow: divide by √n, not by n"),
            (wrong(deviation=populations), "too narrow: the sample standard deviation divides by n - 1, not by n"),
            (wrong(deviation=unpaired),
             "not paired: take the deviation of the differences, so that what a seed does to both cancels"),
            (lambda x, y, t: right(sorted(x), sorted(y), t),
             "sorting tears the pairs apart: x_i and y_i belong to the same seed"),
            (wrong(differ=lambda x, y: abs(x - y)), "abs loses the sign of the differences"),
            (lambda x, y, t: right(x, y, 3.0), "t is handed in: use it"),
            (lambda x, y, t: right(x, y, 1.96), "t is handed in; 1.96 is for many runs"),
            (lambda x, y, t: right(x, y, 1.0), "t is missing: that is one standard error to either side"),
            (wrong(deviation=lambda x, y: statistics.variance(a - b for a, b in zip(x, y))),
             "that is the variance: take its root"),
        ],
        lambda got, best: f"it should be ({best[0]:.4f}, {best[1]:.4f}): mean ± t · s / √n of first - second",
    )  # fmt: skip
