"""One Triton kernel that decodes a token in factor space, and `use`, which gives it to a model.

    from tpa_minimal import flash_decode
    flash_decode.use(model)         # decoding on a CUDA device now goes through the kernel; all else stays as it was

It computes what `tpa.factor_attention` computes for one new token (App. A, Algorithm 2), in one pass over the cache:
each program takes some heads and a stretch of the cache, walks it block by block with an online softmax, and leaves its
maximum m, sum s and output y. The stretches are independent, which is what keeps a whole GPU busy with one sequence
(flash decoding); their results are then merged as any two blocks are, by rescaling to a common maximum.

With the environment variable TRITON_INTERPRET=1, set before Triton is imported, the same code runs on a CPU.
"""

import math
import types

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton import knobs

from tpa_minimal.tpa import TensorProductAttention, assemble

MAX_BLOCK_H = 32  # heads of a program; with more heads than that b_k and b_v are read several times
BLOCK_BYTES = 64  # of each column that a program reads at a time: 32 half-precision positions, or 16 of float32
STAGE_BYTES = 48 * 1024  # of shared memory for blocks on their way: small enough for consumer GPUs


@triton.jit
def read_rows(factor, strides, batch, r, positions, columns, M, width):
    """The tile (positions, columns) of rank r of a factor (B, M, R, width); zeros outside. `strides`: of B, M and R."""
    rows = factor + batch * strides[0] + positions[:, None] * strides[1] + r * strides[2]
    inside = (positions < M)[:, None] & (columns < width)[None, :]
    return tl.load(rows + columns[None, :], mask=inside, other=0.0)


@triton.jit
def multiply_add(x, y, total, WIDEN: tl.constexpr):
    """total + x y, products exact. Triton's interpreter cannot multiply bfloat16 matrices: there they are widened."""
    if WIDEN:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    return tl.dot(x, y, total, input_precision="ieee")  # not tf32, which has 11 bits


