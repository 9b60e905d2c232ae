# %% [markdown]
# # 06 · Attention in factor space
# {badge}
#
# **You will be able to**
# - compute TPA's scores and outputs from the factors alone, with loops and with einsum (Algorithm 1);
# - derive the online softmax and walk a cache block by block with bounded memory (Algorithm 2);
# - count the multiply–adds of a decode step in each order, and set them beside MHA, GQA and MLA, as App. A.4 does;
# - say when factor space is *not* worth it.
#
# **You need** [05](05_factor_cache.ipynb).
#
# **Time** about 75 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import math
import time
import weakref
from itertools import product

import matplotlib.pyplot as plt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.tpa import (
    DECODE_TOKENS,
    T6Config,
    TensorProductAttention,
    assemble,
    causal_attention,
    unseen,
)

looks.style()
torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook


def random_factors(B, T, M, h, d_h, ranks, dtype=torch.float64):
    """Factors a_q, b_q of T queries and a_k, b_k, a_v, b_v of M positions."""
    sizes = [(T, ranks[0]), (M, ranks[1]), (M, ranks[2])]
    shapes = [(B, n, R, width) for n, R in sizes for width in (h, d_h)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


# %% [markdown]
# ## 1 · What rebuilding costs
#
# The factor cache of notebook 05 is small. But if each decode step first assembles $K$ and $V$ of the whole past, it
# writes and reads tensors of MHA's size at *every* token. Storing little then saves memory but no time:

# %% tags=["nbval-check-output"]
M, h, d_h = 16_384, 34, 64  # the paper's small model, 16,384 cached tokens, float32
rows = [
    ["factors, read from the cache", f"{M * (2 + 2) * (h + d_h) * 4 / 1e6:.1f} MB"],
    ["K and V, rebuilt from them", f"{2 * M * h * d_h * 4 / 1e6:.1f} MB"],
]
looks.table(["per step and layer", "bytes"], rows, "One decode step at M = 16,384")

# %% [markdown]
# The way out is to never build them. $K$ is only an intermediate result: what is wanted is $q \cdot k$, and that can be
# had from the factors.
#
# ## 2 · One sum, in six steps
#
# Here is one query of a small layer (4 heads of width 8, ranks 3, 2 and 2) that attends to six positions. The numbers are
# the layer's own factors. A tensor of rank $R$ is drawn as $R$ matrices, each row is a position, and what comes from the
# cache has a blue frame. $K$ and $V$ would be $6 \times 4 \times 8$; they appear nowhere.

# %%
config = T6Config.for_layer(32, n_head=4, d_head=8, rank_q=3, rank_k=2, rank_v=2)
small = TensorProductAttention(config).factors(torch.randn(1, 6, 32))  # of six tokens
one_query = [factor[0, -1] for factor in small[:2]]  # the last token's a_q and b_q
six_keys = [factor[0] for factor in small[2:]]  # everybody's a_k, b_k, a_v, b_v

# %% tags=["hide-input"]
looks.show(*diagrams.contraction([*one_query, *six_keys]))

# %% [markdown]
# Look at the left column first. **Step 1** compares feature factors: each of the query's three with each of a
# position's two. That table, $P$, *has no head index*: it is computed once, whatever the number of heads. **Steps 2 and
# 3** let each head weigh it, with its column of $a_q$ and then of $a_k$. The right column is what the module really
# runs; it comes to the same scores by another order (section 4). **Step 4** is the softmax, and **5 and 6** do with the
# values what was done with the keys: $a_v$ weighs for each head, $b_v$ brings the features. Step by step:

# %% tags=["hide-input"]
drawn = [diagrams.contraction([*one_query, *six_keys], n) for n in range(1, 7)]
alt = "The six steps of the picture above, one after the other"
looks.animate([fig for fig, _ in drawn], alt, 1500, 4000)

# %% [markdown]
# Now the algebra, which says the same. Put Eq. 3.1 for $Q$ and for $K$ into the score of head $i$, query $t$, key $j$,
# and multiply out. Each of the two is a sum over ranks, so their product is a double sum:
#
# $$
# \begin{aligned}
# L_{i,t,j} &= \frac{1}{\sqrt{d_h}}\Bigl(\tfrac{1}{R_Q}\sum_r a^Q_{t,r,i}\,b^Q_{t,r}\Bigr)\cdot
#   \Bigl(\tfrac{1}{R_K}\sum_u a^K_{j,u,i}\,b^K_{j,u}\Bigr) \\
# &= \frac{1}{R_Q R_K \sqrt{d_h}} \sum_{r,u} a^Q_{t,r,i}\; a^K_{j,u,i}\; P_{t,j,r,u},
# \qquad P_{t,j,r,u} = \langle b^Q_{t,r}, b^K_{j,u}\rangle
# \end{aligned}
# $$
#
# For the scores, all heads share the only products that run over $d_h$; that is where the paper's saving comes from.
# The output is simpler still, since the weights $\alpha$ multiply $V$ linearly:
#
# $$ O_{i,t} = \frac{1}{R_V}\sum_j \sum_u \alpha_{i,t,j}\, a^V_{j,u,i}\, b^V_{j,u}. $$
#
# As loops, for one sequence and one query at the end of $M$ tokens, counting each multiply–add:


# %%
def decode_with_loops(a_q, b_q, a_k, b_k, a_v, b_v):
    (R_Q, h), (M, R_K, d_h), R_V = a_q.shape, b_k.shape, b_v.shape[1]
    scores, out = torch.zeros(h, M).double(), torch.zeros(h, d_h).double()
    scale, count = R_Q * R_K * d_h**0.5, 0
    for j, r, u in product(range(M), range(R_Q), range(R_K)):
        p = sum(b_q[r, e] * b_k[j, u, e] for e in range(d_h))  # once for all heads
        count += d_h
        for i in range(h):
            scores[i, j] += a_q[r, i] * a_k[j, u, i] * p / scale
            count += 1
    alpha = scores.softmax(-1)
    for j, u, i, e in product(range(M), range(R_V), range(h), range(d_h)):
        out[i, e] += alpha[i, j] * a_v[j, u, i] * b_v[j, u, e] / R_V
        count += 1
    return out, count


# %% [markdown]
# (The count takes $a^Q a^K P$ as one multiply–add and $\alpha\,a^V$ as free, as the paper does: these products do not
# involve $d_h$.) Does it give what assembling gives?

# %% claim="algorithm-1-loops" tags=["nbval-check-output"]
factors = random_factors(1, 1, 5, h=2, d_h=4, ranks=(3, 2, 2))
a_q, b_q, a_k, b_k, a_v, b_v = factors
assembled = causal_attention(assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v))
past = [factor[0] for factor in factors[2:]]
looped, count = decode_with_loops(a_q[0, 0], b_q[0, 0], *past)
torch.testing.assert_close(looped, assembled[0, 0], rtol=0, atol=1e-12)
formula = 5 * (3 * 2 * 4 + 2 * 3 * 2 + 2 * 2 * 4)
print(f"{count} multiply–adds for M = 5; the formula: {formula}")

