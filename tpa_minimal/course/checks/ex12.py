"""Checkers of notebook 12's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, equals, exercise, judge
from tpa_minimal.tpa import apply_rope, rope_tables


@exercise
def ex12_1(attempt):
    """Rows of a query or key projection changed so that our RoPE does what LLaMA's does: attempt(weight, d_head)."""
    generator = torch.Generator().manual_seed(2)
    d_head, positions = 8, torch.tensor([3, 11])
    W_q, W_k = (torch.randn(3 * d_head, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    cos, sin = rope_tables(positions, d_head, 100.0, torch.float64)

    def logits(change, sign=1):
        q, k = (apply_rope((x @ change(W).T).view(1, 2, 3, d_head), cos, sign * sin)[0] for W in (W_q, W_k))
        return (q[0] * k[1]).sum(-1)  # one per head

    before, got = W_q.clone(), attempt(W_q, d_head)
    if not torch.equal(W_q, before):
        raise WrongAnswer("the given weight was changed in place: return a new one")
    if not isinstance(got, torch.Tensor) or got.shape != W_q.shape:
        raise WrongAnswer(f"return a weight of the shape {tuple(W_q.shape)} that was given")
    wrong = {
        "the weight is as it was: our RoPE turns it the wrong way": W_q,
        "-x turns as x does: a change of all signs cancels out of q · k": -W_q,
        "that is the second half of the whole matrix: each head has a second half of its own": torch.cat(
            (W_q[:12], -W_q[12:])
        ),
        "you changed columns, which belong to the layer's input; features of q and k are rows": torch.cat(
            (W_q[:, :5], -W_q[:, 5:]), 1
        ),
        "you changed every other feature: RoPE's pairs are i and i + d_head/2": W_q
        * torch.tensor([1.0, -1.0], dtype=W_q.dtype).repeat(12)[:, None],
    }
    for say, value in wrong.items():
        if torch.equal(got, value):
            raise WrongAnswer(say)
    if not equals(logits(lambda W: attempt(W, d_head)), logits(lambda W: W, sign=-1)):
        raise WrongAnswer(
            "q · k with our RoPE differs from LLaMA's; you need signs with s_i s_{i + d_head/2} = -1 for every pair"
        )


@exercise
def ex12_2(attempt):
    """A norm's gain folded into the matrix that follows: attempt(weight, gain) with y = W (gain ⊙ x)."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    gain = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    judge(
        attempt(W, gain),
        W * gain,
        {
            "you scaled rows, the outputs: the gain multiplies the inputs, one number a column": W * gain[:, None],
            "the gain has to be multiplied in, not divided out": W / gain,
            "the gain is lost": W,
            "the matrix is transposed": (W * gain).T,
        },
        "for an x of your choice, compare attempt(W, gain) @ x with W @ (gain * x)",
    )


@exercise
def ex12_3(attempt):
    """The authors' head factors, laid out head by head, in our order rank by rank: attempt(weight, n_head, rank)."""
    for h, R in ((5, 3), (4, 4), (3, 5)):
        W = torch.arange(h * R * 2, dtype=torch.float64).view(h * R, 2)
        right = W.view(h, R, 2).transpose(0, 1).reshape(R * h, 2)
        judge(
            attempt(W, h, R),
            right,
            {
                "the rows are as they were: theirs go head by head, ours rank by rank": W,
                "you read them as rank by rank already: the first split is into heads": W.view(R, h, 2)
                .transpose(0, 1)
                .reshape(R * h, 2),
                "you reversed the order of rows": W.flip(0),
            },
            "row r · h + i of ours is row i · R + r of theirs",
        )


@exercise
def ex12_4(attempt):
    """The largest R_K = R_V at which fixed and contextual A cache less than GQA: attempt(n_head, d_head, n_kv_head)."""
    for h, d_head, G in ((32, 128, 16), (32, 64, 32), (9, 64, 3), (16, 16, 4), (8, 16, 1)):
        got = attempt(h, d_head, G)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise WrongAnswer("return two numbers: the largest rank with fixed A, and with contextual A")
        fixed, contextual = got
        case = f"h={h}, d_head={d_head}, G={G}, fixed A: "
        judge(
            fixed,
            G - 1,
            {
                case + f"rank {G} caches as much as GQA does, not less": G,
                case + "compare with GQA's G heads, not with all h": h - 1,
            },
            case + "2 R d_h numbers against 2 G d_h",
        )
        case = f"h={h}, d_head={d_head}, G={G}, contextual A: "
        right = -(-G * d_head // (h + d_head)) - 1
        mistakes = {
            case + "compare with GQA's 2 G d_h, not with MHA's 2 h d_h": -(-h * d_head // (h + d_head)) - 1,
            case + "contextual head factors are cached too: 2 R (h + d_h)": G - 1,
            case + "that rank caches as much or more": right + 1,
            case + "GQA keeps keys and values, 2 G d_h": -(-G * d_head // (2 * (h + d_head))) - 1,
        }
        judge(contextual, right, mistakes, case + "the largest R with 2 R (h + d_h) < 2 G d_h")
        if not all(isinstance(value, int) for value in got):
            raise WrongAnswer(f"ranks are whole numbers: return ints, not {got!r}")
