# %% [markdown]
# # 10 · Flash decoding
#
# {badge}
#
# **You will be able to**
#
# - say why decoding waits for memory, and place MHA, GQA and TPA on a roofline that you measured;
# - split one query's attention over the cache, and merge the results exactly;
# - write a Triton kernel that attends in factor space, say why its rows are positions, and run it without a GPU;
# - keep large logits accurate when the hardware multiplies half-precision numbers;
# - read a decoding benchmark: what it compares, against which limit, and what it leaves out.
#
# **You need** notebook 06 (attention in factor space, and the online softmax). No GPU.
#
# **Time** about 65 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# Notebook 06 derived *what* to compute for a new token: walk the cache block by block, and never build K or V. This one
# is about *who computes it*. A GPU has more than a hundred processors, and a single new token of a single sequence
# must keep them all busy.
#
# The language for such programs is [Triton](https://triton-lang.org): Python functions that are compiled for the GPU.
# It also has an **interpreter**, which runs the same functions on a CPU, slowly, and in float32 with the same results to
# rounding (to bfloat16 it truncates where a GPU rounds). It must be chosen before Triton is imported, so that is
# our first step. We also use it on GPUs of compute capability below 8, such as Colab's T4: Triton has no matrix units
# there. (Triton comes with PyTorch for CUDA on Linux; elsewhere there may be no package for your system, and this
# notebook can only be read.)

# %% tags=["hide-input"]
import json
import math
import os

if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
    device = "cpu"
if device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
print("Triton", "interprets" if device == "cpu" else "compiles", "the kernels")

import matplotlib.pyplot as plt
import triton
import triton.language as tl

from tpa_minimal import flash_decode
from tpa_minimal.course import checks, looks
from tpa_minimal.experiments import bench
from tpa_minimal.tpa import T6, T6Config, assemble, factor_attention

looks.style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1 · Decoding waits for memory
#
# To decode one token, all of the cache must be read once. How much arithmetic is there to do meanwhile? Count two
# operations (a multiplication and an addition) for each multiply–add, per cached token and layer:
#
# | | operations | numbers read |
# |---|---|---|
# | MHA | $4\,h\,d_h$ | $2\,h\,d_h$ |
# | GQA, $G$ groups | $4\,h\,d_h$ | $2\,G\,d_h$ |
# | TPA, the small Q assembled first | $2\,(R_K + R_V)\,h\,(d_h + 1)$ | $(R_K + R_V)(h + d_h)$ |
#
# Operations divided by bytes is the **arithmetic intensity**. It decides which resource runs out first.

# %%
h, d_h, size = 32, 64, 4  # float32: 4 bytes a number


def intensity(operations, numbers):
    return operations / (size * numbers)


kinds = {
    "MHA": intensity(4 * h * d_h, 2 * h * d_h),
    "GQA-4": intensity(4 * h * d_h, 2 * 4 * d_h),
    "TPA, rank 1": intensity(2 * 2 * h * (d_h + 1), 2 * (h + d_h)),
}
for name, value in kinds.items():
    print(f"{name:12} {value:5.1f} operations per byte")

# %% [markdown]
# MHA does half an operation for each byte of float32: any processor waits. TPA shares one $b_k$ among all heads, and its
# intensity is that of $h$ heads reading a single row, as in MQA, less what the head factors add. The rank does not
# enter: it multiplies both counts.
#
# What can this machine do? We measure two things: how fast it copies memory, and how fast it multiplies matrices.

# %%
threads = torch.get_num_threads()
bandwidth = bench.copy_bandwidth(device, megabytes=64)
matrix = torch.randn(1024, 1024, device=device)
product = bench.in_turns({"product": lambda: matrix @ matrix}, 5, device)["product"]
peak = 2 * 1024**3 / (product["min_ms"] / 1000)
print(
    f"{bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} billion operations per second, "
    f"{threads} threads, {device}"
)

# %% [markdown]
# The **roofline** is the limit that follows: a program of intensity $I$ performs at most
# $\min(\text{peak},\; I \cdot \text{bandwidth})$ operations per second.