# %% [markdown]
# The count is $M\,(R_Q R_K d_h + h R_Q R_K + h R_V d_h)$: $P$, the heads' weighing of it, and the values.
#
# ## 3 · The same in three lines
#
# Every index of the formula is a letter of an einsum: b batch, q query, k key, r and u ranks, h head, d feature.


# %% claim="algorithm-1-einsum"
def algorithm_1(a_q, b_q, a_k, b_k, a_v, b_v, mask=None):
    scale = a_q.shape[2] * a_k.shape[2] * math.sqrt(b_k.shape[-1])
    P = torch.einsum("bqrd,bkud->bqkru", b_q, b_k)
    L = torch.einsum("bqrh,bkuh,bqkru->bhqk", a_q, a_k, P) / scale
    alpha = (L if mask is None else L.masked_fill(~mask, -math.inf)).softmax(-1)
    return torch.einsum("bhqk,bkuh,bkud->bqhd", alpha, a_v, b_v) / a_v.shape[2]


torch.testing.assert_close(algorithm_1(*factors), assembled, rtol=0, atol=1e-12)

many = random_factors(2, 7, 7, h=3, d_h=8, ranks=(4, 1, 3))  # a batch, seven queries
expected = causal_attention(*(assemble(*many[i : i + 2]) for i in (0, 2, 4)))
mask = torch.ones(7, 7, dtype=torch.bool).tril()
torch.testing.assert_close(algorithm_1(*many, mask), expected, rtol=0, atol=1e-12)

# %% [markdown]
# This is Algorithm 1. It is exact, but it writes down $P$ with $T M R_Q R_K$ entries and the scores with $h T M$. The
# rest of the notebook is about doing the same sums in a better order.
#
# ## 4 · The order decides the cost
#
# Sums can be done in any order. In a decode step there are few queries, so one may assemble **q** (never $K$) and
# compare it with each $b_k$: that is the right column of the picture,
#
# $$ L_{i,t,j} = \frac{1}{R_K\sqrt{d_h}}\sum_u a^K_{j,u,i}\,\langle q_{t,i}, b^K_{j,u}\rangle . $$
#
# $R_Q$ has vanished from the cost per cached token, but the products over $d_h$ are per head again. Here are all orders
# on one page, counted as above, for the paper's small model and for a layer of its speed figures:


# %%
def tpa_cost(h, d_h, R_Q, R_K, R_V):
    return R_Q * R_K * d_h + h * R_Q * R_K + h * R_V * d_h


def queries_first_cost(h, d_h, R_Q, R_K, R_V):
    return h * R_K * d_h + h * R_K + h * R_V * d_h


def assembled_cost(h, d_h, R_Q, R_K, R_V):
    return h * (R_K + R_V) * d_h + 2 * h * d_h


def mha_cost(h, d_h, *ranks):
    return 2 * h * d_h


