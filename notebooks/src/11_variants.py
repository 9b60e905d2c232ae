# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 11 · Variants
#
# {badge}
#
# **You will be able to**
#
# - describe any variant of TPA by three answers: what a token brings, what RoPE rotates, what attention reconstructs;
# - derive what each variant caches, and read it off a real cache;
# - say why a fixed feature factor leaves attention only a few curves of distance to work with;
# - share one feature factor between keys and values without letting RoPE into the values;
# - prove Theorem C.1 by experiment, and write a variant of your own in a few lines.
#
# **You need** notebooks 02, 03 and 05 (factors, pre-rotation, the factor cache). 04 helps.
#
# **Time** about 95 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# ## Three questions
#
# TPA is a family. Its appendices and its authors' code change one thing at a time: make some factors constants, share
# others, put a nonlinearity on them, or factor the factors again. Each variant answers three questions:
#
# 1. **What does a token bring?** That is what is projected from it, and what a cache must keep of it.
# 2. **Which of it does RoPE rotate?** What is rotated before caching is never rotated again.
# 3. **What does attention have to reconstruct?** All that is constant, shared or folded.
#
# In code these are three methods of `TensorProductAttention` that a variant replaces: `factor_widths` (how many numbers
# of a row of each factor a token brings; 0 for none), `factors` and `attend`. `tpa_minimal/variants.py` holds them
# all, a few lines each. Here is one, whole:

# %%
import inspect
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
from torch.testing import assert_close

from tpa_minimal import variants
from tpa_minimal.course import checks, looks
from tpa_minimal.tpa import (
    T6,
    T6Config,
    TensorProductAttention,
    apply_rope,
    factor_attention,
    rope_tables,
)

looks.style()
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # so that "equal" means equal
print(inspect.getsource(variants.FixedHeadFactors))

# %% [markdown]
# `factor_widths` says 0 for $A_Q$, $A_K$ and $A_V$, so the projection and the cache both shrink without further code.
# Let us see what every variant keeps, from its cache itself and not from a formula. Numbers per token and layer, at
# $h=8$ heads of width $d_h=16$ and ranks $(4,2,2)$:

# %% tags=["nbval-check-output"]
config = T6Config(
    vocab_size=64,
    n_layer=1,
    d_model=32,
    n_head=8,
    d_head=16,
    rank_q=4,
    rank_k=2,
    rank_v=2,
    max_len=64,
)
kinds = [
    TensorProductAttention,
    variants.KeyValueOnly,
    variants.FixedHeadFactors,
    variants.FixedFeatureFactors,
    variants.SharedFeatureFactors,
    variants.SigmoidHeadFactors,
    variants.ThirdOrderFactors,
    variants.PartialRoPE,
]
x = torch.randn(2, 24, config.d_model)
for kind in kinds:
    layer = kind(config)
    torch.nn.init.normal_(layer.out_proj.weight)  # zero would hide any difference
    cache = layer.new_cache(batch_size=2)
    chunks = [layer(chunk, cache) for chunk in x.split([10, 1, 13], dim=1)]
    assert_close(torch.cat(chunks, dim=1), layer(x))
    print(f"{kind.__name__:24s} {cache.nbytes // (2 * 24 * 8):4d}")

