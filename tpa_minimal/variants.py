"""Variants of tensor product attention, each a few lines on top of `tpa.py`.

Give any of them to the trunk: `T6(config, attention=FixedHeadFactors)`. Symbols and shapes are those of `tpa.py`.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tpa_minimal.tpa import FactorCache, T6Config, TensorProductAttention, factor_bound


def _without_rows_for(layer: TensorProductAttention, *names: str) -> None:
    """Take the rows of the named factors out of the layer's projection: they are not maps of the token here."""
    order = ("a_q", "b_q", "a_k", "b_k", "a_v", "b_v")
    layer.sizes = [0 if name in names else size for name, size in zip(order, layer.sizes)]
    layer.factor_proj = nn.Linear(layer.config.d_model, sum(layer.sizes), bias=False)


def _constant(config: T6Config, rank: int, width: int, is_head_factor: bool) -> nn.Parameter:
    """A learned constant factor (rank, width) that starts with the spread a contextual one has at unit-scale input."""
    bound = factor_bound(config, rank, width, is_head_factor) * config.d_model**0.5
    return nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound))


class FixedHeadCache(FactorCache):
    """The feature factors alone: (R_K + R_V) d_h numbers per token (Table 1, non-contextual A)."""

    def __init__(self, config: T6Config, batch_size: int, max_len: int | None = None, device=None, dtype=None):
        room = SimpleNamespace(
            rank_k=config.rank_k, rank_v=config.rank_v, n_head=0, d_head=config.d_head, max_len=config.max_len
        )
        super().__init__(room, batch_size, max_len, device, dtype)

    def append(self, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor) -> tuple[Tensor, ...]:
        """Store b_k and b_v; return all four of every position, a_k and a_v being the same at each."""
        _, all_b_k, _, all_b_v = super().append(a_k[..., :0], b_k, a_v[..., :0], b_v)
        shape = (-1, self.length, -1, -1)
        return a_k[:, :1].expand(shape), all_b_k, a_v[:, :1].expand(shape), all_b_v


class FixedHeadFactors(TensorProductAttention):
    """TPA with non-contextual A: the head factors are learned constants a_q, a_k, a_v (R, h) (App. G).

    Each head then sees a fixed mix of R feature vectors, and the cache holds b_k and b_v alone. MHA, MQA and GQA are
    members of this family (Sec. 4): see `convert.mha_to_tpa`.
    Parameters: (R_Q + R_K + R_V)(d_model · d_h + h) + d_model · h · d_h.
    """

    def __init__(self, config: T6Config):
        super().__init__(config)
        _without_rows_for(self, "a_q", "a_k", "a_v")
        self.a_q = _constant(config, config.rank_q, config.n_head, True)
        self.a_k = _constant(config, config.rank_k, config.n_head, True)
        self.a_v = _constant(config, config.rank_v, config.n_head, True)
        self.reset_parameters()

    def factors(self, x: Tensor, start: int = 0) -> tuple[Tensor, ...]:
        """As in TensorProductAttention; a_q, a_k and a_v are views of the constants, equal at every position."""
        _, b_q, _, b_k, _, b_v = super().factors(x, start)
        a_q, a_k, a_v = (a.to(b_q.dtype).expand(*x.shape[:2], -1, -1) for a in (self.a_q, self.a_k, self.a_v))
        return a_q, b_q, a_k, b_k, a_v, b_v

    def new_cache(self, batch_size: int, max_len: int | None = None, device=None, dtype=None) -> FixedHeadCache:
        """An empty cache for this layer, by default in the layer's own dtype and on its device."""
        weight = self.out_proj.weight
        return FixedHeadCache(self.config, batch_size, max_len, device or weight.device, dtype or weight.dtype)
