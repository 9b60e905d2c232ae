# %% [markdown]
# # 01 · Attention and the KV cache
#
# {badge}
#
# **You will be able to**
#
# - write multi-head attention in a few lines, and generate text with and without a cache;
# - say why a causal model may keep old keys and values, and a bidirectional one may not;
# - compute the cache's size for any model, and tell when it outgrows the memory;
# - explain what MQA, GQA and MLA do about it, and what each gives up.
#
# **You need** PyTorch, and to have met attention once. Nothing from the paper on Tensor Product Attention (TPA) yet.
#
# **Time** about 85 minutes to read and do; the code runs in at most 40 s on two CPU cores
#
# TPA is an answer to a question. This notebook is about the question: *why does a language model that writes long texts
# run out of memory, and what have people done about it?*

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import math
import time

import matplotlib.pyplot as plt
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch import nn

from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.memory import Layer

looks.style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1 · Attention in a handful of lines
#
# We follow one sequence of $T$ tokens (no batch axis, until a later notebook needs one). Each token is a vector of
# width $d_\text{model}$. Three linear maps turn it into a **query**, a **key** and a **value**, and each of these is cut
# into $h$ pieces of width $d_h$, one per head (`n_head` and `d_head` in the code; all letters of the course are on the
# card of notebook 00):

# %%
T, d_model, n_head, d_head = 6, 64, 4, 16
x = torch.randn(T, d_model)
W_q, W_k, W_v = torch.randn(3, d_model, n_head * d_head) / math.sqrt(d_model)
q, k, v = (
    (x @ W).unflatten(-1, (n_head, d_head)) for W in (W_q, W_k, W_v)
)  # each (T, h, d_h)
print(q.shape, k.shape, v.shape)

# %% [markdown]
# A query asks, a key answers how relevant its token is, and the value is what gets handed over. For head $i$, the
# **logit** of the query at position $t$ against the key at position $s$ is their inner product divided by $\sqrt{d_h}$,
# so that it does not grow with the width. A softmax over the allowed $s$ turns the logits of one query into weights that
# sum to one:
#
# $$\alpha_{i,t,s} = \operatorname{softmax}_{s \le t} \frac{q_{t,i} \cdot k_{s,i}}{\sqrt{d_h}}, \qquad
# o_{t,i} = \sum_{s \le t} \alpha_{i,t,s}\, v_{s,i}.$$
#
# In words: each head of token $t$ receives a weighted mean of the values of the tokens up to $t$. The condition
# $s \le t$ is the **causal mask**: a model that is trained to predict the next token must not see it. The whole rest of
# this course hangs on that condition.


# %%
def attend(q, k, v):
    """Causal softmax attention: q (T, h, d_h); k, v (M, h, d_h) -> (T, h, d_h).

    M = T, or T = 1: one query alone may see every key.
    """
    logits = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])  # (h, T, M)
    if len(q) > 1:
        ahead = torch.ones(len(q), len(k), dtype=torch.bool).triu(
            1
        )  # keys that lie in the query's future
        logits = logits.masked_fill(ahead, -math.inf)
    return torch.einsum("hts,shd->thd", logits.softmax(-1), v)


# %% [markdown]
# Does it agree with PyTorch's own attention (which wants the heads in front)?

# %%
heads_first = [y.double().transpose(0, 1) for y in (q, k, v)]
theirs = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(0, 1)
torch.testing.assert_close(
    attend(q.double(), k.double(), v.double()), theirs, rtol=0, atol=1e-12
)

# %% [markdown]
# It does, to rounding. Around it go the projections, and an output projection that mixes the heads. That is the whole
# **multi-head attention** (MHA) layer. We leave positions out; they get a notebook of their own (03).