# %% [markdown]
# MHA with these heads keeps $2hd_h = 256$, MQA 32. Fixing the *wide* factors B saves most, 64 of TPA's 96 here, but we
# shall see what that costs. (KV-only has queries from an ordinary linear map, $Q_t = W_Q x_t$, rotated as usual: in
# factors, rank $h$ with $a_r = h\,e_r$.) In symbols (Table 1, with $R=R_K=R_V$ for the shared one):
#
# | variant | cached numbers per token | when one would want it |
# |---|---|---|
# | TPA | $(R_K+R_V)(h+d_h)$ | the default |
# | KV-only | the same | ordinary queries: simpler, and queries are never cached anyway |
# | fixed A | $(R_K+R_V)\,d_h$ | to start from an MHA, MQA or GQA model (notebooks 04 and 12) |
# | fixed B | $(R_K+R_V)\,h$ | the smallest cache at few heads; the paper's weakest variant |
# | shared B | $R\,(2h+d_h)$ | wide heads: the feature vectors are most of the cache |
# | sigmoid, softmax A | as TPA | bounded gates; a reading as a mixture of heads |
# | third order | $(R_K+R_V)(h+d_b+d_c)$ | very wide heads; slower to use, and weaker in the paper |
# | partial RoPE | as TPA | some features free of position |
#
# ## Fixed A: a constant that no linear map can be
#
# With $A$ constant, $K_t = \frac1{R_K} A_K^\top B_K(x_t)$: each head sees a fixed mixture of $R_K$ feature vectors. Why
# is this a *variant* and not simply TPA with lucky weights? Because TPA's factors are linear maps without a bias, and
# the only constant linear map is zero. Unless some coordinate of the input happens to be constant. Give it one:

# %% claim="table-1-fixed-a"
x_one = x.clone()
x_one[..., -1] = 1  # a coordinate that never changes

fixed, base = variants.FixedHeadFactors(config), TensorProductAttention(config)
torch.nn.init.normal_(fixed.out_proj.weight)
with torch.no_grad():
    parts = dict(
        zip(
            "a_q b_q a_k b_k a_v b_v".split(), base.factor_proj.weight.split(base.sizes)
        )
    )
    given = dict(
        zip(
            "b_q b_k b_v".split(),
            fixed.factor_proj.weight.split([s for s in fixed.sizes if s]),
        )
    )
    for name, part in parts.items():
        if name in given:
            part.copy_(given[name])
        else:
            part.zero_()
            part[:, -1] = getattr(fixed, name).flatten()  # the constant coordinate's
    base.out_proj.weight.copy_(fixed.out_proj.weight)

assert_close(base(x_one), fixed(x_one))
print(
    "with a constant coordinate: equal.  Without: largest difference",
    f"{(base(x) - fixed(x)).abs().max():.1f}",
)

# %% [markdown]
# Equal on inputs that carry a constant, different on all others. So the paper's special cases (MHA, MQA, GQA; notebook
# 04) live in the fixed-A family, and contextual TPA neither contains it nor is contained in it.
#
# ## Fixed B: a few curves of distance
#
# Now the other way round: each token brings only *which heads*, and the feature vectors $b_{q,r}$ and $b_{k,u}$ are
# constants of the layer. They are still rotated to their positions, so their products depend on distance alone:
#
# $$ \langle b_{q,r}\,\Theta_t,\; b_{k,u}\,\Theta_s\rangle = b_{q,r}\,\Theta_{t-s}\,b_{k,u}^\top =: \kappa_{ru}(t-s) . $$
#
# A logit is $\sum_{ru} a_{q,r}(x_t)\,a_{k,u}(x_s)\,\kappa_{ru}(t-s)$: whatever the tokens say, their influence on each
# other follows $R_Q R_K$ fixed curves. Here are those of a fresh layer.

# %% tags=["hide-input"] claim="app-g-fixed-b"
layer = variants.FixedFeatureFactors(config)
tables = rope_tables(torch.arange(64), config.d_head, config.rope_base, torch.float64)
b_k = apply_rope(layer.b_k.detach().expand(1, 64, -1, -1), *tables)[0]  # (M, R_K, d_h)
b_q = apply_rope(layer.b_q.detach()[None, None], tables[0][-1:], tables[1][-1:])[
    0, 0
]  # (R_Q, d_h), at position 63
curves = torch.einsum("re,mse->rsm", b_q, b_k).flip(-1)  # from position 63 backwards

fig, ax = plt.subplots()
for index, style in zip(((0, 0), (0, 1), (1, 0)), ("-", "--", ":")):
    ax.plot(curves[index], style, label=f"r={index[0] + 1}, s={index[1] + 1}")