# %%
SIZES = (34, 64, 6, 2, 2), (64, 128, 16, 1, 1)
ORDERS = {
    "P first (Algorithm 1)": ("R_Q R_K d_h + h R_Q R_K + h R_V d_h", tpa_cost, "–"),
    "queries first": ("h R_K d_h + h R_K + h R_V d_h", queries_first_cost, "decoding"),
    "K and V first": ("h (R_K + R_V) d_h + 2 h d_h", assembled_cost, "full passes"),
    "MHA, same heads": ("2 h d_h", mha_cost, "to compare"),
}
rows = []
for name, (formula, cost, used) in ORDERS.items():
    rows.append([name, formula, *(cost(*size) for size in SIZES), used])

# %% tags=["hide-input", "nbval-check-output"]
header = ["order", "multiply–adds", "34 × 64 (6, 2, 2)", "64 × 128 (16, 1, 1)", "for"]
looks.table(header, rows, "Per cached token and query; the module uses two of them")

# %% [markdown]
# Three things to read off.
#
# - **Algorithm 1 needs less arithmetic than MHA only at $R_V = 1$** and small $R_K$ (the condition is Eq. A.4; exercise
#   06.3). With the small model's ranks, (6, 2, 2), it needs more.
# - **The module's order counts more.** Its sum $(R_K + R_V)\,h\,d_h$ is never below MHA's. It is run all the same,
#   because its products are few and large, with every head in one of them, whatever $R_Q$ is; the kernel of notebook 10
#   makes the same choice. So its gain is in bytes, not in arithmetic.
# - **Assembling costs** $h(R_K + R_V)d_h$ once for a position and $2\,h\,d_h$ for each query, so with many queries the
#   first part is spread thin: the right order for training and for prompts.
#
# What does a clock say of the first two, for the scores alone?


# %%
def milliseconds(action, *arguments, **settings):
    action(*arguments, **settings)  # a first call, which is not counted
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        action(*arguments, **settings)
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[2]  # the median


def as_cached(factor):
    """The memory order that FactorCache keeps: (B, R, M, ·) seen as (B, M, R, ·)."""
    return factor.transpose(1, 2).contiguous().transpose(1, 2)


def cached_factors(T, M, ranks=(6, 2, 2), h=34, d_h=64):
    factors = random_factors(1, T, M, h, d_h, ranks, dtype=torch.float32)
    return factors[:2] + [as_cached(factor) for factor in factors[2:]]


# %%
def queries_first(a_q, b_q, a_k, b_k):
    q = assemble(a_q, b_q)[0, 0] / (a_k.shape[2] * math.sqrt(b_k.shape[-1]))  # (h, d_h)
    p = b_k[0].transpose(0, 1) @ q.mT  # (R_K, M, h)
    return (p * a_k[0].transpose(0, 1)).sum(0)  # scores, (M, h)


def features_first(a_q, b_q, a_k, b_k):
    scale = a_q.shape[2] * a_k.shape[2] * math.sqrt(b_k.shape[-1])
    P = b_k[0].transpose(0, 1) @ b_q[0, 0].mT  # (R_K, M, R_Q), shared by all heads
    per_head = P @ a_q[0, 0]  # (R_K, M, h)
    return (per_head * a_k[0].transpose(0, 1)).sum(0) / scale


# %%
step = cached_factors(1, 16_384)
scores = queries_first(*step[:4]), features_first(*step[:4])
torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)
counts = 2 * 34 * 64 + 34 * 2, 6 * 2 * 64 + 34 * 6 * 2
rows = []
for order, count in zip((queries_first, features_first), counts):
    measured = milliseconds(order, *step[:4])
    rows.append([order.__name__.replace("_", " "), count, f"{measured:.1f} ms"])

# %% tags=["hide-input"]
header = ["order", "multiply–adds", "time"]
looks.table(header, rows, "The scores of 16,384 cached tokens")

# %% [markdown]
# The counts differ far more than the times: both orders read the same factors and write tensors of $M \times h$ numbers.
# How the times compare depends on the machine and on who else uses it.
#
# ### The paper's eighteen numbers
# App. A.4 works out three sizes of layer. MHA and GQA need $2\,h\,d_h$ (sharing keys saves memory, not arithmetic). MLA in
# its absorbed form compares each head's query with the whole latent, $h\,(2 d_c + d_R)$.

# %% claim="appendix-a4"
RANKS = [(16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2)]
LAYERS = {"I": (32, 64, 256, 32), "II": (32, 128, 512, 64), "III": (64, 128, 512, 64)}
PAPER = {  # MHA and GQA, MLA, then TPA with the four ranks above
    "I": [4096, 17408, 3584, 7168, 2816, 5632],
    "II": [8192, 34816, 6656, 13312, 5376, 10752],
    "III": [16384, 69632, 11264, 22528, 9728, 19456],
}
rows = []
for name, (h, d_h, d_c, d_R) in LAYERS.items():
    tpa = [tpa_cost(h, d_h, *ranks) for ranks in RANKS]
    ours = [2 * h * d_h, h * (2 * d_c + d_R), *tpa]
    assert ours == PAPER[name]
    rows.append([f"{name}: {h} × {d_h}", *ours])

# %% tags=["hide-input", "nbval-check-output"]
header = ["layer", "MHA, GQA", "MLA", *(f"TPA {ranks}" for ranks in RANKS)]
looks.table(header, rows, "Multiply–adds per cached token, as App. A.4 has them")

