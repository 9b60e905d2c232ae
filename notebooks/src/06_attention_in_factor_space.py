# %% [markdown]
# # 06 · Attention in factor space
# {badge}
#
# **You will be able to**
# - compute TPA's logits and outputs from the factors alone, with loops and with einsum (Algorithm 1);
# - derive the online softmax and walk a cache block by block with bounded memory (Algorithm 2);
# - count the multiply–adds of a decode step and set them beside MHA, GQA and MLA, as App. A.4 does;
# - say when factor space is *not* worth it.
#
# **You need** [05](05_factor_cache.ipynb).
#
# **Time** about 75 minutes to read and do; the code runs in at most 50 s on two CPU cores

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

from tpa_minimal.course import checks, looks
from tpa_minimal.tpa import assemble, causal_attention

looks.style()
torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook


def random_factors(B, T, M, h, d_h, ranks, dtype=torch.float64):
    """Factors a_q, b_q of T queries and a_k, b_k, a_v, b_v of M positions."""
    sizes = [(T, ranks[0]), (M, ranks[1]), (M, ranks[2])]
    return [torch.randn(B, n, R, width, dtype=dtype) for n, R in sizes for width in (h, d_h)]


# %% [markdown]
# ## 1 · What rebuilding costs
#
# The factor cache of notebook 05 is small. But if each decode step first assembles K and V of the whole past, it
# writes and reads tensors of MHA's size at *every* token. Storing little then buys memory and no time:

# %% tags=["nbval-check-output"]
M, h, d_h = 16_384, 34, 64  # the paper's small model, 16,384 cached tokens, float32
cached = M * (2 + 2) * (h + d_h) * 4
rebuilt = 2 * M * h * d_h * 4
print(f"read from the cache {cached / 1e6:.1f} MB; K and V, rebuilt at each step in each layer, {rebuilt / 1e6:.1f} MB")

# %% [markdown]
# The way out is to never build them. K is only an intermediate result: what is wanted is q·k, and q·k can be had from
# the factors.
#
# ## 2 · One sum, written as loops
#
# Put Eq. 3.1 for Q and for K into the logit of head i, query t, key s, and multiply out. Each of the two is a sum
# over ranks, so their product is a double sum:
#
# $$
# \begin{aligned}
# L_{i,t,s} &= \frac{1}{\sqrt{d_h}}\Bigl(\tfrac{1}{R_Q}\sum_r a^Q_{t,r,i}\,b^Q_{t,r}\Bigr)\cdot
#   \Bigl(\tfrac{1}{R_K}\sum_u a^K_{s,u,i}\,b^K_{s,u}\Bigr) \\
# &= \frac{1}{R_Q R_K \sqrt{d_h}} \sum_{r,u} a^Q_{t,r,i}\; a^K_{s,u,i}\; P_{t,s,r,u},
# \qquad P_{t,s,r,u} = \langle b^Q_{t,r}, b^K_{s,u}\rangle
# \end{aligned}
# $$
#
# In words: compare the feature factors once, in a small R_Q × R_K table P, and let each head weigh the table with its
# own head factors. **P has no head index.** For the logits, all heads share the only products that run over d_h; that is
# where the paper's saving comes from.
#
# The output is simpler still, since the weights α multiply V linearly: $O_{i,t} = \frac{1}{R_V}\sum_s \sum_u
# \alpha_{i,t,s}\, a^V_{s,u,i}\, b^V_{s,u}$.
#
# As loops, for one sequence and one query at the end of M tokens, counting each multiply–add:


# %%
def decode_with_loops(a_q, b_q, a_k, b_k, a_v, b_v):
    (R_Q, h), (M, R_K, d_h), R_V = a_q.shape, b_k.shape, b_v.shape[1]
    logits, out = torch.zeros(h, M).double(), torch.zeros(h, d_h).double()
    count = 0
    for s, r, u in product(range(M), range(R_Q), range(R_K)):
        p = sum(b_q[r, e] * b_k[s, u, e] for e in range(d_h))  # once for all heads
        count += d_h
        for i in range(h):
            logits[i, s] += a_q[r, i] * a_k[s, u, i] * p / (R_Q * R_K * d_h**0.5)
            count += 1
    alpha = logits.softmax(-1)
    for s, u, i, e in product(range(M), range(R_V), range(h), range(d_h)):
        out[i, e] += alpha[i, s] * a_v[s, u, i] * b_v[s, u, e] / R_V
        count += 1
    return out, count


