# %% [markdown]
# # 02 · Tensor product factorization
#
# {badge}
#
# **You will be able to**
#
# - look at one token's queries, keys or values as a matrix, and say what its rank means;
# - fit such a matrix by outer products (SVD), and read off honestly how well that works on real activations;
# - write TPA's factors, Eq. 3.1 and its 1/R, and count the layer's parameters;
# - tell contextual factors from LoRA's static ones and from MLA's fixed subspace;
# - predict how large the attention logits are before the first training step.
#
# **You need** notebook 01 (heads, the KV cache, the table of ranks in its section 5) and matrix rank from linear
# algebra.
#
# **Time** about 110 minutes to read and do; the code runs in at most 60 s on two CPU cores
#
# The idea of Tensor Product Attention fits in one sentence: *write each token's queries, keys and values as a short sum
# of outer products, and cache the pieces.* This notebook builds that sentence up from one matrix.

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.experiments import data

looks.style()
_ = torch.manual_seed(0)

# %% [markdown]
# ## 1 · One token's keys are a matrix
#
# Multi-head attention gives a token $h$ keys of width $d_h$. Written below each other they form a matrix
# $K_t \in \mathbb{R}^{h \times d_h}$: **one row per head, one column per feature**. The same goes for $Q_t$ and $V_t$.
#
# We want to see real ones. "Real" must be said with care: we train a small MHA model here and now, for some seconds, on
# the short lessons that this package can always make. It is a language model that has learned something, but a tiny
# one. What we see in it need not hold for large models, so every conclusion from it is about *this* model.
#
# Its backbone (everything but the attention), `T6`, and `rms_norm` (RMSNorm, which scales each vector to mean square 1)
# are built in notebook 07; today we only use them.

# %%
from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention, apply_rope, rms_norm

lessons = data.prepare("lessons", tokens=200_000, progress=False)
n_head, d_head = 8, 16
sizes = dict(n_layer=2, d_model=96, n_head=n_head, d_head=d_head, max_len=64)
config = T6Config(vocab_size=lessons.vocab_size, **sizes)


# %%
def train(attention, steps=150):
    torch.manual_seed(0)
    model = T6(config, attention=attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, total_iters=steps)
    losses = []
    for step in range(steps):
        tokens, targets = lessons.batch(
            "train", step, batch_size=16, seq_len=64, seed=0
        )
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return model.requires_grad_(False), losses


held_out, held_out_targets = lessons.batch("val", 0, batch_size=32, seq_len=64, seed=0)


def held_out_loss(model):
    logits = model(held_out).flatten(0, 1)
    return F.cross_entropy(logits, held_out_targets.flatten()).item()


# %%
mha, _ = train(MultiHeadAttention)
mha_loss = held_out_loss(mha)
clueless = math.log(lessons.vocab_size)
print(f"held-out loss {mha_loss:.2f}")
print(f"guessing evenly would give ln {lessons.vocab_size} = {clueless:.2f}")

# %% [markdown]
# Now the keys of the last layer, for some two thousand tokens of held-out text, and one of them as a picture:

# %%
x = mha.embedding(held_out)
x = rms_norm(
    mha.blocks[0](x)
)  # what the last layer's attention sees: (32, 64, d_model)
keys = mha.blocks[1].attention.k_proj(x).flatten(0, 1)
keys = keys.unflatten(-1, (n_head, d_head))
print(keys.shape)

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6, 3))
image = ax.imshow(keys[20], cmap="cividis")
ax.set(xlabel="feature", ylabel="head")
ax.set_title("One token's keys: a matrix with a row for each head")
ax.grid(False)
fig.colorbar(image, label="value", shrink=0.8)
looks.show(
    fig,
    alt="A heat map of 8 rows, the heads, and 16 columns, the features: no pattern.",
)

# %% [markdown]
# (Rotary position embedding rotates each row by the same rotation afterwards. That changes neither the rank of a token's
# matrix nor the error of its best fit, so we leave it out until notebook 03. It does matter where *many* tokens are
# taken together, as in section 5, because each is rotated differently.)
#
# MHA caches this whole matrix, $h \cdot d_h$ numbers, and another one for the values. Must it?
#
# ### Where we are going
#
# Here is the same place in the same model, trained with TPA instead. Its keys are a matrix of the same shape, but made
# in another way, and what is cached is what it is made of:

# %%
tpa, _ = train(TensorProductAttention)
x_tpa = rms_norm(tpa.blocks[0](tpa.embedding(held_out)))
a_k, b_k = tpa.blocks[1].attention.factors(x_tpa)[2:4]  # (B, T, R, h), (B, T, R, d_h)

# %% tags=["hide-input"]
looks.show(
    diagrams.hero(a_k[0, 50], b_k[0, 50]),
    alt="One token's keys, 8 heads by 16 features, as one half of the sum of two outer "
    "products. The vectors a and b at the margins of each product are in colour: "
    "2 times (8 + 16) = 48 numbers are cached. The products and the keys are hatched: "
    "their 128 numbers are never built.",
)

# %% [markdown]
# Each grey matrix is determined by the two coloured vectors at its margins: an entry is the product of the number at its
# left and the number above it. The rest of this notebook takes the picture apart.