# %% [markdown]
# All eighteen are the paper's. With $R_K = R_V = 1$ TPA needs less arithmetic than MHA; with 2 it needs *more*, in layers
# of this kind. MLA needs most, although its cache is small. Cached bytes and arithmetic are two different budgets, and
# which one limits a decode step depends on the hardware.
#
# The package's accountant, which notebook 09 uses for real models, counts by the same formula:

# %%
from tpa_minimal.memory import Layer

small_tpa = Layer("tpa", 768, n_head=34, d_head=64, rank_q=6, rank_k=2, rank_v=2)
layers = {
    "TPA, 34 heads": small_tpa,
    "MHA, 12 heads: as many weights": Layer("mha", 768, n_head=12, d_head=64),
    "MHA, 34 heads: as many heads": Layer("mha", 768, n_head=34, d_head=64),
}
assert small_tpa.decode_multiply_adds(1) == tpa_cost(34, 64, 6, 2, 2)
rows = []
for name, layer in layers.items():
    rows.append([name, layer.cached_numbers, layer.decode_multiply_adds(1)])

# %% tags=["hide-input", "nbval-check-output"]
header = ["layer", "numbers cached", "multiply–adds"]
looks.table(header, rows, "The paper's small model, per cached token; TPA: Algorithm 1")

# %% [markdown]
# ## 5 · Softmax in pieces
#
# All scores of a decode step are $h M$ numbers, and the products $\alpha\,a^V$ another $R_V h M$. To keep memory bounded
# we want to look at one block of positions at a time. But softmax needs all scores twice, once for the maximum and once
# for the sum. Does it?
#
# **Why a maximum at all.** exp overflows, and softmax does not change when the same number is subtracted from all
# scores:

# %%
scores = torch.tensor([90.0, 100.0])
print("exp:", scores.exp().tolist())
print("shifted by the maximum:", (scores - scores.max()).exp().tolist())

# %% [markdown]
# **The idea, seen.** Sixteen scores of one head arrive in blocks of four. All terms are kept relative to the largest score
# so far. When a block brings a larger one, every earlier term was measured against the wrong maximum, and *all of them
# shrink by the same factor*:

# %%
a_q, b_q, a_k, b_k, a_v, b_v = random_factors(1, 1, 16, h=34, d_h=64, ranks=(1, 1, 1))
all_heads = queries_first(a_q, b_q, a_k, b_k).T  # (h, 16)
maxima = all_heads.cummax(dim=1).values[:, 3::4]  # after each block
head = maxima.diff().clamp(max=1.0).sum(dim=1).argmax()  # one whose maximum grows often
scores, values = all_heads[head], assemble(a_v, b_v)[0, :, head, 0]  # one feature

# %% tags=["hide-input"]
looks.show(*diagrams.online_softmax(scores, values, 4, (1, 2, 3, 4)))

# %% tags=["hide-input"]
frames = [diagrams.online_softmax(scores, values, 4, (step,)) for step in (1, 2, 3, 4)]
alt = "The four panels above, one after the other: the earlier bars shrink together."
looks.animate([fig for fig, _ in frames], alt, 1500, 3000)

# %% [markdown]
# **The derivation.** Let one block have been seen, with maximum $m$. Keep two sums, both relative to $m$ (here $l_j$ is
# the score of key $j$ and $v_j$ its value):
#
# $$ s = \sum_j e^{l_j - m}, \qquad y = \sum_j e^{l_j - m}\, v_j. $$
#
# Their quotient $y/s$ is the softmax average of what has been seen. A new block brings a larger maximum $m'$. Because
# $e^{l_j - m'} = e^{l_j - m}\cdot e^{m - m'}$ and the last factor is the same for every $j$, it can be pulled out of
# both sums: **multiply $s$ and $y$ by $e^{m-m'}$**, and they are what they would have been, had $m'$ been known from the
# start. Then add the new block's terms. Nothing else about the past is needed, and its scores can be thrown away.


# %%
def online(scores, values, block):
    m, s, y = torch.tensor(-math.inf).double(), 0.0, 0.0
    for l, v in zip(scores.split(block), values.split(block)):
        m_new = torch.maximum(m, l.max())
        shrink, weights = (m - m_new).exp(), (l - m_new).exp()
        s = s * shrink + weights.sum()
        y = y * shrink + weights @ v
        m = m_new
    return y / s


exact = scores.softmax(0) @ values
for block in (1, 4, 5, 16):
    average = online(scores, values, block)
    torch.testing.assert_close(average, exact, rtol=0, atol=1e-12)
print(f"softmax at once {exact:+.3f}, in blocks {average:+.3f}")

# %% [markdown]
# After each block the average is exact for the keys seen so far, and so at the end for all of them. The first block
# needs no special case: $m$ starts at $-\infty$, and $e^{-\infty} = 0$ wipes out the empty sums.
#
# ## 6 · Both together: factor_attention
#
# Now nothing is left to invent. Take the right column of the picture for one block of positions, then the four lines of
# `online`, with a value for each head. For one query:


# %%
def add_block(state, q, a_k, b_k, a_v, b_v):
    """q (h, d_h), with all scales in it; factors of n positions (n, R, ·)."""
    m, s, y = state  # (h, 1), (h, 1), (h, d_h)
    p = torch.einsum("hd,nrd->hnr", q, b_k)
    scores = torch.einsum("hnr,nrh->hn", p, a_k)
    m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
    weights, shrink = (scores - m_new).exp(), (m - m_new).exp()
    s = s * shrink + weights.sum(-1, keepdim=True)
    y = y * shrink + torch.einsum("hn,nrh,nrd->hd", weights, a_v, b_v)
    return m_new, s, y


# %%
a_q, b_q, *rest = random_factors(1, 1, 100, h=3, d_h=8, ranks=(4, 2, 3))
q = assemble(a_q, b_q)[0, 0] / (2 * math.sqrt(8))  # 1/R_K and the softmax's scale
nothing = torch.zeros(3, 1).double()
state = nothing - math.inf, nothing, torch.zeros(3, 8).double()
for block in zip(*(factor[0].split(32) for factor in rest)):
    state = add_block(state, q, *block)
_, s, y = state
blockwise = (y / s / 3)[None, None]  # 1/R_V
expected = algorithm_1(a_q, b_q, *rest)
torch.testing.assert_close(blockwise, expected, rtol=0, atol=1e-12)

# %% [markdown]
# Three things are left for the real function.
#
# - **Several queries, in a batch.** Two more letters in each einsum, b and t; a block takes block_size / $T$ positions,
#   so that its size stays the same.
# - **The mask.** Query $t$ is at position start + $t$ and may not see positions ahead of it; `unseen` (notebook 05) says
#   which. A block may then be masked for a query as a whole, and $-\infty - (-\infty)$ is not a number: so $m$ starts at
#   the smallest finite number instead.
# - **Precision.** Sums over 100,000 positions are taken in float32 or wider, whatever the cache is stored in; and the
#   largest number of float16 is 65,504, which a score before its scaling can exceed.

# %% tags=["tpa"]
# {{tpa: factor_attention}}

# %% [markdown]
# That is the whole of it: the loop is `add_block`, line by line. It must agree with the einsum, for any ranks, lengths and
# blocks:

# %% claim="algorithm-2"
TRIALS = ((6, 2, 2), 1, 40, 16), ((1, 3, 1), 5, 12, 7), ((2, 1, 4), 9, 0, 1)
for ranks, T, start, block_size in TRIALS:
    factors = random_factors(2, T, start + T, h=3, d_h=8, ranks=ranks)
    mask = torch.ones(T, start + T, dtype=torch.bool).tril(start)
    blockwise = factor_attention(*factors, start=start, block_size=block_size)
    at_once = algorithm_1(*factors, mask)
    torch.testing.assert_close(blockwise, at_once, rtol=0, atol=1e-12)
    q, k, v = (assemble(*factors[i : i + 2]) for i in (0, 2, 4))
    fused = causal_attention(q, k, v)
    torch.testing.assert_close(blockwise, fused, rtol=0, atol=1e-12)

# %% [markdown]
# The function is written to be read, and differentiable. `cpu_decode.factor_attention` computes the same and is tuned for
# a CPU (scratch memory that is used again from block to block, powers of 2 in place of exp); `flash_decode` is a GPU kernel
# (notebook 10). `cpu_decode.use(model)` puts the one in the other's place.

# %%
from tpa_minimal import cpu_decode

same = cpu_decode.factor_attention(*factors, start=start)
torch.testing.assert_close(same, blockwise, rtol=0, atol=1e-12)

# %% [markdown]
# ## 7 · Memory as a function of the block, measured
#
# How much temporary memory does a decode step take? PyTorch lets us watch every operation. This watcher notes the
# memory of each tensor that an operation newly creates, drops it when the tensor is freed, and remembers the highest
# total.


# %%
def storages(tree):
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]


class PeakBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(out):
            key = storage._cdata
            if key not in given and key not in self.alive:  # no view, not in place
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak_megabytes(action, *arguments, **settings):
    with PeakBytes() as watch:
        action(*arguments, **settings)
    return watch.peak / 1e6


# %%
def assemble_and_attend(*factors):
    return causal_attention(*(assemble(*factors[i : i + 2]) for i in (0, 2, 4)))


contexts, blocks = (2048, 8192), [64, 256, 512, 1024]
tuned = cpu_decode.factor_attention
functions = {"factor_attention": factor_attention, "cpu_decode": tuned}
peaks, rows = {}, []
for M in contexts:
    step = cached_factors(1, M)
    for (name, function), block in product(functions.items(), blocks):
        settings = dict(start=M - 1, block_size=block)
        peaks[M, name, block] = peak_megabytes(function, *step, **settings)
    found = [peak_megabytes(f, *step) for f in (assemble_and_attend, algorithm_1)]
    found += [peaks[M, name, 1024] for name in functions]
    rows.append([f"{M:,}", *(f"{peak:.2f} MB" for peak in found)])

# %% tags=["hide-input"]
header = ["M", "K and V assembled", "Algorithm 1 at once", *functions]
looks.table(header, rows, "Highest temporary memory of a decode step; blocks of 1,024")

