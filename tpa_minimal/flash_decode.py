"""Triton kernels that decode a token in factor space, and `use`, which gives them to a model.

    from tpa_minimal import flash_decode
    flash_decode.use(model)         # decoding on a CUDA device now goes through the kernels; all else stays as it was

Two compute what `tpa.factor_attention` computes for one new token (App. A, Algorithm 2), in one pass over the cache.
Each program of the first takes some heads and a split of the cache, walks it block by block with an online softmax, and
leaves its maximum m, sum s and output y. The splits are independent, which is what keeps a whole GPU busy with one
sequence (flash decoding); the second kernel merges them as any two blocks are merged, by rescaling to a common maximum.
A third rotates and appends what a new token brings; `decode_graph` has it in a step of a whole model.

With the environment variable TRITON_INTERPRET=1, set before Triton is imported, the same code runs on a CPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tpa_minimal import tpa
from tpa_minimal.tpa import TensorProductAttention

BLOCK_BYTES = {True: 48 * 1024, False: 32 * 1024}  # for the blocks of one of two programs on a processor: H100, others


@triton.jit
def multiply_add(x, y, total, WIDEN: tl.constexpr):
    """total + x y, products exact. Triton's interpreter cannot multiply bfloat16 matrices: there they are widened."""
    if WIDEN:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    return tl.dot(x, y, total, input_precision="ieee")  # of float32: not tf32, which has 11 bits


@triton.jit
def read_rows(
    rows, first, M, columns, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Positions first to first + BLOCK_M - 1 of a factor (M, WIDTH) whose rows lie ROW apart; zeros outside."""
    i = tl.arange(0, BLOCK_M)[:, None]
    rows += tl.cast(first, tl.int64) * ROW  # a long cache has more than 2^31 numbers
    rows = rows + (i.to(tl.int64) * ROW + columns[None, :])
    if WIDTH % BLOCK == 0:  # every tile is full
        return tl.load(rows, mask=i < M - first, other=0.0)
    return tl.load(rows, mask=(i < M - first) & (columns < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=["M"])  # it changes while decoding; nothing need be compiled anew for that
def split_kernel(
    a_q, b_q, a_k, b_k, a_v, b_v, length,  # (B, 1, R_Q, h or d_h), (B, M, R, h or d_h) and None or (B,)
    m_out, s_out, y_out,  # (B, splits, h), the same, and (B, splits, h, d_h), all float32
    batch_strides, rank_strides, M, scale, AK_ROW: tl.constexpr, BK_ROW: tl.constexpr, AV_ROW: tl.constexpr,
    BV_ROW: tl.constexpr, H: tl.constexpr, D: tl.constexpr, A_UNIT: tl.constexpr, B_UNIT: tl.constexpr,
    RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one sequence against the program_id(1)-th of num_programs(1) splits of its positions."""
    # Programs that differ in their heads only come first: they read the same b_k and b_v at about the same time.
    heads, features = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    batch = tl.program_id(2).to(tl.int64)
    a_q, b_q = a_q + batch * batch_strides[0], b_q + batch * batch_strides[1]
    a_k, b_k = a_k + batch * batch_strides[2] * A_UNIT, b_k + batch * batch_strides[3] * B_UNIT
    a_v, b_v = a_v + batch * batch_strides[4] * A_UNIT, b_v + batch * batch_strides[5] * B_UNIT
    if length is not None:
        M = tl.load(length + batch).to(tl.int32)

    # The query (d_h, heads). Tensor cores multiply half-precision numbers, and a rounded query would spoil large
    # scores: so it is the sum of two such numbers, scaled to at most 1 to stay within the range of float16.
    query = tl.zeros((BLOCK_D, BLOCK_H), tl.float32)
    for i in range(RANK_Q):
        of_head = tl.load(a_q + i * rank_strides[0] + heads, mask=heads < H, other=0.0)
        of_feature = tl.load(b_q + i * rank_strides[1] + features, mask=features < D, other=0.0)
        query += of_feature.to(tl.float32)[:, None] * of_head.to(tl.float32)[None, :]
    largest = tl.maximum(tl.max(tl.abs(query), 0), 1e-30)
    query = query / largest[None, :]
    scale = scale * largest  # (heads)
    q0 = query.to(b_k.dtype.element_ty)
    q1 = (query - q0.to(tl.float32)).to(q0.dtype)  # used if PARTS is 2; of a float32 query nothing is left over

    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)  # running maximum of the scores
    s = tl.zeros((BLOCK_H,), tl.float32)  # running Σ 2^(score - m)
    y = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)  # running Σ 2^(score - m) · v
    split = tl.cdiv(tl.cdiv(M, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    begin = tl.program_id(1) * split
    for first in tl.range(begin, tl.minimum(begin + split, M), BLOCK_M, num_stages=STAGES):
        # Positions are rows: each warp has positions of its own for all heads, and the query is read by all of them.
        scores = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for r in tl.static_range(RANK_K):
            b = read_rows(b_k + r * rank_strides[3] * B_UNIT, first, M, features, BK_ROW, D, BLOCK_M, BLOCK_D)
            p = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)  # ⟨b_k,r, q⟩ of all positions and heads
            if PARTS == 2:
                p = multiply_add(b, q1, p, WIDEN)
            p = multiply_add(b, q0, p, WIDEN)
            a = read_rows(a_k + r * rank_strides[2] * A_UNIT, first, M, heads, AK_ROW, H, BLOCK_M, BLOCK_H)
            scores += p * a.to(tl.float32)
        seen = (first + tl.arange(0, BLOCK_M) < M)[:, None]
        scores = tl.where(seen, scores * scale[None, :], float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 0))
        weights = tl.exp2(scores - m_new[None, :])
        shrink = tl.exp2(m - m_new)
        s = s * shrink + tl.sum(weights, 0)
        y = y * shrink[:, None]
        for r in tl.static_range(RANK_V):
            a = read_rows(a_v + r * rank_strides[4] * A_UNIT, first, M, heads, AV_ROW, H, BLOCK_M, BLOCK_H)
            b = read_rows(b_v + r * rank_strides[5] * B_UNIT, first, M, features, BV_ROW, D, BLOCK_M, BLOCK_D)
            y = multiply_add(tl.trans((weights * a.to(tl.float32)).to(b.dtype)), b, y, WIDEN)
        m = m_new

    rows = (batch * tl.num_programs(1) + tl.program_id(1)) * H + heads  # a split beyond M leaves -inf, 0 and 0
    tl.store(m_out + rows, m, mask=heads < H)
    tl.store(s_out + rows, s, mask=heads < H)
    tl.store(y_out + rows[:, None] * D + features[None, :], y, mask=(heads < H)[:, None] & (features < D)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    m_in, s_in, y_in, out, splits,
    H: tl.constexpr, D: tl.constexpr, RANK_V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The output of one head of one sequence: the splits' results, rescaled to their common maximum."""
    head, batch, features = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_D)
    m, s, y = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, BLOCK):
        i = first + tl.arange(0, BLOCK)
        rows = (batch * splits + i) * H + head
        m_i = tl.load(m_in + rows, mask=i < splits, other=float("-inf"))
        s_i = tl.load(s_in + rows, mask=i < splits, other=0.0)
        inside = (i < splits)[:, None] & (features < D)[None, :]
        y_i = tl.load(y_in + rows[:, None] * D + features[None, :], mask=inside, other=0.0)
        m_new = tl.maximum(m, tl.max(m_i, 0))
        weights, shrink = tl.exp2(m_i - m_new), tl.exp2(m - m_new)
        s = s * shrink + tl.sum(weights * s_i, 0)
        y = y * shrink + tl.sum(weights[:, None] * y_i, 0)
        m = m_new
    tl.store(out + (batch * H + head) * D + features, y / (s * RANK_V), mask=features < D)