# %%
class MHA(nn.Module):
    def __init__(self, d_model, n_head, d_head):
        super().__init__()
        self.n_head = n_head
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(d_model, n_head * d_head, bias=False) for _ in range(3)
        )
        self.out_proj = nn.Linear(n_head * d_head, d_model, bias=False)

    def forward(self, x, cache=None):  # x: (T, d_model)
        q, k, v = (
            f(x).unflatten(-1, (self.n_head, -1))
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:  # explained in section 3
            k, v = cache.append(k, v)
        return self.out_proj(attend(q, k, v).flatten(1))  # (T, d_model)


# %% [markdown]
# Our test object is a language model with nothing but attention in it: an embedding, a few MHA layers, an output
# projection. (`rms_norm` scales each vector to mean square 1.) Its weights are random, so what it writes is nonsense. That
# does not matter here: time and memory depend on shapes, not on what the weights have learned.


# %%
class TinyLM(nn.Module):
    def __init__(self, vocab_size=256, n_layer=3, d_model=256, n_head=8, d_head=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            MHA(d_model, n_head, d_head) for _ in range(n_layer)
        )
        self.out = nn.Linear(d_model, vocab_size, bias=False)

    def forward(
        self, tokens, caches=None
    ):  # (T,) -> (T, vocab_size), scores of each next token
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = x + layer(
                F.rms_norm(x, x.shape[-1:]), None if caches is None else caches[i]
            )
        return self.out(F.rms_norm(x, x.shape[-1:]))


model = TinyLM().eval().requires_grad_(False)
prompt = torch.tensor([7, 42, 3, 99])
print(model(prompt).shape)

# %% [markdown]
# ## 2 · Naive generation, and what it repeats
#
# Generating is a loop: run the model on all tokens so far, take the most likely next token, append it. The honest first
# version:


# %%
def generate_naive(model, tokens, n_new):
    seconds = []
    for _ in range(n_new):
        begin = time.perf_counter()
        new = model(tokens)[
            -1
        ].argmax()  # all tokens go in, one row of the result is used
        tokens = torch.cat((tokens, new[None]))
        seconds.append(time.perf_counter() - begin)
    return tokens, seconds


slow_tokens, slow_seconds = generate_naive(model, prompt, 316)
print(f"{sum(slow_seconds):.2f} s for {len(slow_seconds)} tokens")
print("the first ones:", slow_tokens[:10].tolist())

# %% [markdown]
# Look at what the loop does. When the text has 300 tokens it computes the keys and values of all 300, 299 of which it
# had computed at the step before. Over the whole run, each layer computes this many keys:

# %% tags=["nbval-check-output"]
lengths = range(len(prompt), 320)
print("computed:", sum(lengths), " different tokens:", max(lengths))

# %% [markdown]
# A quadratic number of computations for a linear number of tokens. But is the repeated work really a *repetition*: are
# the old keys the same after a token has been added? In the first layer, surely: a key is a linear map of its own
# token. In the second layer it is not obvious, because there the input has already been mixed with other tokens. Let us
# look at the input of each layer, before and after appending one token, with the causal mask and without it.


# %%
def layer_inputs(model, tokens, causal):
    """What each attention layer gets to see: a list of (T, d_model)."""
    x, inputs = model.embedding(tokens), []
    for layer in model.layers:
        inputs.append(F.rms_norm(x, x.shape[-1:]))
        q, k, v = (
            f(inputs[-1]).unflatten(-1, (layer.n_head, -1))
            for f in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            *(y.transpose(0, 1) for y in (q, k, v)), is_causal=causal
        )
        x = x + layer.out_proj(mixed.transpose(0, 1).flatten(1))
    return inputs


# %%
longer = torch.cat((prompt, torch.tensor([5])))
for causal in (True, False):
    before, after = (
        layer_inputs(model, prompt, causal),
        layer_inputs(model, longer, causal),
    )
    change = [
        f"{(b - a[: len(prompt)]).abs().max():.5f}" for b, a in zip(before, after)
    ]
    print(f"{'causal' if causal else 'no mask':8} change in layers 1 to 3:", *change)

# %% [markdown]
# With the causal mask, nothing that belongs to an old token changes, in any layer (up to rounding): token $t$ has never
# depended on what follows it. Without the mask, every layer but the first changes. So:
#
# > **A causal model may keep the keys and values of past tokens for ever. A bidirectional one may not.**
#
# And the queries? The query of token $t$ is used once, to compute row $t$. Nobody asks for it again, so there is
# nothing to keep. This is why it is a *KV* cache.

# %% [markdown]
# ## 3 · The same tokens with a cache
#
# Per layer we keep two tensors, which grow by one row per token. (Growing by concatenation copies everything each time;
# notebook 05 does better.)


# %%
class KVCache:
    """The keys and values of all tokens that one layer has seen."""

    def __init__(self):
        self.k = self.v = None

    def append(self, k, v):
        """Add the rows of new tokens; return all rows, old and new, (M, h, d_h)."""
        self.k = k if self.k is None else torch.cat((self.k, k))
        self.v = v if self.v is None else torch.cat((self.v, v))
        return self.k, self.v

    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.k, self.v))