# %% [markdown]
# ## 2 · Outer products and rank
#
# The cheapest interesting matrix is an **outer product** of a vector $a \in \mathbb{R}^h$ and a vector
# $b \in \mathbb{R}^{d_h}$:
#
# $$(a \otimes b)_{ie} = a_i\, b_e .$$
#
# In words: every row is the same vector $b$, scaled by that row's entry of $a$. For attention: there is one key $b$,
# and $a$ says how much each head gets of it, and with which sign. So $a$ is the **head factor** ("which heads"), $b$
# the **feature factor** ("which features").

# %%
a = torch.tensor([1.0, -1.0, 0.5, 0.0])  # 4 heads
b = torch.tensor([2.0, 0.0, 4.0])  # 3 features
print(torch.outer(a, b))

# %% [markdown]
# 12 numbers, written down with 4 + 3. All rows are multiples of each other, so the rank is 1. The **rank** of a matrix
# is the smallest number of outer products that add up to it. Adding a second one gives rank 2, and so on up to
# $\min(h, d_h)$, where every matrix can be reached:

# %%
a = torch.stack((torch.linspace(1, -1, n_head), torch.tensor([0, 0, 1, 1, 1, 0, 0, 0])))
b = torch.stack((torch.linspace(0, 9, d_head).sin(), torch.linspace(-1, 1, d_head)))
first, second = torch.outer(a[0], b[0]), torch.outer(a[1], b[1])
for matrix, its_rank in ((first, 1), (second, 1), (first + second, 2)):
    assert torch.linalg.matrix_rank(matrix) == its_rank

# %% tags=["hide-input"]
fig, ax = diagrams.canvas(63, 14)
for r, (left, product) in enumerate(((1, first), (23, second))):
    diagrams.cells(ax, left, 5, a[r][:, None], "shown")
    diagrams.cells(ax, left + 2, 3, b[r][None], "shown")
    diagrams.cells(ax, left + 2, 5, product, "shown")
    ax.text(left + 2, 1.5, f"$a_{r + 1} ⊗ b_{r + 1}$: rank 1", fontsize=11)
diagrams.cells(ax, 45.5, 5, first + second, "shown")
ax.text(45.5, 1.5, "their sum: rank 2", fontsize=11)
for left, sign in ((20, "+"), (42.3, "=")):
    ax.text(left, 9, sign, fontsize=18, va="center")
looks.show(
    diagrams.closed(fig),
    alt="Two outer products, each with the vector a at its left and b above it: every "
    "row of a product is b, scaled. Their sum has rows of more than one kind: "
    "rank 2.",
)

# %% [markdown]
# With $R$ outer products, $R\,(h + d_h)$ numbers stand for $h \cdot d_h$. Whether that is less depends on the sizes:

# %%
looks.table(
    ["h, d_h", "the matrix", "R = 1", "R = 2", "R = 4", "R = 8"],
    [
        (f"{h}, {d_h}", h * d_h, *(R * (h + d_h) for R in (1, 2, 4, 8)))
        for h, d_h in ((8, 16), (12, 64), (64, 128))
    ],
    caption="Numbers for one matrix, and for R outer products",
)

# %% [markdown]
# Rank 8 at $h = 8$, $d_h = 16$ costs *more* than the matrix itself. Many wide heads and a small rank are where this pays.

# %% [markdown]
# ## 3 · The best fit, and what it does not say
#
# How close to $K_t$ can a sum of $R$ outer products come? The singular value decomposition answers this:
#
# $$K_t = \sum_{r} \sigma_r\; u_r \otimes v_r, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0,$$
#
# with orthonormal $u_r \in \mathbb{R}^h$ and orthonormal $v_r \in \mathbb{R}^{d_h}$. **Keeping the first $R$ terms is
# the best fit of rank $R$ there is** (Eckart and Young), and what it misses are exactly the dropped terms: its squared
# error is $\sum_{r>R} \sigma_r^2$.

# %%
u, s, vh = torch.linalg.svd(keys[20], full_matrices=False)
fit = (u[:, :2] * s[:2]) @ vh[:2]  # (h, 2) @ (2, d_h)
torch.testing.assert_close((keys[20] - fit).square().sum(), s[2:].square().sum())

# %% [markdown]
# As a picture, for rank 2: the token's keys, their best fit, and what it misses; below, the two outer products that make
# up the fit, each with its vectors at the margins (the dotted frames are the terms that are left out):


# %%
def fit_of_rank(rank):
    return diagrams.best_fit(keys[20], rank)


looks.show(*fit_of_rank(rank=2))

# %% [markdown]
# Move the rank from 1 to 8 (with the mouse, or with the arrow keys): each further outer product brings back more of the
# keys, and is paler than the one before.

# %%
looks.control(fit_of_rank, rank=(1, 8, 2))

# %% [markdown]
# Now for all tokens. A curve of errors means nothing without something to compare it with, since *every* matrix is
# fitted better by a larger $R$. So we draw the same curve for matrices of pure noise.


# %%
def error_by_rank(matrices):
    """Relative error of the best fit of each rank: √(missed squares / all squares)."""
    energy = torch.linalg.svdvals(matrices).square().sum(0)  # (min(h, d_h),)
    missed = energy.sum() - torch.cat((torch.zeros(1), energy.cumsum(0)))
    return (missed.clamp(min=0) / energy.sum()).sqrt()


