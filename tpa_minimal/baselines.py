"""The mechanisms that TPA is compared with: MHA, MQA and GQA as one class, and MLA.

All have the interface of `tpa.TensorProductAttention`, so any of them fits the backbone and `generate`:

    T6(config, attention=MultiHeadAttention)
    T6(config, attention=functools.partial(MultiHeadAttention, n_kv_head=1))
    T6(config, attention=MultiHeadLatentAttention)

They read the same config and ignore its ranks. Weights start as torch's `nn.Linear` draws them, as in the authors'
baselines, except the output projection, which starts at zero as TPA's does. Symbols and shapes are those of `tpa.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_minimal.tpa import DECODE_TOKENS, FactorCache, RoPE, T6Config, apply_rope, causal_attention, rms_norm, unseen


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    """Causal attention in which each of G keys and values is shared by h/G query heads, none of them copied.

    q: (B, T, h, d), the last T of the M positions; k, v: (B, M, G, d) -> (B, T, h, d). Scale 1/√d.
    padding: see `tpa.unseen`.
    """
    (B, T, h, d), (M, G) = q.shape, k.shape[1:3]
    group = h // G
    if not (T < M and T <= DECODE_TOKENS):
        # One batch entry per shared head: its h/G query heads see the same k and v through a stride of 0.
        q = q.unflatten(2, (G, group)).transpose(1, 2).flatten(0, 1)  # (B·G, T, h/G, d)
        k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, group, -1) for x in (k, v))
        out = causal_attention(q, k, v, None if padding is None else padding.repeat_interleave(G))
        return out.unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3)
    # Decoding: the h/G · T queries that share a head are the rows of one matrix product.
    q = q.unflatten(2, (G, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, h/G · T, d)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, G, M, d)
    mask = None
    if T > 1 or padding is not None:
        positions = torch.arange(M, device=q.device)
        seen = ~unseen(positions, positions[M - T :], padding)  # (T, M) or (B, T, M)
        seen = seen.expand(group, *seen.shape).movedim(0, -3)  # (h/G, T, M) or (B, h/G, T, M)
        mask = seen.flatten(-3, -2).unsqueeze(-3)  # (1, h/G · T, M) or (B, 1, h/G · T, M)
    if q.device.type == "cpu" and q.dtype.itemsize >= 4:
        # On a CPU the fused kernel works on one shared head per thread: two plain products are up to 3 times faster.
        logits = q @ k.mT / math.sqrt(d)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        out = logits.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def empty_cache(layer: nn.Module, shapes, batch_size: int, max_len: int | None, device, dtype) -> FactorCache:
    """A cache of `shapes` for `layer`, by default as long as its config says, in its own dtype and on its device."""
    weight, max_len = layer.out_proj.weight, layer.config.max_len if max_len is None else max_len
    return FactorCache(shapes, batch_size, max_len, device or weight.device, dtype or weight.dtype)


class MultiHeadAttention(nn.Module):
    """Softmax attention with h query heads and G key-value heads: MHA (G = h), GQA, or MQA (G = 1), with RoPE.

    n_kv_head: G; None is MHA. It must divide n_head. Query heads i · h/G to (i + 1) · h/G - 1 share key-value head i.
    Parameters: 2 d_model d_h (h + G) (Table 1). Raises ValueError for a G that cannot work.
    """

    def __init__(self, config: T6Config, n_kv_head: int | None = None):
        super().__init__()
        self.config = config
        self.rope = RoPE(config.d_head, config.rope_base)
        self.n_kv_head = config.n_head if n_kv_head is None else n_kv_head
        divisors = [G for G in range(1, config.n_head + 1) if config.n_head % G == 0]
        if not isinstance(self.n_kv_head, int) or self.n_kv_head not in divisors:
            raise ValueError(
                f"n_kv_head={n_kv_head!r}: must divide n_head={config.n_head}, so that all groups are of one size; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        width, kv_width = config.n_head * config.d_head, self.n_kv_head * config.d_head
        self.q_proj = nn.Linear(config.d_model, width, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.out_proj = nn.Linear(width, config.d_model, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def new_cache(self, batch_size: int, max_len: int | None = None, device=None, dtype=None) -> FactorCache:
        """An empty cache for this layer's k and v, 2 G d_h numbers per token, keys stored rotated (Table 1)."""
        shapes = [(self.n_kv_head, self.config.d_head)] * 2
        return empty_cache(self, shapes, batch_size, max_len, device, dtype)

    def forward(self, x: Tensor, cache: FactorCache | None = None, rope=None, padding=None) -> Tensor:
        """Attend from each token of x to itself and all before it, the cached ones included.

        x: (B, T, d_model) -> (B, T, d_model). The tokens follow those in `cache`, and are appended to it.
        rope: their cos and sin, if at hand already; padding: see `tpa.unseen`.
        """
        start = 0 if cache is None else cache.length
        heads = (-1, self.config.d_head)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, ·, d_h)
        q, k = (apply_rope(y, *(rope or self.rope.tables(start, x))) for y in (q, k))
        if cache is not None:
            cached = cache.append(k, v)
            if start > 0:
                k, v = (y.to(q.dtype) for y in cached)  # (B, M, G, d_h)
        return self.out_proj(grouped_attention(q, k, v, padding).flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """MLA: keys and values are linear maps of one cached latent per token (DeepSeek-V2, arXiv 2405.04434, Sec. 2.1).

    With c_q = norm(W_DQ x) of width d'_c and c = norm(W_DKV x) of width d_c, head i has
        query (W_UQ,i c_q ; RoPE(W_QR,i c_q)),   key (W_UK,i c ; RoPE(W_KR x)),   value W_UV,i c
    and scale 1/√(d_h + d_R). The second half of the key, of width d_R, is the same for all heads: RoPE stands between
    W_UQ and W_UK and would not let them be multiplied together, so position has a part of its own.

    d_c, d_c_q, d_rope: d_c, d'_c and d_R. The defaults, 4 d_h, 8 d_h and d_h/2 (the even number at or below it, at
    least 2), are the paper's small model at d_h = 64: 256, 512 and 32. Norms are RMSNorm as DeepSeek has them, without
    a gain as everywhere in T6, so the parameters are exactly Table 1's:
    d'_c (d_model + h d_h + h d_R) + d_c (d_model + 2 h d_h) + d_model (h d_h + d_R).
    Raises ValueError for a width that cannot work.
    """

    def __init__(self, config: T6Config, d_c: int | None = None, d_c_q: int | None = None, d_rope: int | None = None):
        super().__init__()
        self.config = config
        self.d_c = 4 * config.d_head if d_c is None else d_c
        self.d_c_q = 8 * config.d_head if d_c_q is None else d_c_q
        self.d_rope = max(2, config.d_head // 4 * 2) if d_rope is None else d_rope
        for name in ("d_c", "d_c_q", "d_rope"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more")
        if self.d_rope % 2:
            raise ValueError(f"d_rope={d_rope}: must be even, since RoPE rotates pairs; use {self.d_rope + 1}")
        self.rope = RoPE(self.d_rope, config.rope_base)
        h, d_head, d_model = config.n_head, config.d_head, config.d_model
        self.q_down = nn.Linear(d_model, self.d_c_q, bias=False)  # W_DQ
        self.q_up = nn.Linear(self.d_c_q, h * (d_head + self.d_rope), bias=False)  # W_UQ and W_QR, head by head
        self.kv_down = nn.Linear(d_model, self.d_c + self.d_rope, bias=False)  # W_DKV and W_KR
        self.k_up = nn.Linear(self.d_c, h * d_head, bias=False)  # W_UK
        self.v_up = nn.Linear(self.d_c, h * d_head, bias=False)  # W_UV
        self.out_proj = nn.Linear(h * d_head, d_model, bias=False)
        nn.init.zeros_(self.out_proj.weight)

    def new_cache(self, batch_size: int, max_len: int | None = None, device=None, dtype=None) -> FactorCache:
        """An empty cache for this layer's latents and rotated keys, d_c + d_R numbers per token (Table 1).

        Both lie side by side as one vector, because absorbed attention reads them as one key.
        """
        return empty_cache(self, [(1, self.d_c + self.d_rope)], batch_size, max_len, device, dtype)

    def forward(self, x: Tensor, cache: FactorCache | None = None, rope=None, padding=None) -> Tensor:
        """Attend from each token of x to itself and all before it, the cached ones included.

        x: (B, T, d_model) -> (B, T, d_model). The tokens follow those in `cache`, and are appended to it.
        rope: their cos and sin, if at hand already; padding: see `tpa.unseen`.
        """
        start = 0 if cache is None else cache.length
        # 1. Low-rank queries, in a part without and a part with position; the new tokens' latents and rotated keys.
        q = self.q_up(rms_norm(self.q_down(x))).unflatten(-1, (self.config.n_head, -1))  # (B, T, h, d_h + d_R)
        q, q_rope = q.split((self.config.d_head, self.d_rope), dim=-1)
        latent, k_rope = self.kv_down(x).unsqueeze(2).split((self.d_c, self.d_rope), dim=-1)  # (B, T, 1, ·)
        q_rope, k_rope = (apply_rope(y, *(rope or self.rope.tables(start, x))) for y in (q_rope, k_rope))
        latent = torch.cat((rms_norm(latent), k_rope), dim=-1)  # (B, T, 1, d_c + d_R), what is cached
        # 2. With a cache: remember them, and see all earlier ones too.
        if cache is not None:
            (cached,) = cache.append(latent)
            if start > 0:
                latent = cached.to(q.dtype)  # (B, M, 1, d_c + d_R)
        # 3. Attend: while decoding, straight from the latents.
        attend = self.attend_absorbed if start > 0 and x.shape[1] <= DECODE_TOKENS else self.attend_expanded
        return self.out_proj(attend(q, q_rope, latent, padding).flatten(2))

    def attend_expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, padding=None) -> Tensor:
        """Build every head's keys and values of all M positions: for training and prefill. Returns (B, T, h, d_h)."""
        c, k_rope = latent.split((self.d_c, self.d_rope), dim=-1)
        k, v = (up(c.squeeze(2)).unflatten(-1, q.shape[2:]) for up in (self.k_up, self.v_up))  # (B, M, h, d_h)
        k = torch.cat((k, k_rope.expand(-1, -1, q.shape[2], -1)), dim=-1)
        v = F.pad(v, (0, self.d_rope))  # the fused kernels want keys and values of one width
        return causal_attention(torch.cat((q, q_rope), dim=-1), k, v, padding)[..., : self.config.d_head]

    def attend_absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, padding=None) -> Tensor:
        """The same from the latents alone, for decoding: qᵀ (W_UK c) = (W_UKᵀ q)ᵀ c, and Σ α W_UV c = W_UV Σ α c.

        MLA is then MQA of width d_c + d_R, whose one value is the latent. Returns (B, T, h, d_h).
        """
        h, d_head = q.shape[2:]
        q = torch.einsum("bthd,hdc->bthc", q, self.k_up.weight.view(h, d_head, self.d_c))
        scale = math.sqrt((self.d_c + self.d_rope) / (d_head + self.d_rope))  # to 1/√(d_h + d_R)
        q = torch.cat((q, q_rope), dim=-1) * scale  # (B, T, h, d_c + d_R)
        mixed = grouped_attention(q, latent, latent, padding)[..., : self.d_c]  # (B, T, h, d_c)
        return torch.einsum("bthc,hdc->bthd", mixed, self.v_up.weight.view(h, d_head, self.d_c))