# %% [markdown]
# First the whole prompt goes through the model once and fills the caches: this is **prefill**. Then each step hands in
# *one* token, whose query meets all cached keys: this is **decode**.


# %%
def generate_cached(model, tokens, n_new):
    caches = [KVCache() for _ in model.layers]
    new, seconds = tokens, []
    for _ in range(n_new):
        begin = time.perf_counter()
        new = model(new, caches)[-1].argmax()[
            None
        ]  # prompt first, then one token at a time
        tokens = torch.cat((tokens, new))
        seconds.append(time.perf_counter() - begin)
    return tokens, seconds, caches


fast_tokens, fast_seconds, caches = generate_cached(model, prompt, 316)
ratio = sum(slow_seconds) / sum(fast_seconds)
print(f"{sum(fast_seconds):.2f} s, {ratio:.0f} times faster than without a cache")

# %% [markdown]
# The same text? The cached model gets its numbers from products of other shapes, which round differently, so we compare
# the scores as well, in float64 and against the full pass:

# %%
torch.testing.assert_close(fast_tokens[:32], slow_tokens[:32])
exact, caches64 = TinyLM().double().requires_grad_(False), [KVCache() for _ in range(3)]
step_by_step = torch.cat(
    [exact(token[None], caches64) for token in fast_tokens[:40]]
)  # (40, vocab_size)
torch.testing.assert_close(step_by_step, exact(fast_tokens[:40]), rtol=0, atol=1e-12)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
for seconds, line, name in (
    (slow_seconds, "-", "recompute everything"),
    (fast_seconds, "--", "with a KV cache"),
):
    smooth = (
        torch.tensor(seconds[4:]).mul(1000).unfold(0, 25, 1).median(-1).values
    )  # a running median of 25 steps
    place = torch.arange(len(smooth)) + len(prompt) + 16
    ax.plot(place, smooth, line, label=name)
ax.set(xlabel="tokens so far", ylabel="time for one more token (ms)", ylim=(0, None))
ax.set_title("Without a cache, the cost of a new token climbs with the length")
ax.legend(frameon=False)
looks.show(
    fig,
    alt="Milliseconds for one more token against the tokens so far. The solid curve, "
    "which recomputes everything, climbs; the dashed one, with a cache, stays "
    "nearly flat.",
)

# %% [markdown]
# Without a cache the time per token climbs with the length, because the whole text goes through every matrix again.
# With a cache it stays nearly flat: one token goes through the matrices, and only `attend` still grows, since one query
# meets all keys. At these lengths that part is too small to see; at the lengths of section 4 it decides.
# (Single steps are timed here, and other programs run on the same machine: the curves are running medians of 25 steps,
# and what is left of the wiggles and jumps is that disturbance. The trend is the point.)
#
# So the cache buys time with memory. How much memory?

# %% [markdown]
# ## 4 · What the cache weighs
#
# One key and one value per head, per layer, per token:
#
# $$\text{bytes} = \underbrace{2}_{K\text{ and }V} \cdot h \cdot d_h \cdot n_\text{layer} \cdot
# \text{bytes per number} \cdot \text{tokens} \cdot \text{sequences}.$$
#
# A formula about memory deserves to be measured. The caches of the run above still exist:

# %% claim="table-1-mha-cache"
held = sum(cache.nbytes() for cache in caches)
formula = (
    2 * 8 * 32 * 3 * 4 * (len(fast_tokens) - 1)
)  # the very last token was written but never read back in
assert held == formula
print(f"{held:,} bytes held, {formula:,} by the formula")