ax.set(
    xlabel="distance from query back to key (positions)",
    ylabel="κ, product of features",
)
ax.set_title("With fixed B, attention is a mixture of a few fixed curves of distance")
fig.legend(loc="outside lower center", ncols=3)
looks.show(
    fig,
    "Three curves against distance, each an oscillation of its own that no token changes.",
)

# %% [markdown]
# Three of the eight curves. The tokens can scale them up and down per head, and that is all: "look for the token that
# *means* this" has to be said through $R_K$ numbers per head. In the paper the small model falls from 46.21 to 43.66 on
# average without contextual B, and to 45.03 without contextual A (zero-shot; single runs without error bars).
#
# What has to be reconstructed? $b_k$ itself is never cached, so it is rotated to all $M$ positions in each call. That is
# $R_K M d_h$ numbers of temporary memory, once for the whole batch, instead of as many cached ones per sequence.
#
# ## Shared B: keep RoPE out of the values
#
# With $b_k=b_v=b$ a token brings $a_k$, $a_v$ and one $b$. But keys must be rotated and values must not be. Which of
# the two shall the cache hold? Suppose somebody caches the rotated one and uses it for both, since it is the same
# factor after all. Keys are right. Are the values?


# %% claim="app-g-shared-b"
def attend_shared(layer, x, first_position, rotate_values):
    positions = torch.arange(first_position, first_position + x.shape[1])
    a_q, b_q, a_k, _, a_v, b = layer.project(x)
    cos, sin = rope_tables(positions, config.d_head, config.rope_base, x.dtype)
    b_q, b_k = apply_rope(b_q, cos, sin), apply_rope(b, cos, sin)
    return factor_attention(
        a_q, b_q, a_k, b_k, a_v, b_k if rotate_values else b, start=0
    )


shared = variants.SharedFeatureFactors(config)
torch.nn.init.normal_(shared.out_proj.weight)
for rotate_values in (False, True):
    here, there = (
        attend_shared(shared, x, first, rotate_values) for first in (0, 1000)
    )
    change = (here - there).norm() / here.norm()
    print(
        f"values rotated: {rotate_values!s:5}  "
        f"moving the text by 1,000 positions changes the output by {change:.1e}"
    )
    assert (change < 1e-9) != rotate_values

# %% [markdown]
# Rotated values make the output depend on where the text stands, which is just what RoPE was to avoid: the rotation of
# a value meets no counter-rotation. (A widely read port of TPA makes this mistake with separate factors.) So `b` is
# cached once, **unrotated**, and rotated for the keys when it is used. The price is a rotation of $R M d_h$ numbers per
# call, against about $2 R M h d_h$ multiply–adds of attention in factor space: small when there are many heads.

# %%
cache = shared.new_cache(batch_size=2)
parts = [shared(chunk, cache) for chunk in x.split([10, 1, 1, 12], dim=1)]
assert_close(torch.cat(parts, dim=1), shared(x))
R, h, d_head = config.rank_k, config.n_head, config.d_head
assert cache.nbytes == 2 * 24 * R * (2 * h + d_head) * 8
print(
    f"cached: {R * (2 * h + d_head)} numbers per token "
    f"where TPA has {2 * R * (h + d_head)}"
)

# %% [markdown]
# ## Nonlinear head factors
#
# A sigmoid turns $a_r$ into gates: each feature vector is let into each head between 0 and 1. A softmax over the heads
# makes the heads *share out* each feature vector, "mixture of heads". The cache keeps $a_k$ and $a_v$ after the
# nonlinearity. At zero weights the gates are constants, a fixed A of $\frac12$ or $\frac1h$, and so unlike plain TPA
# they start from something that does not vanish.