# %% [markdown]
# (The count takes a_q·a_k·p as one multiply–add and α·a_v as free, as the paper does: these products do not involve
# d_h.) Does it give what assembling gives?

# %% claim="algorithm-1-loops" tags=["nbval-check-output"]
factors = random_factors(1, 1, 5, h=2, d_h=4, ranks=(3, 2, 2))
a_q, b_q, a_k, b_k, a_v, b_v = factors
assembled = causal_attention(assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v))
looped, count = decode_with_loops(a_q[0, 0], b_q[0, 0], *(factor[0] for factor in factors[2:]))
torch.testing.assert_close(looped, assembled[0, 0], rtol=0, atol=1e-12)
print(f"{count} multiply–adds for M = 5; the formula: {5 * (3 * 2 * 4 + 2 * 3 * 2 + 2 * 2 * 4)}")

# %% [markdown]
# The count is **M · (R_Q R_K d_h + h R_Q R_K + h R_V d_h)**: P, the heads' weighing of it, and the values.
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

many = random_factors(2, 7, 7, h=3, d_h=8, ranks=(4, 1, 3))  # a batch, seven queries, any ranks
expected = causal_attention(*(assemble(*many[i : i + 2]) for i in (0, 2, 4)))
mask = torch.ones(7, 7, dtype=torch.bool).tril()
torch.testing.assert_close(algorithm_1(*many, mask), expected, rtol=0, atol=1e-12)

# %% [markdown]
# This is Algorithm 1. It is exact, but it writes down P with T·M·R_Q·R_K entries and the logits with h·T·M. The rest
# of the notebook is about doing the same sums in a better order.
#
# ## 4 · The cost, counted
#
# App. A.4 works out three sizes of layer. Let us do the same sums. MHA and GQA need 2·h·d_h multiply–adds per cached
# token (sharing keys saves memory, not arithmetic). MLA in its absorbed form compares each head's query with the
# whole latent, h·(2·d_c + d_R).


# %%
def tpa_cost(h, d_h, R_Q, R_K, R_V):
    return R_Q * R_K * d_h + h * R_Q * R_K + h * R_V * d_h


RANKS = [(16, 1, 1), (16, 2, 2), (8, 1, 1), (8, 2, 2)]
LAYERS = {"I": (32, 64, 256, 32), "II": (32, 128, 512, 64), "III": (64, 128, 512, 64)}  # h, d_h, d_c, d_R

# %% claim="appendix-a4" tags=["nbval-check-output"]
PAPER = {  # MHA and GQA, MLA, then TPA with the four ranks above
    "I": [4096, 17408, 3584, 7168, 2816, 5632],
    "II": [8192, 34816, 6656, 13312, 5376, 10752],
    "III": [16384, 69632, 11264, 22528, 9728, 19456],
}
print("layer  MHA, GQA     MLA" + "".join(f"{str(ranks):>13s}" for ranks in RANKS))
for name, (h, d_h, d_c, d_R) in LAYERS.items():
    ours = [2 * h * d_h, h * (2 * d_c + d_R), *(tpa_cost(h, d_h, *ranks) for ranks in RANKS)]
    assert ours == PAPER[name]
    print(f"{name:5s} {ours[0]:9d} {ours[1]:7d}" + "".join(f"{cost:13d}" for cost in ours[2:]))

# %% [markdown]
# All eighteen numbers are the paper's. Read the columns: with R_K = R_V = 1 TPA needs less arithmetic than MHA; with
# 2 it needs *more*, in every layer. MLA needs most, although its cache is small. Cached bytes and arithmetic are two
# different budgets, and which one limits a decode step depends on the hardware.
#
# The package's accountant, which notebook 09 uses for real models, counts by the same formula. And here is the honest
# line for the paper's own small model:

# %% tags=["nbval-check-output"]
from tpa_minimal.memory import Layer

tpa = Layer("tpa", d_model=768, n_head=34, d_head=64, rank_q=6, rank_k=2, rank_v=2)
mha = Layer("mha", d_model=768, n_head=12, d_head=64)
assert tpa.decode_multiply_adds(1) == tpa_cost(34, 64, 6, 2, 2)
print(f"per cached token: TPA, 34 heads, {tpa.decode_multiply_adds(1)}; MHA, 12 heads, {mha.decode_multiply_adds(1)}")

