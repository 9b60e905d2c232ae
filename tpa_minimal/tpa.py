"""Tensor Product Attention (TPA) and the T6 language model, in one file that needs only PyTorch.

Zhang et al., "Tensor Product Attention Is All You Need" (arXiv 2501.06425, NeurIPS 2025). TPA writes the queries,
keys and values of each token as short sums of outer products, "which heads" times "which features", and caches the
factors in place of the keys and values. Copy this file into your project and it works as it stands.

Code name         Paper         Meaning                                            Shape
d_model           d_model       width of the residual stream
n_head, d_head    h, d_h        attention heads, width of one head
rank_q, _k, _v    R_Q, R_K, R_V number of outer products in Q, K and V (Eq. 3.1)
a_q, a_k, a_v     A_Q, A_K, A_V head factors                                       (B, T, R, h)
b_q, b_k, b_v     B_Q, B_K, B_V feature factors; b_q and b_k carry RoPE (Sec. 3.2) (B, T, R, d_h)
q, k, v           Q, K, V       assembled queries, keys, values                    (B, T, h, d_h)
B, C, T, M                      batch, cached positions, new positions, M = C + T

Read from top to bottom: config, RoPE, factors, cache, attention in factor space, the layer, SwiGLU, block, T6.
Three decisions where the paper and the authors' code differ or are silent, each argued where it stands:
`T6Config.init`, float32 RoPE tables (`rope_tables`), and when attention stays in factor space
(`TensorProductAttention.attend`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class T6Config:
    """The sizes of a T6 model; every attention mechanism in it reads the same object.

    n_head * d_head need not equal d_model. `d_ff` is the hidden width of SwiGLU, ⌊8/3 · d_model⌋ if not given.
    `init` chooses the bound of the uniform initialization of the factor weights: "paper" is Xavier as App. G
    states it, "authors" is what their code computes by applying Xavier to a three-dimensional view of each weight
    (smaller: feature factors about 4 times at "tiny" and 7 times at the paper's sizes, head factors 1.3 to 2.2 times).
    Raises ValueError for a value that cannot work.
    """

    vocab_size: int
    n_layer: int
    d_model: int
    n_head: int
    d_head: int
    rank_q: int = 6
    rank_k: int = 2
    rank_v: int = 2
    max_len: int = 1024
    rope_base: float = 10000.0
    d_ff: int | None = None
    init: str = "paper"

    def __post_init__(self):
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 8 * self.d_model // 3)
        for name in "vocab_size n_layer d_model n_head d_head rank_q rank_k rank_v max_len d_ff".split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
        if self.d_head % 2:
            raise ValueError(f"d_head={self.d_head}: must be even, since RoPE rotates pairs; use {self.d_head + 1}")
        if not self.rope_base > 1:
            raise ValueError(f"rope_base={self.rope_base!r}: must be above 1; the paper uses 10000")
        if self.init not in ("paper", "authors"):
            raise ValueError(f'init={self.init!r}: must be "paper" or "authors"')

    @classmethod
    def for_layer(cls, d_model: int, n_head: int, d_head: int, **others) -> "T6Config":
        """The sizes of an attention layer alone, for a model of your own; `others` are any of the other fields."""
        return cls(1, 1, d_model, n_head, d_head, **others)

    @classmethod
    def preset(cls, name: str, **changes) -> "T6Config":
        """A named configuration, with `changes` applied: the paper's four sizes (App. H) or "tiny" for a laptop.

        Raises ValueError for an unknown name.
        """
        paper = dict(vocab_size=50304, d_head=64)
        presets = {
            "tiny": dict(vocab_size=50304, n_layer=4, d_model=128, n_head=16, d_head=32, max_len=512),
            "small-124M": dict(paper, n_layer=12, d_model=768, n_head=34),
            "medium-353M": dict(paper, n_layer=24, d_model=1024, n_head=47),
            "large-773M": dict(paper, n_layer=36, d_model=1280, n_head=61),
            "xl-1.5B": dict(paper, n_layer=48, d_model=1600, n_head=78),
        }
        if name not in presets:
            raise ValueError(f"preset {name!r} does not exist; choose one of {', '.join(presets)}")
        return cls(**{**presets[name], **changes})


# ------------------------------------------------------------------------------------------------------- RoPE


def rope_tables(positions: Tensor, d_head: int, base: float, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """The cosines and sines of RoPE's angles t · base^(-2j/d_h) for positions t (Sec. 3.2).

    positions: (T,) absolute. Returns cos and sin, each (T, d_h/2), in `dtype` but never narrower than float32:
    tables of bfloat16 break the relative-position identity Q̃_t K̃_sᵀ = Q_t T_{t-s} K_sᵀ after about 3 digits.
    """
    # An angle of 10^5 radians in float32 is off by 0.004, so angles are float64 wherever the device has it.
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    j = torch.arange(d_head // 2, device=positions.device, dtype=exact)
    angles = positions.to(exact)[:, None] * base ** (-2 * j / d_head)  # (T, d_h/2)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RoPE(NamedTuple):
    """The rotation that a layer applies; layers whose rotations are equal share the tables of a forward pass."""

    d_head: int
    base: float

    def tables(self, start: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, d_h/2), for the tokens of x (B, T, ...), the first of which is at position `start`."""
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        return rope_tables(positions, self.d_head, self.base, x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the rows of x by their positions' angles: x T_t in the paper's row-vector convention (Sec. 3.2).

    x: (B, T, any, d_h); cos, sin: (T, d_h/2). Feature i is paired with feature i + d_h/2.
    """
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, d_h/2)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- factors


def assemble(a: Tensor, b: Tensor) -> Tensor:
    """The tensor product (1/R) Σ_r a_r ⊗ b_r = (1/R) Aᵀ B of every token (Eq. 3.1).

    a: (B, T, R, h), b: (B, T, R, d_h) -> (B, T, h, d_h), a matrix of rank at most R for each token.
    """
    return a.mT @ (b / b.shape[-2])


def factor_bound(config: T6Config, rank: int, width: int, is_head_factor: bool) -> float:
    """Half the range of the uniform initialization of one factor's weight, as `config.init` asks (App. G).

    width: h for a head factor, d_h for a feature factor; the weight is (rank · width) × d_model.
    """
    n_in, n_out = config.d_model, rank * width
    if config.init == "authors":
        # Their Xavier sees the views (d_model, h, R) and (d_model, R, d_h) and counts the last axis in both fans.
        n_in *= rank if is_head_factor else width
    return math.sqrt(6 / (n_in + n_out))


# ------------------------------------------------------------------------------------------------------ cache


class FactorCache:
    """What one layer keeps of all past tokens: for TPA (R_K + R_V)(h + d_h) numbers per token (Sec. 3.3, Table 1).

    shapes: (rank, width) of each thing kept, for TPA of a_k, b_k, a_v and b_v; MHA's keys and values, or MLA's latent,
    are other shapes. The caller owns the cache and passes it to `forward`, which appends. Room for `max_len` positions
    is set aside once. b_k is stored as rotated (Theorem 3.1), so nothing is rotated again. Gradients do not flow into
    a cache. Raises ValueError for sizes below 1.
    """

    def __init__(self, shapes, batch_size: int, max_len: int, device=None, dtype=None):
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"batch_size={batch_size}, max_len={max_len}: both must be 1 or more")
        self.max_len, self.length = max_len, 0
        # Each rank's rows lie one after another: the operands of `factor_attention`'s products, read as they are.
        self._kept = [torch.zeros(batch_size, R, max_len, width, device=device, dtype=dtype) for R, width in shapes]

    def view(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Views of what is kept of positions start to end - 1, each (B, end - start, R, width)."""
        return tuple(kept[:, :, start:end].transpose(1, 2) for kept in self._kept)

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Store what T new tokens bring, each (B, T, R, width); return views of all of it, each (B, C + T, R, width).

        Raises ValueError, with nothing changed, if they do not fit.
        """
        T = new[0].shape[1]
        if self.length + T > self.max_len:
            remedy = f"create it with max_len={self.length + T} or above, or truncate() it first"
            raise ValueError(f"the cache holds {self.length} of {self.max_len} positions; for {T} more {remedy}")
        places = self.view(self.length, self.length + T)
        expected, given = ([tuple(x.shape) for x in tensors] for tensors in (places, new))
        if expected != given:  # copy_ would silently broadcast a smaller batch
            raise ValueError(f"the cache expects tensors of shapes {expected}, not {given}")
        for place, x in zip(places, new):
            place.copy_(x.detach())
        self.length += T
        return self.view(0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of what is cached now, not of the room set aside for max_len positions."""
        return sum(view.numel() * view.element_size() for view in self.view(0, self.length))

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on. Raises ValueError unless 0 <= length <= the present length."""
        if not 0 <= length <= self.length:
            raise ValueError(f"truncate({length}): the cache holds {self.length} positions, so 0 to {self.length} work")
        self.length = length


class Cache(list):
    """What a whole model remembers: a list of one layer's cache per block."""

    @property
    def length(self) -> int:
        """Positions cached."""
        return self[0].length

    @property
    def nbytes(self) -> int:
        """Bytes cached, over all layers."""
        return sum(layer.nbytes for layer in self)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on, in every layer."""
        for layer in self:
            layer.truncate(length)


# -------------------------------------------------------------------------------------------------- attention


def unseen(keys: Tensor, queries: Tensor, padding: Tensor | None) -> Tensor:
    """Whether a query must not see a key: keys after it, and in a ragged batch the padding before its row's text.

    keys (M,), queries (T,): positions; padding: (B,), tokens of left padding in each row, or None. Returns (T, M) or
    (B, T, M), True where unseen. Padding sees itself alone, so that no softmax is empty; what it gives is of no use.
    """
    later = keys > queries[:, None]  # (T, M)
    return later if padding is None else later | (keys < torch.minimum(padding[:, None, None], queries[:, None]))


def factor_attention(a_q, b_q, a_k, b_k, a_v, b_v, *, start: int, block_size: int = 16384, padding=None) -> Tensor:
    """Causal attention that never builds K or V (App. A, Algorithm 1), block by block (Algorithm 2).

    a_q (B, T, R_Q, h), b_q (B, T, R_Q, d_h): factors of T queries at positions start, start + 1, ...
    a_k, b_k, a_v, b_v: factors of M positions from 0 on, in the same layout, any ranks. padding: see `unseen`.
    Returns (B, T, h, d_h). A block has block_size / T positions, so temporary memory is about
    3 B · (R_K + R_V) · h · block_size numbers at most, whatever M and T are.
    """
    (B, T, _, h), (rank_k, d_head), rank_v = a_q.shape, b_k.shape[2:], b_v.shape[2]
    n = max(1, block_size // max(1, T))  # positions in a block
    dtype = torch.promote_types(b_k.dtype, torch.float32)  # a softmax over 10^5 positions needs float32 or wider
    with torch.autocast(b_k.device.type, enabled=False):
        # The T queries are few: assembling them makes R_Q vanish from the cost per cached position.
        q = assemble(a_q.to(dtype), b_q.to(dtype)) / (rank_k * math.sqrt(d_head))  # (B, T, h, d_h)
        queries = torch.arange(start, start + T, device=q.device)
        m = q.new_full((B, T, h, 1), torch.finfo(dtype).min)  # running maximum of the scores; -inf - -inf would be nan
        s = q.new_zeros(B, T, h, 1)  # running Σ exp(score - m)
        y = q.new_zeros(B, T, h, d_head)  # running Σ exp(score - m) · v
        for i, block in enumerate(zip(*(x.split(n, dim=1) for x in (a_k, b_k, a_v, b_v)))):
            a_kb, b_kb, a_vb, b_vb = (x.to(dtype) for x in block)  # (B, n, R, ·)
            p = torch.einsum("bthd,bnrd->bthnr", q, b_kb)
            scores = torch.einsum("bthnr,bnrh->bthn", p, a_kb)
            keys = torch.arange(b_kb.shape[1], device=q.device) + i * n
            scores = scores.masked_fill(unseen(keys, queries, padding).unsqueeze(-2), -math.inf)
            m_new = torch.maximum(m, scores.detach().amax(-1, keepdim=True))  # any m gives the same result: no gradient
            weights, shrink = (scores - m_new).exp(), (m - m_new).exp()
            s = s * shrink + weights.sum(-1, keepdim=True)
            y = y * shrink + torch.einsum("bthn,bnrh,bnrd->bthd", weights, a_vb, b_vb)
            m = m_new
    return (y / (s * rank_v)).to(b_q.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    """Softmax attention with scale 1/√d_h, the T queries being the last of the M positions.

    q: (B, T, h, d_h); k, v: (B, M, h, d_h) -> (B, T, h, d_h). padding: see `unseen`.
    """
    T, M = q.shape[1], k.shape[1]
    mask = None
    if T < M or padding is not None:  # is_causal aligns the mask with the first key, but cached ones come before
        positions = torch.arange(M, device=q.device)
        mask = ~unseen(positions, positions[M - T :], padding).unsqueeze(-3)  # (1, T, M) or (B, 1, T, M)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, h, ·, d_h)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


# With this many new tokens or fewer against a filled cache, attention stays in factor space; above it, K and V of the
# whole context are assembled once for the call and handed to the fused kernel, whose cost per token is lower. On two
# CPU cores (h 32, d_h 64, ranks 1 and 2, 1,024 and 8,192 cached tokens) `cpu_decode` was ahead at 16 and 24 new tokens
# and no longer at 64; the plain function above loses its lead earlier.
DECODE_TOKENS = 16


class TensorProductAttention(nn.Module):
    """TPA: causal self-attention from contextual factors, with a factor cache (Sec. 3).

    Parameters: d_model (R_Q + R_K + R_V)(h + d_h) + d_model · h · d_h (Table 1), none of them biases.
    """

    attend_in_factor_space = staticmethod(factor_attention)  # `cpu_decode.use` and `flash_decode.use` put theirs here

    def __init__(self, config: T6Config):
        super().__init__()
        self.config = config
        self.rope = RoPE(config.d_head, config.rope_base)
        ranks = [config.rank_q] * 2 + [config.rank_k] * 2 + [config.rank_v] * 2
        self.shapes = list(zip(ranks, self.factor_widths()))  # (R, h) or (R, d_h) of a_q, b_q, a_k, b_k, a_v, b_v
        self.sizes = [rank * width for rank, width in self.shapes]
        # One product for all six factors is faster than six; rows are in the order a_q, b_q, a_k, b_k, a_v, b_v.
        self.factor_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(config.n_head * config.d_head, config.d_model, bias=False)
        self.reset_parameters()

    def factor_widths(self) -> tuple[int, ...]:
        """How many numbers of a row of a_q, b_q, a_k, b_k, a_v and b_v each token brings; variants answer otherwise."""
        return (self.config.n_head, self.config.d_head) * 3

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factor weights as `config.init` says; start the output projection at zero, as the authors do."""
        for i, (weight, (rank, width)) in enumerate(zip(self.factor_proj.weight.split(self.sizes), self.shapes)):
            if width:  # else a variant without this factor
                bound = factor_bound(self.config, rank, width, is_head_factor=i % 2 == 0)
                weight.uniform_(-bound, bound)
        self.out_proj.weight.zero_()

    def project(self, x: Tensor) -> list[Tensor]:
        """The factors before rotation: (B, T, d_model) -> six tensors (B, T, R, h) or (B, T, R, d_h)."""
        parts = self.factor_proj(x).split(self.sizes, dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes)]

    def factors(self, x: Tensor, start: int = 0, rope=None) -> tuple[Tensor, ...]:
        """a_q, b_q, a_k, b_k, a_v, b_v of tokens at positions start, start + 1, ...; b_q and b_k rotated.

        x: (B, T, d_model) -> six tensors (B, T, R, h) or (B, T, R, d_h). rope: their cos and sin, if at hand already.
        """
        a_q, b_q, a_k, b_k, a_v, b_v = self.project(x)
        cos, sin = rope or self.rope.tables(start, x)
        return a_q, apply_rope(b_q, cos, sin), a_k, apply_rope(b_k, cos, sin), a_v, b_v

    def new_cache(self, batch_size: int, max_len: int | None = None, device=None, dtype=None) -> FactorCache:
        """An empty cache for this layer, by default in the layer's own dtype and on its device."""
        weight, max_len = self.out_proj.weight, self.config.max_len if max_len is None else max_len
        return FactorCache(self.shapes[2:], batch_size, max_len, device or weight.device, dtype or weight.dtype)

    def forward(self, x: Tensor, cache: FactorCache | None = None, rope=None, padding=None) -> Tensor:
        """Attend from each token of x to itself and all before it, the cached ones included.

        x: (B, T, d_model) -> (B, T, d_model). The tokens follow those in `cache`, and are appended to it.
        rope: see `factors`; padding: see `unseen`.
        """
        # 1. Factors of the new tokens, at their absolute positions.
        start = 0 if cache is None else cache.length
        a_q, b_q, *factors = self.factors(x, start, rope)
        # 2. With a cache: remember them, and see all earlier ones too.
        if cache is not None:
            cached = cache.append(*factors)
            factors = cached if start else factors
        # 3. Attend, then concatenate the heads and mix them.
        out = self.attend(a_q, b_q, *factors, start, padding)  # (B, T, h, d_h)
        return self.out_proj(out.flatten(2))

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start: int, padding=None) -> Tensor:
        """In factor space while decoding; with assembled q, k, v in training and prefill. Returns (B, T, h, d_h)."""
        if start > 0 and a_q.shape[1] <= DECODE_TOKENS:
            return self.attend_in_factor_space(a_q, b_q, a_k, b_k, a_v, b_v, start=start, padding=padding)
        q, k, v = assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v)
        return causal_attention(q, k.to(q.dtype), v.to(q.dtype), padding)  # a cache may have a dtype of its own