# %%
layer = variants.SoftmaxHeadFactors(config)
a_k = layer.project(x)[2]  # (B, T, R_K, h)
assert_close(a_k.sum(-1), torch.ones(2, 24, config.rank_k))
print(
    "the 8 heads' shares of one feature vector:",
    [round(share, 2) for share in a_k[0, 0, 0].tolist()],
)

# %% [markdown]
# ## Third order: factor the features again
#
# A feature vector of width $d_h = d_b d_c$ can itself be an outer product, $\mathrm{vec}(b_r\otimes c_r)$ with $b_r$ of
# width $d_b$ and $c_r$ of width $d_c$ (here the width of $c_r$, not MLA's latent). Then a row costs $d_b+d_c$ numbers instead of $d_b d_c$, least at
# $d_b\approx d_c\approx\sqrt{d_h}$: 16 instead of 64. vec stacks columns, so feature $j\,d_b+i$ is $b_i c_j$.
#
# And RoPE? Theorem C.1: rotating $b_r$ alone *is* a rotary embedding of the product, with the block matrix
# $I_{d_c}\otimes \Theta'_t$ in the place of $\Theta_t$, where $\Theta'_t$ rotates $d_b$ features. The proof is one line: column $j$ of
# $(b\,\Theta'_t)\otimes c$ is $c_j\,b\,\Theta'_t$, so $\Theta'_t$ acts on each of the $d_c$ blocks of vec alike. Here it is with explicit matrices:

# %% claim="theorem-c1"
d_b, d_c, t = 4, 3, 7
b, c = torch.randn(1, 1, 1, d_b), torch.randn(d_c)
cos, sin = rope_tables(torch.tensor([t]), d_b, 100.0, torch.float64)
R_t = apply_rope(torch.eye(d_b).view(1, 1, d_b, d_b), cos, sin)[
    0, 0
]  # the matrix itself

rotated_b = torch.outer(
    apply_rope(b, cos, sin).flatten(), c
).T.flatten()  # vec(b R_t ⊗ c)
rotated_product = torch.outer(b.flatten(), c).T.flatten() @ torch.kron(
    torch.eye(d_c), R_t
)
assert_close(rotated_b, rotated_product)
print(
    "rotating b alone = rotating vec(b ⊗ c) by I ⊗ R_t, a",
    tuple(torch.kron(torch.eye(d_c), R_t).shape),
    "matrix",
)

# %% [markdown]
# So $b_k$ can be cached rotated, as in TPA. Two prices: there are only $d_b/2$ different rotation speeds instead of
# $d_h/2$, and vec$(b\otimes c)$ is formed anew for all cached tokens in each call. The paper's small model scores 44.56
# with third order against 46.21 without.
#
# ## Two ways to rotate
#
# Some of the authors' files rotate the factors, others the assembled $q$ and $k$. By Theorem 3.1 these are the same
# function. What differs is what can be cached: if rotation comes after assembly, $b_k$ is kept unrotated, and each call
# has to assemble and rotate *all* keys. So one wants it only for code or weights that were written that way.

# %%
after, before = variants.RotateAssembled(config), TensorProductAttention(config)
torch.nn.init.normal_(before.out_proj.weight)
after.load_state_dict(before.state_dict())
caches = after.new_cache(2), before.new_cache(2)
for chunk in x.split([20, 1, 3], dim=1):
    assert_close(after(chunk, caches[0]), before(chunk, caches[1]))
assert caches[0].nbytes == caches[1].nbytes
b_k_after, b_k_before = (cache.view(0, 24)[1] for cache in caches)
print(
    "same outputs, same bytes; but one cache holds rotated keys:",
    not torch.equal(b_k_after, b_k_before),
)

# %% [markdown]
# *Partial RoPE* rotates only some features and leaves the others free of position. With tables at hand it is a table
# whose last columns stand for the angle 0:

# %%
partly = variants.PartialRoPE(config, rotary_dim=6)
cos, sin = partly.rope.tables(0, torch.empty(1, 3))
print("sines at position 2:", [round(s, 3) for s in sin[2].tolist()])