# %% tags=["hide-input"]
fig, ax = plt.subplots()
x = torch.logspace(-2, 8, 100, base=2)
ax.plot(x, (x * bandwidth).clamp(max=peak) / 1e9, color="black")
for (name, value), mechanism in zip(kinds.items(), ("mha", "gqa", "tpa")):
    style = looks.of(mechanism).line_style()
    ax.plot(value, min(value * bandwidth, peak) / 1e9, markersize=9, **style)
    ax.annotate(
        name,
        (value, min(value * bandwidth, peak) / 1e9),
        (6, -16),
        textcoords="offset points",
    )
ax.set_xscale("log", base=2)
ax.set_yscale("log", base=2)
ax.set(xlabel="operations per byte", ylabel="billion operations per second")
for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_formatter("{x:g}")
ax.set_title("Limits, not measurements: where the roof slopes, memory decides")
looks.show(
    fig,
    "A roof over operations per byte: decoding lies where it slopes, a large product where it is flat.",
)

# %% [markdown]
# Where a point lies under the slope, fewer bytes mean less time. Under the flat part the processor itself is the limit,
# and fewer bytes no longer help. MHA sits on the slope on any machine. TPA moves to the right, and on a CPU it can reach
# the flat part: there its speed-up over MHA stays *below* the ratio of the caches. In half precision on a GPU with
# matrix units the slope reaches much further to the right.
#
# ## 2 · One query, many processors
#
# While a model is being trained, each processor takes some of the many queries. In decoding there is one. What is long
# is the cache, so we cut *it*: each processor takes a split of the positions and attends to that alone. What it must hand
# over are the three quantities of the online softmax, per head, with scores in powers of 2 as GPUs like them: the
# maximum $m$, the sum $s = \sum 2^{\ell - m}$, and the vector $y = \sum 2^{\ell - m} v$.


# %%
def attend_to(scores, v):
    """What one split leaves: scores (M, h), v (M, h, d_h) -> m, s (h), y (h, d_h)."""
    m = scores.amax(0)
    weights = torch.exp2(scores - m)
    return m, weights.sum(0), torch.einsum("mh,mhd->hd", weights, v)


scores, v = (
    20 * torch.randn(1000, h, dtype=torch.float64),
    torch.randn(1000, h, d_h, dtype=torch.float64),
)
splits = [slice(0, 100), slice(100, 617), slice(617, 1000)]
parts = [attend_to(scores[split], v[split]) for split in splits]
m, s, y = (torch.stack(part) for part in zip(*parts))  # (3, h), (3, h), (3, h, d_h)

# %% [markdown]
# Merging needs one thought. The splits used different maxima. Multiplying a split's $s$ and $y$ by
# $2^{m_i - m}$ gives what it would have found with the common maximum $m = \max_i m_i$; then sums may be added:
#
# $$o = \frac{\sum_i 2^{m_i - m}\, y_i}{\sum_i 2^{m_i - m}\, s_i}.$$
#
# In words: every split's own output $y_i / s_i$ is weighed by the share of the whole softmax that fell into it.

# %% claim="alg-2-splits"
shrink = torch.exp2(m - m.amax(0))
merged = (shrink[..., None] * y).sum(0) / (shrink * s).sum(0)[:, None]
whole = torch.einsum("mh,mhd->hd", (scores * math.log(2)).softmax(0), v)
torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)