# %% [markdown]
# 3.9 times fewer bytes, 3.6 times as much arithmetic, in the order of the paper's Algorithm 1. (MHA with 34 heads would
# need 4,352.)
#
# ### Another order: queries first
# Sums can be done in another order. In a decode step there are few queries, so one may assemble **q** (never K) and
# compare it with each b_k: the logit is $\frac{1}{R_K\sqrt{d_h}}\sum_u a^K_{s,u,i}\,\langle q_{t,i},
# b^K_{s,u}\rangle$. Now R_Q has vanished from the cost per cached token, but the products over d_h are per head
# again: R_K·h·d_h + h·R_K instead of R_Q·R_K·d_h + h·R_Q·R_K. Which is less depends on R_Q; that is exercise 06.2.
# What does a clock say?


# %%
def milliseconds(action, *arguments, **settings):
    action(*arguments, **settings)  # a first call, which is not counted
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        action(*arguments, **settings)
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[3]  # the median


def cached_factors(T, M, ranks=(6, 2, 2), h=34, d_h=64):
    """float32 factors with the memory order that FactorCache keeps: (B, R, M, ·) seen as (B, M, R, ·)."""
    factors = random_factors(1, T, M, h, d_h, ranks, dtype=torch.float32)
    return factors[:2] + [factor.transpose(1, 2).contiguous().transpose(1, 2) for factor in factors[2:]]


# %%
def queries_first(a_q, b_q, a_k, b_k):
    q = assemble(a_q, b_q)[0, 0] / (a_k.shape[2] * math.sqrt(b_k.shape[-1]))  # (h, d_h)
    p = b_k[0].transpose(0, 1) @ q.mT  # (R_K, M, h)
    return (p * a_k[0].transpose(0, 1)).sum(0)  # logits, (M, h)


def table_first(a_q, b_q, a_k, b_k):
    P = b_k[0].transpose(0, 1) @ b_q[0, 0].mT  # (R_K, M, R_Q), shared by all heads
    per_head = P @ a_q[0, 0]  # (R_K, M, h)
    return (per_head * a_k[0].transpose(0, 1)).sum(0) / (a_q.shape[2] * a_k.shape[2] * math.sqrt(b_k.shape[-1]))


# %%
small = cached_factors(1, 16_384)
torch.testing.assert_close(queries_first(*small[:4]), table_first(*small[:4]), rtol=1e-3, atol=1e-4)
print(f"multiply–adds per token: table first {6 * 2 * 64 + 34 * 6 * 2}, queries first {2 * 34 * 64 + 34 * 2}")
for order in (table_first, queries_first):
    print(f"{order.__name__:14s}{milliseconds(order, *small[:4]):6.1f} ms for the logits of 16,384 tokens")

# %% [markdown]
# The counts differ by a factor of 3.8. How much of that a clock shows depends on the machine and on who else uses it: on
# one thread of ours, otherwise idle, it was 2.8 against 3.7 ms, since both orders read the same factors and write tables
# of M × h numbers. The module assembles the queries although that counts more, with the values
# (R_K + R_V)·h·(d_h + 1) with α·a_v counted too, never less than MHA with the same heads needs: what it runs are large products, which
# processors do quickly, whatever R_Q is, and its gain is in bytes. At R_Q = 16, the rank of the paper's speed figures,
# the counts lie closer together (exercise 06.2). The kernel of notebook 10 makes the same choice.
#
# ## 5 · Softmax in pieces
#
# All logits of a decode step are h·M numbers, and the products α·a^V another R_V·h·M. To keep memory bounded we want
# to look at one block of positions at a time. But softmax needs all logits twice, once for the maximum and once for
# the sum. Does it?
#
# **Why a maximum at all.** exp overflows, and softmax does not change when the same number is subtracted from all
# logits:

# %%
logits = torch.tensor([90.0, 100.0])
print("exp:", logits.exp().tolist(), " shifted by the maximum:", (logits - logits.max()).exp().tolist())

# %% [markdown]
# **The derivation.** Let one block have been seen, with maximum m. Keep two sums (from here s is a sum, no longer a
# position), both relative to m:
#
# $$ s = \sum_k e^{l_k - m}, \qquad y = \sum_k e^{l_k - m}\, v_k. $$
#
# Their quotient y/s is the softmax average of what has been seen. A new block brings a larger maximum m′. Because
# $e^{l_k - m'} = e^{l_k - m}\cdot e^{m - m'}$ and the last factor is the same for every k, it can be pulled out of
# both sums: **multiply s and y by $e^{m-m'}$**, and they are what they would have been, had m′ been known from the
# start. Then add the new block's terms. Nothing else about the past is needed, and the logits can be thrown away.