# %% [markdown]
# And along the way, for our tiny model, from a run that stops now and then to look:

# %%
tokens_seen, measured = [], []
caches = [KVCache() for _ in model.layers]
for piece in range(10):
    for token in fast_tokens[32 * piece : 32 * piece + 32]:
        model(token[None], caches)
    tokens_seen.append(len(caches[0].k))
    measured.append(sum(cache.nbytes() for cache in caches) / 2**20)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
mha = looks.of("mha").colour
ax.plot(
    tokens_seen, measured, "o", color=mha, label="measured: bytes of the cached tensors"
)
formula = [0, 2 * 8 * 32 * 3 * 4 * 320 / 2**20]
ax.plot([0, 320], formula, ":", color=mha, label="formula: 6 KiB per token")
ax.set(xlabel="tokens in the cache", ylabel="cache (MiB)")
ax.set_title("The cache grows in a straight line")
ax.legend(frameon=False)
looks.show(
    fig,
    alt="Ten measured sizes of the cache, from 32 to 320 tokens, lie on the straight "
    "line of the formula, 6 KiB per token.",
)

# %% [markdown]
# A few MiB are harmless. Now put real models into the same formula, with 2 bytes per number (float16 or bfloat16). The
# sizes are those that their makers published; GPT-2, GPT-3 and Llama 2 7B are plain MHA.

# %%
real_models = {  # layers, heads, d_head, parameters in billions
    "GPT-2 small": (12, 12, 64, 0.124),
    "Llama 2 7B": (32, 32, 128, 6.74),
    "GPT-3 175B": (96, 96, 128, 175),
}


def bytes_per_token(n_layer, n_head, d_head):
    return 2 * n_head * d_head * n_layer * 2


# %%
rows = []
for name, (*sizes, billions) in real_models.items():
    per_token = bytes_per_token(*sizes)
    weights = 2e9 * billions
    rows.append(
        (
            name,
            f"{per_token / 2**10:,.0f}",
            f"{weights / 1e9:.3g}",
            f"{weights / per_token:,.0f}",
        )
    )
looks.table(
    [
        "",
        "cache, KiB per token",
        "weights, GB",
        "tokens at which the cache weighs as much",
    ],
    rows,
    caption="Three models with MHA, 16 bits per number",
)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 4))
context = torch.logspace(3, 6.3, 50)
for (name, (*sizes, _)), line in zip(real_models.items(), ("-", "--", "-.")):
    gigabytes = bytes_per_token(*sizes) * context / 1e9
    ax.loglog(context, gigabytes, line, color=looks.of("mha").colour)
    place = context[0], gigabytes[0]
    ax.annotate(name, place, (2, 8), textcoords="offset points", rotation=27)
ax.axhline(80, color=looks.COLOURS[1], lw=1, ls=":")
ax.annotate("80 GB (one large GPU)", (1.05e3, 95), color=looks.COLOURS[1])
ax.set(
    xlabel="tokens cached, over all sequences served at once",
    ylabel="KV cache (GB, 16 bits per number)",
)
ax.set_title("Real models: long contexts outgrow the GPU")
looks.show(
    fig,
    alt="Gigabytes of cache against cached tokens, three straight lines on "
    "logarithmic axes: GPT-3 crosses the 80 GB of one large GPU first, then Llama "
    "2 7B, then GPT-2 small.",
)

# %% [markdown]
# The axis counts tokens of *all* sequences that are served at once: 32 users with 4,096 tokens each hold 131,072
# tokens. For Llama 2 7B that is about 69 GB of cache, beside 13.5 GB of weights. The weights are there once; the cache
# is there once *per user*.
#
# Memory is half of the trouble. The other half is that **each decode step reads the entire cache**, and does next to
# nothing with it: one multiply–add for each cached number, per query. A GPU can calculate far faster than it can read,
# so the reading sets the pace. Taking an H100's 3.35 TB/s from its data sheet:

# %%
tokens_held = 32 * 4096
gigabytes = bytes_per_token(32, 32, 128) * tokens_held / 1e9
milliseconds = gigabytes / 3350 * 1000
print(f"{tokens_held:,} tokens: {gigabytes:.0f} GB to read for each step,")
print(f"at least {milliseconds:.0f} ms, whatever the arithmetic costs")

# %% [markdown]
# So a smaller cache means more users, longer contexts *and* faster decoding. The question of the last years has been
# what one can leave out of it.

# %% [markdown]
# ## 5 · Three answers
#
# ### MQA and GQA: fewer key heads than query heads
#
# **Multi-query attention** (MQA) computes *one* key and *one* value per token, and all heads use them. **Grouped-query
# attention** (GQA) is the dial between: $G$ key and value heads, each shared by a group of $h / G$ neighbouring query
# heads. $G = h$ is MHA, $G = 1$ is MQA. A picture for 8 query heads:

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(6, 3), width_ratios=(8, 3, 3))
for ax, groups, name in zip(axes, (8, 2, 1), ("mha", "gqa", "mqa")):
    reads = torch.arange(8)[:, None] // (8 // groups) == torch.arange(groups)
    ax.imshow(
        reads.int(),
        vmin=0,
        cmap=ListedColormap(["#F2F2F2", looks.of(name).colour]),
        vmax=1,
    )
    ax.set(
        title=name.upper() + (", G = 2" if name == "gqa" else ""),
        xticks=range(groups),
        yticks=range(8),
        xlabel="key head",
    )
    ax.grid(False)
    ax.set_anchor("W")
axes[0].set_ylabel("query head")
fig.suptitle("Which key (and value) head each query head reads", x=0.02, ha="left")
looks.show(
    fig,
    alt="Grids of 8 query heads against key heads. MHA: a diagonal, each reads its "
    "own. GQA with 2 key heads: the upper four read the first, the lower four the "
    "second. MQA: all eight read the only one.",
)

# %% [markdown]
# Filled squares are who reads whom. The cache holds one entry per *column*, so its size per token and layer is $2 G d_h$
# in place of $2 h d_h$.
#
# What is given up: heads of one group look at tokens through the same key. They are *not* identical, since their
# queries differ: each asks its own question, but of the same answer sheet. And they average the same value vectors,
# only with different weights. Models with many heads can bear that: Llama 3.1 8B and 70B use 8 key heads for 32 and 64
# query heads.

# %% [markdown]
# ### MLA: a compressed note, from which keys are rebuilt
#
# **Multi-head latent attention** (MLA, from DeepSeek-V2) keeps all heads, but caches neither keys nor values. It caches
# one **latent** vector $c_t = x_t W_c$ of width $d_c$, much smaller than $2 h d_h$, and makes keys and values of all
# heads from it by two fixed *up-projections*:

# %%
d_latent, heads, width = 24, 8, 16
x = torch.randn(50, 64, dtype=torch.float64)
W_c = torch.randn(64, d_latent, dtype=torch.float64) / 8
up_k = torch.randn(d_latent, heads, width, dtype=torch.float64) / math.sqrt(d_latent)
c = x @ W_c  # (T, d_c): all that is cached
k_mla = torch.einsum("tc,chd->thd", c, up_k)  # (T, h, d_h): rebuilt when needed
print("cached per token:", c.shape[1], " in place of", 2 * heads * width)

# %% [markdown]
# Rebuilding all keys at each step would be slow: the whole past would go through `up_k` again. But a matrix in the
# middle of a product can be taken with either neighbour. Here is one head of ours, with its own up-projection $U$, and
# the latents of the first 12 tokens:

# %% tags=["hide-input"]
query = torch.randn(heads, width, dtype=torch.float64)  # of one new token
looks.show(
    diagrams.two_orders(
        (query[:1], up_k[:, 0].T, c[:12].T),
        ("$q$", "$U^⊤$", "latents $c_s$ of 12 tokens", "logits"),
        ("shown", "shown", "cached", "shown"),
        ("shown", f"query first: {d_latent} numbers, once"),
        ("never built", f"keys first:\n{width} numbers for each\ncached token"),
    ),
    alt="A query times an up-projection times the latents of 12 tokens, which are "
    "cached, gives 12 logits. Above, the first two multiplied first: one absorbed "
    "query of 24 numbers. Below, the last two multiplied first: 16 times 12 "
    "numbers of keys, hatched because they need not be built.",
)