noise = torch.randn(2000, n_head, d_head)
errors = {
    "pure noise": error_by_rank(noise),
    "keys of the trained MHA": error_by_rank(keys),
}
print(
    {
        name: [round(error.item(), 2) for error in curve]
        for name, curve in errors.items()
    }
)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
ax.plot(errors["pure noise"], "s--", color=looks.COLOURS[4], label="pure noise")
mha_look = looks.of("mha").line_style()
ax.plot(errors["keys of the trained MHA"], **mha_look, label="keys of the trained MHA")
ax.set(
    xlabel="rank R of the fit (24 numbers per token for each; all of MHA's keys: 128)",
    ylabel="relative error of the best fit",
)
ax.set_title("These keys are hardly easier to fit than noise")
ax.legend(frameon=False)
looks.show(
    fig,
    alt="Relative error of the best fit against its rank, from 1 at rank 0 to 0 at "
    "rank 8. The curve of the trained keys lies only a little below that of pure "
    "noise.",
)

# %% [markdown]
# A sobering picture, and worth a pause. A trained MHA model has been given no reason to keep its keys low-rank, and
# ours does not. Even the best rank-2 fit of each single token's keys has a relative error of about two thirds.
#
# Does that matter to the model? Let us cut its keys *and* values to rank $R$, in both layers, and look at the loss on
# held-out text.


# %%
def cut(flat, R):
    """The best rank-R fit of every token's matrix: (..., h · d_h) -> the same shape."""
    matrices = flat.unflatten(-1, (n_head, d_head))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    return ((u[..., :R] * s[..., None, :R]) @ vh[..., :R, :]).flatten(-2)


cut_loss = {}
for R in (1, 2, 3, 4, 6, 8):
    layers = [block.attention for block in mha.blocks]
    projections = [p for layer in layers for p in (layer.k_proj, layer.v_proj)]
    hooks = [
        p.register_forward_hook(lambda _, __, out, R=R: cut(out, R))
        for p in projections
    ]
    cut_loss[R] = held_out_loss(mha)
    for hook in hooks:
        hook.remove()
looks.table(
    ["cut to rank", *map(str, cut_loss), "uncut"],
    [("loss", *(f"{loss:.2f}" for loss in cut_loss.values()), f"{mha_loss:.2f}")],
    caption="Held-out loss of the MHA model with its keys and values cut",
)

# %% [markdown]
# At full rank nothing is lost, and at rank 1 or 2 a good deal is. **So TPA is not meant as a way to compress a trained
# MHA**, and for this one it would be a poor way. The SVD gives the vocabulary (factors, rank, fit), not the
# justification.
#
# TPA's proposal is another one: make the low rank part of the *model*, so that training can arrange itself with it.
# Nobody needs $K_t$ to be close to what some MHA would have computed; the loss needs to be low.

# %% [markdown]
# ## 4 · Contextual factors: Eq. 3.1
#
# The factors of token $t$ must come from what the layer knows about the token, its hidden state $x_t$. The simplest
# choice: each is a linear map of it, without bias,
#
# $$a_r(x_t) = W^a_r\, x_t \in \mathbb{R}^{h}, \qquad b_r(x_t) = W^b_r\, x_t \in \mathbb{R}^{d_h},
# \qquad r = 1, \dots, R,$$
#
# and the queries are their sum of outer products, divided by $R$ (Eq. 3.1 of the paper):
#
# $$\boxed{\; Q_t = \frac{1}{R_Q} \sum_{r=1}^{R_Q} a^Q_r(x_t) \otimes b^Q_r(x_t) \;}$$
#
# with keys and values likewise, by their own maps and ranks $R_K$ and $R_V$. In words: *the token itself decides which
# heads get which features*. We keep the factors rank-major, as the paper does: $A_Q$ with one row per $a^Q_r$ is
# $R_Q \times h$, and $B_Q$ is $R_Q \times d_h$. In code they are `a` and `b`.

# %%
rank, d_model = 2, config.d_model
W_a = torch.randn(rank * n_head, d_model, dtype=torch.float64) / math.sqrt(d_model)
W_b = torch.randn(rank * d_head, d_model, dtype=torch.float64) / math.sqrt(d_model)
tokens_in = x[:2, :5].double()  # (batch, T, d_model): 2 sequences, 5 tokens each
a = F.linear(tokens_in, W_a).unflatten(-1, (rank, n_head))  # (batch, T, R, h)
b = F.linear(tokens_in, W_b).unflatten(-1, (rank, d_head))  # (batch, T, R, d_h)
print(a.shape, b.shape)

# %% [markdown]
# Three ways to write the same sum: literally; as an `einsum`; and as a matrix product, because summing $a_{ri} b_{re}$
# over $r$ *is* the product $A^\top B$.

# %% claim="eq-3.1"
literally = torch.zeros(2, 5, n_head, d_head, dtype=torch.float64)
for n in range(2):
    for t in range(5):
        for r in range(rank):
            literally[n, t] += torch.outer(a[n, t, r], b[n, t, r]) / rank