# %% [markdown]
# Exact to rounding, wherever we cut. This is **flash decoding**: splits side by side, then one small merge. Its cost
# is the partial results, $h (d_h + 2)$ numbers per split, which a cache of thousands of tokens outweighs.
#
# ## 3 · A first kernel: one tile of scores
#
# A Triton kernel is written for one **program**, and many programs run at once. Each asks for its own number, loads a
# *tile* of each operand from the addresses that it computes, works on the tiles, and stores its result. Ours starts
# with the scores of factor space at rank 1: $\langle b_k, q\rangle\, a_k$.
#
# One decision comes first: what are the **rows** of the matrix product, heads or positions? We take positions:
#
# - The cache lies in memory with positions as rows, $a_k$ and $b_k$ alike. The product of the tile of $b_k$ with the
#   query, (positions, features) times (features, heads), has the shape of the tile of $a_k$: no tile is transposed.
# - A program consists of groups of 32 threads (*warps*), and the rows of a product are what it divides among them. Each
#   warp then has positions of its own, for all heads; all warps read the same small query.
# - The matrix units of a GPU take a fixed number of rows at a time, and those of an H100 take 64, by four warps
#   together. The model fixes how many heads there are, but of positions we can always take 64:


# %%
for heads in (16, 32, 34, 64):
    as_rows = heads / (64 * math.ceil(heads / 64))
    as_columns = heads / triton.next_power_of_2(heads)
    print(
        f"{heads} heads: {as_rows:4.0%} of the rows used, "
        f"or {as_columns:4.0%} of the columns"
    )

# %% [markdown]
# As columns, heads fill a tile whenever their number is a power of two, which is all that Triton asks of a tile's sides.
# (34, the paper's small model, leaves almost half of it empty either way. The empty part costs arithmetic, but no bytes.)


