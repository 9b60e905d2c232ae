"""Checkers of notebook 12's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, agree, describe, exercise, judge, normal, tensor
from tpa_minimal.tpa import apply_rope, rope_tables


@exercise
def ex12_1(attempt):
    """Rows of a query or key projection changed so that our RoPE does what LLaMA's does: attempt(weight, d_head)."""
    for heads, d_head, d_model in ((3, 8, 10), (2, 4, 7), (1, 12, 6)):
        W_q, W_k = normal(2, heads * d_head, d_model, seed=heads)
        x = normal(2, d_model, seed=9)
        cos, sin = rope_tables(torch.tensor([3, 11]), d_head, 100.0, torch.float64)

        def logits(W_q, W_k, sign=1, x=x, cos=cos, sin=sin, shape=(1, 2, heads, d_head)):
            q, k = (apply_rope((x @ W.double().T).view(shape), cos, sign * sin)[0] for W in (W_q, W_k))
            return (q[0] * k[1]).sum(-1)  # one per head

        before = W_q.clone()
        changed_q = tensor(attempt(W_q, d_head))
        if not torch.equal(W_q, before):
            raise WrongAnswer("the given weight was changed in place: return a new one")
        if changed_q.shape != W_q.shape:
            raise WrongAnswer(
                f"return a weight of the shape {tuple(W_q.shape)} that was given, not {describe(changed_q)}"
            )
        every = W_q.new_tensor([1.0, -1.0]).repeat(heads * d_head // 2)[:, None]
        for wrong, say in (
            (W_q, "the weight is as it was: our RoPE rotates it the wrong way"),
            (-W_q, "-x rotates as x does: a change of all signs cancels out of q · k"),
            (W_q * W_q.new_tensor([1.0, -1.0]).repeat_interleave(heads * d_head // 2)[:, None] if heads > 1 else None,
             "that is the second half of the whole matrix: each head has a second half of its own"),
            (torch.cat((W_q[:, : d_model // 2], -W_q[:, d_model // 2 :]), 1),
             "you changed columns, which belong to the layer's input; features of q and k are rows"),
            (W_q * every if d_head > 2 else None,
             "you changed every other feature: RoPE's pairs are i and i + d_head/2"),
            (W_q.flip(0), "you reversed the order of rows: heads must stay where they are"),
        ):  # fmt: skip
            if wrong is not None and agree(changed_q, wrong):
                raise WrongAnswer(say)
        changed_k = tensor(attempt(W_k.clone(), d_head))
        if not agree(logits(changed_q, changed_k).to(changed_q.dtype), logits(W_q, W_k, sign=-1)):
            raise WrongAnswer(
                "q · k with our RoPE differs from LLaMA's; you need signs with s_i s_{i + d_head/2} = -1 for every "
                "pair, or "
                "the two halves of each head exchanged"
            )


@exercise
def ex12_2(attempt):
    """A norm's gain folded into the matrix that follows: attempt(weight, gain) with y = W (gain ⊙ x)."""
    judge(
        attempt,
        lambda weight, gain: weight * gain,
        [(normal(n, d), 3 * normal(d, seed=3)) for n, d in ((6, 6), (4, 7), (9, 3))],
        [
            (lambda W, g: W * g[:, None] if len(W) == len(g) else W.T * g[:, None],
             "you scaled rows, the outputs: the gain multiplies the inputs, one number a column"),
            (lambda W, g: W / g, "the gain has to be multiplied in, not divided out"),
            (lambda W, g: W, "the gain is lost"),
            (lambda W, g: W * g.abs(), "a gain may be negative, and its sign belongs to it"),
            (lambda W, g: (W * g).T, "the matrix is transposed"),
            (lambda W, g: W @ g, "that is the output for x = (1, 1, ...): return a matrix"),
            (lambda W, g: W + g, "the gain is a factor, not a term"),
            (lambda W, g: W * g**2, "the gain is folded in twice"),
            (lambda W, g: W * (1 + g), "1 + gain is the convention of other models; LLaMA's gain is the factor itself"),
        ],
        "for an x of your choice, compare attempt(W, gain) @ x with W @ (gain * x)",
    )  # fmt: skip


@exercise
def ex12_3(attempt):
    """The authors' head factors, laid out head by head, in our order rank by rank: attempt(weight, n_head, rank)."""

    def moved(W, h, R):
        return W.view(h, R, -1).transpose(0, 1).flatten(0, 1)

    judge(
        attempt,
        lambda weight, n_head, rank: moved(weight, n_head, rank),
        [(normal(h * R, d), h, R) for h, R, d in ((5, 3, 2), (4, 4, 3), (3, 5, 7), (2, 6, 1))],
        [
            (lambda W, h, R: W, "the rows are as they were: theirs go head by head, ours rank by rank"),
            (lambda W, h, R: moved(W, R, h), "you read them as rank by rank already: the first split is into heads"),
            (lambda W, h, R: W.flip(0), "you reversed the order of rows"),
            (lambda W, h, R: W.view(h, R, -1).flip(0).flatten(0, 1), "you reversed the heads; their order stays"),
            (lambda W, h, R: W.view(h, R, -1).flip(1).flatten(0, 1), "you reversed the ranks; their order stays"),
            (lambda W, h, R: W.view(h, R, -1).transpose(0, 1),
             "return a matrix (rank · n_head, d_model): flatten again"),
            (lambda W, h, R: W.view(R, h, -1),
             "a view keeps every number in its place: rows must move, so split into (n_head, rank), "
             "transpose, flatten"),
            (lambda W, h, R: W.T, "you exchanged rows and columns: columns belong to the input and stay"),
            (lambda W, h, R: W.T.reshape(W.shape),
             "you exchanged rows and columns: columns belong to the input and stay"),
        ],
        "row r · h + i of ours is row i · R + r of theirs",
    )  # fmt: skip


@exercise
def ex12_4(attempt):
    """The largest R_K = R_V at which fixed and contextual A cache less than GQA: attempt(n_head, d_head, n_kv_head)."""

    def right(n_head, d_head, n_kv_head):
        return n_kv_head - 1, (n_kv_head * d_head - 1) // (n_head + d_head)

    def fixed(rank):
        return lambda h, d, G: (rank(h, d, G), right(h, d, G)[1])

    def contextual(rank):
        return lambda h, d, G: (right(h, d, G)[0], rank(h, d, G))

    judge(
        attempt,
        right,
        [(32, 128, 16), (32, 64, 32), (9, 64, 3), (16, 16, 4), (8, 16, 1), (12, 36, 8)],
        [
            (lambda h, d, G: right(h, d, G)[::-1], "fixed A comes first, contextual A second"),
            (fixed(lambda h, d, G: G), "fixed A: rank G caches as much as GQA does, not less"),
            (fixed(lambda h, d, G: h - 1), "fixed A: compare with GQA's G heads, not with all h"),
            (contextual(lambda h, d, G: (h * d - 1) // (h + d)),
             "contextual A: compare with GQA's 2 G d_h, not with MHA's 2 h d_h"),
            (contextual(lambda h, d, G: G - 1), "contextual A: its head factors are cached too, 2 R (h + d_h)"),
            (contextual(lambda h, d, G: (G * d - 1) // (h + d) + 1), "contextual A: that rank caches as much or more"),
            (contextual(lambda h, d, G: (G * d - 1) // (2 * (h + d))),
             "contextual A: GQA caches keys and values, 2 G d_h"),
            (contextual(lambda h, d, G: G * d / (h + d)), "contextual A: whole ranks only, rounded down"),
            (contextual(lambda h, d, G: max(1, (G * d - 1) // (h + d))),
             "contextual A: 0 where no rank saves anything"),
        ],
        lambda got, best: f"the answer is {best}, and yours is {tuple(describe(x) for x in got)}: "
        "2 R d_h < 2 G d_h with fixed A, 2 R (h + d_h) < 2 G d_h with contextual A",
    )  # fmt: skip
