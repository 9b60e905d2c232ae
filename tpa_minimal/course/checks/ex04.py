"""Checkers of notebook 04's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, exercise, judge, judge_names, normal, tensor
from tpa_minimal.tpa import assemble


def constants(reads, value=None, R=None):
    """Head factors (R, h) with `value`, by default R, where a head reads a key head, and 0 elsewhere."""
    R = R or max(reads) + 1
    a = torch.zeros(R, len(reads), dtype=torch.float64)
    a[reads, range(len(reads))] = float(R if value is None else value)
    return a


@exercise
def ex04_1(attempt):
    """Constant head factors (R, h) for key heads shared in groups of any shape: attempt(reads)."""

    def floats(reads):
        a = attempt(reads)
        if isinstance(a, torch.Tensor) and not a.is_floating_point():
            raise WrongAnswer(f"A must be a float tensor, as the keys that it multiplies are; yours is {a.dtype}")
        return a

    def neighbours(reads):
        R, h = max(reads) + 1, len(reads)
        return constants([i * R // h for i in range(h)], R=R)

    judge(
        floats,
        lambda reads: constants(reads),
        [(list(reads),) for reads in ([0, 0, 1, 0], [0, 1, 2], [0, 0, 0], [2, 0, 1, 1, 0], [0, 0, 1, 1], [1, 0])],
        [
            (lambda reads: constants(reads).mT, "A has one row per rank, shape (R, h); yours is the transpose, (h, R)"),
            (lambda reads: constants(reads, 1), "each key comes out R times too small: undo the 1/R of assemble"),
            (lambda reads: constants(reads, len(reads)),
             "the factor that undoes 1/R is R, the number of key heads; h is right only for MHA, where R = h"),
            (lambda reads: constants(reads, (max(reads) + 1) ** 0.5),
             "√R is not enough: b carries no factor here, so A undoes the whole 1/R"),
            (lambda reads: constants(reads, 1 / (max(reads) + 1)), "divide by R? assemble has done so: multiply by R"),
            (neighbours,
             "these are equal groups of neighbours; head i must read key head reads[i], wherever it stands"),
        ],
        lambda got, right: (
            "some head mixes several key heads: each column of A has one entry that is not 0"
            if (torch.as_tensor(got) != 0).sum(0).max() > 1
            else "column i of A must be R in row reads[i], and 0 in the others"
        ),
    )  # fmt: skip


@exercise
def ex04_2(attempt):
    """The largest G dividing h with which GQA caches no more than TPA of rank R: attempt(h, d_head, rank)."""

    def largest(h, within):
        return max((G for G in range(1, h + 1) if h % G == 0 and within(G)), default=0)

    judge(
        attempt,
        lambda h, d_head, rank: largest(h, lambda G: G * d_head <= rank * (h + d_head)),
        [(32, 128, 2), (36, 64, 2), (64, 128, 1), (64, 64, 2), (12, 64, 3), (8, 128, 12), (34, 64, 2), (48, 96, 4)],
        [
            (lambda h, d, R: largest(h, lambda G: G * d < R * (h + d)), "'no more' includes an equal number"),
            (lambda h, d, R: largest(h, lambda G: G <= R),
             "contextual TPA caches its head factors too, h + d_h numbers per rank and not d_h"),
            (lambda h, d, R: largest(h, lambda G: 2 * G * d <= R * (h + d)),
             "count keys and values on both sides: 2 G d_h against (R_K + R_V)(h + d_h)"),
            (lambda h, d, R: largest(h, lambda G: G * d <= 2 * R * (h + d)),
             "count keys and values on both sides: 2 G d_h against (R_K + R_V)(h + d_h)"),
            (lambda h, d, R: R * (h + d) // d, "G must divide h: a group has a whole number of heads"),
            (lambda h, d, R: min(h, R * (h + d) // d), "G must divide h: a group has a whole number of heads"),
            (lambda h, d, R: R * (h + d) / d, "G must be a whole number that divides h"),
            (lambda h, d, R: largest(h, lambda G: G * h <= R * (h + d)),
             "each of GQA's G heads caches d_h numbers, not h"),
            (lambda h, d, R: h, "with G = h that is MHA, which caches more than TPA here"),
            (lambda h, d, R: 1, "a single group always caches less; the largest G was asked for"),
        ],
        "compare 2 G d_h numbers with 2 R (h + d_h), for every G that divides h",
    )  # fmt: skip


@exercise
def ex04_3(attempt):
    """W_a (4, 20) and W_b (8, 20) by which a token shows its topic to its speaker's head only: attempt()."""
    answer = attempt()
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise WrongAnswer("return two tensors, W_a and W_b")
    W_a, W_b = (tensor(W).double() for W in answer)
    if (W_a.shape, W_b.shape) == ((8, 20), (4, 20)):
        raise WrongAnswer("W_a must have shape (4, 20) and W_b (8, 20): returned in the other order?")
    for name, W, shape in (("W_a", W_a, (4, 20)), ("W_b", W_b, (8, 20))):
        if tuple(W.shape) != shape:
            transposed = ", the transpose: a = W x, with x a column" if tuple(W.shape) == shape[::-1] else ""
            raise WrongAnswer(f"{name} must have shape {shape}, not {tuple(W.shape)}{transposed}")
    for speaker, topic, word in [(s, t, w) for s in range(4) for t in range(8) for w in (7, 3, 0)]:
        x = torch.zeros(20, dtype=torch.float64)
        x[[speaker, 4 + topic, 12 + word]] = 1
        K, asked = torch.outer(W_a @ x, W_b @ x), torch.zeros(4, 8, dtype=torch.float64)
        asked[speaker, topic] = 1
        if torch.allclose(K, asked, rtol=0, atol=1e-6):
            continue
        token, rows = f"for speaker {speaker}, topic {topic}, word {word} ", K.any(1).nonzero().flatten().tolist()
        if not rows:
            raise WrongAnswer(token + "the key matrix is all zeros: no head can see the token")
        if len(rows) > 1:
            raise WrongAnswer(
                token + f"heads {rows} see the token: a must be the one-hot vector of the speaker, 0 for every other "
                "head, and the topic and the word must not enter it"
            )
        if rows != [speaker]:
            raise WrongAnswer(token + f"head {rows[0]} sees the token: a must be one-hot at the speaker")
        if torch.allclose(K[speaker] / K[speaker, topic], asked[speaker]):
            raise WrongAnswer(token + f"the row is {K[speaker, topic]:g} times the topic's one-hot vector")
        raise WrongAnswer(
            token + f"row {speaker} is not the topic's one-hot vector: b must read entries 4 to 11 of x and "
            "nothing else"
        )