by_einsum = torch.einsum("btrh,btrd->bthd", a, b) / rank
by_product = a.mT @ b / rank
torch.testing.assert_close(by_einsum, literally, rtol=0, atol=1e-12)
torch.testing.assert_close(by_product, literally, rtol=0, atol=1e-12)

# %% [markdown]
# The last one goes into the module. Dividing `b` first is the same thing, only cheaper: there are fewer entries in the
# factor than in the result.

# %% tags=["tpa"]
# {{tpa: assemble}}

# %%
assembled = assemble(a, b)
torch.testing.assert_close(assembled, literally, rtol=0, atol=1e-12)
assert (torch.linalg.matrix_rank(assembled) <= rank).all()

# %% [markdown]
# ### Does training arrange itself with a low rank?
#
# Same backbone, same data, same number of steps and of heads; only the attention of the TPA model of section 1 is another
# one, with $R_Q = 6$, $R_K = R_V = 2$ (the paper's ranks). Its cache holds $(2+2)(8+16) = 96$ numbers per token and
# layer, MHA's $2 \cdot 8 \cdot 16 = 256$. (The layer is built in notebook 05; we borrow it.)

# %%
tpa_loss = held_out_loss(tpa)
count = {"MHA": mha.num_parameters(), "TPA": tpa.num_parameters()}
print(
    "weights:",
    count,
    f" cache: MHA {2 * 8 * 16 / ((2 + 2) * (8 + 16)):.1f} times TPA's",
)
print(
    f"MHA {mha_loss:.2f}, cut to rank 2 {cut_loss[2]:.2f}; TPA of rank 2 {tpa_loss:.2f}"
)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
ax.plot(*zip(*cut_loss.items()), **mha_look, label="MHA, K and V cut after training")
ax.axhline(mha_loss, color=looks.of("mha").colour, ls=":", label="MHA, uncut")
tpa_look = looks.of("tpa").line_style()
ax.plot([2], [tpa_loss], **tpa_look, ms=10, label="TPA, trained with rank 2")
ax.set(
    xlabel="rank of each token's keys and values",
    ylabel="held-out loss (nats per token)",
)
ax.set_title("In this run training with rank 2 beats cutting to rank 2")
ax.legend(frameon=False)
looks.show(
    fig,
    alt="Held-out loss against the rank of keys and values. The curve of the MHA "
    "model that is cut after training falls with the rank to the level of the "
    "uncut one. The point of TPA, trained with rank 2, lies below the curve at "
    "rank 2 and above the uncut level.",
)

# %% [markdown]
# Trained within rank 2, the model does better than an MHA cut to rank 2 afterwards, from the same number of steps and
# with somewhat fewer weights. Take it as an illustration, not as evidence: it is one seed of a toy run of seconds, and
# another seed, rate or number of steps moves such small differences. And TPA does *not* reach the uncut MHA here, which
# caches 2.7 times as much. The paper's comparison at 124M parameters and 50 billion tokens, with as many *parameters* on
# both sides, ends in a tie (46.19 for MHA, 46.21 for TPA; single runs).

# %% [markdown]
# ## 5 · Contextual is not static: LoRA, MLA, and fixed factors
#
# Which matrix is it that has a low rank? The keys of one sequence form a block of $T \times h \times d_h$ numbers (tokens,
# heads, features), which can be cut in three ways. Here are the keys of 24 tokens of the TPA model, and what the singular
# values of one slice of each kind say (a matrix has as many above zero as its rank):

# %% tags=["hide-input"]
sequence = assemble(a_k.double(), b_k.double())[0, :24]  # (T, h, d_h)
looks.show(
    diagrams.cube(sequence, rank=2),
    alt="A cube of keys, 24 tokens deep, 8 heads high and 16 features wide, with a "
    "slice of each kind outlined. The slice of one token, heads by features, has "
    "2 singular values above zero. That of one head, tokens by features, has 16, "
    "and that of one feature, tokens by heads, has 8: as many as fit.",
)

# %%
cuts = {  # the slices, and the unfolding that puts them side by side
    "token": (sequence, sequence.transpose(0, 1).flatten(1)),  # h × (T · d_h)
    "head": (
        sequence.transpose(0, 1),
        sequence.movedim(2, 0).flatten(1),
    ),  # d_h × (T · h)
    "feature": (sequence.movedim(2, 0), sequence.flatten(1)),  # T × (h · d_h)
}

# %%
rank = torch.linalg.matrix_rank
looks.table(
    [
        "one slice for each",
        "slices",
        "size of each",
        "largest rank",
        "unfolding",
        "its rank",
    ],
    [
        (
            name,
            len(slices),
            " × ".join(map(str, slices.shape[1:])),
            int(rank(slices).max()),
            " × ".join(map(str, unfolding.shape)),
            int(rank(unfolding)),
        )
        for name, (slices, unfolding) in cuts.items()
    ],
    caption="Rank of the slices, and of all slices of a kind side by side",
)