INTERPRETED = not isinstance(split_kernel, triton.JITFunction)


@torch.compiler.assume_constant_result
def processors(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors a device has, and its major compute capability; of a CPU (interpreter) 1 and 8."""
    if device.type != "cuda":
        return 1, 8
    about = torch.cuda.get_device_properties(device)
    return about.multi_processor_count, about.major


def plan(B: int, M: int, h: int, d_head: int, rank: int, itemsize: int, processors: int, major: int):
    """The grid of `split_kernel` (tiles of heads, splits, sequences) and the sizes of its blocks; rank is R_K + R_V.

    The splits are as many as run side by side: one more would start when all others are done. Blocks are as large as
    the shared memory and the registers of two programs on a processor allow, or of one where a block needs more.
    """
    half, warp_groups = itemsize == 2, major == 9  # H100's tensor cores want 64 rows for four warps together
    BLOCK_D = max(16, triton.next_power_of_2(d_head))
    BLOCK_H = max(16, min(triton.next_power_of_2(h), (64 if warp_groups else 32) if half else 1024 // BLOCK_D))
    BLOCK_M, row_bytes = (64 if warp_groups else 32) if half else 16, (BLOCK_H + BLOCK_D) * rank * itemsize
    room = BLOCK_BYTES[warp_groups]
    while BLOCK_M > 16 and BLOCK_M * row_bytes > 2 * room:
        BLOCK_M //= 2
    stages = 3 if 2 * BLOCK_M * row_bytes <= room else 2  # blocks on their way, and the one that is worked on
    programs = processors * (2 if BLOCK_M * row_bytes <= room else 1)
    tiles = triton.cdiv(h, BLOCK_H)
    splits = max(1, min(triton.cdiv(M, BLOCK_M), programs // (B * tiles)))
    blocks = dict(BLOCK_H=BLOCK_H, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, STAGES=stages)
    # Two programs of 128 threads may use 255 registers; else the assembler spills some so that three fit.
    return (tiles, splits, B), blocks if warp_groups else {**blocks, "maxnreg": 255}


@torch.library.custom_op("tpa_minimal::decode", mutates_args=())
def decode(
    a_q: Tensor, b_q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, length: Tensor | None = None
) -> Tensor:
    """`tpa.factor_attention` for the newest token, at position M - 1, by the kernels (App. A, Algorithm 2).

    a_q (B, 1, R_Q, h), b_q (B, 1, R_Q, d_h); a_k, b_k, a_v, b_v: (B, M, R, ·) of any ranks and strides, the last one 1,
    and of one dtype. length: (B,) integers from 1 to M on the device, to attend to only so many positions of each
    sequence, so that a CUDA graph may be replayed while they grow. Returns (B, 1, h, d_h). No gradient.
    """
    (B, _, rank_q, h), (M, rank_k, d_head), rank_v = a_q.shape, b_k.shape[1:], b_v.shape[2]
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    grid, blocks = plan(B, M, h, d_head, rank_k + rank_v, b_k.itemsize, *processors(b_k.device))
    m, s = b_k.new_empty(2, B, grid[1], h, dtype=torch.float32)
    y = b_k.new_empty(B, grid[1], h, d_head, dtype=torch.float32)
    out = b_q.new_empty(B, 1, h, d_head)
    batch_strides, rows, rank_strides = zip(*(x.stride()[:3] for x in factors))
    # Strides go in as multiples of what divides them all: then the compiler knows how many numbers it may read at once.
    a_unit, b_unit = (math.gcd(16, *x.stride()[:3], *y.stride()[:3]) for x, y in ((a_k, a_v), (b_k, b_v)))
    units = (1, 1, a_unit, b_unit, a_unit, b_unit)
    batch_strides, rank_strides = (tuple(n // unit for n, unit in zip(x, units)) for x in (batch_strides, rank_strides))
    scale = math.log2(math.e) / (rank_q * rank_k * math.sqrt(d_head))  # the kernels' softmax is in powers of 2
    with torch.cuda.device_of(b_k):  # Triton launches on the current device, which need not be the model's
        split_kernel[grid](
            *factors, length, m, s, y, batch_strides, rank_strides, M, scale, *rows[2:], H=h, D=d_head,
            A_UNIT=a_unit, B_UNIT=b_unit, RANK_Q=rank_q, RANK_K=rank_k, RANK_V=rank_v,
            PARTS=2 if b_k.itemsize == 2 else 1, WIDEN=INTERPRETED, **blocks,
        )  # fmt: skip
        BLOCK_D = blocks["BLOCK_D"]
        merge_kernel[h, B](m, s, y, out, grid[1], H=h, D=d_head, RANK_V=rank_v, BLOCK=32, BLOCK_D=BLOCK_D)
    return out


@decode.register_fake
def _(a_q, b_q, a_k, b_k, a_v, b_v, length=None):
    return b_q.new_empty(b_q.shape[0], 1, a_q.shape[-1], b_q.shape[-1])


@triton.jit
def append_kernel(
    new, length, cos, sin, b_q, cached, strides,  # strides: of batch, position and rank in each of the four cached
    H: tl.constexpr, D: tl.constexpr, RANK_Q: tl.constexpr, RANK_K: tl.constexpr, RANK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sequence's new token, the program_id(0)-th row of each factor to where it belongs."""
    r, batch, i = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    position = tl.load(length + batch).to(tl.int64) - 1
    a_q = new + batch * (RANK_Q + RANK_K + RANK_V) * (H + D)  # then b_q, a_k, b_k, a_v, b_v, each row by row
    a_k = a_q + RANK_Q * (H + D)
    a_v = a_k + RANK_K * (H + D)
    a_k_to, b_k_to, a_v_to, b_v_to = cached
    if r < RANK_Q:
        rotate_row(a_q + RANK_Q * H + r * D, b_q + (batch * RANK_Q + r) * D, cos, sin, position, D // 2, BLOCK)
    if r < RANK_K:
        a_k_to += batch * strides[0] + position * strides[1] + r * strides[2]
        tl.store(a_k_to + i, tl.load(a_k + r * H + i, mask=i < H), mask=i < H)
        b_k_to += batch * strides[3] + position * strides[4] + r * strides[5]
        rotate_row(a_k + RANK_K * H + r * D, b_k_to, cos, sin, position, D // 2, BLOCK)
    if r < RANK_V:
        a_v_to += batch * strides[6] + position * strides[7] + r * strides[8]
        tl.store(a_v_to + i, tl.load(a_v + r * H + i, mask=i < H), mask=i < H)
        b_v_to += batch * strides[9] + position * strides[10] + r * strides[11]
        tl.store(b_v_to + i, tl.load(a_v + RANK_V * H + r * D + i, mask=i < D), mask=i < D)


@triton.jit
def rotate_row(x, out, cos, sin, position, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """One row of 2 HALF numbers, rotated as `tpa.apply_rope` does at `position`."""
    i = tl.arange(0, BLOCK)
    x1, x2 = (tl.load(x + i, mask=i < HALF).to(tl.float32), tl.load(x + HALF + i, mask=i < HALF).to(tl.float32))
    c, s = (tl.load(cos + position * HALF + i, mask=i < HALF), tl.load(sin + position * HALF + i, mask=i < HALF))
    tl.store(out + i, x1 * c + x2 * s, mask=i < HALF)
    tl.store(out + HALF + i, x2 * c - x1 * s, mask=i < HALF)


@torch.library.custom_op("tpa_minimal::append", mutates_args=("a_k", "b_k", "a_v", "b_v"))
def append(
    new: Tensor, length: Tensor, cos: Tensor, sin: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor
) -> Tensor:
    """Rotate one token's b_q and b_k; write a_k, b_k, a_v and b_v as position length - 1; return b_q.

    new: (B, 1, (R_Q + R_K + R_V)(h + d_h)), contiguous, in the order of `TensorProductAttention.factor_proj`;
    length: (B,) integers on the device; cos, sin: (M, d_h/2) in float32; a_k, b_k, a_v, b_v: (B, M, R, ·) of any
    strides, the last one 1. Returns (B, 1, R_Q, d_h).
    """
    (B, _, rank_k, h), (rank_v, d_head), cached = a_k.shape, b_v.shape[2:], (a_k, b_k, a_v, b_v)
    rank_q = new.shape[-1] // (h + d_head) - rank_k - rank_v
    b_q = new.new_empty(B, 1, rank_q, d_head)
    strides = tuple(n for x in cached for n in x.stride()[:3])
    with torch.cuda.device_of(new):
        append_kernel[max(rank_q, rank_k, rank_v), B](
            new, length, cos, sin, b_q, cached, strides, H=h, D=d_head, RANK_Q=rank_q, RANK_K=rank_k, RANK_V=rank_v,
            BLOCK=triton.next_power_of_2(max(h, d_head)),
        )  # fmt: skip
    return b_q


@append.register_fake
def _(new, length, cos, sin, a_k, b_k, a_v, b_v):
    h, d_head = a_k.shape[-1], b_k.shape[-1]
    return new.new_empty(new.shape[0], 1, new.shape[-1] // (h + d_head) - a_k.shape[2] - a_v.shape[2], d_head)


def serves(cached) -> bool:
    """Whether the kernels read such cached factors: of one dtype that they know, where Triton has tensor cores.

    That is a CUDA device of compute capability 8 or more (a T4 has 7.5), or the interpreter.
    """
    dtype, device = cached[0].dtype, cached[0].device
    known = dtype in (torch.float16, torch.bfloat16, torch.float32) and all(x.dtype == dtype for x in cached)
    return known and (device.type == "cuda" or INTERPRETED) and processors(device)[1] >= 8


def factor_attention(a_q, b_q, a_k, b_k, a_v, b_v, *, start: int, block_size: int = 16384, padding=None) -> Tensor:
    """What `tpa.factor_attention` computes, from the same arguments: by the kernels where they serve, else by it.

    They serve one new token of a batch without padding, where no gradient is wanted and `serves` says so.
    """
    factors = (a_q, b_q, a_k, b_k, a_v, b_v)
    if (
        padding is None
        and a_q.shape[1] == 1
        and b_k.shape[1] == start + 1
        and all(x.stride(-1) == 1 for x in factors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in factors))
        and serves(factors[2:])
    ):
        return decode(*factors)
    return tpa.factor_attention(*factors, start=start, block_size=block_size, padding=padding)


def use(model: nn.Module) -> nn.Module:
    """Let every TensorProductAttention in `model` decode by `factor_attention` above; returns the changed model."""
    for layer in model.modules():
        if isinstance(layer, TensorProductAttention):
            layer.attend_in_factor_space = factor_attention
    return model
