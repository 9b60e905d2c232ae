"""Checkers of notebook 11's exercises."""

import torch

from tpa_minimal.course.checks.judging import (
    WrongAnswer,
    agree,
    exercise,
    guarded,
    judge,
    judge_choices,
    normal,
)
from tpa_minimal.tpa import T6Config, TensorProductAttention, apply_rope, rope_tables


@exercise
def ex11_1(attempt):
    """Numbers cached per token by four variants: attempt(variant, R, h, d_head)."""
    head_and_feature_factors = {
        "shared A": (1, 2),
        "shared both": (1, 1),
        "fixed a_k": (1, 2),
        "shared B, fixed A": (0, 1),
    }

    def right(variant, R, h, d_head):
        heads, features = head_and_feature_factors[variant]
        return R * (heads * h + features * d_head)

    def constants_too(variant, R, h, d_head):
        return right(variant, R, h, d_head) + R * h * {"fixed a_k": 1, "shared B, fixed A": 2}.get(variant, 0)

    judge(
        attempt,
        right,
        [(name, *sizes) for name in head_and_feature_factors for sizes in ((2, 6, 16), (1, 32, 128), (3, 5, 64))],
        [
            (lambda name, R, h, d: 2 * R * (h + d),
             "that is TPA's own cache: what is shared or constant need not be cached twice, or at all"),
            (constants_too, "you cached constants too: they are weights of the layer, the same for every token"),
            (lambda name, R, h, d: R * (2 * h + d),
             "that is shared B, two head factors and one feature factor: what is shared here?"),
            (lambda name, R, h, d: right(name, R, h, d) + R * d * (name in ("shared both", "shared B, fixed A")),
             "b is needed once only, unrotated: b_k is made from it"),
            (lambda name, R, h, d: right(name, 1, h, d), "each of the R rows has to be cached"),
            (lambda name, R, h, d: R * (h + d), "that is one a and one b: what else does a token bring?"),
            (lambda name, R, h, d: right(name, R, d, h), "h and d_head are exchanged: a has h numbers, b has d_head"),
            (lambda name, R, h, d: right(name, R, h, d) - R * h * (name == "shared A"),
             "a_k = a_v is cached once, not never: it differs from token to token"),
        ],
        "list a_k, b_k, a_v, b_v, and cross out what is a constant or a copy",
    )  # fmt: skip


@exercise
def ex11_2(attempt):
    """A TPA with a_k = a_v: a subclass of TensorProductAttention."""
    for h, d_head, R in ((5, 6, 2), (3, 4, 3)):
        config = T6Config(
            vocab_size=8, n_layer=1, d_model=12, n_head=h, d_head=d_head, rank_q=3, rank_k=R, rank_v=R, max_len=32
        )
        layer = attempt(config)
        if not isinstance(layer, TensorProductAttention):
            raise WrongAnswer(f"expected a subclass of TensorProductAttention; its objects are {type(layer).__name__}")
        layer = layer.double()
        widths = tuple(guarded(layer.factor_widths)())
        if widths == (h, d_head, h, d_head, 0, d_head):
            raise WrongAnswer(
                "you cache the shared factor as a_k; the checker reads it as a_v, so give a_k the width 0"
            )
        if widths == (h, d_head) * 3:
            raise WrongAnswer("a_k and a_v are both projected and cached: one of the widths must be 0")
        if widths != (h, d_head, 0, d_head, h, d_head):
            raise WrongAnswer(
                f"factor_widths() is {widths}; for h = {h} and d_head = {d_head} it should hold all but a_k's"
            )
        base = TensorProductAttention(config).double()
        with torch.no_grad():
            for i, weight in enumerate(layer.parameters()):
                weight.copy_(normal(*weight.shape, seed=i) * 0.5)
            rows = list(layer.factor_proj.weight.split(layer.sizes))
            rows[2] = rows[4]
            base.factor_proj.weight.copy_(torch.cat(rows))
            base.out_proj.weight.copy_(layer.out_proj.weight)
        if type(layer).attend is TensorProductAttention.attend:
            raise WrongAnswer(
                "`attend` is TPA's own, and gets an empty a_k: replace it, and put a_v in the place of a_k"
            )
        run, x, cache = guarded(layer), normal(2, 9, 12, seed=5), layer.new_cache(2)
        whole, expected = run(x), base(x)
        pieces = torch.cat([run(piece, cache) for piece in x.split([4, 1, 4], dim=1)], dim=1)
        if not agree(whole, expected):
            raise WrongAnswer(
                "without a cache the output differs from that of a TPA with equal a_k and a_v: pass a_q, b_q, a_v, "
                "b_k, "
                "a_v, b_v on; b_k is rotated already, and values are never rotated"
            )
        if not agree(pieces, whole):
            raise WrongAnswer(
                "with a cache the output differs from that without: pass `start` on, and do not rotate again"
            )
        left = torch.tensor([3, 0])
        if not agree(run(x, None, None, left), base(x, None, None, left)):
            raise WrongAnswer(
                "in a batch with padding the output differs from TPA's: pass `padding` on to super().attend"
            )
        if cache.nbytes != 2 * 9 * R * (h + 2 * d_head) * 8 and cache.nbytes != 2 * 32 * R * (h + 2 * d_head) * 8:
            raise WrongAnswer(f"the cache takes {cache.nbytes} bytes where R (h + 2 d_h) numbers per token need less")