# %%
formula = {block: 4 * (2 + 2) * 34 * block / 1e6 for block in blocks}  # MB in float32
for name in functions:
    short, long = (peaks[M, name, 1024] for M in contexts)
    print(f"{name}: {long / formula[1024]:.1f} times (R_K + R_V) h numbers a position")
    assert short == long < 4 * formula[1024]  # the context does not matter

# %% tags=["hide-input"]
fig, ax = plt.subplots()
for (M, name), line in zip(product(contexts, functions), ("o-", "^-", "s:", "v:")):
    measured, size = [peaks[M, name, block] for block in blocks], 9 if M == 2048 else 5
    colour = looks.COLOURS[list(functions).index(name)]
    look = dict(markersize=size, color=colour, label=f"{name}, M = {M:,}")
    ax.loglog(blocks, measured, line, **look)
label = "4 bytes · $(R_K + R_V)\\,h$ · block"
ax.loglog(blocks, formula.values(), "--", color="black", label=label)
ax.set_xticks(blocks, blocks)
ax.minorticks_off()
ax.set(xlabel="block_size [positions]", ylabel="peak temporary memory [MB]")
ax.set_title("Temporary memory follows the block, not the context")
ax.legend(frameon=False, fontsize=9)
looks.show(fig, "Peak memory against block size: both contexts lie on one rising line.")

# %% [markdown]
# Both contexts lie on one line. The dashed one would be the two intermediate results that no order avoids, $R_K h$ and
# $R_V h$ numbers for each position of the block. `cpu_decode`, which writes them over each other, follows it;
# `factor_attention` keeps `p`, the scores, the weights and einsum's own copies at the same time. Then why not tiny blocks?
# Each block costs a handful of calls, whatever its size:


# %%
def attend(step, start, **settings):
    return factor_attention(*step, start=start, **settings)


rows = []
for block in (64, 512, 8192):
    measured = milliseconds(attend, step, 8191, block_size=block)
    memory = peak_megabytes(attend, step, 8191, block_size=block)
    rows.append([f"{block:,}", f"{measured:.1f} ms", f"{memory:.2f} MB"])

# %% tags=["hide-input"]
looks.table(["block_size", "time", "memory"], rows, "One decode step at M = 8,192")

# %% [markdown]
# So the default is a large block, twice that of the last row: the calls are few, and however long the context, it takes no
# more than twice that row's memory, where $K$ and $V$ of section 1 go on growing.
#
# ## 8 · When it is worth it, and when not
#
# **Against other caches.** That factor space beats rebuilding $K$ and $V$ is no surprise. The fair question is how it
# compares with a model that caches its keys and values as they are. One decode step of one layer, with the head counts of
# the paper's small models (about equal weights), and MHA with TPA's 34 heads; attention alone, without projections:

# %%
from tpa_minimal.baselines import grouped_attention


def cached_kv(h, G, M, d_h=64):
    q, k, v = (torch.randn(1, heads, n, d_h) for heads, n in ((h, 1), (G, M), (G, M)))
    return [x.transpose(1, 2) for x in (q, k, v)]  # (B, ·, heads, d_h)


contexts = [1024, 4096, 16384]
times, cached_bytes = {}, {}
for M in contexts:
    step, start = cached_factors(1, M), dict(start=M - 1)
    runs = {
        "TPA, factor_attention": (factor_attention, step, start),
        "TPA, cpu_decode": (cpu_decode.factor_attention, step, start),
        "TPA, K and V rebuilt": (assemble_and_attend, step, {}),
        "MHA, 34 heads": (grouped_attention, cached_kv(34, 34, M), {}),
        "MHA, 12 heads": (grouped_attention, cached_kv(12, 12, M), {}),
        "MQA, 23 heads": (grouped_attention, cached_kv(23, 1, M), {}),
    }
    for name, (action, tensors, settings) in runs.items():
        times.setdefault(name, []).append(milliseconds(action, *tensors, **settings))
        past = tensors[2 if "TPA" in name else 1 :]
        cached_bytes[name] = sum(tensor.numel() * 4 for tensor in past) / 1e6

# %%
rows = []
for name, measured in times.items():
    rows.append([name, f"{cached_bytes[name]:.1f} MB", *(f"{t:.1f}" for t in measured)])
header = ["one layer", "cache at 16,384", *(f"ms at M = {M:,}" for M in contexts)]
looks.table(header, rows, "One decode step in float32 on this CPU")
last = {name: measured[-1] for name, measured in times.items()}
assert last["TPA, factor_attention"] < last["TPA, K and V rebuilt"]
assert last["MQA, 23 heads"] < last["TPA, factor_attention"]

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.6, 4))
kinds = ["tpa", "tpa", "tpa", "mha", "mha", "mqa"]
for n, ((name, measured), kind) in enumerate(zip(times.items(), kinds)):
    look = {**looks.of(kind).line_style(), "alpha": 1 if n in (0, 3, 5) else 0.75}
    if n in (1, 2):
        look.update(looks.TPA_LOOKS[n].line_style())
    if n == 4:
        look.update(marker="o", markerfacecolor="white", linestyle="--")
    ax.loglog(contexts, measured, label=name, **look)