# %%
def online(logits, values, block):
    m, s, y = torch.tensor(-math.inf).double(), 0.0, 0.0
    trace = []
    for l, v in zip(logits.split(block), values.split(block)):
        m_new = torch.maximum(m, l.max())
        shrink, weights = (m - m_new).exp(), (l - m_new).exp()
        s = s * shrink + weights.sum()
        y = y * shrink + weights @ v
        m = m_new
        trace.append((m.item(), (y / s).item()))
    return y / s, trace


logits, values = 3 * torch.randn(64).double(), torch.randn(64).double()
average, trace = online(logits, values, block=8)
torch.testing.assert_close(average, logits.softmax(0) @ values, rtol=0, atol=1e-12)

# %%
fig, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.4))
seen = [8 * (i + 1) for i in range(8)]
upper.step(seen, [m for m, _ in trace], "s--", where="post")
lower.plot(seen, [average for _, average in trace], "o-")
lower.axhline(logits.softmax(0) @ values, color="black", linestyle=":", label="softmax average of all 64")
upper.set(ylabel="running maximum m")
lower.set(xlabel="positions seen", ylabel="running average y / s", xticks=seen)
upper.set_title("The running average moves with each block; after the last it is exact")
lower.legend(frameon=False)
plt.show()

# %% [markdown]
# The average on the way is the right one *for what has been seen*; at the end it is the right one. The first block
# needs no special case: m starts at −∞, and e^(−∞) = 0 wipes out the empty sums.
#
# ## 6 · Both together: one block of the cache
#
# Now the step that Algorithm 2 repeats, for one sequence and one query, in the shapes that the module uses. A table
# has one row per position and one column per head. Two changes make it cheap on a CPU: exp2 is cheaper than exp, so
# log₂e is multiplied into the queries once (2^(x·log₂e) = e^x); and positions are rows because `b_k @ q` was about
# twice as fast as `q.mT @ b_k.mT` on the CPUs we measured.


# %%
def add_block(state, q, a_k, b_k, a_v, b_v):
    """state: m (h,), s (h,), y (h, d_h); q (d_h, h), with all scales in it; factors of n positions, (R, n, ·)."""
    m, s, y = state
    logits = ((b_k @ q) * a_k).sum(0)  # (R_K, n, h) -> (n, h)
    m_new = torch.maximum(m, logits.amax(0))
    weights, shrink = (logits - m_new).exp2(), (m - m_new).exp2()  # (n, h), (h,)
    s = s * shrink + weights.sum(0)
    y = y * shrink[:, None] + ((weights * a_v).mT @ b_v).sum(0)  # (R_V, h, n) @ (R_V, n, d_h)
    return m_new, s, y


a_q, b_q, *rest = random_factors(1, 1, 100, h=3, d_h=8, ranks=(4, 2, 3))
q = assemble(a_q, b_q)[0, 0].mT * math.log2(math.e) / (2 * math.sqrt(8))
state = torch.full((3,), -math.inf).double(), torch.zeros(3).double(), torch.zeros(3, 8).double()
for block in zip(*(factor[0].transpose(0, 1).split(32, dim=1) for factor in rest)):
    state = add_block(state, q, *block)
_, s, y = state
torch.testing.assert_close((y / s[:, None] / 3)[None, None], algorithm_1(a_q, b_q, *rest), rtol=0, atol=1e-12)

# %% [markdown]
# Three things are left for the real function.
#
# - **Several queries.** With T of them a table has T·h columns, and a block takes block_size / T positions, so that
#   its size stays the same.
# - **The mask.** Query t stands at position start + t and may not see positions ahead of it. Only blocks that reach
#   past `start` need it.
# - **Precision.** Sums over 100,000 positions are taken in float32 or wider, whatever the cache is stored in.

# %% tags=["tpa"]
# {{tpa: factor_attention}}