@exercise
def ex11_3(attempt):
    """Third order with RoPE: vec(b R_t ⊗ c), attempt(b, c, cos, sin)."""

    def rotate(y, cos, sin):
        return apply_rope(y[None, :, None], cos, sin)[0, :, 0]

    def rotate_neighbours(y, cos, sin):
        y1, y2 = y[:, ::2], y[:, 1::2]
        return torch.stack((y1 * cos + y2 * sin, y2 * cos - y1 * sin), -1).flatten(1)

    def vec(b, c):
        return (c[:, :, None] * b[:, None, :]).flatten(1)

    def cases(*sizes):
        for T, d_b, d_c in sizes:
            yield normal(T, d_b, seed=1), normal(T, d_c, seed=2), *rope_tables(torch.arange(2, T + 2), d_b, 100.0)

    def right(b, c, cos, sin):
        return vec(rotate(b, cos, sin), c)

    judge(
        attempt,
        right,
        list(cases((5, 4, 4), (3, 6, 6), (4, 2, 2))),
        [
            (lambda b, c, cos, sin: vec(c, rotate(b, cos, sin)),
             "vec stacks columns: feature j · d_b + i is b_i c_j, and yours is that of b_j c_i"),
            (lambda b, c, cos, sin: vec(b, c), "nothing is rotated"),
            (lambda b, c, cos, sin: vec(b, rotate(c, cos, sin)), "you rotated c: the theorem's form rotates b"),
            (lambda b, c, cos, sin: vec(rotate(b, cos, sin), rotate(c, cos, sin)),
             "you rotated both b and c: b alone is enough"),
            (lambda b, c, cos, sin: vec(rotate(b, cos, -sin), c),
             "you rotated the other way: x1 cos + x2 sin comes first"),
            (lambda b, c, cos, sin: vec(rotate_neighbours(b, cos, sin), c),
             "you paired neighbours: feature i goes with i + d_b/2"),
            (lambda b, c, cos, sin: vec(rotate(b, cos, sin), c).unflatten(1, (c.shape[1], b.shape[1])),
             "return one vector per token, (T, d_b d_c): flatten the last two axes"),
            (lambda b, c, cos, sin: vec(rotate(b, sin, cos), c), "cos and sin are exchanged"),
        ],
        "not the rotated product; try it with sin = 0 and cos = 1 first, and then with c = 1",
    )  # fmt: skip
    judge(attempt, right, list(cases((3, 6, 2), (4, 2, 3))), otherwise="right for d_c = d_b only")


@exercise
def ex11_4(attempt):
    """True or false about the variants."""
    judge_choices(
        attempt(),
        dict(
            a=(True, "a square random A is invertible, so h independent feature vectors give h independent keys"),
            b=(True, "at rank 1 the logit is a_q a_k κ(distance): the two tokens' numbers cancel from the ratio"),
            c=(
                True,
                "a rotation is undone by rotating back: exact up to rounding, at the same cost as rotating at use",
            ),
            d=(False, "R_t ⊗ I is as good a rotation as I ⊗ R_t: products still depend on distance alone"),
            e=(False, "RoPE acts on whatever it is given; what matters is that nothing but RoPE depends on position"),
            f=(
                True,
                "the sigmoid of rotated features is no longer a rotated vector, so distances are not what is left",
            ),
        ),
    )