# %% [markdown]
# **Only the slice of one token is bounded by $R$**, because only there all rows are combinations of the same $R$ vectors
# $b_r$. One head over the sequence (this is the matrix that a query of that head meets) is made of a *new* pair of
# vectors at each token, so its rank goes as high as its size allows. The unfoldings, which put all slices of a kind side
# by side, have the full rank that their shorter side allows. Low rank for each token is not low rank for the text.
# (Nor does it lower the rank of a head's $T \times T$ table of logits: without RoPE that is a product of a $T \times d_h$ and
# a $d_h \times T$ matrix, so its rank is at most $d_h$ in MHA and in TPA alike.)
#
# Factors are not unique: $(c\,a_r,\; b_r/c)$, or any invertible $R \times R$ mix of the pairs, gives the same matrix. Compare
# assembled matrices between two runs, never factors.
#
# "Low rank" appears in several other methods, and they are easily mixed up. **LoRA** fine-tunes a weight matrix by adding a
# product of two thin ones (here of rank 2), $W + U V$. Its factors $U$ and $V$ are *weights*: the same for all tokens.
# What is short there is the list of trained parameters. Does it make a token's key matrix low-rank? Let us ask, with
# 200 tokens of width 64:

# %% tags=["nbval-check-output"] claim="contextual-vs-static"
xs = torch.randn(200, 64, dtype=torch.float64)
W = torch.randn(64, n_head * d_head, dtype=torch.float64)
U, V = (
    torch.randn(64, 2, dtype=torch.float64),
    torch.randn(2, n_head * d_head, dtype=torch.float64),
)
a = (xs @ torch.randn(64, 2 * n_head, dtype=torch.float64)).unflatten(-1, (2, n_head))
b = (xs @ torch.randn(64, 2 * d_head, dtype=torch.float64)).unflatten(-1, (2, d_head))
stacks = {"full W": xs @ W, "LoRA: W + UV": xs @ (W + U @ V), "UV alone": xs @ U @ V}
stacks["TPA"] = assemble(a, b).flatten(1)
looks.table(
    ["", "one token's keys", "keys of 200 tokens, stacked"],
    [
        (name, int(rank(stack[0].view(n_head, d_head))), int(rank(stack)))
        for name, stack in stacks.items()
    ],
    caption="Rank",
)

# %% [markdown]
# Read the columns separately; they are two different notions of "low rank".
#
# - **LoRA** leaves a token's keys at full rank (8) and the stack at the rank that $d_\text{model}$ allows (64). All 128
#   numbers must be cached: LoRA does nothing for the cache.
# - **UV alone** is MLA's idea (with 2 in place of $d_c$): all tokens' keys are combinations of the same 2 fixed
#   matrices, *each of full rank*. One caches the two coefficients.
# - **TPA** turns it around: each token's matrix has rank 2, but every token has its own, and together they fill all 128
#   dimensions, more than the 64 of $d_\text{model}$.
#
# Which restriction suits a given model better is an empirical question. For the MHA that we trained in section 1 we can
# ask the SVD: how well do its keys fit each kind, at 48 numbers per token?


# %%
def missed(matrix, R):
    """Relative error of the best fit of rank R of one matrix."""
    energy = torch.linalg.svdvals(matrix).square()
    return (energy[R:].sum() / energy.sum()).sqrt().item()


# %%
rotated = apply_rope(
    keys.view(32, 64, n_head, d_head), *mha.blocks[1].attention.rope.tables(0, x)
)
looks.table(
    ["", "relative error"],
    [
        (
            "each token its own rank-2 matrix",
            f"{errors['keys of the trained MHA'][2]:.2f}",
        ),
        (
            "3 head factors fixed for all tokens",
            f"{missed(keys.mT.flatten(0, 1), 3):.2f}",
        ),
        (
            "one fixed 48-dimensional space, as MLA's",
            f"{missed(keys.flatten(1), 48):.2f}",
        ),
        (
            "the same, for rotated keys",
            f"{missed(rotated.flatten(0, 1).flatten(1), 48):.2f}",
        ),
    ],
    caption="Best fit of the trained MHA's keys with 48 numbers per token",
)

# %% [markdown]
# Own factors for each token fit a little better than head factors that are fixed for all; the paper calls the latter
# *non-contextual A*, trains it too and finds it weaker (small size, zero-shot: 45.03 against 46.21). But by far the
# best fit of *this* MHA's keys is a fixed subspace across all heads. That suits them: they are linear in $x_t$, which
# has 96 entries, so all keys lie in 96 dimensions, and 48 are half of what is possible. To convert *this*
# MHA, look at MLA first. TPA is meant to be trained as TPA. (All this is before RoPE. Rotated keys do not lie in one
# such space, as the last row shows. So MLA has to keep its latent unrotated; notebook 03, section 7.)

# %% [markdown]
# ## 6 · The configuration, and the parameters counted
#
# All sizes of a model live in one immutable object that says no to what cannot work: a mistake in a size is cheapest to
# find before the model exists. Note that $h \cdot d_h$ need **not** equal $d_\text{model}$: TPA often has many more heads
# than MHA could pay for. (SwiGLU, whose width is `d_ff`, is the feed-forward part of a block: notebook 07.)

# %% tags=["tpa"]
# {{tpa: T6Config}}

# %% [markdown]
# Two things to notice. `frozen=True` means that nobody can change a size behind the model's back, which is why the
# default of `d_ff` is put in by `object.__setattr__`. And each complaint names the value, the rule and a way out:

# %%
try:
    T6Config(vocab_size=100, n_layer=1, d_model=96, n_head=8, d_head=15)
except ValueError as error:
    print(error)

# %% [markdown]
# Now count the layer's weights. Queries, keys and values each have $R$ maps from $d_\text{model}$ to $h$ and $R$ from
# $d_\text{model}$ to $d_h$. The output projection takes the concatenated heads back:
#
# $$d_\text{model}\,(R_Q + R_K + R_V)(h + d_h) \;+\; d_\text{model}\, h\, d_h .$$

# %% claim="table-1-parameters"
small = T6Config.preset("small-124M")
ranks = small.rank_q + small.rank_k + small.rank_v
factors = small.d_model * ranks * (small.n_head + small.d_head)
output = small.d_model * small.n_head * small.d_head
layer = TensorProductAttention(small)
assert sum(p.numel() for p in layer.parameters()) == factors + output
print(f"factors {factors:,} + output {output:,} = {factors + output:,}")
print(f"MHA with 12 heads: {4 * 768**2:,}")

# %% [markdown]
# That is how the paper arrives at 34 heads for its small model: the factor maps are so small that 34 heads of width 64
# cost about as much as MHA's 12. Most of the weights now sit in the output projection.

# %% [markdown]
# ## 7 · How large should the numbers be at the start?
#
# A product of two random factors is a touchy thing. Let us follow the variance from the weights to the logits, for a
# hidden state whose entries have mean square 1 (it comes out of an RMSNorm).
#
# **Weights.** Uniform on $(-\beta, \beta)$, which has variance $\beta^2/3$. Xavier's rule, meant to keep variances
# alike from layer to layer, sets $\beta = \sqrt{6 / (n_\text{in} + n_\text{out})}$.
#
# **Factors.** An entry of $a$ sums $d_\text{model}$ products of a weight and an entry of $x$, so
# $\operatorname{var} a = d_\text{model}\, \beta_a^2 / 3$. The same for $b$, with its own $\beta_b$.
#
# **Queries.** An entry of $Q_t$ is $\frac1R \sum_r a_r b_r$: a sum of $R$ independent terms of variance
# $\operatorname{var} a \cdot \operatorname{var} b$ each, divided by $R$. So
#
# $$\operatorname{var} Q = \frac{1}{R^2} \cdot R \cdot \operatorname{var} a \,\operatorname{var} b
# = \frac{\operatorname{var} a \, \operatorname{var} b}{R}.$$
#
# The division makes the sum a *mean*, so more ranks give smaller queries, not larger ones. From there to the logits is
# exercise 4; here we measure.
#
# Which $n_\text{in}$ and $n_\text{out}$? App. G of the paper takes the layer's own: $n_\text{in} = d_\text{model}$, and
# $n_\text{out} = R h$ or $R d_h$, all ranks being one matrix. The authors' code computes smaller bounds, for a reason
# that the appendix of this notebook explains. We offer both, the paper's formula being the default. A smaller start is
# a choice that many models make; one only has to know which one runs.

# %% tags=["tpa"]
# {{tpa: factor_bound}}

# %% [markdown]
# ### Measured in the real layer
#
# The paper's small size, 256 random tokens: the standard deviation of $q \cdot k / \sqrt{d_h}$ with either
# initialization, each also with the two divisions by $R$ left out.


# %%
def logits_at_the_start(init):
    """The logits of a new layer, before any training: (h, T, T)."""
    torch.manual_seed(0)
    config = T6Config.preset("small-124M", init=init)
    with torch.no_grad():
        x = rms_norm(torch.randn(1, 256, 768))
        a_q, b_q, a_k, b_k, _, _ = TensorProductAttention(config).factors(x)
    q, k = assemble(a_q, b_q), assemble(a_k, b_k)
    return torch.einsum("bthd,bshd->hts", q, k) / math.sqrt(config.d_head)


# %%
start = {"authors' code": logits_at_the_start("authors")}
start["paper, App. G"] = logits_at_the_start("paper")
for name, logits in list(start.items()):
    start[f"{name}, without 1/R"] = logits * 6 * 2  # R_Q for queries, R_K for keys
looks.table(
    ["", "standard deviation"],
    [(name, f"{logits.std():.3f}") for name, logits in start.items()],
    caption="Logits of a new layer of the paper's small size",
)

# %% [markdown]
# What does that mean for attention? Sort the weights that a query gives to 256 keys from the largest to the smallest,
# and average over all queries and heads:

# %% tags=["hide-input"]
fig, ax = plt.subplots()
for (name, logits), line in zip(start.items(), ("-", "--", ":", "-.")):
    weights = logits.softmax(-1).sort(-1, descending=True).values.mean((0, 1))  # (256,)
    ax.loglog(range(1, 257), weights, line, label=name)
ax.set(xlabel="keys, from the most to the least attended", ylabel="attention weight")
ax.set_ylim(1e-5, 1.5)
ax.set_title("With App. G's bounds and no 1/R, attention is decided before training")
ax.legend(frameon=False, loc="lower left")
looks.show(
    fig,
    alt="Attention weight against the order of the keys. With the authors' bounds "
    "both curves are flat at one in 256. With App. G's the curve falls gently; "
    "without 1/R it falls steeply from near 1: a single key takes most of the "
    "weight.",
)