# %% [markdown]
# Find the steps of `add_block` in it: the product `p`, the logits as a sum over ranks r, the mask, `m_new`,
# `weights`, `shrink`, `s`, `y`. What remains is for speed: `table` and `scaled` are written over in each block (with
# one value rank they are the same memory), since asking the system for fresh memory every time costs more than the
# arithmetic, and a sum over many positions is cut into `pieces`, so that both cores work on it. Autograd needs every
# table, so with gradients on they are not reused.
# The repeat of q (`repeat_interleave`) pairs it with each of the R_K ranks.
#
# It must agree with the einsum, for any ranks, lengths and blocks:

# %% claim="algorithm-2"
for ranks, T, start, block_size in (((6, 2, 2), 1, 40, 16), ((1, 3, 1), 5, 12, 7), ((2, 1, 4), 9, 0, 1)):
    factors = random_factors(2, T, start + T, h=3, d_h=8, ranks=ranks)
    mask = torch.ones(T, start + T, dtype=torch.bool).tril(start)
    blockwise = factor_attention(*factors, start=start, block_size=block_size)
    torch.testing.assert_close(blockwise, algorithm_1(*factors, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        blockwise, causal_attention(*(assemble(*factors[i : i + 2]) for i in (0, 2, 4))), rtol=0, atol=1e-12
    )

# %% [markdown]
# ## 7 · Memory as a function of the block, measured
#
# How much temporary memory does a decode step take? PyTorch lets us watch every operation. This watcher notes the
# memory of each tensor that an operation newly creates, drops it when the tensor is freed, and remembers the highest
# total.


# %%
class PeakBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for storage in [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]:
            if storage._cdata not in given and storage._cdata not in self.held:  # neither a view nor in place
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.held.values()))
        return out


def peak_megabytes(action, *arguments, **settings):
    with PeakBytes() as watch:
        action(*arguments, **settings)
    return watch.peak / 1e6


# %%
def assemble_and_attend(*factors):
    return causal_attention(*(assemble(*factors[i : i + 2]) for i in (0, 2, 4)))


contexts, blocks = (2048, 8192), [64, 256, 512, 1024]
peaks = {}
for M in contexts:
    step = cached_factors(1, M)
    peaks[M] = [peak_megabytes(factor_attention, *step, start=M - 1, block_size=block) for block in blocks]
    whole = [peak_megabytes(action, *step) for action in (assemble_and_attend, algorithm_1)]
    print(f"M = {M:5,}: K and V {whole[0]:.0f} MB, Algorithm 1 {whole[1]:.0f} MB, blocks of 1,024 {peaks[M][3]:.2f} MB")
torch.testing.assert_close(peaks[2048], peaks[8192], rtol=0.1, atol=0)  # the context does not matter

# %%
fig, ax = plt.subplots()
for (M, values), line in zip(peaks.items(), ("o-", "s:")):
    ax.loglog(blocks, values, line, markersize=9 if M == 2048 else 5, label=f"measured, M = {M:,}")
formula = [4 * (2 + 2) * 34 * block / 1e6 for block in blocks]
ax.loglog(blocks, formula, "--", color="black", label="4 bytes · (R_K + R_V) · h · block")
ax.axhline(peak_megabytes(assemble_and_attend, *step), linestyle="-.", color="grey")
ax.text(70, 110, "K and V assembled, M = 8,192", va="top")
ax.set(xlabel="block_size (positions)", ylabel="peak temporary memory (MB)")
ax.set_title("Temporary memory follows the block, not the context")
ax.legend(frameon=False, loc="center left")
plt.show()
assert peaks[8192][3] < 2 * formula[3]

# %% [markdown]
# Both contexts lie on one line. It follows the dashed one, the two tables of R_K·h and R_V·h numbers per position of
# the block; at the small end, where it is higher, the queries and the outputs show, which do not depend on the block.
# Then why not tiny blocks? Each block costs a handful of calls, whatever its size:


# %%
def attend(step, start, **settings):
    return factor_attention(*step, start=start, **settings)


for block in (64, 512, 8192):
    print(f"block_size {block:5d}: {milliseconds(attend, step, 8191, block_size=block):7.1f} ms for one token")

# %% [markdown]
# So the default is a block of 16,384 positions: the calls are few, and the tables take 4 bytes · (2 + 2) · 34 ·
# 16,384, about 9 MB for the small model, at any longer context too. K and V of 16,384 positions take the 285 MB of
# section 1, and grow.
#
# ## 8 · When it is *not* worth it
#
# **Many queries.** With T queries against M keys factor space computes every one of its products T times, while
# assembling K and V costs the same for one query as for a thousand, and then the fused kernel needs only 2·h·d_h per
# pair. So the lines must cross:

# %%
M, queries = 1024, [1, 4, 16, 64, 256]
in_factor_space, assembled = [], []
for T in queries:
    step = cached_factors(T, M)
    in_factor_space.append(milliseconds(attend, step, M - T))
    assembled.append(milliseconds(assemble_and_attend, *step))
ahead = [T for T, ours, theirs in zip(queries, in_factor_space, assembled) if ours < theirs]
print("factor space was faster for T in", ahead)

# %%
fig, ax = plt.subplots()
for times, name, line in ((in_factor_space, "factor space", "o-"), (assembled, "assemble K and V", "s--")):
    ax.loglog(queries, times, line)
    ax.annotate(name, (queries[-1], times[-1]), xytext=(8, -4), textcoords="offset points")
ax.axvline(16, color="grey", linestyle=":")
ax.text(16, ax.get_ylim()[0] * 1.2, " the layer's limit, 16")
ax.set(xlabel="new tokens T in one call", ylabel="time (ms)", xlim=(0.8, 1500))
ax.set_xticks(queries, queries)
ax.minorticks_off()
ax.set_title("Factor space is for few new tokens")
plt.show()
assert in_factor_space[0] < assembled[0] and in_factor_space[-1] > assembled[-1]

# %% [markdown]
# For one token, factor space wins clearly; for 256 it loses. In this run the lines meet where the cell above says. On
# quiet machines we found the crossing between 16 and 24 new tokens at 1,024 cached ones and beyond 24 at 8,192, since
# what assembling costs grows with the past; on a busy one it came sooner. So notebook 05's layer prefills and trains with
# assembled K and V, and `max_factor_space_tokens` is 16: a round number in that range, not a law.
#
# **Higher ranks.** In Algorithm 1's order the condition for less arithmetic than MHA (Eq. A.4) is R_Q R_K d_h +
# h R_Q R_K + h R_V d_h < 2 h d_h. The last term alone reaches the right-hand side at R_V = 2. The paper's speed figures use ranks (16,
# 1, 1); its quality tables use (6, 2, 2), which does not meet it:

# %% claim="equation-a4" tags=["nbval-check-output"]
for h, d_h in ((34, 64), (32, 64), (64, 128)):
    relative = {ranks: tpa_cost(h, d_h, *ranks) / (2 * h * d_h) for ranks in ((16, 1, 1), (6, 1, 1), (6, 2, 2))}
    print(f"h {h}, d_h {d_h}, of MHA's: " + ", ".join(f"{cost:.2f} with {ranks}" for ranks, cost in relative.items()))

# %% [markdown]
# **Short contexts.** With a few hundred cached tokens attention is a small part of a step, and the other layers
# decide. **Compared with GQA or MQA** the saving is smaller, and may be none, since their caches can be smaller than
# TPA's (05 §7): count for the model that you have.
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
# Section 4 gave two ways to the logits: P first (Algorithm 1), or the queries assembled first. For which ranks R_Q is
# P first cheaper, in multiply–adds per cached token? Return `"P first"` or `"queries first"`; where both cost the same,
# P first is not cheaper. First convince yourself that R_K does not matter.
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
# What is the largest R_Q for which Algorithm 1 needs *fewer* multiply–adds than MHA with the same heads (Eq. A.4)?
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
    left = 2 * h * d_h - h * rank_v * d_h  # what the values leave: nothing from rank 2 on
    per_rank = rank_k * (d_h + h)
    return max(0, (left - 1) // per_rank)  # "fewer": the budget may not be reached exactly


# %%
checks.ex06_3(largest_rank_q)

# %% [markdown]
# ## Summary
# - Logits need ⟨b_q, b_k⟩ for each pair of ranks, once for all heads; each head weighs them with its head factors. K
#   and V are never built.
# - Online softmax: keep m, s and y; when the maximum grows, multiply s and y by e^(m − m′). With it, temporary memory
#   follows the block and not the context.
# - Multiply–adds per cached token in Algorithm 1's order: R_Q R_K d_h + h R_Q R_K + h R_V d_h (App. A.4); only R_V = 1
#   can need fewer than MHA. The module's order, queries first, never does: it saves bytes, not arithmetic.
# - For many new tokens, assemble K and V once and use the fused kernel.
#
# **Next:** [07 · T6](07_t6.ipynb) puts the layer into a language model.