# %% [markdown]
# ## Bytes and loss
#
# How do they learn? Below, each variant is trained for a few dozen steps on the built-in lessons, from three seeds for
# TPA itself and one for each other. Read the figure for what it is: **the start of training of very small models**.
# What decides that, more than the variant, is how large the *values* are at first. From the paper's initialization
# softmax heads led TPA by 0.4 nats, since their shares, 1/8 on average, make the values small; with the weights of
# $b_v$ multiplied by 0.15, TPA gained as much. So here all variants start as the authors' code does (notebook 02), with
# small factors, and the figure ranks none of them; the paper's table does, for its sizes. `TPA_FULL=1` in the
# environment trains ten times longer.

# %%
import os

from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.experiments import data, train

torch.set_default_dtype(torch.float32)
lessons = data.prepare("lessons", 400_000, progress=False)
small = T6Config(
    vocab_size=lessons.vocab_size, n_layer=2, d_model=64, n_head=8, d_head=16,
    rank_q=4, rank_k=2, rank_v=2, max_len=64, init="authors",
)  # fmt: skip
steps = 400 if os.environ.get("TPA_FULL") == "1" else 40
held_out = list(lessons.validation_batches(batch_size=16, seq_len=64, max_batches=8))


# %%
def bytes_and_loss(attention, seed=0, **changes):
    torch.manual_seed(seed)
    model = T6(replace(small, **changes), attention=attention)
    train.fit(model, lessons, steps, lr=4e-3, seed=seed)
    cache = model.new_cache(batch_size=1)
    with torch.no_grad():
        model(held_out[0][0][:1], cache)
        loss = sum(train.loss_sum(model, *batch).item() for batch in held_out)
    return cache.nbytes / 64, loss / sum(targets.numel() for _, targets in held_out)


# %% [markdown]
# `bytes_and_loss` returns what is cached per token in float32, over both layers, and the loss on held-out lessons.

# %%
candidates = {
    "MHA": MultiHeadAttention,
    "MQA": partial(MultiHeadAttention, n_kv_head=1),
    "KV-only": variants.KeyValueOnly,
    "fixed A": variants.FixedHeadFactors,
    "fixed B": variants.FixedFeatureFactors,
    "shared B": variants.SharedFeatureFactors,
    "sigmoid A": variants.SigmoidHeadFactors,
    "softmax A": variants.SoftmaxHeadFactors,
    "third order": variants.ThirdOrderFactors,
    "partial RoPE": variants.PartialRoPE,
}
results = {name: bytes_and_loss(attention) for name, attention in candidates.items()}
seeds = [bytes_and_loss(TensorProductAttention, seed) for seed in range(3)]
results["TPA"] = seeds[0]
for rank in (1, 4):
    results[f"TPA, rank {rank}"] = bytes_and_loss(
        TensorProductAttention, rank_k=rank, rank_v=rank
    )

# %% tags=["hide-input"]
LOOK = {
    "MHA": "mha", "MQA": "mqa", "KV-only": "tpa-kv-only", "fixed A": "tpa-fixed-a", "fixed B": "tpa-fixed-b",
    "shared B": "tpa-shared-b", "sigmoid A": "tpa-sigmoid-a", "softmax A": "tpa-softmax-a",
    "third order": "tpa-third-order", "partial RoPE": "tpa-partial-rope",
}  # fmt: skip
fig, ax = plt.subplots(figsize=(7.5, 4.4))
losses = [loss for _, loss in seeds]
ax.axhspan(min(losses), max(losses), color="0.85", label="TPA, three seeds")
ranks = [results[name] for name in ("TPA, rank 1", "TPA", "TPA, rank 4")]
ax.plot(*zip(*ranks), **looks.of("tpa").line_style(), label="TPA, ranks 1, 2, 4")
for name, mechanism in LOOK.items():
    look = looks.of(mechanism)
    ax.plot(*results[name], look.marker, color=look.colour, markersize=8, label=name)