@triton.jit(do_not_specialize=["M", "stretch"])  # they change while decoding; nothing need be compiled anew for that
def decode_kernel(
    q, q_scale, a_k, b_k, a_v, b_v,  # q: (B, PARTS, h, d_h); q_scale: (B, h); the factors: (B, M, R, h or d_h)
    m_out, s_out, y_out,  # (B, stretches, h), the same, and (B, stretches, h, d_h), all float32
    a_k_strides, b_k_strides, a_v_strides, b_v_strides, M, stretch, h, d_head,
    RANK_K: tl.constexpr, RANK_V: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Positions stretch · i to stretch · (i + 1) - 1 for BLOCK_H heads of one sequence, i = program_id(1)."""
    # Programs that differ in their heads only come first: they read the same b_k and b_v at about the same time.
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    batch = tl.program_id(2).to(tl.int64)
    features = tl.arange(0, BLOCK_D)
    in_q = (heads < h)[:, None] & (features < d_head)[None, :]
    q += (batch * PARTS * h + heads[:, None]) * d_head + features[None, :]
    q0 = tl.load(q, mask=in_q, other=0.0)
    if PARTS == 3:
        q1 = tl.load(q + h * d_head, mask=in_q, other=0.0)
        q2 = tl.load(q + 2 * h * d_head, mask=in_q, other=0.0)
    scale = tl.load(q_scale + batch * h + heads, mask=heads < h, other=0.0)[:, None]

    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)  # running maximum of the logits
    s = tl.zeros((BLOCK_H,), tl.float32)  # running Σ 2^(logit - m)
    y = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)  # running Σ 2^(logit - m) · v
    begin = tl.program_id(1) * stretch
    for first in range(begin, tl.minimum(begin + stretch, M), BLOCK_M):
        positions = (first + tl.arange(0, BLOCK_M)).to(tl.int64)  # a long cache has more than 2^31 numbers
        logits = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        for r in tl.static_range(RANK_K):
            b = tl.trans(read_rows(b_k, b_k_strides, batch, r, positions, features, M, d_head))
            p = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)  # ⟨q, b_k,r⟩ of all heads and positions
            if PARTS == 3:
                p = multiply_add(q1, b, multiply_add(q2, b, p, WIDEN), WIDEN)
            p = multiply_add(q0, b, p, WIDEN)
            a = read_rows(a_k, a_k_strides, batch, r, positions, heads, M, h)
            logits += p * tl.trans(a).to(tl.float32)
        logits = tl.where((positions < M)[None, :], logits * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        weights = tl.exp2(logits - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        s = s * shrink + tl.sum(weights, 1)
        y = y * shrink[:, None]
        for r in tl.static_range(RANK_V):
            a = read_rows(a_v, a_v_strides, batch, r, positions, heads, M, h)
            b = read_rows(b_v, b_v_strides, batch, r, positions, features, M, d_head)
            y = multiply_add((weights * tl.trans(a).to(tl.float32)).to(b.dtype), b, y, WIDEN)
        m = m_new

    rows = (batch * tl.num_programs(1) + tl.program_id(1)) * h + heads
    tl.store(m_out + rows, m, mask=heads < h)
    tl.store(s_out + rows, s, mask=heads < h)
    tl.store(y_out + rows[:, None] * d_head + features[None, :], y, mask=in_q)


def can_decode(a_q, b_q, a_k, b_k, a_v, b_v) -> bool:
    """Whether `decode` takes these factors: one new token, on a CUDA device (or interpreted), no gradient wanted."""
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    return (
        a_q.shape[1] == 1
        and (b_k.is_cuda or knobs.runtime.interpret)
        and b_k.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(x.dtype == b_k.dtype and x.stride(-1) == 1 for x in (a_k, b_k, a_v, b_v))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in factors))
    )


def decode(a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor) -> Tensor:
    """`tpa.factor_attention` for the newest token, at position M - 1, by the kernel (App. A, Algorithm 2).

    a_q (B, 1, R_Q, h), b_q (B, 1, R_Q, d_h); a_k, b_k, a_v, b_v: (B, M, R, ·) of any ranks and strides, the last one 1.
    Returns (B, 1, h, d_h). Only what `can_decode` accepts; no gradient.
    """
    (B, _, _, h), (M, rank_k, d_head), rank_v = a_q.shape, b_k.shape[1:], b_v.shape[2]
    # Tensor cores multiply half-precision numbers, and a rounded query would spoil large logits. So the float32 query
    # goes in as a sum of three half-precision ones, scaled to at most 1 to stay within the range of float16.
    rest = assemble(a_q.float(), b_q.float())[:, 0]  # (B, h, d_h)
    q_scale = rest.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # (B, h, 1)
    rest, parts = rest / q_scale, []
    for _ in range(1 if b_k.dtype == torch.float32 else 3):
        parts.append(rest.to(b_k.dtype))
        rest = rest - parts[-1].float()
    q = torch.stack(parts, dim=1)  # (B, PARTS, h, d_h)
    q_scale = q_scale * (math.log2(math.e) / (rank_k * math.sqrt(d_head)))  # the kernel's softmax is in powers of 2

    # As many stretches as give each of the processors a few programs, in whole blocks.
    BLOCK_H = min(max(triton.next_power_of_2(h), 16), MAX_BLOCK_H)
    BLOCK_M, BLOCK_D = BLOCK_BYTES // b_k.itemsize, max(triton.next_power_of_2(d_head), 16)
    tiles = triton.cdiv(h, BLOCK_H)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    stretches = max(1, 4 * processors // (B * tiles))
    stretch = BLOCK_M * triton.cdiv(triton.cdiv(M, BLOCK_M), stretches)
    stretches = triton.cdiv(M, stretch)
    block_bytes = BLOCK_M * (BLOCK_H + BLOCK_D) * (rank_k + rank_v) * b_k.itemsize
    m, s = q.new_empty(2, B, stretches, h, 1, dtype=torch.float32)
    y = q.new_empty(B, stretches, h, d_head, dtype=torch.float32)
    decode_kernel[tiles, stretches, B](
        q, q_scale, a_k, b_k, a_v, b_v, m, s, y, *(x.stride()[:3] for x in (a_k, b_k, a_v, b_v)), M, stretch, h, d_head,
        RANK_K=rank_k, RANK_V=rank_v, PARTS=len(parts), WIDEN=not q.is_cuda,
        BLOCK_H=BLOCK_H, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, num_stages=min(4, 1 + STAGE_BYTES // block_bytes),
    )  # fmt: skip
    shrink = (m - m.amax(1, keepdim=True)).exp2()
    return ((y * shrink).sum(1) / ((s * shrink).sum(1) * rank_v)).to(b_q.dtype).unsqueeze(1)


def attend(layer: TensorProductAttention, a_q, b_q, a_k, b_k, a_v, b_v, start: int) -> Tensor:
    """What `use` puts in place of the layer's own `attend`: the kernel where it serves, else that method."""
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    if start > 0 and can_decode(*factors):
        return decode(*factors)
    return type(layer).attend(layer, *factors, start)


def use(model: nn.Module) -> nn.Module:
    """Let every TensorProductAttention in `model` decode by the kernel; returns the model, changed in place.

    Training, prefill, several new tokens at once and other devices keep to PyTorch, and so does a variant that attends
    in a way of its own.
    """
    for layer in model.modules():
        if isinstance(layer, TensorProductAttention) and type(layer).attend is TensorProductAttention.attend:
            layer.attend = types.MethodType(attend, layer)
    return model