# %% [markdown]
# From the right (below), all keys are rebuilt. From the left (above), the one query is transformed rather than the many
# latents, $q\,(c_s U)^\top = (q\,U^\top)\, c_s^\top$. One says that the up-projection is *absorbed* into the query. For all
# heads:

# %%
rebuilt = torch.einsum("hd,thd->ht", query, k_mla)
absorbed = torch.einsum("hd,chd->hc", query, up_k) @ c.T  # (h, d_c) @ (d_c, T)
torch.testing.assert_close(absorbed, rebuilt, rtol=0, atol=1e-12)

# %% [markdown]
# What is given up: (1) every logit now costs $d_c$ multiply–adds rather than $d_h$, and $d_c$ is several times $d_h$ in
# practice; memory is bought with arithmetic. (2) The trick needs *nothing between* query and up-projection. Rotary
# position embedding puts a rotation there, so MLA carries an extra, separately rotated key of width $d_R$ beside the
# latent (notebook 03 shows why). (3) All keys of all tokens come from one fixed $d_c$-dimensional space.

# %% [markdown]
# ### The three, through one lens
#
# Put one token's keys of all heads into a matrix with one row per head, $K_t \in \mathbb{R}^{h \times d_h}$. Its
# **rank** says how many independent keys the token really has. Then flatten each $K_t$ into one long row and stack the
# rows of many tokens: the rank of that stack says in how large a space the tokens' keys live.

# %% tags=["nbval-check-output"] claim="sharing-is-low-rank"
k_all = torch.randn(
    50, heads, width, dtype=torch.float64
)  # MHA: every head its own key
k_gqa = k_all[:, ::4].repeat_interleave(4, dim=1)  # 2 keys, each for 4 heads
k_mqa = k_all[:, :1].expand(-1, heads, -1)  # 1 key for all
rank = torch.linalg.matrix_rank
looks.table(
    ["", "one token's keys", "stack of 50 tokens"],
    [
        (name, int(rank(keys[0])), int(rank(keys.flatten(1))))
        for name, keys in (
            ("MHA", k_all),
            ("GQA", k_gqa),
            ("MQA", k_mqa),
            ("MLA", k_mla),
        )
    ],
    caption="Rank of the keys",
)

# %% [markdown]
# (Random keys, so every rank is as large as the mechanism allows: $8 \times 16$ matrices, 50 tokens.) Each mechanism saves
# memory by giving up rank somewhere:
#
# | | cached per token and layer | gives up |
# |---|---|---|
# | MHA | $2 h d_h$ | nothing; it is the measure |
# | GQA | $2 G d_h$ | a token has at most $G$ different keys, and *which* heads share is fixed for ever |
# | MQA | $2 d_h$ | one key and one value per token |
# | MLA | $d_c + d_R$ | all keys lie in one fixed $d_c$-dimensional space; more arithmetic; a detour for positions |
#
# TPA, the subject of this course, also makes $K_t$ a matrix of low rank, $R_K$. But it lets **each token choose its
# own** rank-$R_K$ matrix: which heads share what is decided anew for every token. What that means is notebook 02.
#
# What does this weigh in a model of the paper's small size? All rows have about equally many attention parameters:
# mechanisms with smaller key and value projections get more heads for it, which is why the number of heads differs
# (paper, App. H; MLA, whose compression has projections of its own, keeps 12). TPA's number is $(R_K + R_V)(h + d_h)$;
# notebooks 02 and 05 show why.

