"""Variants of tensor product attention, each a few lines on top of `tpa.py`.

Give any of them to the trunk: `T6(config, attention=FixedHeadFactors)`. Symbols and shapes are those of `tpa.py`.
A variant says three things: how wide the factors are that each token brings (`factor_widths`; these are what is
projected and cached, so 0 where a factor is a constant), which of them RoPE turns (`factors`), and how all six are
had again from them just before attention (`attend`).
"""

import torch
from torch import Tensor, nn

from tpa_minimal.tpa import T6Config, TensorProductAttention, factor_bound


def _constant(config: T6Config, rank: int, width: int, is_head_factor: bool) -> nn.Parameter:
    """A learned constant factor (rank, width) that starts with the spread a contextual one has at unit-scale input."""
    bound = factor_bound(config, rank, width, is_head_factor) * config.d_model**0.5
    return nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound))


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

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int) -> Tensor:
        """As in TensorProductAttention, with the constants in the place of the empty head factors."""
        a_q = self.a_q.to(b_q.dtype).expand(*b_q.shape[:2], -1, -1)
        a_k, a_v = (a.to(b_q.dtype).expand(*b_k.shape[:2], -1, -1) for a in (self.a_k, self.a_v))
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start)
