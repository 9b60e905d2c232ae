"""Checkers of notebook 14's exercises."""

from tpa_minimal.course.checks.judging import exercise, judge, judge_choices


@exercise
def ex14_1(attempt):
    """Of B · (longest prompt + longest answer) places, the share that holds no token of a text."""

    def places(prompts, answers):
        return len(prompts) * (max(prompts) + max(answers))

    def tokens(prompts, answers):
        return sum(prompts) + sum(answers)

    def right(prompts, answers):
        return 1 - tokens(prompts, answers) / places(prompts, answers)

    def of(places):
        return lambda p, a: 1 - tokens(p, a) / places(p, a)

    judge(
        attempt,
        right,
        [([3, 10, 5], [4, 2, 20]), ([7, 7], [5, 1]), ([50, 21, 30, 64], [9, 40, 3, 12]), ([6, 2], [2, 6])],
        [
            (lambda p, a: 1 - right(p, a), "that is the share that is used: the waste is the rest"),
            (lambda p, a: 100 * right(p, a), "a share is between 0 and 1, not a percentage"),
            (lambda p, a: places(p, a) - tokens(p, a), "that is the number of wasted places: divide by all places"),
            (lambda p, a: places(p, a) / tokens(p, a) - 1, "divided by the tokens: divide by the places of the batch"),
            (of(lambda p, a: len(p) * max(x + y for x, y in zip(p, a))),
             "the longest prompt and the longest answer may be of different rows: all answers begin at the same place"),
            (lambda p, a: 1 - sum(p) / (len(p) * max(p)), "rows also wait for the longest answer, not only prompt"),
            (lambda p, a: 1 - sum(a) / (len(a) * max(a)), "prompts are padded too, to the longest of them"),
            (lambda p, a: ((1 - sum(p) / (len(p) * max(p))) + (1 - sum(a) / (len(a) * max(a)))) / 2,
             "two shares of parts of different sizes are averaged: count places and tokens of the whole"),
            (of(lambda p, a: max(p) + max(a)), "this many places are in one row: there are len(prompts) rows"),
        ],
        "each row has places for the longest prompt and the longest answer, and fills as many as its own have tokens",
    )  # fmt: skip


@exercise
def ex14_2(attempt):
    """Pages of a shared prefix of P tokens, ⌈P/s⌉, and of each text after it, ⌈(P + n)/s⌉ - ⌊P/s⌋."""

    def up(x, s):
        return -(-x // s)

    def right(prefix, lengths, page_size):
        s = page_size
        return up(prefix, s) + sum(up(prefix + n, s) - prefix // s for n in lengths)

    judge(
        attempt,
        right,
        [(32, [5, 20, 16], 16), (40, [3, 8, 9, 30], 16), (7, [1, 1], 4), (3, [2, 1, 9], 8), (0, [5, 16], 16),
         (10, [8, 4, 3], 8)],
        [
            (lambda p, ns, s: sum(up(p + n, s) for n in ns), "nothing is shared here: full pages of the prefix are"),
            (lambda p, ns, s: up(p, s) + sum(up(p + n, s) for n in ns), "full pages of the prefix are kept once"),
            (lambda p, ns, s: up(p, s) + sum(up(n, s) for n in ns),
             "a text does not begin with a page of its own: it writes on in the prefix's last page, of which it gets a "
             "copy unless that is full"),
            (lambda p, ns, s: up(p, s) + sum(up(p + n, s) - up(p, s) for n in ns),
             "the prefix's last page, if half full, is copied by each text that writes to it: count the copies"),
            (lambda p, ns, s: right(p, ns, s) - up(p, s), "the prefix's own pages are held as well"),
            (lambda p, ns, s: p // s + sum(up(p + n, s) - p // s for n in ns),
             "the prefix itself still holds its last page, half full: round up"),
            (lambda p, ns, s: p // s + sum((p + n) // s - p // s for n in ns), "a page begun is held: round up"),
            (lambda p, ns, s: up(p + sum(ns), s), "texts do not share pages with each other: round up each of them"),
            (lambda p, ns, s: s * right(p, ns, s), "these are positions: count pages"),
        ],
        "full pages of the prefix once, its half-full one once for itself and once for each text, then the texts' own",
    )  # fmt: skip


@exercise
def ex14_3(attempt):
    """The leading proposals that are what the model says, and then one token of the model's own."""

    def n_right(proposed, says):
        return next((i for i, (p, s) in enumerate(zip(proposed, says)) if p != s), len(proposed))

    def right(proposed, says):
        return says[: n_right(proposed, says) + 1]

    def matches(proposed, says):
        return [p for p, s in zip(proposed, says) if p == s]

    judge(
        attempt,
        right,
        [
            ([5, 9, 2, 7], [5, 9, 4, 7, 1]),
            ([3, 3, 3], [3, 3, 3, 8]),
            ([6, 1], [2, 1, 9]),
            ([4, 8, 8, 1], [4, 7, 8, 1, 0]),
            ([], [5]),
            ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 9, 7]),
        ],
        [
            (lambda p, s: p[: n_right(p, s)],
             "one token more is for free: after the last right proposal the model has said what comes next"),
            (lambda p, s: p[: n_right(p, s) + 1],
             "the first wrong proposal is kept: take what the model says in its place"),
            (lambda p, s: matches(p, s) + [s[len(matches(p, s))]],
             "after the first wrong proposal nothing counts, as all later tokens were proposed and checked behind it"),
            (lambda p, s: matches(p, s), "proposals after a wrong one count too here: stop at the first wrong one"),
            (lambda p, s: s[: n_right(p, s)], "says[i] is about the place of proposed[i]: one of `says` more is right"),
            (lambda p, s: s, "all that the model says is taken, also what it said after a wrong proposal"),
            (lambda p, s: p, "the proposals are taken unchecked"),
            (lambda p, s: s[:-1], "all but the last is taken, whether the proposals before it were right or not"),
            (lambda p, s: p + s[len(p) :], "the proposals are taken unchecked, and one token after them"),
            (lambda p, s: [s[n_right(p, s)]], "the right proposals belong to the answer as well"),
            (lambda p, s: n_right(p, s), "that is the number of right proposals: return the tokens to append"),
            (lambda p, s: s[n_right(p, s)], "return a list: the right proposals, and the token after them"),
        ],
        "as many of `says` as there are right proposals before the first wrong one, and one more",
    )  # fmt: skip


@exercise
def ex14_4(attempt):
    """What serving with TPA supports, from the numbers of the notebook."""
    judge_choices(
        attempt(),
        dict(
            a=(False, "on each of 8 GPUs TPA (1, 1) keeps 2 · (64/8 + 128) = 272 numbers, GQA-8 one head, 256"),
            b=(True, "on one GPU it is 384 against 2,048: b is not copied anywhere there"),
            c=(False, "a right proposal is what the model itself would have written, so drafts change the time only"),
            d=(False, "b is stored after its rotation, so pages are shared at equal positions only: a prefix, not an "
                      "infix"),
            e=(True, "the error of a key enters a score, and the softmax raises e to it; values are averaged"),
            f=(False, "prefill assembles K and V and works as MHA does: it is the arithmetic that counts there"),
        ),
    )  # fmt: skip