ax.set_xticks(contexts, [f"{M:,}" for M in contexts])
ax.minorticks_off()
ax.set(xlabel="M, tokens to attend to", ylabel="one step [ms]")
ax.set_title("Factor space beats rebuilding; against cached K and V it depends")
ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
looks.show(fig, "Time of a decode step against M for TPA in three ways, MHA and MQA.")

# %% [markdown]
# The table is of the machine that built this notebook, while others used it; take the order, not the digits. Rebuilding is
# slowest by far. MHA with 12 heads, the one of equal weights, is ahead of both TPA functions here, although its cache is 3.9
# times as large. The function that you just built reads 11.1 times fewer bytes than MHA with as many heads, but pays for
# being readable: it writes its intermediate results to memory. `cpu_decode` does the same sums with less of that. And MQA,
# which caches least of all, is ahead of what you built: **TPA's promise is quality at a small cache, not the fastest step**
# (notebooks 08 and 10 look at both halves of that sentence).

# %% tags=["nbval-check-output"]
for heads in (34, 12):
    ratio = 2 * heads * 64 / (4 * (34 + 64))
    print(f"MHA with {heads} heads caches {ratio:.1f} times what TPA caches")

# %% [markdown]
# **Many queries.** With $T$ queries against $M$ keys factor space computes every one of its products $T$ times, while
# assembling $K$ and $V$ costs the same for one query as for a thousand, and then the fused kernel needs only $2\,h\,d_h$
# per pair. So the lines must cross:

# %%
M, queries = 1024, [1, 4, 16, 64, 256]
ways = {"assemble K and V": [], **{name: [] for name in functions}}
for T in queries:
    step = cached_factors(T, M)
    ways["assemble K and V"].append(milliseconds(assemble_and_attend, *step))
    for name, function in functions.items():
        ways[name].append(milliseconds(function, *step, start=M - T))
rows = [[name, *(f"{t:.1f} ms" for t in measured)] for name, measured in ways.items()]

# %% tags=["hide-input"]
looks.table(["", *(f"T = {T}" for T in queries)], rows, f"T new tokens, M = {M:,}")

# %%
print("the layer's limit is", DECODE_TOKENS)
for name in functions:
    assert ways[name][0] < ways["assemble K and V"][0]
assert ways["factor_attention"][-1] > ways["assemble K and V"][-1]

# %% tags=["hide-input"]
fig, ax = plt.subplots()
for (name, measured), line in zip(ways.items(), ("s--", "o-", "^-.")):
    ax.loglog(queries, measured, line, label=name)
ax.axvline(DECODE_TOKENS, color="grey", linestyle=":")
ax.text(DECODE_TOKENS, ax.get_ylim()[0] * 1.2, " the layer's limit")
ax.set(xlabel="T, new tokens in one call", ylabel="time [ms]")
ax.set_xticks(queries, queries)
ax.minorticks_off()
ax.set_title("Factor space is for few new tokens")
ax.legend(frameon=False)
looks.show(fig, "Time against new tokens: factor space starts lower and crosses.")

# %% [markdown]
# For one token, factor space wins clearly; for many the function that you built loses. Where the lines meet depends on the
# function (the tuned one stays ahead longer), on the context (what assembling costs grows with the past) and on the
# machine. So notebook 05's layer prefills and trains with assembled $K$ and $V$, and `DECODE_TOKENS` is a round number,
# not a law.
#
# **Higher ranks.** In Algorithm 1's order the condition for less arithmetic than MHA is (Eq. A.4)
#
# $$ R_Q R_K d_h + h R_Q R_K + h R_V d_h < 2\,h\,d_h . $$
#
# The last term alone reaches the right-hand side at $R_V = 2$. The paper's speed figures use ranks (16, 1, 1); its
# quality tables use (6, 2, 2), which does not meet it:

# %% claim="equation-a4" tags=["nbval-check-output"]
ranks, rows = ((16, 1, 1), (6, 1, 1), (6, 2, 2)), []
for h, d_h in ((34, 64), (32, 64), (64, 128)):
    relative = [tpa_cost(h, d_h, *triple) / mha_cost(h, d_h) for triple in ranks]
    rows.append([f"h = {h}, d_h = {d_h}", *(f"{cost:.2f}" for cost in relative)])
header = ["heads", *(f"ranks {triple}" for triple in ranks)]
looks.table(header, rows, "Multiply–adds of Algorithm 1, as a share of MHA's")

# %% [markdown]
# **Short contexts.** With a few hundred cached tokens attention is a small part of a step, and the other layers
# decide. **Compared with GQA or MQA** the saving is smaller, and may be none, since their caches can be smaller than
# TPA's (notebook 05, section 7): count for the model that you have.
#
# Where it *is* worth it is where it is used: a long cache, one or a few new tokens, and memory traffic as the limit.
#
# ## Exercises
#
# ### Exercise 06.1 · Two halves of a cache (★★☆, 15 minutes)
# Fast GPU kernels cut the cache in two, let two groups of cores work at the same time, and merge. Each part arrives
# as (m, s, y), with m and s of shape (h,), y of shape (h, d_h), and natural exponentials as in section 5. Write
# `merge`, which returns (m, s, y) of both parts together. A part that has seen nothing is (−∞, 0, 0); of the two, at
# most one is such. Leave both parts as they came.
#
# <details><summary>Hint 1</summary>
#
# The sums of the two parts are relative to different maxima. What is the common one?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A sum relative to $m_1$ becomes one relative to $m \ge m_1$ when it is multiplied by $e^{m_1 - m}$, which is at most
# 1.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The same two factors for $s$ and for $y$; for $y$ with an axis for the features, `shrink[:, None]`. Make new
# tensors: `*=` would change what came in.
#
# </details>