# %% claim="table-1-cache-small"
small = dict(d_model=768, d_head=64)
layers = {
    "MHA, 12 heads": Layer("mha", n_head=12, **small),
    "TPA, 34 heads, ranks 2 and 2": Layer("tpa", n_head=34, **small),
    "MLA, 12 heads, latent 256 + 32": Layer(
        "mla", n_head=12, d_c=256, d_rope=32, **small
    ),
    "GQA, 22 heads, G = 2": Layer("gqa", n_head=22, n_kv_head=2, **small),
    "MQA, 23 heads": Layer("mqa", n_head=23, **small),
}
cached = {name: layer.cached_numbers for name, layer in layers.items()}
assert cached["TPA, 34 heads, ranks 2 and 2"] == (2 + 2) * (34 + 64)
ratios = [f"{cached['MHA, 12 heads'] / number:.1f}" for number in cached.values()]
print("MHA caches so many times as much:", dict(zip(layers, ratios)))
looks.show(
    diagrams.per_token_bars(layers),
    alt="Bars of the numbers cached per token and layer: "
    + ", ".join(f"{name}: {number:,}" for name, number in cached.items()),
)

# %% [markdown]
# Read it soberly. TPA is **not** the smallest here: with 392 numbers it needs 3.9 times less than MHA's 1,536, and GQA,
# MQA and MLA need less still. What counts is how much quality is left. The paper reports, at this size, averages over
# nine benchmarks (zero-shot; its Sec. 6) of 46.19 for MHA, 46.20 for MLA, 46.21 for TPA, 45.14 for MQA and 45.04 for
# GQA: the first three tie within any plausible noise (single runs, no error bars), and the two that share fixed heads
# are about a point behind. At the medium size even that order changes: MQA 50.44, GQA 50.35, MLA 50.13, MHA 50.11, and
# TPA ahead with 51.41 (how many weights MLA had there is not clear: notebook 07). The paper also advertises cache
# savings of ten times and more; where those come from (rank 1, many and wide heads) is a matter of notebook 09.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · What stays true? (★☆☆, 5 minutes)
#
# A two-layer model without positional encoding has processed 100 tokens; you hold the keys and values of each layer.
# Then something happens. For each case say whether the keys and values **named in the brackets** that you hold are
# still right (`True`) or must be computed anew (`False`).
#
# <details><summary>Hint 1</summary>
#
# For each case ask: from which tokens was this key computed? A key of layer 1 depends on its own token alone.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A key of layer 2 depends on whatever its token could *see* in layer 1. With the causal mask that is the past and
# itself; without a mask it is the whole text.
#
# </details>


# %% tags=["exercise"]
def still_right():
    raise NotImplementedError
    return {  # replace each ... by True or False
        "a": ...,  # causal model, a token is appended [layer 2, all 100 old tokens]
        "b": ...,  # bidirectional, a token is appended [layer 1, all 100 old tokens]
        "c": ...,  # bidirectional, a token is appended [layer 2, all 100 old tokens]
        "d": ...,  # causal model, token 50 is replaced [layer 2, tokens before 50]
        "e": ...,  # causal model, token 50 is replaced [layer 1, tokens after 50]
        "f": ...,  # causal model, token 50 is replaced [layer 2, tokens after 50]
    }


# %% tags=["solution"]
def still_right():
    return {
        "a": True,  # an old token never sees a later one, at any depth
        "b": True,  # in layer 1 a key is a linear map of its own token alone
        "c": False,  # layer 1 mixed the new token into the old ones
        "d": True,  # they come before the change
        "e": True,  # again: layer 1 has not mixed anything yet
        "f": False,  # they attended to token 50 in layer 1
    }


# %%
checks.ex01_1(still_right)

# %% [markdown]
# ### Exercise 2 · The longest context (★☆☆, 10 minutes)
#
# A GPU has `memory` bytes. The weights take `weights` bytes; everything else may be spent on the cache of `batch_size`
# sequences of equal length. How many whole tokens can each sequence have? Return a whole number, and 0 if not even the
# weights fit.
#
# <details><summary>Hint 1</summary>
#
# Start from one token of one sequence: how many bytes does it leave in all layers?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A token leaves a key and a value in each of `n_kv_head` heads of each of `n_layer` layers, $2 \cdot$ `n_layer`
# $\cdot$ `n_kv_head` $\cdot$ `d_head` numbers.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Divide what the weights leave of the memory, or 0, by that times `batch_size` times `bytes_per_number`, and round
# down with `//`.
#
# </details>