def keys_of(kind, seed):
    """Assembled keys (T, h, d_h) of a mechanism with random weights; T = 24 tokens."""
    h, d_head, G = ((6, 8, 2), (8, 8, 4), (6, 12, 3))[seed % 3]
    R = {"MHA": h, "MQA": 1, "GQA": G, "fixed A": G, "contextual A": (1, G, 2)[seed % 3]}[kind]
    x = normal(24, 40, seed=seed)
    b = (x @ normal(40, R * d_head, seed=seed + 10)).unflatten(-1, (R, d_head))
    if kind == "contextual A":
        return assemble((x @ normal(40, R * h, seed=seed + 20)).unflatten(-1, (R, h)), b)
    if kind == "fixed A":
        return assemble(normal(R, h, seed=seed + 20), b)
    return b.repeat_interleave(h // R, dim=1)


@exercise
def ex04_4(attempt):
    """Tell from the keys of a text (T, h, d_h) which mechanism made them: attempt(K) -> one of five names."""
    names = ("MHA", "GQA", "MQA", "fixed A", "contextual A")
    hints = {
        ("MHA", "GQA"): "no two heads have equal keys",
        ("MHA", "MQA"): "no two heads have equal keys",
        ("MHA", "fixed A"): "its keys have full rank h, in one token already",
        ("MHA", "contextual A"): "one token's keys have full rank h; contextual factors give one token rank R < h",
        ("GQA", "MHA"): "heads of one group have equal keys, so the rank is G < h",
        ("GQA", "MQA"): "not all heads have the same key: there are several groups",
        ("GQA", "fixed A"): "its constants are masks: heads of one group have equal keys, so count the different rows",
        ("GQA", "contextual A"): "the rank of many tokens side by side, h × (T · d_h), is that of one token",
        ("MQA", "MHA"): "all heads have the same key",
        ("MQA", "GQA"): "all heads have the same key: there is one group",
        ("MQA", "fixed A"): "all heads have the same key; random constants would scale it",
        ("MQA", "contextual A"): "all heads have the same key, in every token",
        ("fixed A", "MHA"): "its rank is below h, for any number of tokens",
        ("fixed A", "GQA"): "the rank is the same as GQA's, but no two heads have equal keys",
        ("fixed A", "MQA"): "the heads have different keys",
        ("fixed A", "contextual A"): "the rank of many tokens side by side, h × (T · d_h), is that of one token",
        ("contextual A", "MHA"): "together its tokens use all head patterns, as MHA's do, but one token is of low rank",
        ("contextual A", "GQA"): "no two heads have equal keys",
        ("contextual A", "MQA"): "rank 1 means that rows are multiples of one another; MQA's are *equal*",
        ("contextual A", "fixed A"): "one token's rank is small in both; put many tokens side by side, h × (T · d_h): "
        "with constants the rank stays, with contextual factors it grows",
    }
    judge_names(attempt, [(keys_of(truth, seed), truth, "") for seed in range(3) for truth in names], hints)