# %% tags=["exercise"]
def merge(part_1: tuple, part_2: tuple) -> tuple:
    raise NotImplementedError


# %% tags=["solution"]
def merge(part_1: tuple, part_2: tuple) -> tuple:
    (m_1, s_1, y_1), (m_2, s_2, y_2) = part_1, part_2
    m = torch.maximum(m_1, m_2)
    shrink_1, shrink_2 = (m_1 - m).exp(), (m_2 - m).exp()  # here either side may shrink
    s = s_1 * shrink_1 + s_2 * shrink_2
    y = y_1 * shrink_1[:, None] + y_2 * shrink_2[:, None]
    return m, s, y


# %%
checks.ex06_1(merge)

# %% [markdown]
# ### Exercise 06.2 · Which order needs less arithmetic? (★★☆, 10 minutes)
# Section 4 gave two ways to the logits: P first (Algorithm 1), or the queries assembled first. For which ranks $R_Q$ is
# P first cheaper, in multiply–adds per cached token? Return `"P first"` or `"queries first"`; where both cost the same,
# P first is not cheaper. First convince yourself that $R_K$ does not matter.
#
# <details><summary>Hint 1</summary>
#
# Count both orders for one cached token, with all ranks. Which common factor can be dropped?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# P first: $R_Q R_K$ products over $d_h$ features, then $h R_Q R_K$ to weigh them. Queries first: $h R_K$ products
# over $d_h$ features, then $h R_K$.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Divide both by $R_K$: compare $R_Q(d_h + h)$ with $h(d_h + 1)$.
#
# </details>


# %% tags=["exercise"]
def cheaper_order(h: int, d_h: int, rank_q: int) -> str:
    raise NotImplementedError


# %% tags=["solution"]
def cheaper_order(h: int, d_h: int, rank_q: int) -> str:
    # both counts are R_K times something: R_Q d_h + h R_Q against h d_h + h
    return "P first" if rank_q * (d_h + h) < h * (d_h + 1) else "queries first"


# %%
checks.ex06_2(cheaper_order)

# %% [markdown]
# ### Exercise 06.3 · The most that arithmetic allows (★★☆, 10 minutes)
# What is the largest $R_Q$ for which Algorithm 1 needs *fewer* multiply–adds than MHA with the same heads (Eq. A.4)?
# Return 0 if there is none. Then look at what your function says for `rank_v = 2`, and explain it in one sentence.
#
# <details><summary>Hint 1</summary>
#
# MHA needs $2 h d_h$ multiply–adds per cached token. What does Eq. A.4 count for TPA?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $R_Q R_K (d_h + h) + h R_V d_h$. The values are spent whatever $R_Q$ is; what do they leave?
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The largest whole $R_Q$ with $R_Q \cdot \text{price} < \text{left}$ is `(left - 1) // price`, and never below 0.
#
# </details>


# %% tags=["exercise"]
def largest_rank_q(h: int, d_h: int, rank_k: int, rank_v: int) -> int:
    raise NotImplementedError


# %% tags=["solution"]
def largest_rank_q(h: int, d_h: int, rank_k: int, rank_v: int) -> int:
    left = (
        2 * h * d_h - h * rank_v * d_h
    )  # what the values leave: nothing from rank 2 on
    per_rank = rank_k * (d_h + h)
    return max(
        0, (left - 1) // per_rank
    )  # "fewer": the budget may not be reached exactly


# %%
checks.ex06_3(largest_rank_q)

# %% [markdown]
# ## Summary
# - Scores need $\langle b_q, b_k \rangle$ for each pair of ranks, once for all heads; each head weighs them with its head
#   factors. $K$ and $V$ are never built.
# - Online softmax: keep $m$, $s$ and $y$; when the maximum grows, multiply $s$ and $y$ by $e^{m - m'}$. With it, temporary
#   memory follows the block and not the context.
# - Multiply–adds per cached token in Algorithm 1's order: $R_Q R_K d_h + h R_Q R_K + h R_V d_h$ (App. A.4); only
#   $R_V = 1$ can need fewer than MHA. The module's order, queries first, never does: it saves bytes, not arithmetic.
# - For many new tokens, assemble $K$ and $V$ once and use the fused kernel. MQA caches less and is faster.
#
# **Next:** [07 · T6](07_t6.ipynb) puts the layer into a language model. The lines that you built are in
# [tpa.py](../tpa_minimal/tpa.py), the solved notebook is [here](solutions/06_attention_in_factor_space.ipynb).