ax.set(
    xscale="log", xlim=(200, 2600), xlabel="cache (bytes per token, 2 layers, float32)"
)
ax.set_xticks([256, 384, 768, 1536, 2048], ["256", "384", "768", "1,536", "2,048"])
ax.minorticks_off()
ax.set(ylabel="loss on held-out text (nats per token)")
ax.set_title(f"After {steps} steps: the cache does not order the losses")
fig.legend(loc="outside right upper", fontsize=9)
looks.show(
    fig,
    "Loss against cached bytes: TPA's ranks fall along a line, the other mechanisms do not follow it.",
)

# %% [markdown]
# Black and violet are the baselines, the line is TPA with three ranks. The grey band is what a change of seed does to one and the
# same variant; smaller differences mean nothing here. What to see: along the line of TPA's ranks more cache goes with
# less loss, by two or three times what a seed does. From one mechanism to the next it does not: MHA has the largest
# cache and lies above TPA and its variants. That is how it stands after 40 steps at one learning rate for all; notebook
# 08, with more steps and a rate of its own for each mechanism, finds MHA ahead.
#
# ## Exercises
#
# ### 1 · Count before you build (★☆☆, 10 minutes)
#
# Four variants that this notebook did *not* have. For each, how many numbers per token and layer does the cache need,
# at best, for ranks $R_K=R_V=R$, $h$ heads of width $d_h$? RoPE is used throughout; queries are as in TPA.
#
# - `"shared A"`: $a_k=a_v$, separate $b_k$ and $b_v$;
# - `"shared both"`: $a_k=a_v$ and $b_k=b_v$;
# - `"fixed a_k"`: $a_k$ a constant, $a_v$ and both $b$ contextual;
# - `"shared B, fixed A"`: $b_k=b_v$, and constant $a_k$ and $a_v$.
#
# <details><summary>Hint 1</summary>
#
# List the four cached factors $a_k, b_k, a_v, b_v$. Cross out what is a copy of another, and what is the same for
# every token.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A head factor has $R h$ numbers, a feature factor $R d_h$. A $b$ that serves as $b_k$ and as $b_v$ is cached once,
# unrotated.
#
# </details>


# %% tags=["exercise"]
def cached_numbers(variant: str, R: int, h: int, d_head: int) -> int:
    raise NotImplementedError


# %% tags=["solution"]
def cached_numbers(variant: str, R: int, h: int, d_head: int) -> int:
    return {
        "shared A": R * (h + 2 * d_head),
        "shared both": R * (h + d_head),
        "fixed a_k": R * (h + 2 * d_head),
        "shared B, fixed A": R * d_head,
    }[variant]


# %%
checks.ex11_1(cached_numbers)

# %% [markdown]
# ### 2 · Build a variant (★★☆, 25 minutes)
#
# Write the first of these, TPA with **shared head factors**: $a_k=a_v$, cached once. `factor_widths` gives six widths,
# those of $a_q, b_q, a_k, b_k, a_v, b_v$; keep the shared factor in the place of $a_v$ and nothing in that of $a_k$.
# Then replace `attend`, which gets $a_q$ and $b_q$ of the new tokens and all cached factors, $b_q$ and $b_k$ already
# rotated. The checker compares your layer with a TPA whose rows for $a_k$ and $a_v$ are equal, without a cache, with one
# and with padding, and counts bytes.
#
# <details><summary>Hint 1</summary>
#
# Six widths, in the order $a_q, b_q, a_k, b_k, a_v, b_v$. Which one is 0 here?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# With $a_k$ of width 0, `attend` gets an empty `a_k`. What belongs in its place?
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `return super().attend(a_q, b_q, a_v, b_k, a_v, b_v, start, padding)`.
#
# </details>


# %% tags=["exercise"]
class SharedHeadFactors(TensorProductAttention):
    def factor_widths(self):
        raise NotImplementedError

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        raise NotImplementedError


