"""Checkers of notebook 04's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, close, exercise, expect_tensor
from tpa_minimal.tpa import assemble


@exercise
def ex04_1(attempt):
    """Constant head factors (R, h) for key heads shared in groups of any shape: attempt(reads)."""
    generator = torch.Generator().manual_seed(0)
    for reads in ([0, 0, 1, 0], [0, 1, 2], [0, 0, 0], [2, 0, 1, 1, 0], [0, 0, 1, 1]):
        R, h = max(reads) + 1, len(reads)
        a = attempt(list(reads))
        if isinstance(a, torch.Tensor) and a.shape == (h, R) and R != h:
            raise WrongAnswer(f"A has one row per rank: shape (R, h) = ({R}, {h}); yours is the transpose, ({h}, {R})")
        a = expect_tensor(a, (R, h), "A")
        if not a.is_floating_point():
            raise WrongAnswer(f"A must be a float tensor, as the keys that it multiplies are; yours is {a.dtype}")
        a = a.double()
        b = torch.randn(R, 8, generator=generator, dtype=torch.float64)
        got, asked = assemble(a, b), b[reads]
        if close(got, asked):
            continue
        if close(R * got, asked):
            raise WrongAnswer("each key comes out R times too small: the masks must undo the 1/R of assemble")
        if close(got * R / h, asked):
            raise WrongAnswer(
                "the factor that undoes 1/R is R, the number of key heads; h is right only for MHA, where R = h"
            )
        if h % R == 0 and close(a, R * torch.eye(R, dtype=a.dtype).repeat_interleave(h // R, dim=1)):
            raise WrongAnswer(
                "these are equal groups of neighbours; head i must read key head reads[i], wherever it stands"
            )
        if ((a != 0).sum(0) > 1).any():
            raise WrongAnswer(
                f"for reads={reads} some head mixes several key heads: each column of A has one entry that is not 0"
            )
        raise WrongAnswer(f"for reads={reads}: column i of A must be R in row reads[i] and 0 in the others")


@exercise
def ex04_2(attempt):
    """The largest G dividing h with which GQA caches no more than TPA of rank R: attempt(h, d_head, rank)."""

    def largest(h, budget):
        return max((G for G in range(1, h + 1) if h % G == 0 and budget(G)), default=0)

    for h, d, R in ((32, 128, 2), (36, 64, 2), (64, 128, 1), (64, 64, 2), (12, 64, 3), (8, 128, 12), (34, 64, 2)):
        G, truth = attempt(h, d, R), largest(h, lambda G: G * d <= R * (h + d))  # noqa: B023
        if G == truth:
            continue
        where = f"for h={h}, d_h={d}, R={R} the answer is {truth}, and yours is {G}: "
        if not isinstance(G, int) or G < 1 or h % G:
            raise WrongAnswer(where + "G must be a whole number that divides h")
        if G == largest(h, lambda G: G * d < R * (h + d)):  # noqa: B023
            raise WrongAnswer(where + "'no more' includes an equal number")
        if G == largest(h, lambda G: G <= R):  # noqa: B023
            raise WrongAnswer(
                where + "contextual TPA caches its head factors too, h + d_h numbers per rank and not d_h"
            )
        if G in (largest(h, lambda G: 2 * G * d <= R * (h + d)), largest(h, lambda G: G * d <= 2 * R * (h + d))):  # noqa: B023
            raise WrongAnswer(where + "count keys and values on both sides: 2 G d_h against (R_K + R_V)(h + d_h)")
        verb = "caches more than TPA" if G > truth else "leaves room for a larger G"
        raise WrongAnswer(where + f"GQA with {G} groups caches {2 * G * d} numbers, TPA {2 * R * (h + d)}; that {verb}")


@exercise
def ex04_3(attempt):
    """W_a (4, 20) and W_b (8, 20) by which a token shows its topic to its speaker's head only: attempt()."""
    answer = attempt()
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise WrongAnswer("return two tensors, W_a and W_b")
    W_a, W_b = answer
    if [getattr(W, "shape", None) for W in answer] == [(8, 20), (4, 20)]:
        raise WrongAnswer(
            "W_a must have shape (4, 20), yours has (8, 20), and W_b (8, 20): returned in the other order?"
        )
    for name, W, shape in (("W_a", W_a, (4, 20)), ("W_b", W_b, (8, 20))):
        if isinstance(W, torch.Tensor) and W.shape == shape[::-1]:
            raise WrongAnswer(f"{name} has shape {tuple(W.shape)}, the transpose of {shape}: a = W x, with x a column")
        expect_tensor(W, shape, name)
    for speaker in range(4):
        for topic in range(8):
            for word in reversed(range(8)):  # so that a word cannot pass for its topic at the first token
                x = torch.zeros(20, dtype=torch.float64)
                x[[speaker, 4 + topic, 12 + word]] = 1
                a, b = W_a.double() @ x, W_b.double() @ x
                K = torch.outer(a, b)
                asked = torch.zeros(4, 8, dtype=torch.float64)
                asked[speaker, topic] = 1
                if close(K, asked):
                    continue
                token = f"for speaker {speaker}, topic {topic}, word {word} "
                if not K.any():
                    raise WrongAnswer(token + "the key matrix is all zeros: no head can see the token")
                rows = [i for i in range(4) if K[i].any()]
                if len(rows) > 1:
                    raise WrongAnswer(
                        token + f"heads {rows} see the token: a must be the one-hot vector of the speaker, "
                        "0 for every other head, and the topic and the word must not enter it"
                    )
                if rows != [speaker]:
                    raise WrongAnswer(token + f"head {rows[0]} sees the token: a must be one-hot at the speaker")
                if close(K[speaker] / K[speaker, topic], asked[speaker]):
                    raise WrongAnswer(token + f"the row is {K[speaker, topic]:g} times the topic's one-hot vector")
                raise WrongAnswer(
                    token + f"row {speaker} is not the topic's one-hot vector: b must read entries 4 to 11 of x and "
                    "nothing else"
                )