# %% [markdown]
# With the authors' start every key gets about 1/256, with the $1/R$ or without: attention begins as a plain average.
# With the paper's formula it leans, but no key dominates. Leave the $1/R$ out there, and a single key takes most of the
# weight, by chance; a softmax that is nearly one-hot passes hardly any gradient to the others.
#
# Does that harm? We train the small model of section 1 for 100 steps, with App. G's bounds, with the division and
# without it:


# %%
class WithoutDivision(TensorProductAttention):
    """TPA whose queries, keys and values are sums of outer products, not means."""

    def factors(self, x, start=0, rope=None):
        a_q, b_q, a_k, b_k, a_v, b_v = super().factors(x, start, rope)
        c = self.config
        return a_q * c.rank_q, b_q, a_k * c.rank_k, b_k, a_v * c.rank_v, b_v


curves, ends = {}, {}
for name, attention in (("1/R", TensorProductAttention), ("no 1/R", WithoutDivision)):
    model, curves[name] = train(attention, steps=100)
    ends[name] = held_out_loss(model)
print(
    {name: f"held-out loss {loss:.2f} after 100 steps" for name, loss in ends.items()}
)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
for (name, losses), line, colour in zip(curves.items(), ("-", "--"), looks.COLOURS):
    ax.plot(range(1, 101), losses, line, color=colour, label=name)
ax.set(xlabel="step", ylabel="loss on the training batch (nats per token)")
ax.set_title("The same rate and batches: without 1/R it learns later and less")
ax.legend(frameon=False)
looks.show(
    fig,
    alt="Training loss over 100 steps. With 1/R it falls quickly to between 2 and 3 "
    "nats. Without, it stays far above for all 100 steps.",
)

# %% [markdown]
# At this learning rate the model without the division stays far behind: its attention has decided before it has learned
# what to look at. That is no proof that it cannot be trained; a smaller start, such as the authors', or another rate may
# do in place of the $1/R$. With App. G's bounds the division is what makes the start gentle.
#
# Forget $1/R$ in queries and keys of a *trained* model, and its logits are $R_Q R_K$ times too large; divide twice, and they
# are as much too small. A model trained from scratch may learn with either, so only a comparison with a reference finds
# the mistake: test with three *different* ranks, and with an output projection that is not zero.
#
# The division costs no generality: in notebook 04 MHA is exactly a TPA whose head factors are fixed, and its constants
# simply undo the $1/R$.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · The best factors (★★☆, 10 minutes)
#
# Return factors `a` (R, h) and `b` (R, d_h) for which `assemble(a, b)` is the best rank-`R` fit of a matrix (h, d_h).
#
# <details><summary>Hint 1</summary>
#
# Which rank-$R$ matrix is nearest to a given one? Section 3 cut off a singular value decomposition.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `u, s, vh = torch.linalg.svd(matrix, full_matrices=False)`: the best fit is $\sum_{r<R} s_r\, u_r v_r^\top$. Factors
# are rank-major: one row per $r$.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `assemble` divides by $R$, so somewhere a factor $R$ must come in, once; and so must $s$.
#
# </details>


# %% tags=["exercise"]
def best_factors(matrix, R):
    raise NotImplementedError


# %% tags=["solution"]
def best_factors(matrix, R):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a = (u[:, :R] * s[:R]).mT  # (R, h), with the sizes
    return R * a, vh[:R]  # times R, because assemble divides by it


# %%
checks.ex02_1(best_factors)

# %% [markdown]
# ### Exercise 2 · When does it pay? (★☆☆, 5 minutes)
#
# MHA with `h` heads caches $2 h d_h$ numbers per token. TPA with as many heads and $R_K = R_V = R$ caches its factors.
# Return the largest whole `R` for which TPA caches *less*, or 0 if there is none.
#
# <details><summary>Hint 1</summary>
#
# Write down both caches per token: $2hd_h$ for MHA, and for TPA $2R$ times what?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $R(h + d_h) < hd_h$. The largest whole number *below* a fraction $p/q$ is `(p - 1) // q`.
#
# </details>


# %% tags=["exercise"]
def largest_rank_that_saves(h, d_h):
    raise NotImplementedError


# %% tags=["solution"]
def largest_rank_that_saves(h, d_h):
    return (h * d_h - 1) // (
        h + d_h
    )  # R (h + d_h) < h d_h; the factor 2 stands on both sides


# %%
checks.ex02_2(largest_rank_that_saves)

# %% [markdown]
# ### Exercise 3 · Is TPA a linear map? (★★☆, 10 minutes)
#
# A linear map of the hidden state $x$ doubles when $x$ is doubled: $f(cx) = c^1 f(x)$. Others grow with another power,
# $f(cx) = c^n f(x)$ for $c > 0$. First write down, by thought, the power $n$ of an entry of $K$ in MHA and in TPA; of a
# logit $q \cdot k$ in MHA, in TPA, and where only the keys are factorized. Then write a function that finds $n$ by
# experiment, for any such `function` of a tensor `x`; the checker tries it on all five, and tells you if your function
# and its own disagree. (And what does an even $n$ say about $-x$?)
#
# <details><summary>Hint 1</summary>
#
# How much longer does `function(2 * x)` get than `function(x)`, if the function is linear? If it is a product of two
# linear maps?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# If $f(cx) = c^n f(x)$, then $|f(2x)|/|f(x)| = 2^n$. Take a logarithm.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `math.log2((function(2 * x).norm() / function(x).norm()).item())`.
#
# </details>


