"""Checkers of notebook 11's exercises."""

import torch

from tpa_minimal.course.checks.judging import WrongAnswer, equals, exercise, judge, judge_choices
from tpa_minimal.tpa import T6Config, TensorProductAttention, apply_rope, rope_tables


@exercise
def ex11_1(attempt):
    """Numbers cached per token by four variants: attempt(variant, R, h, d_head)."""
    right = {
        "shared A": lambda R, h, d: R * (h + 2 * d),
        "shared both": lambda R, h, d: R * (h + d),
        "fixed a_k": lambda R, h, d: R * (h + 2 * d),
        "shared B, fixed A": lambda R, h, d: R * d,
    }
    for R, h, d_head in ((2, 6, 16), (1, 32, 128), (3, 5, 64)):
        base = 2 * R * (h + d_head)
        for name, numbers in right.items():
            best, fixed_a = numbers(R, h, d_head), name == "shared B, fixed A"
            constants = 2 * fixed_a + (name == "fixed a_k")
            mistakes = {
                "that is TPA's own cache: what is shared or constant need not be kept twice, or at all": base,
                "you kept constants too: they are weights of the layer, the same for every token": best
                + R * h * constants,
                "that is shared B, two head factors and one feature factor: what is shared here?": R * (2 * h + d_head),
                "b is needed once only, unrotated: b_k is made from it": R * (2 * d_head + h * (not fixed_a)),
                "each of the R rows has to be kept": numbers(1, h, d_head),
                "that is one a and one b: what else does a token bring?": R * (h + d_head),
            }
            judge(
                attempt(name, R, h, d_head),
                best,
                {f'"{name}": {say}': value for say, value in mistakes.items()},
                f'"{name}": for R={R}, h={h}, d_head={d_head} the answer is another; list a_k, b_k, a_v, b_v, and '
                "cross out what is a constant or a copy",
            )


@exercise
def ex11_2(attempt):
    """A TPA with a_k = a_v: a subclass of TensorProductAttention."""
    config = T6Config(vocab_size=8, n_layer=1, d_model=12, n_head=5, d_head=6, rank_q=3, rank_k=2, rank_v=2, max_len=32)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = attempt(config).double()
    widths = tuple(layer.factor_widths())
    if widths == (5, 6, 5, 6, 0, 6):
        raise WrongAnswer("you keep the shared factor as a_k; the checker reads it as a_v, so give a_k the width 0")
    if widths == (5, 6) * 3:
        raise WrongAnswer("a_k and a_v are both projected and cached: one of the widths must be 0")
    if widths != (5, 6, 0, 6, 5, 6):
        raise WrongAnswer(f"factor_widths() is {widths}; for h=5 and d_head=6 it should keep all but a_k")
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(random(*weight.shape) * 0.5)
    base = TensorProductAttention(config).double()
    with torch.no_grad():
        rows = list(layer.factor_proj.weight.split(layer.sizes))
        rows[2] = rows[4]
        base.factor_proj.weight.copy_(torch.cat(rows))
        base.out_proj.weight.copy_(layer.out_proj.weight)
    x = random(2, 9, 12)
    given, full = layer.factors(x), base.factors(x)
    got = layer.restore(*given, 0)
    if not isinstance(got, (tuple, list)) or len(got) != 6:
        raise WrongAnswer("restore must return all six factors: a_q, b_q, a_k, b_k, a_v, b_v")
    for name, new, right in zip(("a_q", "b_q", "a_k", "b_k", "a_v", "b_v"), got, full):
        if new.shape[-1] == 0:
            raise WrongAnswer(f"restore returns {name} empty: put the shared factor in its place")
        if new.shape != right.shape:
            raise WrongAnswer(f"restore returns {name} of shape {tuple(new.shape)}, not {tuple(right.shape)}")
        if not equals(new, right):
            reason = "`factors` has turned b_k already, and values are never turned" if name[0] == "b" else "why?"
            raise WrongAnswer(f"restore changes {name}: {reason}")
    cache = layer.new_cache(2)
    whole = layer(x)
    pieces = torch.cat([layer(piece, cache) for piece in x.split([4, 1, 4], dim=1)], dim=1)
    if not equals(whole, base(x)) or not equals(pieces, whole):
        raise WrongAnswer("the layer's output differs from TPA's with equal rows, or with its own cache")
    if cache.nbytes != 2 * 9 * 2 * (5 + 2 * 6) * 8:
        raise WrongAnswer(f"the cache holds {cache.nbytes} bytes where R (h + 2 d_h) numbers per token need less")


@exercise
def ex11_3(attempt):
    """Third order with RoPE: vec(b R_t ⊗ c), attempt(b, c, cos, sin)."""
    generator = torch.Generator().manual_seed(1)
    b, c = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    cos, sin = rope_tables(torch.arange(2, 7), 4, 100.0, torch.float64)

    def turn(y, sign=1):
        return apply_rope(y[None, :, None], cos, sign * sin)[0, :, 0]

    def turn_neighbours(y):
        y1, y2 = y[:, ::2], y[:, 1::2]
        return torch.stack((y1 * cos + y2 * sin, y2 * cos - y1 * sin), -1).flatten(1)

    def vec(b, c):
        return (c[:, :, None] * b[:, None, :]).flatten(1)

    judge(
        attempt(b, c, cos, sin),
        vec(turn(b), c),
        {
            "vec stacks columns: feature j · d_b + i is b_i c_j, and yours is that of b_j c_i": vec(c, turn(b)),
            "nothing is rotated": vec(b, c),
            "you rotated c: the theorem's form rotates b": vec(b, turn(c)),
            "you rotated both b and c: b alone is enough": vec(turn(b), turn(c)),
            "you turned the other way: x1 cos + x2 sin comes first": vec(turn(b, -1), c),
            "you paired neighbours: feature i goes with i + d_b/2": vec(turn_neighbours(b), c),
        },
        "not the rotated product; try it with sin = 0 and cos = 1 first, and then with c = 1",
    )


@exercise
def ex11_4(attempt):
    """True or false about the variants."""
    judge_choices(
        attempt(),
        dict(a=True, b=True, c=True, d=False, e=False, f=True),
        dict(
            a="A square random A is invertible, so h independent feature vectors give h independent keys",
            b="At rank 1 the logit is a_q a_k κ(distance): the two tokens' numbers cancel from the ratio",
            c="A rotation is undone by turning back: exact up to rounding, at the same cost as turning at use",
            d="R_t ⊗ I is as good a rotation as I ⊗ R_t: products still depend on distance alone",
            e="RoPE acts on whatever it is given; what matters is that nothing but RoPE depends on position",
            f="The sigmoid of turned features is no longer a turned vector, so distances are not what is left",
        ),
    )