# %% tags=["solution"]
class SharedHeadFactors(TensorProductAttention):
    def factor_widths(self):
        h, d_head = self.config.n_head, self.config.d_head
        return h, d_head, 0, d_head, h, d_head

    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        return super().attend(a_q, b_q, a_v, b_k, a_v, b_v, start, padding)


# %%
checks.ex11_2(SharedHeadFactors)

# %% [markdown]
# ### 3 · Rotate a third-order factor (★★☆, 15 minutes)
#
# Given `b` of shape $(T, d_b)$, `c` of shape $(T, d_c)$ and RoPE's tables for $d_b$ features (`cos`, `sin` of shape
# $(T, d_b/2)$, feature $i$ paired with $i+d_b/2$, $x_1\cos+x_2\sin$ first), return the rotated feature vectors
# $\mathrm{vec}(b\,R_t\otimes c)$ of shape $(T, d_b d_c)$. Mind the order of vec.
#
# <details><summary>Hint 1</summary>
#
# Rotate $b$ first, as in notebook 03, then build the product.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The vec of a matrix stacks its columns: entry $j \cdot d_b + i$ is $b_i c_j$, so $c$ is the slower index.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `(c[:, :, None] * b[:, None, :]).flatten(1)`.
#
# </details>


# %% tags=["exercise"]
def rotated_vec(b, c, cos, sin):
    raise NotImplementedError


# %% tags=["solution"]
def rotated_vec(b, c, cos, sin):
    b1, b2 = b.chunk(2, dim=-1)
    b = torch.cat((b1 * cos + b2 * sin, b2 * cos - b1 * sin), dim=-1)  # (T, d_b)
    return (c[:, :, None] * b[:, None, :]).flatten(1)  # feature j · d_b + i is b_i c_j


# %%
checks.ex11_3(rotated_vec)

# %% [markdown]
# ### 4 · What survives? (★★☆, 10 minutes)
#
# True or false, for layers with random weights?
#
# - `"a"`: In the fixed-A variant with $R_K=h$, all heads' keys can be independent of each other.
# - `"b"`: With fixed B and all ranks 1, the ratio of a logit at distance 3 to the logit of the same two tokens at
#   distance 5 is the same for all tokens and all heads.
# - `"c"`: If shared B cached its factor rotated, the values could still be recovered exactly, by rotating it back.
# - `"d"`: Rotating $c_r$ (of even width) instead of $b_r$ would break the relative-position property.
# - `"e"`: A sigmoid on the *feature* factors, before RoPE, would break it.
# - `"f"`: The same sigmoid after RoPE would break it.
#
# <details><summary>Hint 1</summary>
#
# For **a** to **c** ask what can be undone: a square matrix, a rotation, a common factor in a ratio.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# For **d** to **f** ask only: does anything but RoPE know the position? And is what comes out of RoPE still a rotated
# vector afterwards?
#
# </details>


# %% tags=["exercise"]
def what_survives() -> dict:
    raise NotImplementedError


# %% tags=["solution"]
def what_survives() -> dict:
    return {"a": True, "b": True, "c": True, "d": False, "e": False, "f": True}


# %%
checks.ex11_4(what_survives)

# %% [markdown]
# ## Summary
#
# - A variant is three answers: what a token brings (and the cache keeps), what RoPE rotates, what attention
#   reconstructs.
# - Fixed A is where MHA, MQA and GQA live; a bias-free linear map cannot be a constant, so it needs a mode of its own.
# - Fixed B leaves $R_QR_K$ fixed curves of distance; it is the weakest variant in the paper.
# - Shared B is cached once and unrotated, because values must not be rotated.
# - Third order rotates $b$ alone (Theorem C.1); rotating factors or assembled keys is the same function (Theorem 3.1).
#
# Next: [12 · Bring your own model](12_bring_your_own_model.ipynb), where fixed A earns its place.