# %% tags=["exercise"]
def power(function, x):
    raise NotImplementedError


# %% tags=["solution"]
def power(function, x):
    return math.log2((function(2 * x).norm() / function(x).norm()).item())
    # K: 1 in MHA and 2 in TPA, which no static low-rank weight can imitate.
    # Logits: 2, 4, and 3 with linear queries.
    # Even: Q, K and V of TPA cannot tell x from -x.


# %%
checks.ex02_3(power)

# %% [markdown]
# ### Exercise 4 · Predict the logits (★★★, 20 minutes)
#
# Section 7 measured the standard deviation of $q \cdot k / \sqrt{d_h}$ at the start. Predict it: go on from the
# variances of $Q$ and $K$, for any `config` (either `init`), with `factor_bound`. Entries of $x$ have mean square 1,
# and $q$ and $k$ are independent since they come from different weights.
#
# <details><summary>Hint 1</summary>
#
# Work forwards: the variance of an entry of $a$, then of an entry of $q$, then of the logit.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# An entry of $a$ sums $d_\text{model}$ products of independent numbers; a weight uniform on $(-\beta, \beta)$ has
# variance $\beta^2/3$. So $\operatorname{var} a = d_\text{model}\,\beta^2/3$, and the same for $b$ with its own
# $\beta$.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# $q = \frac1R\sum_r a_r b_r$ has $\operatorname{var} q = \operatorname{var} a \operatorname{var} b / R$. A logit sums
# $d_h$ products and is divided by $\sqrt{d_h}$: its variance is $\operatorname{var} q \operatorname{var} k$.
#
# </details>


# %% tags=["exercise"]
def logit_std(config):
    raise NotImplementedError


# %% tags=["solution"]
def logit_std(config):
    variance = 1.0  # of q · k / √d_h: d_h products of variance var(q) var(k), over d_h
    for rank in (config.rank_q, config.rank_k):
        var_a = (
            config.d_model * factor_bound(config, rank, config.n_head, True) ** 2 / 3
        )
        var_b = (
            config.d_model * factor_bound(config, rank, config.d_head, False) ** 2 / 3
        )
        variance *= var_a * var_b / rank
    return math.sqrt(variance)


# %%
checks.ex02_4(logit_std)

# %% [markdown]
# ## Appendix · The fan-in of a three-dimensional view
#
# Why are the authors' bounds smaller? Their code hands torch a *three-dimensional view* of each weight. Torch takes all
# axes after the second as a "receptive field", which it multiplies into both the fan-in and the fan-out:

# %% claim="app-g-initialization"
d_model, h, d_h, R = 128, 8, 32, 6
bounds = []
for name, shape in (("a", (d_model, h, R)), ("b", (d_model, R, d_h))):
    width = h if name == "a" else d_h
    as_matrix = nn.init.xavier_uniform_(torch.empty(d_model, R * width)).abs().max()
    as_view = nn.init.xavier_uniform_(torch.empty(shape)).abs().max()
    bounds.append((f"W_{name} of the queries", f"{as_matrix:.3f}", f"{as_view:.3f}"))
looks.table(
    ["", "App. G", "three-dimensional view"],
    bounds,
    caption="Largest entry of a new weight",
)

# %% [markdown]
# The last axis of their view is the rank for a head factor and the feature for a feature factor. (`n_out` already
# contains `rank * width`, so only `n_in` changes.) `factor_bound` agrees with what torch does:

# %%
small_sizes = dict(n_layer=1, d_model=d_model, n_head=h, d_head=d_h, rank_q=R)
for init in ("paper", "authors"):
    c = T6Config(vocab_size=100, init=init, **small_sizes)
    of_a, of_b = factor_bound(c, R, h, True), factor_bound(c, R, d_h, False)
    print(f"{init:8} {of_a:.3f} for W_a, {of_b:.3f} for W_b")

# %% [markdown]
# ## Summary
#
# - A token's queries, keys or values form an $h \times d_h$ matrix. An outer product $a \otimes b$ is "which heads" times
#   "which features"; the rank counts how many of them are needed.
# - TPA computes the factors by linear maps of the token, $Q_t = \frac1{R_Q} A_Q(x_t)^\top B_Q(x_t)$, and K and V
#   likewise: at most rank $R$ for each token, another matrix for each token.
# - It is not a compression of a trained MHA (whose keys need not be low-rank), not LoRA (whose factors are the same for
#   all tokens), and not MLA (one subspace for all tokens).
# - The layer has $d_\text{model}(R_Q+R_K+R_V)(h+d_h) + d_\text{model} h d_h$ weights. $1/R$ and the initialization
#   decide how sharp attention is before training.
#
# **Next:** [03 · RoPE and pre-rotation](03_rope_and_prerotation.ipynb): positions, and why the factor $B$ alone has to
# carry them.