# ---------------------------------------------------------------------------------------------------------- T6


class SwiGLU(nn.Module):
    """LLaMA's feed-forward layer: W_down (silu(W_gate x) ⊙ W_up x), without biases (Sec. 4.3)."""

    def __init__(self, config: T6Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        nn.init.zeros_(self.down_proj.weight)  # so that each block starts as the identity, as in the authors' code

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d_model) -> (B, T, d_model)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rms_norm(x: Tensor) -> Tensor:
    """Divide each token's vector by its root mean square; no learned gain, as in the authors' code."""
    return F.rms_norm(x, (x.shape[-1],))


class Block(nn.Module):
    """LLaMA's block with any attention: x + attention(norm(x)), then x + SwiGLU(norm(x)) (Sec. 4.3)."""

    def __init__(self, config: T6Config, attention):
        super().__init__()
        self.attention = attention(config)
        self.mlp = SwiGLU(config)
        self.norm = rms_norm

    def forward(self, x: Tensor, cache=None, **shared) -> Tensor:
        """x: (B, T, d_model) -> (B, T, d_model); `cache` is this layer's, or None; `shared` is for its attention."""
        x = x + self.attention(self.norm(x), cache, **shared)
        return x + self.mlp(self.norm(x))


class T6(nn.Module):
    """A causal language model: embedding, blocks, norm, and the embedding again as output layer (Sec. 4.3).

    `attention` is called with the config once per block; any module with `forward(x, cache)` and `new_cache` will do.
    """

    def __init__(self, config: T6Config, attention=TensorProductAttention):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        bound = config.d_model**-0.5  # what the authors' tied output layer starts from
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
        self.norm = rms_norm

    def hidden(self, tokens: Tensor, cache: Cache | None = None, padding: Tensor | None = None) -> Tensor:
        """The normalized output of the last block: tokens (B, T) -> (B, T, d_model)."""
        x = self.embedding(tokens)
        shared = {} if padding is None else {"padding": padding}
        rope, *others = (getattr(block.attention, "rope", None) for block in self.blocks)
        if rope and all(other == rope for other in others):  # one pair of tables serves all layers
            shared["rope"] = rope.tables(0 if cache is None else cache.length, x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], **shared)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The embedding used backwards, as output layer: (..., d_model) -> (..., vocab_size)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens: Tensor, cache: Cache | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits of each next token: tokens (B, T) -> (B, T, vocab_size).

        With a cache, the tokens follow those already in it: one token, a chunk or a prompt; padding as in `unseen`.
        """
        return self.logits(self.hidden(tokens, cache, padding))

    def new_cache(self, batch_size: int, max_len: int | None = None) -> Cache:
        """An empty cache for `max_len` positions (config.max_len if not given), one entry per layer."""
        return Cache(block.attention.new_cache(batch_size, max_len) for block in self.blocks)

    @torch.no_grad()
    def generate(
        self, tokens, max_new_tokens, *, temperature=1.0, top_k=None, generator=None, padding=None, use_cache=True
    ) -> Tensor:
        """Continue each prompt by `max_new_tokens` sampled tokens; temperature 0 takes the most likely (greedy).

        tokens: (B, T) -> (B, T + max_new_tokens), prompt included. Only the `top_k` most likely are drawn from, if
        given. Prompts of unequal lengths are padded on the left, by any token, and `padding` (B,) says by how many.
        Raises ValueError, before any work, for what cannot work, as a result longer than config.max_len.
        """
        (B, T), max_len = tokens.shape, self.config.max_len
        if T < 1 or max_new_tokens < 0 or T + max_new_tokens > max_len:
            rule = f"need 1 or more + 0 or more, together at most max_len={max_len}; T6Config(max_len=...) allows more"
            raise ValueError(f"a prompt of {T} + {max_new_tokens} new tokens: {rule}")
        if not 0 <= temperature < math.inf or not (top_k is None or isinstance(top_k, int) and top_k >= 1):
            raise ValueError(f"temperature={temperature}, top_k={top_k}: need 0 or more; None, or 1 or more")
        if padding is not None and not (padding.shape == (B,) and 0 <= padding.min() <= padding.max() < T):
            raise ValueError(f"padding={padding.tolist()}: need a number from 0 to {T - 1} for each prompt")
        cache, new = self.new_cache(B, T + max_new_tokens) if use_cache else None, tokens
        for _ in range(max_new_tokens):
            x = self.hidden(new if use_cache else tokens, cache, padding)  # (B, T or 1, d_model)
            logits = self.logits(x[:, -1]).float()  # (B, vocab_size)
            if top_k is not None:
                lowest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < lowest_kept, -math.inf)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0, so that none overflows
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def num_parameters(self) -> int:
        """Number of learned weights; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())
