"""Tensor Product Attention, taught in notebooks and implemented in one small file, tpa_minimal/tpa.py."""

from .tpa import (
    T6,
    Cache,
    FactorCache,
    T6Config,
    TensorProductAttention,
    apply_rope,
    assemble,
    factor_attention,
    rope_tables,
)

__all__ = [
    "T6",
    "Cache",
    "FactorCache",
    "T6Config",
    "TensorProductAttention",
    "apply_rope",
    "assemble",
    "factor_attention",
    "rope_tables",
]
