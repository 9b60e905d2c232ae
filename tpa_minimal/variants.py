"""Variants of tensor product attention, each a few lines on top of `tpa.py`.

Give any of them to the backbone: `T6(config, attention=FixedHeadFactors)`. Symbols and shapes are those of `tpa.py`.
A variant says up to three things: how wide the factors are that each token brings (`factor_widths`; these are what is
projected and cached, so 0 where a factor is a constant), which of them RoPE rotates (`factors`), and how attention
reconstructs all six from them (`attend`).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tpa_minimal.tpa import (
    RoPE,
    T6Config,
    TensorProductAttention,
    apply_rope,
    assemble,
    causal_attention,
    factor_bound,
)


def _constant(config: T6Config, rank: int, width: int, is_head_factor: bool) -> nn.Parameter:
    """A learned constant factor (rank, width) that starts with the spread a contextual one has at unit-scale input."""
    bound = factor_bound(config, rank, width, is_head_factor) * config.d_model**0.5
    return nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound))


def _at_every_position(constant: Tensor, like: Tensor) -> Tensor:
    """View a constant (R, width) as the factor (B, T, R, width) of each of the tokens that `like` (B, T, ...) has."""
    return constant.to(like.dtype).expand(*like.shape[:2], -1, -1)


class KeyValueOnly(TensorProductAttention):
    """TPA of the keys and values alone; the queries come from one ordinary linear map (Sec. 3; "TPA-KVonly").

    In factors: the query has rank h with the constant a_r = h · e_r, so that b_r is head r's query; `config.rank_q`
    is not used. Cache: (R_K + R_V)(h + d_h) numbers per token, as TPA.
    Parameters: d_model (R_K + R_V)(h + d_h) + 2 d_model · h · d_h.
    """

    def __init__(self, config: T6Config):
        super().__init__(replace(config, rank_q=config.n_head))
        self.config = config

    def factor_widths(self) -> tuple[int, ...]:
        """Nothing of a_q."""
        return (0, *super().factor_widths()[1:])

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """With h · I in the place of the empty a_q."""
        h = self.config.n_head
        a_q = _at_every_position(h * torch.eye(h, device=b_q.device), b_q)
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start, padding)


class FixedHeadFactors(TensorProductAttention):
    """TPA with non-contextual A: the head factors are learned constants a_q, a_k, a_v (R, h) (App. G).

    Each head sees a fixed mix of R feature vectors. MHA, MQA and GQA are of this kind (Sec. 4; `convert.mha_to_tpa`).
    Cache: (R_K + R_V) d_h numbers per token, b_k and b_v alone.
    Parameters: (R_Q + R_K + R_V)(d_model · d_h + h) + d_model · h · d_h.
    """

    def __init__(self, config: T6Config):
        super().__init__(config)
        self.a_q = _constant(config, config.rank_q, config.n_head, True)
        self.a_k = _constant(config, config.rank_k, config.n_head, True)
        self.a_v = _constant(config, config.rank_v, config.n_head, True)

    def factor_widths(self) -> tuple[int, ...]:
        """Nothing of a_q, a_k and a_v."""
        return (0, self.config.d_head) * 3

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """With the constants in the place of the empty head factors."""
        a_q = _at_every_position(self.a_q, b_q)
        a_k, a_v = _at_every_position(self.a_k, b_k), _at_every_position(self.a_v, b_v)
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start, padding)


class FixedFeatureFactors(TensorProductAttention):
    """TPA with non-contextual B: the feature factors are learned constants b_q, b_k, b_v (R, d_h) (App. G).

    A constant b_k still has to be rotated to its position, anew for all M positions in each call; that takes
    room for R_K · M · d_h numbers, once for the batch. Cache: (R_K + R_V) h numbers per token, a_k and a_v alone.
    Parameters: (R_Q + R_K + R_V)(d_model · h + d_h) + d_model · h · d_h.
    """

    def __init__(self, config: T6Config):
        super().__init__(config)
        self.b_q = _constant(config, config.rank_q, config.d_head, False)
        self.b_k = _constant(config, config.rank_k, config.d_head, False)
        self.b_v = _constant(config, config.rank_v, config.d_head, False)

    def factor_widths(self) -> tuple[int, ...]:
        """Nothing of b_q, b_k and b_v."""
        return (self.config.n_head, 0) * 3

    def factors(self, x: Tensor, start: int = 0, rope=None) -> tuple[Tensor, ...]:
        """Six tensors (B, T, R, h) or, of the constants, (B, T, R, 0)."""
        return tuple(self.project(x))

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """With the constants, b_q and b_k rotated, in the place of the empty feature factors."""
        T = a_q.shape[1]
        cos, sin = self.rope.tables(0, a_k.to(a_q.dtype))
        b_q = apply_rope(_at_every_position(self.b_q, a_q[:1]), cos[start : start + T], sin[start : start + T])
        b_k = apply_rope(_at_every_position(self.b_k, a_k[:1]), cos, sin)
        b_q, b_k = (b.expand(len(a_q), -1, -1, -1) for b in (b_q, b_k))
        b_v = _at_every_position(self.b_v, a_v)
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start, padding)


class SharedFeatureFactors(TensorProductAttention):
    """TPA whose keys and values share their feature factors, b_k = b_v = b (App. G).

    Values must not be rotated, so b is cached once, as it is, and rotated to b_k at all M positions in each call.
    Cache: R (2h + d_h) numbers per token, with R = R_K = R_V; a ValueError says so if these differ.
    Parameters: d_model (R_Q (h + d_h) + R (2h + d_h)) + d_model · h · d_h.
    """

    def __init__(self, config: T6Config):
        if config.rank_k != config.rank_v:
            raise ValueError(
                f"rank_k={config.rank_k}, rank_v={config.rank_v}: keys and values can share feature factors only if "
                f"these are equal; use rank_k=rank_v={config.rank_k}"
            )
        super().__init__(config)

    def factor_widths(self) -> tuple[int, ...]:
        """Nothing of b_k; b is kept as b_v."""
        h, d_head = self.config.n_head, self.config.d_head
        return h, d_head, h, 0, h, d_head

    def factors(self, x: Tensor, start: int = 0, rope=None) -> tuple[Tensor, ...]:
        """As in TensorProductAttention, but b_k is empty, (B, T, R, 0): it is b_v, rotated."""
        a_q, b_q, *others = self.project(x)
        return a_q, apply_rope(b_q, *(rope or self.rope.tables(start, x))), *others

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """With b_k made from b_v, rotated."""
        b_k = apply_rope(b_v, *self.rope.tables(0, b_v))
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start, padding)


class SigmoidHeadFactors(TensorProductAttention):
    """TPA with a sigmoid on every head factor: each head has a gate in (0, 1) on each feature vector (App. G).

    Cache and parameters: as TPA; a_k and a_v are stored after the sigmoid.
    """

    def nonlinearity(self, a: Tensor) -> Tensor:
        """What is done to a head factor (B, T, R, h)."""
        return a.sigmoid()

    def project(self, x: Tensor) -> list[Tensor]:
        """The factors before rotation, the head factors having passed the nonlinearity."""
        a_q, b_q, a_k, b_k, a_v, b_v = super().project(x)
        return [self.nonlinearity(a_q), b_q, self.nonlinearity(a_k), b_k, self.nonlinearity(a_v), b_v]


class SoftmaxHeadFactors(SigmoidHeadFactors):
    """TPA with a softmax over the heads on every head factor: the heads share out each feature vector (App. G)."""

    def nonlinearity(self, a: Tensor) -> Tensor:
        """What is done to a head factor (B, T, R, h)."""
        return a.softmax(-1)


class ThirdOrderFactors(TensorProductAttention):
    """TPA of third order: Q = (1/R) Σ_r a_r ⊗ vec(b_r ⊗ c_r), b_r in R^d_b, c_r in R^d_c, d_b · d_c = d_h (App. C).

    vec stacks columns: feature j · d_b + i is b_i c_j. Rotating b_r alone is RoPE by I ⊗ R_t (Theorem C.1), so b_k is
    cached rotated. Cache: (R_K + R_V)(h + d_b + d_c) numbers per token; vec(b ⊗ c) is formed anew in each call.
    d_b is the even divisor of d_head closest to its root if not given; a ValueError says so if it is not such a one.
    Parameters: d_model (R_Q + R_K + R_V)(h + d_b + d_c) + d_model · h · d_h.
    """

    def __init__(self, config: T6Config, d_b: int | None = None):
        possible = [d for d in range(2, config.d_head + 1, 2) if config.d_head % d == 0]
        d_b = min(possible, key=lambda d: abs(d - config.d_head**0.5)) if d_b is None else d_b
        if not isinstance(d_b, int) or d_b not in possible:
            raise ValueError(
                f"d_b={d_b}: must be an even divisor of d_head={config.d_head}, one of {', '.join(map(str, possible))}"
            )
        self.d_b, self.d_c = d_b, config.d_head // d_b  # before the projection, which needs their sum
        super().__init__(config)
        self.rope = RoPE(d_b, config.rope_base)  # rotates b; c stays as it is

    def factor_widths(self) -> tuple[int, ...]:
        """b and c side by side in the place of a feature factor."""
        return (self.config.n_head, self.d_b + self.d_c) * 3

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in TensorProductAttention, with bounds of their own for b and c."""
        super().reset_parameters()
        for weight, shape in list(zip(self.factor_proj.weight.split(self.sizes), self.shapes))[1::2]:
            for part in weight.unflatten(0, shape).split((self.d_b, self.d_c), dim=1):  # (R, d_b or d_c, d_model)
                bound = factor_bound(self.config, *part.shape[:2], is_head_factor=False)
                part.uniform_(-bound, bound)

    def factors(self, x: Tensor, start: int = 0, rope=None) -> tuple[Tensor, ...]:
        """As in TensorProductAttention, but feature factors are b and c side by side, (B, T, R, d_b + d_c)."""
        a_q, bc_q, a_k, bc_k, a_v, bc_v = self.project(x)
        tables = rope or self.rope.tables(start, x)

        def rotate(bc):
            b, c = bc.split((self.d_b, self.d_c), dim=-1)
            return torch.cat((apply_rope(b, *tables), c), dim=-1)

        return a_q, rotate(bc_q), a_k, rotate(bc_k), a_v, bc_v

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """With vec(b ⊗ c) as feature factors."""
        return super().attend(a_q, self.vec(b_q), a_k, self.vec(b_k), a_v, self.vec(b_v), start, padding)

    def vec(self, bc: Tensor) -> Tensor:
        """vec(b ⊗ c): (B, T, R, d_b + d_c) -> (B, T, R, d_h)."""
        b, c = bc.split((self.d_b, self.d_c), dim=-1)
        return (c.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


class RotateAssembled(TensorProductAttention):
    """TPA with RoPE on the assembled q and k, as some of the authors' files have it: the same function (Theorem 3.1).

    It only decides what is cached: b_k unrotated here, so that all M keys must be assembled and rotated in each call.
    Cache and parameters: as TPA.
    """

    def factors(self, x: Tensor, start: int = 0, rope=None) -> tuple[Tensor, ...]:
        """Six tensors (B, T, R, h) or (B, T, R, d_h), none of them rotated."""
        return tuple(self.project(x))

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """Assemble, rotate, attend: (B, T, h, d_h)."""
        T = b_q.shape[1]
        cos, sin = self.rope.tables(0, b_k.to(b_q.dtype))
        q = apply_rope(assemble(a_q, b_q), cos[start : start + T], sin[start : start + T])
        k, v = apply_rope(assemble(a_k, b_k), cos, sin), assemble(a_v, b_v)
        return causal_attention(q, k.to(q.dtype), v.to(q.dtype), padding)


class RotatePart(NamedTuple):
    """The rotation of PartialRoPE, used as `tpa.RoPE` is."""

    d_head: int
    base: float
    rotary_dim: int

    def tables(self, start: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """As RoPE's, (T, d_h/2), but the last columns stand for the angle 0."""
        cos, sin = RoPE(self.rotary_dim, self.base).tables(start, x)
        still = (0, (self.d_head - self.rotary_dim) // 2)  # columns to add at the end
        return nn.functional.pad(cos, still, value=1.0), nn.functional.pad(sin, still)


class PartialRoPE(TensorProductAttention):
    """TPA that rotates `rotary_dim` of the d_h features and leaves the others free of position.

    The pairs are (i, i + d_h/2) for i < rotary_dim/2; the authors' code takes the first rotary_dim features, which is
    the same up to the order of features. rotary_dim is even, 0 (no RoPE) to d_head (all of it); by default about a
    third, as in the authors' code. A ValueError says so otherwise. Cache and parameters: as TPA.
    """

    def __init__(self, config: T6Config, rotary_dim: int | None = None):
        super().__init__(config)
        self.rotary_dim = config.d_head // 6 * 2 if rotary_dim is None else rotary_dim
        if type(self.rotary_dim) is not int or self.rotary_dim not in range(0, config.d_head + 1, 2):
            raise ValueError(f"rotary_dim={rotary_dim!r}: must be an even int from 0 to d_head={config.d_head}")
        self.rope = RotatePart(config.d_head, config.rope_base, self.rotary_dim)