# %% tags=["exercise"]
def longest_context(
    memory, weights, n_layer, n_kv_head, d_head, batch_size, bytes_per_number
):
    raise NotImplementedError


# %% tags=["solution"]
def longest_context(
    memory, weights, n_layer, n_kv_head, d_head, batch_size, bytes_per_number
):
    per_token = (
        2 * n_kv_head * d_head * n_layer * bytes_per_number
    )  # keys and values, all layers
    return max(0, memory - weights) // (per_token * batch_size)


# %%
checks.ex01_2(longest_context)

# %% [markdown]
# ### Exercise 3 · A chunk of new tokens (★★☆, 15 minutes)
#
# Our `attend` knows two situations: all tokens at once, or a single new one. A chat needs the case between: the cache
# holds a conversation, and the user adds a message of several tokens at once. Write attention for `T` queries that are
# the **last** `T` of the `M` tokens whose keys and values are given. Each query may see itself and everything before
# it.
#
# <details><summary>Hint 1</summary>
#
# Only the mask differs from `attend`. At which position of the $M$ tokens does the first query stand?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Query $t$ stands at position $M - T + t$ and may see the keys $0$ to $M - T + t$.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `torch.ones(T, M, dtype=torch.bool).triu(M - T + 1)` is true where a key lies ahead; fill those logits with
# $-\infty$ before the softmax.
#
# </details>


# %% tags=["exercise"]
def attend_chunk(q, k, v):
    """q: (T, h, d_h); k, v: (M, h, d_h) with M >= T -> (T, h, d_h)."""
    raise NotImplementedError


# %% tags=["solution"]
def attend_chunk(q, k, v):
    """q: (T, h, d_h); k, v: (M, h, d_h) with M >= T -> (T, h, d_h)."""
    T, M = len(q), len(k)
    logits = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    ahead = torch.ones(T, M, dtype=torch.bool).triu(
        M - T + 1
    )  # query t stands at position M - T + t
    return torch.einsum(
        "hts,shd->thd", logits.masked_fill(ahead, -math.inf).softmax(-1), v
    )


# %%
checks.ex01_3(attend_chunk)

# %% [markdown]
# ### Exercise 4 · Grouped queries (★☆☆, 10 minutes)
#
# Write causal attention for GQA: `h` query heads, `G` key and value heads, `G` divides `h`, and the groups consist of
# *neighbouring* query heads as in the picture. You may call `attend`.
#
# <details><summary>Hint 1</summary>
#
# Give each query head a key head of its own, then it is MHA again.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# With $h = 4$ and $G = 2$ the query heads 0, 1, 2, 3 read the groups 0, 0, 1, 1. Which of `repeat` and
# `repeat_interleave` makes that order?
#
# </details>


# %% tags=["exercise"]
def attend_grouped(q, k, v):
    """q: (T, h, d_h); k, v: (T, G, d_h) -> (T, h, d_h)."""
    raise NotImplementedError


# %% tags=["solution"]
def attend_grouped(q, k, v):
    """q: (T, h, d_h); k, v: (T, G, d_h) -> (T, h, d_h)."""
    share = q.shape[1] // k.shape[1]
    return attend(
        q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    )


# %%
checks.ex01_4(attend_grouped)

# %% [markdown]
# ## Summary
#
# - Causality makes past keys and values final, in every layer. Keeping them turns a growing cost per token into a
#   nearly constant one.
# - The price is $2 h d_h$ numbers per token and layer. It grows in a straight line with the text and with the number of
#   users, and every decode step reads all of it.
# - MQA and GQA give each token fewer keys, shared by a fixed pattern of heads. MLA stores a short latent and rebuilds
#   the keys from it. All of them restrict the rank of the keys.
# - At the paper's small size TPA caches 3.9 times less than MHA; others cache less than TPA. The interest lies in what
#   is kept.
#
# **Next:** [02 · Tensor product factorization](02_tensor_product_factorization.ipynb), where each token gets a low-rank
# matrix of its own.