def _keys_of(kind, seed):
    """Assembled keys (T, h, d_h) of a mechanism with random weights; T = 24 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, d_head, G = ((6, 8, 2), (8, 8, 4), (6, 12, 3))[seed % 3]
    R = {"MHA": h, "MQA": 1, "GQA": G, "fixed A": G, "contextual A": (1, G, 2)[seed % 3]}[kind]
    x = random(24, 40)
    b = (x @ random(40, R * d_head)).unflatten(-1, (R, d_head))
    if kind == "contextual A":
        return assemble((x @ random(40, R * h)).unflatten(-1, (R, h)), b)
    if kind == "fixed A":
        return assemble(random(R, h), b)
    return b.repeat_interleave(h // R, dim=1)


@exercise
def ex04_4(attempt):
    """Tell from the keys of a text (T, h, d_h) which mechanism made them: attempt(K) -> one of five names."""
    hints = {
        ("contextual A", "fixed A"): "one token's rank is small in both; put many tokens side by side, "
        "h × (T · d_h): with constants the rank stays, with contextual factors it grows",
        ("contextual A", "MQA"): "rank 1 means that rows are multiples of one another; MQA's are *equal*",
        ("contextual A", "MHA"): "together they use all head patterns, as MHA's do, but one token is of low rank",
        ("fixed A", "GQA"): "the rank is the same as GQA's, but no two heads have equal keys",
        ("GQA", "fixed A"): "its constants are masks: heads of one group have equal keys, so count the different rows",
        ("GQA", "MQA"): "not all heads have the same key: there are several groups",
        ("MQA", "GQA"): "all heads have the same key: there is one group",
        ("MHA", "fixed A"): "its keys have full rank h, in one token already",
    }  # fmt: skip
    names = ("MHA", "GQA", "MQA", "fixed A", "contextual A")
    for seed in range(3):
        for truth in names:
            answer = attempt(_keys_of(truth, seed))
            if answer not in names:
                raise WrongAnswer(f"answer one of {', '.join(names)}; yours was {answer!r}")
            if answer != truth:
                hint = hints.get(
                    (truth, answer), "compare the rank of one token's matrix with h, and count its different rows"
                )
                raise WrongAnswer(f"you called '{answer}' keys that '{truth}' made: {hint}")