# %%
@triton.jit
def scores_kernel(
    q, a_k, b_k, out, M, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    positions = tl.program_id(0) * BLOCK + tl.arange(
        0, BLOCK
    )  # which rows of the cache are mine?
    heads, features = tl.arange(0, H), tl.arange(0, D)
    seen = (positions < M)[:, None]  # the last tile may stick out of the cache
    b = tl.load(
        b_k + positions[:, None] * D + features[None, :], mask=seen, other=0.0
    )  # (BLOCK, D)
    a = tl.load(
        a_k + positions[:, None] * H + heads[None, :], mask=seen, other=0.0
    )  # (BLOCK, H)
    query = tl.load(q + heads[None, :] * D + features[:, None])  # (D, H)
    scores = tl.dot(b, query, input_precision="ieee") * a  # (BLOCK, H)
    tl.store(out + positions[:, None] * H + heads[None, :], scores, mask=seen)


# %% [markdown]
# Addresses are a pointer plus offsets: row times width plus column, for all entries of the tile at once. The sizes marked
# `tl.constexpr` are fixed when the kernel is compiled; as lengths of `tl.arange` they must be powers of two, and for
# `tl.dot` on a GPU at least 16. The number of positions is free, so the **mask** keeps the last tile inside the cache.
# `kernel[grid](arguments)` starts the kernel as many times as `grid` says, side by side; here once per tile:

# %%
M = 100
q, a_k, b_k = (
    torch.randn(rows, width, device=device)
    for rows, width in ((h, d_h), (M, h), (M, d_h))
)
out = torch.full(
    (M + 32, h), math.nan, device=device
)  # with room for a tile that does not stop in time
scores_kernel[triton.cdiv(M, 32),](q, a_k, b_k, out, M, H=h, D=d_h, BLOCK=32)
torch.testing.assert_close(out[:M], (b_k @ q.T) * a_k, rtol=1e-4, atol=1e-4)
assert out[M:].isnan().all()
print(
    "programs:", triton.cdiv(M, 32), "· positions in the last one:", M - 32 * (M // 32)
)

# %% [markdown]
# No `nan` is left: every entry was written, and none beyond the end.
#
# ## 4 · The second kernel: a whole split
#
# Now each program walks through its split and keeps the running $m$, $s$ and $y$ of notebook 06 on the chip. Nothing
# of the size of the cache is ever written: what goes out is one $m$ and $s$ per head and one $y$.


# %%
@triton.jit
def split_kernel(
    q, a_k, b_k, a_v, b_v, m_out, s_out, y_out, M, split,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    heads, features, i = tl.arange(0, H), tl.arange(0, D), tl.program_id(0)
    query = tl.load(q + heads[None, :] * D + features[:, None])  # (D, H)
    m = tl.full((H,), float("-inf"), tl.float32)
    s, y = tl.zeros((H,), tl.float32), tl.zeros((H, D), tl.float32)
    end = tl.minimum((i + 1) * split, M)
    for first in range(i * split, end, BLOCK):
        positions = first + tl.arange(0, BLOCK)
        seen = (positions < end)[:, None]
        row_h = positions[:, None] * H + heads[None, :]
        row_d = positions[:, None] * D + features[None, :]
        b = tl.load(b_k + row_d, mask=seen, other=0.0)
        p = tl.dot(b, query, input_precision="ieee")  # (BLOCK, H)
        p = p * tl.load(a_k + row_h, mask=seen, other=0.0)
        scores = tl.where(seen, p, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - m_new[None, :]), tl.exp2(m - m_new)
        scaled = weights * tl.load(a_v + row_h, mask=seen, other=0.0)
        s = s * shrink + tl.sum(weights, 0)
        b = tl.load(b_v + row_d, mask=seen, other=0.0)
        y = y * shrink[:, None]
        y = tl.dot(tl.trans(scaled), b, y, input_precision="ieee")  # (H, D)
        m = m_new
    tl.store(m_out + i * H + heads, m)
    tl.store(s_out + i * H + heads, s)
    tl.store(y_out + (i * H + heads[:, None]) * D + features[None, :], y)


# %% [markdown]
# Read it beside the loop of `factor_attention`: the lines are the same. Three details matter. Positions beyond the split
# get the score $-\infty$ and not 0, or they would take part in the softmax. The scale $1/(R_K \sqrt{d_h})$ is put into
# the query beforehand, together with $\log_2 e$, because $e^x = 2^{x \log_2 e}$. (`assemble` has divided by $R_Q$; $R_V$ is
# 1 here, otherwise the merged output is divided by it.) And the second product sums over positions, so they cannot be
# its rows: the weights, just computed, are the one tile that is transposed, and $b_v$ is used as it was read.

# %%
M, count = 1000, 4
factors = [
    torch.randn(1, T, R, w, device=device)
    for T, R in ((1, 6), (M, 1), (M, 1))
    for w in (h, d_h)
]
q = assemble(*factors[:2])[0, 0] * (math.log2(math.e) / math.sqrt(d_h))
m, s = torch.empty(2, count, h, device=device)
y = torch.empty(count, h, d_h, device=device)
cached = [factor.contiguous() for factor in factors[2:]]
split_kernel[count,](q.contiguous(), *cached, m, s, y, M, 250, H=h, D=d_h, BLOCK=16)

# %% [markdown]
# Four splits of 250 positions, none of them a whole number of blocks. The merge is that of section 2:

# %%
shrink = torch.exp2(m - m.amax(0))
ours = (shrink[..., None] * y).sum(0) / (shrink * s).sum(0)[:, None]
exact = factor_attention(*(factor.double() for factor in factors), start=M - 1)[0, 0]
print(
    f"relative error against float64: "
    f"{((ours - exact).norm() / exact.norm()).item():.0e}"
)
assert (ours - exact).norm() <= 1e-5 * exact.norm()

# %% [markdown]
# That is a correct flash-decoding kernel for rank 1, one sequence, and head counts that are powers of two.
#
# ## 5 · The kernels of the course
#
# `tpa_minimal/flash_decode.py` is this kernel with the restrictions removed. Open it; you know most of it:
#
# - **any ranks**: a loop over $r$ around the loads; `tl.static_range` writes it out when compiling;
# - **batch and any number of heads**: two more program numbers, and masks for heads and features;
# - **the cache as it lies in memory**: strides instead of contiguous copies. The `FactorCache` has room for more
#   positions than it holds, so its views are not contiguous, and copying them would read all that TPA saved;
# - **as many splits as run at a time**, two programs on a processor. With one more, all would wait for the last;
# - **the small work moved in**: each program assembles the query from its factors, and a second kernel merges, so that a
#   token costs two launches a layer and not one for each of a dozen PyTorch operations;
# - **half precision without spoiling the query**, which deserves a look.
#
# The matrix units of GPUs multiply bfloat16 numbers, which have 8 significant bits. The cached factors are stored like
# that. But the query is assembled here and now, and if *it* is rounded too, a score of 1,000 is off by a few units, and
# the softmax turns units into factors. The remedy: write the query as a sum of bfloat16 numbers, each of which holds
# what the previous ones left over.

# %%
exact_q = torch.randn(10_000, dtype=torch.float64)
rest, total = exact_q.float(), torch.zeros_like(exact_q)
for parts in (1, 2, 3):
    part = rest.bfloat16()
    rest, total = rest - part.float(), total + part.double()
    error = ((total - exact_q) / exact_q).abs().max().item()
    print(f"{parts} part{'s' * (parts > 1)}: relative error {error:.0e}")
    assert parts != 2 or 1000 * error < 0.02

# %% [markdown]
# Our kernel takes two parts, which leaves a score of 1,000 off by about a hundredth: less than what rounding the softmax
# weights to bfloat16 costs. The second part costs one more product per block, while the bytes that are read stay the
# same. Now the kernels against float64, with factors that are 30 times too large as well:

# %% claim="alg-2-kernel"
worst = {}
for dtype in (torch.float32, torch.bfloat16):
    for scale in (1, 30):
        shapes = [(2, T, R, w) for T, R in ((1, 6), (77, 2), (77, 3)) for w in (20, 24)]
        factors = [
            (scale * torch.randn(shape, device=device)).to(dtype) for shape in shapes
        ]
        exact = factor_attention(*(factor.double() for factor in factors), start=76)
        got = flash_decode.decode(*factors).double()
        worst[dtype, scale] = ((got - exact).norm() / exact.norm()).item()
        print(
            f"{str(dtype):15} factors × {scale:2}: "
            f"relative error {worst[dtype, scale]:.0e}"
        )
assert all(
    value <= (1e-5 if dtype == torch.float32 else 2e-2)
    for (dtype, _), value in worst.items()
)

# %% [markdown]
# Batch 2, 20 heads, 77 positions, ranks 6, 2 and 3: nothing there fits a tile. In bfloat16 the rounding of the result
# and that of the softmax weights, before they meet $b_v$, remain.
#
# ## 6 · Into the model
#
# One call gives the kernel to every TPA layer of a model. It serves single new tokens; prompts, several tokens at once
# and training keep to PyTorch.

# %%
model = T6(
    T6Config(vocab_size=60, n_layer=2, d_model=32, n_head=4, d_head=8, max_len=32)
).to(device)
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.2)


def last_logits(model):
    """A prompt into an empty cache, then six single tokens: the logits of the last."""
    cache = model.new_cache(1)
    with torch.no_grad():
        return [model(part, cache) for part in tokens.split([8, *[1] * 6], dim=1)][-1]


tokens = torch.randint(60, (1, 14), device=device)
before = last_logits(model)
flash_decode.use(model)
difference = (last_logits(model) - before).abs().max().item()
print(
    f"logits differ by {difference:.0e}, "
    f"and are as large as {before.abs().max().item():.0f}"
)
assert difference <= 1e-4 * before.abs().max()

# %% [markdown]
# Attention is 2 of the dozens of kernels that a layer still launches for a token, and while a GPU waits for the next
# launch it does nothing. `decode_graph.use(model)` goes one step further: rotation and appending become one kernel, the
# position is read from the device, and the whole step, 14 kernels a layer, is recorded once as a **CUDA graph** and
# launched as one. `model.generate` then replays it for every token.
#
# ## 7 · What was measured
#
# `python -m tpa_minimal bench decode` times all mechanisms in one run: attention alone, one new token, batch 1, random
# numbers in a full cache, 32 heads of width 64 in float32. So heads are equal, *not* weights. One mechanism is in memory at a time, and all come in turns, several times over. The package
# carries one such result, `tpa_minimal/experiments/results/bench_decode.json`, from the machine that the cell names; the
# same command gives yours. On a CPU our function is `cpu_decode.factor_attention`, which is tuned for it.

# %%
result = json.loads((bench.RESULTS / "bench_decode.json").read_text())
for key, value in result["environment"].items():
    print(f"{key:24} {value:.1f}" if isinstance(value, float) else f"{key:24} {value}")

# %% tags=["hide-input"]
fastest = {}  # of the ways to compute one mechanism
for row in sorted(result["rows"], key=lambda row: -row["median_ms"]):
    fastest[row["mechanism"], row["context"]] = row
contexts = sorted({context for _, context in fastest})
names = ["MHA", "MLA", "GQA-4", "MQA", "TPA (16, 1, 1)", "TPA (16, 2, 2)"]
styles = [looks.of(kind) for kind in ("mha", "mla", "gqa", "mqa")] + looks.TPA_LOOKS[:2]
speed = result["environment"]["copy_bandwidth_GB_per_s"] * 1e6  # bytes per millisecond
fig, ax = plt.subplots(figsize=(7, 4))
for name, style in zip(names, styles):
    ax.plot(
        contexts,
        [fastest[name, M]["median_ms"] for M in contexts],
        **style.line_style(),
        label=name,
    )
least = [fastest["TPA (16, 1, 1)", M]["bytes"] / speed for M in contexts]
ax.plot(contexts, least, "k:", lw=1, label="reading the rank-1 factors")
ax.set(yscale="log", xlabel="context, tokens", ylabel="milliseconds (median)")
ax.set_xscale("log", base=2)
ax.set_title("On this CPU TPA decodes several times faster than MHA with as many heads")
ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
looks.show(
    fig,
    alt="Milliseconds against context for six mechanisms; MHA is slowest, TPA of rank 1 far below it.",
)

# %% [markdown]
# How to read it. The lowest line is the time for reading the rank-1 factors at the bandwidth at which the machine copies;
# at long contexts rank 1 cannot lie below it. The distance between it and TPA's line is the arithmetic of section 1,
# together with passes over each block's scores. Let us see how close each mechanism comes to its own limit:

# %%
for name in names:
    row = fastest[name, contexts[-1]]
    size, share = row["bytes"] / 1e6, row["bytes"] / speed / row["median_ms"]
    print(
        f"{name:15} {size:8.1f} MB  {row['median_ms']:8.2f} ms  "
        f"{share:4.0%} of bandwidth"
    )

# %% [markdown]
# MHA does little arithmetic per byte, so reading is what it spends its time on. TPA stays further below the bandwidth,
# and is quick because there is so little to read: its time goes into arithmetic and into passes over M × h scores, not
# into bytes. So ratios move on a shared machine, where a busy neighbour slows arithmetic but hardly MHA's reading. MQA
# reads still less than TPA (128 numbers a token here, against 192 at rank 1), with the quality that notebook 01 quotes.
# MLA's 288 lie between TPA's two ranks, and its arithmetic per byte is the largest of all (notebook 09).
#
# What these numbers are not. They come from one CPU, and say nothing about a GPU. The kernels of this notebook were
# checked in the interpreter and compiled for several GPUs, and their speed has not been measured: the interpreter's time
# means nothing. On a machine with a CUDA device `python -m tpa_minimal bench decode --device cuda` measures them beside
# PyTorch, and `python -m tpa_minimal bench device --out DIR` checks and measures all that this course has for GPUs. The
# paper's own measurements of speed (its Sec. 6.2) are from GPUs, with ranks (16, 1, 1), $d_h = 64$ and contexts from $2^{12}$
# to $2^{19}$. From about $2^{14}$ cached tokens on they show TPA ahead of MHA, MQA and GQA, and level with MLA or ahead of it. The
# paper's quality results are for other ranks, (6, 2, 2).
#
# ## Exercises
#
# ### Exercise 10.1 · Merge any splits (★★☆, 10 minutes)
# Return the output (h, d_h) from $m$ and $s$ (splits, h) and $y$ (splits, h, d_h), with logits in powers of 2. A
# split may be **empty**: its $m$ is $-\infty$, its $s$ and $y$ are 0. At least one is not empty.
#
# <details><summary>Hint 1</summary>
#
# As in exercise 06.1, but for any number of splits, and with powers of 2.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `shrink = torch.exp2(m - m.amax(0))` is 0 for an empty split.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Add up the rescaled $y$ and the rescaled $s$ over the splits, and divide at the very end.
#
# </details>


# %% tags=["exercise"]
def merge(m, s, y):
    raise NotImplementedError


# %% tags=["solution"]
def merge(m, s, y):
    shrink = torch.exp2(m - m.amax(0))  # 0 for an empty split
    return (shrink[..., None] * y).sum(0) / (shrink * s).sum(0)[:, None]


# %%
checks.ex10_1(merge)

# %% [markdown]
# ### Exercise 10.2 · The limit (★☆☆, 10 minutes)
# The least time in milliseconds in which one layer can decode a token for a batch of sequences, each with M cached
# positions, if the cache (`size` bytes a number) is read at `gb_per_s` (10⁹ bytes per second) and nothing else takes time.
#
# <details><summary>Hint 1</summary>
#
# How many bytes have to be read, at least? Everything cached, once.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `batch` · `M` · $(R_K + R_V)(h + d_h)$ numbers of `size` bytes. Divide by bytes per second; a second is 1,000
# milliseconds.
#
# </details>


# %% tags=["exercise"]
def least_ms(
    batch: int,
    M: int,
    h: int,
    d_h: int,
    rank_k: int,
    rank_v: int,
    size: int,
    gb_per_s: float,
) -> float:
    raise NotImplementedError


# %% tags=["solution"]
def least_ms(
    batch: int,
    M: int,
    h: int,
    d_h: int,
    rank_k: int,
    rank_v: int,
    size: int,
    gb_per_s: float,
) -> float:
    return batch * M * (rank_k + rank_v) * (h + d_h) * size / (gb_per_s * 1e9) * 1000


# %%
checks.ex10_2(least_ms)

# %% [markdown]
# ### Exercise 10.3 · True or false? (★★☆, 10 minutes)
# Replace each `...` by True or False.
#
# - **a** With 64 sequences in the batch, splitting the cache over splits matters more than with one.
# - **b** Cutting the cache into more splits changes the result by no more than rounding.
# - **c** If the mask's logit for positions beyond the end were 0 instead of −∞, results would change even if all factors
#   there are loaded as 0.
# - **d** Doubling $R_Q$ doubles the time to decode against a long cache.
# - **e** A program under the flat part of the roofline gets faster if its cache is stored in half the bytes and the
#   arithmetic stays the same.
#
# <details><summary>Hint 1</summary>
#
# **a**: why is the cache split at all? **c**: what is $e^0$? **e**: which resource is the limit under the flat part?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# **b**: merging is an identity. **d**: the query is assembled once per token; what is read per cached position?
#
# </details>


# %% tags=["exercise"]
def judgement():
    raise NotImplementedError  # return {"a": ..., "b": ..., ..., "e": ...}


# %% tags=["solution"]
def judgement():
    return {"a": False, "b": True, "c": True, "d": False, "e": False}


# %%
checks.ex10_3(judgement)

# %% [markdown]
# ## Summary
# - One new token reads the whole cache; the roofline tells whether bytes or arithmetic set the time.
# - Flash decoding: each program attends to a split and leaves m, s and y; rescaling to the common maximum merges them
#   exactly.
# - In a kernel positions are rows, and the cache is read where it lies; masks give −∞ to what is not there.
# - The small query can afford a second part, so half-precision products need not cost large logits their accuracy.
# - A fair benchmark runs everything in turns, names the machine, and shows the limit.
#
# **Next:** [11 · Variants](11_variants.ipynb) changes what is factorized.
