# %% [markdown]
# # 03 · RoPE and pre-rotation
#
# {badge}
#
# **You will be able to**
#
# - derive rotary position embedding (RoPE) from rotations of a plane, and say which features are paired and which way
#   they rotate;
# - prove Theorem 3.1 of the TPA paper in three lines and see it hold to rounding;
# - explain why a TPA cache holds keys that are already rotated, and why nothing in it is ever rotated again;
# - recognise three common RoPE mistakes by their numbers;
# - say why MLA needs a separate rotated part and TPA does not.
#
# **You need** notebook 02 (the factors A and B, and `assemble`), and matrix products.
#
# **Time** about 100 minutes to read and do; the code runs in at most 40 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# ## 1 · Attention cannot count
#
# Take a query and a set of keys and values, and shuffle the keys together with their values.
# The logits are shuffled in the same way, softmax does not mind, and the weighted sum is the same sum.

# %%
import math
from typing import NamedTuple

import matplotlib.pyplot as plt
from torch import Tensor
from torch.testing import assert_close

from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.tpa import assemble

looks.style()
_ = torch.manual_seed(3)

# %%
q, k, v = (
    torch.randn(8).double(),
    torch.randn(6, 8).double(),
    torch.randn(6, 8).double(),
)
order = torch.randperm(6)
in_order = (q @ k.T).softmax(-1) @ v
shuffled = (q @ k[order].T).softmax(-1) @ v[order]
assert_close(in_order, shuffled)
print("keys taken in the order", order.tolist(), "give the same output")

# %% [markdown]
# So, in one layer, a full stop sees the same after "dog bites man" as after "man bites dog". The position must be put
# in somewhere. (Several causal layers can guess some of it from the mask; we do not want to depend on that.) What
# should it do? Three wishes:
#
# 1. **Relative.** The logit of a query at position $t$ with a key at position $s$ should depend on the two vectors and
#    on the distance $t-s$, not on where in the text the pair stands.
# 2. **Separate.** The query must be treated knowing only $t$, the key knowing only $s$. Otherwise a key could not be
#    prepared once and cached: each new query would want its own version.
# 3. **Harmless.** No vector should become longer or shorter because of where it stands.
#
# Rotations fulfil all three, and RoPE (Su et al., 2021) is exactly that: rotate the query by an angle proportional to
# $t$, the key by an angle proportional to $s$.

# %% [markdown]
# ## 2 · One plane
#
# Begin with vectors of two features. The paper writes vectors as **rows**, and so do we: `x` has shape `(..., d_h)` and
# a matrix acts on it from the *right*. With an angle $\theta$ per position (the paper writes $T_t$ for our $\Theta_t$; in
# this course $T$ is the number of new tokens),
#
# $$ \mathrm{RoPE}_t(q) = q\,\Theta_t, \qquad
# \Theta_t = \begin{pmatrix} \cos t\theta & -\sin t\theta \\ \sin t\theta & \cos t\theta \end{pmatrix}. $$


# %%
def rotation(angle: float) -> Tensor:
    """The 2 × 2 matrix Θ whose product x Θ rotates the row vector x."""
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


# %%
theta = 0.3
x = torch.tensor([1.0, 0.0], dtype=torch.float64)
print("x Θ_1 =", (x @ rotation(theta)).tolist())

# %% [markdown]
# The second feature became *negative*: the arrow rotated **clockwise**. You may know this matrix as the one that rotates
# counter-clockwise; it does, when it acts on a column vector from the left. A row vector meets its transpose, which is
# the inverse rotation.
#
# Does the sense of rotation matter? Not for what a model can learn, as long as queries and keys rotate the same way. It
# matters as soon as you load somebody else's weights: much code for LLaMA rotates the other way.


# %%
def arrow(ax, vector, label, **style):
    style = dict(arrowstyle="-|>", lw=2, shrinkA=0, shrinkB=0, **style)
    ax.annotate("", vector, (0, 0), arrowprops=style)
    side = "left" if vector[0] > 0.5 else "right" if vector[0] < -0.5 else "center"
    ax.text(*(1.15 * torch.as_tensor(vector)).tolist(), label, ha=side, va="center")


# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.7))
for t in range(6):
    arrow(axes[0], (x @ rotation(t * theta)).tolist(), f"t={t}", color="black")
axes[0].set_title("Position t rotates a vector by tθ")
q, k = x, 0.85 * x @ rotation(-0.5)
for shift, shade in ((0, "black"), (8, "0.55")):
    t, s = 2 + shift, 0 + shift
    q_t, k_s = q @ rotation(t * theta), k @ rotation(s * theta)
    arrow(axes[1], q_t.tolist(), f"q, t={t}", color=shade)
    arrow(axes[1], k_s.tolist(), f"k, s={s}", color=shade, linestyle="--")
axes[1].set_title("Shift both by 8: same angle between")
for ax in axes:
    ax.set(xlim=(-1.8, 1.6), ylim=(-1.35, 0.85), aspect="equal")
    ax.set(xlabel="feature 1", ylabel="feature 2")
looks.show(
    fig,
    alt="Left: one vector at positions 0 to 5, each rotated clockwise by the same "
    "angle more. Right: a query and a key two positions apart, at the start of "
    "the text and eight tokens later: both have been rotated, and the angle "
    "between them is the same.",
)

# %% [markdown]
# On the left, one vector at six positions. On the right, a query (solid) and a key (dashed) two positions apart, at the
# start of the text (black) and eight tokens later (grey): both have rotated, but by the same angle, so their lengths and
# the angle between them are what they were. A dot product depends on nothing else. In symbols, rotating by $t$ steps and
# back by $s$ steps is rotating by $t-s$ steps:
#
# $$ \Theta_t\,\Theta_s^\top = \Theta_{t-s} \qquad\text{and so}\qquad
# (q\,\Theta_t)(k\,\Theta_s)^\top = q\,\Theta_t \Theta_s^\top k^\top = q\,\Theta_{t-s}\,k^\top . $$

# %%
for t, s in ((2, 0), (10, 8), (1002, 1000)):
    assert_close(rotation(t * theta) @ rotation(s * theta).T, rotation((t - s) * theta))
    dot = (q @ rotation(t * theta)) @ (k @ rotation(s * theta))
    print(f"t={t:4d}, s={s:4d}: dot product {dot:.12f}")

# %% [markdown]
# Three pairs of positions, one distance, one dot product. Wishes 1 and 2 are fulfilled together: each side was rotated
# knowing only its own position.
#
# ## 3 · Many planes, many speeds
#
# One plane is a clock with one hand: after a full circle, distance 0 and distance $2\pi/\theta$ look the same. So RoPE
# cuts the $d_h$ features of a head into $d_h/2$ planes, and gives each plane its own speed. Here are a query and a key of 8
# features, so of 4 planes, 5 tokens apart, while the pair moves through the text:

# %%
q8 = torch.tensor([0.9, 0.2, -0.8, 0.7, 0.3, 0.9, 0.5, 0.6])
k8 = torch.tensor([0.4, 0.8, -0.3, 0.9, 0.6, -0.4, 0.8, -0.2])


def planes(position, distance):
    return diagrams.rope_planes(q8, k8, position, distance)


# %% tags=["hide-input"]
frames = (planes(position, 5)[0] for position in range(5, 18))
looks.animate(frames, alt="An animation of the next picture: " + planes(17, 5)[1])

# %% [markdown]
# The hands of the first dial race, those of the last hardly move, but in each dial the angle *between* query and key
# stays, and so does the dot product below. The same as a still picture, and with controls: move the position, and nothing
# happens to the sum; move the distance, and it changes. (At distance 0 all rotations cancel: what is left is the dot
# product of the two vectors themselves.)

# %%
looks.show(*planes(position=12, distance=5))

# %%
looks.control(planes, position=(0, 100, 12), distance=(0, 20, 5))

# %% [markdown]
# In a formula, plane $j$ has the speed
#
# $$ \theta_j = \mathrm{base}^{-2j/d_h}, \qquad j = 0, \dots, d_h/2 - 1, \qquad \mathrm{base} = 10000. $$
#
# In words: the first plane rotates by one radian per token, and each later plane is slower by a constant factor.

# %%
d_head, base = 32, 10000.0
theta = base ** (-2 * torch.arange(d_head // 2).double() / d_head)  # (d_h/2,)

# %% tags=["hide-input"]
distance = torch.arange(0, 101)
fig, axes = plt.subplots(3, 1, figsize=(7, 3.4), sharex=True)
for ax, j in zip(axes, (0, 4, 15)):
    ax.plot(distance, (distance * theta[j]).cos(), lw=1.2)
    circle = 2 * math.pi / theta[j]
    ax.set_title(f"plane j={j}: full circle in {circle:,.0f} tokens", fontsize=10)
    ax.set(ylim=(-1.15, 1.15), yticks=(-1, 0, 1))
axes[-1].set_xlabel("distance t − s in tokens")
fig.supylabel("cos((t − s) θⱼ)", fontsize=10)
title = "Fast planes tell neighbours apart; the slowest hardly moves in 100 tokens"
fig.suptitle(title, x=0.02, ha="left", fontsize=12)
looks.show(
    fig,
    alt="The cosine of distance times speed for three of 16 planes, over 100 tokens: "
    "plane 0 swings many times, plane 4 one and a half times, plane 15 stays at "
    "1.",
)

# %% [markdown]
# Together the planes work like the hands of a clock: seconds, minutes, hours. The slowest of the sixteen has hardly
# moved after 100 tokens.
#
# ### Which two features make a plane?
#
# Two layouts are in use, and mixing them up is a common RoPE mistake:
#
# - **half-split** (this course, the authors' training code): feature $j$ is paired with feature $j + d_h/2$;
# - **interleaved** (the RoFormer paper; the block-diagonal matrix as the TPA paper prints it): feature $2j$ is paired
#   with feature $2j+1$.

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 1, figsize=(7, 3.6))
pairs = {"half-split: j with j + d_h/2 (this course)": [(j, j + 4) for j in range(4)]}
pairs["interleaved: 2j with 2j + 1"] = [(2 * j, 2 * j + 1) for j in range(4)]
for ax, (name, couples) in zip(axes, pairs.items()):
    for j, (left, right) in enumerate(couples):
        height = 0.5 + 0.28 * j if right - left > 1 else 0.8
        bracket = [0.3, height, height, 0.3]
        ax.plot([left, left, right, right], bracket, color="black", lw=1.3)
        middle = dict(ha="center", va="center")
        white, grey = (
            dict(fc="white", ec="none", pad=1),
            dict(boxstyle="square,pad=0.45", fc="0.92"),
        )
        ax.text(left + 0.5, height, f"$θ_{j}$", bbox=white, **middle)
        for place in (left, right):
            ax.text(place, 0, place, bbox=grey, **middle)
    ax.set(xlim=(-1, 8), ylim=(-0.4, 1.7), title=name)
    ax.axis("off")
title = "The same rotations, two seating plans for 8 features"
fig.suptitle(title, x=0.02, ha="left", fontsize=12)
looks.show(
    fig,
    alt="Features 0 to 7 in a row, joined in pairs. Half-split: 0 with 4, 1 with 5, 2 "
    "with 6, 3 with 7. Interleaved: 0 with 1, 2 with 3, 4 with 5, 6 with 7.",
)

# %% [markdown]
# The layouts differ by a fixed permutation of the features. A model trained from scratch does not care, because the
# projection weights can learn either order. Trained weights do care: they fit one layout only. Half-split is convenient
# in code, since the two members of all planes are two contiguous halves.
#
# ### Writing it
#
# First the tables. Each position needs $d_h/2$ angles; we keep their cosines and sines.

# %% tags=["nbval-check-output"]
positions = torch.arange(5)
angles = positions.double()[:, None] * theta  # (T, d_h/2)
cos, sin = angles.cos(), angles.sin()
print(cos.shape, sin.shape)

# %% [markdown]
# Then the rotation. For one plane, writing out the row $(x_1, x_2)$ times $\Theta_t$ gives
#
# $$ (x_1, x_2)\,\Theta_t = (x_1 \cos t\theta + x_2 \sin t\theta,\;\; x_2 \cos t\theta - x_1 \sin t\theta), $$
#
# and in the half-split layout `x1` and `x2` are simply the two halves of the vector. All planes at once:

# %%
x = torch.randn(5, d_head).double()  # one vector per position
x1, x2 = x.chunk(2, dim=-1)  # each (T, d_h/2)
rotated = torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)
assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
before, after = x[3].norm().item(), rotated[3].norm().item()
print("length before and after, position 3:", before, after)

# %% [markdown]
# Wish 3: nothing got longer or shorter. These few lines become the two functions of the module, with axes for the batch
# and for heads or ranks; and a small class says which rotation a layer applies, and to which positions:

# %% tags=["tpa"] claim="sec-3.2-rope"
# {{tpa: rope_tables RoPE apply_rope}}

# %% [markdown]
# Four things to notice. (In the shapes there, `B` is the batch.)
#
# - `positions` are **absolute** positions in the text. While decoding, the new token's position is the number of tokens
#   before it, not 0.
# - The angle is computed in float64 and the tables are handed out in float32. We come back to this below: an angle of
#   100,000 radians in float32 has few digits left after the decimal point.
# - `RoPE` is a value, two numbers: layers whose rotations are equal can share the tables of a forward pass.
# - `cos[:, None]` gives the tables a middle axis of length 1. That axis of `x` may be the heads of an assembled query,
#   or the *ranks* of a factor: every row of one token is rotated alike. The theorem below lives on this line.
#
# Is it the matrix of the paper? Build $\Theta_t$ explicitly, in our layout, and compare.


# %%
def rope_matrix(t, width=d_head):
    """Θ_t as an explicit d_h × d_h matrix in the half-split layout."""
    cos, sin = rope_tables(torch.tensor([t]), width, base, torch.float64)
    cos, sin = cos[0].diag(), sin[0].diag()
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)), 0)


# %%
positions = torch.tensor([0, 1, 17, 1000])
x = torch.randn(2, 4, 3, d_head).double()  # (B, T, any, d_h)
by_function = apply_rope(x, *rope_tables(positions, d_head, base, torch.float64))
rows = [x[:, n] @ rope_matrix(t) for n, t in enumerate(positions.tolist())]
by_matrix = torch.stack(rows, dim=1)
assert_close(by_function, by_matrix)
assert_close(rope_matrix(17) @ rope_matrix(5).T, rope_matrix(12))
difference = (by_function - by_matrix).abs().max().item()
print("apply_rope(x) equals x Θ_t; largest difference", difference)

# %% [markdown]
# ## 4 · Theorem 3.1: rotate the factor, not the product
#
# Now TPA. The queries of one token are an $h \times d_h$ matrix, $Q_t = \frac1{R_Q} A_Q^\top B_Q$, with one *row* per
# head. RoPE rotates the query of every head by the same $\Theta_t$. Must we assemble the $h$ rows first, and rotate each? The
# product of three matrices can be taken in two orders. For keys, with 6 heads, rank 2 and 12 features:

# %% tags=["hide-input"]
a, b = torch.randn(2, 6).double(), torch.randn(2, 12).double()
looks.show(
    diagrams.two_orders(
        (a.T / 2, b, rope_matrix(7, width=12)),
        ("$A_K^⊤/R_K$", "$B_K$: 2 × 12", "$Θ_t$: 12 × 12", "RoPE$_t(K_t)$: 6 × 12"),
        ("cached", "shown", "shown", "never built"),
        ("never built", "keys first: 6 rows to rotate,\n72 numbers to cache"),
        (
            "cached",
            "factor first: 2 rows to rotate,\ncached as they are, never rotated again",
        ),
    ),
    alt="Three matrices multiplied: the head factors, 6 by 2, the feature factors, 2 "
    "by 12, and the rotation, 12 by 12, give the rotated keys, 6 by 12. Above: "
    "the first two first, 6 rows of keys that are then rotated. Below: the last "
    "two first, 2 rotated rows, cached.",
)

# %% [markdown]
# **Theorem 3.1.** $\;\mathrm{RoPE}_t(Q_t) = \frac{1}{R_Q}\, A_Q^\top\, (B_Q \Theta_t)$.
#
# *Proof.*
#
# 1. Rotating each row of $Q_t$ by $\Theta_t$ is one matrix product: $\mathrm{RoPE}_t(Q_t) = Q_t \Theta_t$.
# 2. Put in the factorization: $Q_t \Theta_t = \bigl(\frac{1}{R_Q} A_Q^\top B_Q\bigr) \Theta_t$.
# 3. Matrix products may be bracketed as we like:
#    $\bigl(\frac{1}{R_Q} A_Q^\top B_Q\bigr) \Theta_t = \frac{1}{R_Q} A_Q^\top (B_Q \Theta_t)$. $\;\blacksquare$
#
# In words: $A_Q$ mixes *heads* from the left, $\Theta_t$ rotates *features* from the right, and the two never meet.
#
# Now see it hold, for a batch of random factors in float64:

# %% claim="theorem-3.1"
batch, T, R, h = 2, 12, 2, 6
a = torch.randn(batch, T, R, h).double()
b = torch.randn(batch, T, R, d_head).double()
tables = RoPE(d_head, base).tables(0, b)  # those of positions 0 to 11

rotate_the_product = apply_rope(assemble(a, b), *tables)  # h rows per token
rotate_the_factor = assemble(a, apply_rope(b, *tables))  # R rows per token
assert_close(rotate_the_product, rotate_the_factor)
difference = (rotate_the_product - rotate_the_factor).abs().max()
print(f"largest difference {difference:.1e} on entries of size ~1")
print(f"rows rotated per token: {h} or {R}")

# %% [markdown]
# The same function, computed in another order. Which of the two an implementation does makes no difference to the
# result; it decides what can be cached. TPA caches $B_K \Theta_s$, the **pre-rotated** key factor. Key $s$ was at position
# $s$ when it was written and will be at position $s$ for ever, so its rotation is final. Nothing in the cache is ever
# rotated again.
#
# The value factor $B_V$ is *not* rotated: positions belong in the logits, which decide *where* to look, and values are
# *what* is found there.
#
# ## 5 · What attention sees: distances only
#
# Put the two halves together. With $\tilde Q_t = Q_t \Theta_t$ and $\tilde K_s = K_s \Theta_s$ (both $h \times d_h$),
#
# $$ \tilde Q_t\,\tilde K_s^\top = Q_t\,\Theta_t \Theta_s^\top K_s^\top = Q_t\,\Theta_{t-s}\,K_s^\top , $$
#
# and the logits are the diagonal of this matrix (head $i$ with head $i$) over $\sqrt{d_h}$. Here is attention with
# switches: which factors to rotate, and where the text starts.


# %%
def attend(factors, start=0, rotate="qk", table_dtype=torch.float64):
    """Logits (batch, h, T, T), output (batch, T, h, d_h), from position `start` on."""
    a_q, b_q, a_k, b_k, a_v, b_v = factors
    tables = [table.to(table_dtype) for table in RoPE(d_head, base).tables(start, b_q)]
    b_q, b_k, b_v = (
        apply_rope(b, *tables) if name in rotate else b
        for name, b in zip("qkv", (b_q, b_k, b_v))
    )
    q, k, v = assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v)
    logits = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d_head)
    ahead = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(ahead, -math.inf).softmax(-1)
    return logits, torch.einsum("bhts,bshd->bthd", weights, v)


# %%
def random_factors(n_tokens, n_different):
    """Six random factors; n_different = 1 puts the same token at every position."""
    shapes = [(rank, width) for rank in (6, 2, 2) for width in (h, d_head)]
    factors = [torch.randn(1, n_different, *shape).double() for shape in shapes]
    return [factor.expand(1, n_tokens, -1, -1) for factor in factors]


# %% [markdown]
# Move the whole text by 1,000 positions. The logits and the outputs should not notice:

# %% claim="relative-positions"
factors = random_factors(n_tokens=64, n_different=64)
logits, out = attend(factors)
logits_later, out_later = attend(factors, start=1000)
assert_close(logits_later, logits, rtol=0, atol=1e-10)
assert_close(out_later, out, rtol=0, atol=1e-10)
print(f"shifted by 1000: logits change by {(logits_later - logits).abs().max():.0e}")
print(f"                outputs change by {(out_later - out).abs().max():.0e}")

# %% [markdown]
# A picture needs a text in which only positions differ: the *same* token everywhere. Then the logit of $(t, s)$ can
# depend on nothing but $t-s$, and the matrix of logits must be constant along each diagonal. Beside it, the same model
# with a bug: only keys are rotated.

# %%
same_token = random_factors(n_tokens=64, n_different=1)

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.7))
for ax, rotate, title in (
    (axes[0], "qk", "Right: only t − s counts"),
    (axes[1], "k", "Keys only: only s counts"),
):
    image = ax.imshow(attend(same_token, rotate=rotate)[0][0, 0], cmap="cividis")
    ax.set(
        title=title,
        xlabel="key position s (tokens)",
        ylabel="query position t (tokens)",
    )
    ax.grid(False)
    fig.colorbar(image, ax=ax, shrink=0.8, label="logit, head 0")
looks.show(
    fig,
    alt="Two heat maps of logits over query and key position, for one token repeated. "
    "Rotated rightly: stripes along the diagonals. Only keys rotated: vertical "
    "stripes.",
)

# %% [markdown]
# On the left, diagonal stripes: distance is all that counts. On the right, vertical stripes: how interesting a key is
# depends on its *absolute* place, and the query's own position plays no part. (The upper triangle, the future, is
# masked away later.)
#
# ## 6 · What goes wrong, in numbers
#
# Three mistakes that run without an error, and that are easily made:
#
# - **only keys rotated** (or only queries): what you just saw;
# - **values rotated too**: someone rotates "everything that is cached";
# - **bfloat16 tables**: cosines and sines are rounded to 8 significant bits, so that a rotation is no longer quite a
#   rotation.
#
# One test finds all three: shift the text, and look at what must not change.

# %%
versions = {
    "right": dict(),
    "only keys rotated": dict(rotate="k"),
    "values rotated too": dict(rotate="qkv"),
    "bfloat16 tables": dict(table_dtype=torch.bfloat16),
}
change = {}
for name, options in versions.items():
    before, after = attend(factors, 0, **options), attend(factors, 1000, **options)
    change[name] = [((y - x).norm() / x.norm()).item() for x, y in zip(before, after)]
looks.table(
    ["", "logits", "outputs"],
    [(name, *(f"{value:.0e}" for value in values)) for name, values in change.items()],
    caption="Relative change when the text moves by 1,000 positions",
)

# %%
assert max(change["right"]) < 1e-10
assert change["values rotated too"][0] < 1e-10 < 1e-2 < change["values rotated too"][1]
assert 1e-4 < change["bfloat16 tables"][0] < 1e-1 < change["only keys rotated"][0]

# %% [markdown]
# Each mistake has its signature. *Only keys*: the logits change by about their own size, and the outputs follow.
# *Values too*: the logits are perfect, so a test that looks at logits passes, and the outputs are wrong. *bfloat16*:
# everything is nearly right, to two or three digits.
#
# ### Rotated values fade
#
# Why is it bad to rotate values? Attention *averages* values. If they have been rotated to different directions, they
# cancel. Take the same token everywhere again: an average of equal vectors is that vector, whatever the weights.

# %%
long_text = random_factors(n_tokens=1024, n_different=1)
_, right = attend(long_text)
_, rotated = attend(long_text, rotate="qkv")
length = assemble(long_text[4], long_text[5])[
    0, 0, 0
].norm()  # of the value that head 0 reads

# %% tags=["hide-input"]
fig, ax = plt.subplots()
shown = (right, "-", "values not rotated", 8), (rotated, "--", "values rotated", -16)
for out, style, label, up in shown:
    curve = out[0, :, 0].norm(dim=-1) / length
    ax.semilogx(range(1, 1025), curve, style, base=2)
    place = dict(textcoords="offset points", ha="right")
    ax.annotate(label, (1024, curve[-1]), xytext=(-6, up), **place)
ax.set(xlabel="context length (tokens)", ylim=(0, 1.15))
ax.set_ylabel("length of head 0's output\nover length of the value")
ax.set_title("Rotated values cancel when they are averaged")
looks.show(
    fig,
    alt="Length of the output over the length of the value, against the context up to "
    "1,024 tokens. Values not rotated: a level line at 1. Values rotated: a curve "
    "that falls.",
)
assert_close(right[0, :, 0].norm(dim=-1), length.expand(1024))

# %% [markdown]
# Every token reads the same value, so the output should have its length at every position, and does when values are
# left alone. With rotated values, more is lost with every doubling of the context: the fast planes have been averaged
# over all directions. A model can learn around this, which is why the mistake survives training runs; it is then simply
# not the model of the paper.
#
# ### How wrong are coarse tables?
#
# Put a query at position $t$ and keys up to 63 tokens before it, and compare their logits with those that the same
# distances have at the start of the text. The difference should be zero. We rotate in float64 throughout, so that all
# you see is the error of the *tables*.


# %%
def coarse_tables(positions, angle_dtype, table_dtype):
    angles = positions.to(angle_dtype)[:, None] * theta.to(angle_dtype)
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def tables_at(positions, kind):
    if kind == "bfloat16 angles and tables":
        return coarse_tables(positions, torch.bfloat16, torch.bfloat16)
    if kind == "bfloat16 tables":
        return coarse_tables(positions, torch.float32, torch.bfloat16)
    if kind == "float32 angles and tables":
        return coarse_tables(positions, torch.float32, torch.float32)
    return rope_tables(
        positions, d_head, base
    )  # float64 angles, float32 tables: this course


# %%
def relative_error(t, kind):
    """Of the logits of a query at t with the 64 keys that end there."""
    positions = torch.arange(t - 63, t + 1)
    q, k = assemble(*same_token[:2]), assemble(*same_token[2:4])  # (1, 64, h, d_h)
    exact = attend(same_token)[0][0, :, -1]  # (h, 64)
    cos, sin = tables_at(positions, kind)
    q, k = apply_rope(q, cos, sin)[0, -1], apply_rope(k, cos, sin)[0]
    found = torch.einsum("hd,shd->hs", q, k) / math.sqrt(d_head)
    return ((found - exact).norm() / exact.norm()).item()


# %%
kinds = (
    "bfloat16 angles and tables",
    "bfloat16 tables",
    "float32 angles and tables",
    "float64 angles, float32 tables",
)
t_values = [2**n for n in range(6, 18)]
errors = {kind: [relative_error(t, kind) for t in t_values] for kind in kinds}
assert max(errors[kinds[-1]]) < 1e-6 < 1e-4 < min(errors["bfloat16 tables"])

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.8))
for (kind, values), style in zip(errors.items(), ("-s", "-.^", "--o", "-D")):
    ax.loglog(t_values, values, style, ms=4, lw=1.5)
    ax.annotate(
        kind,
        (t_values[6], values[6]),
        xytext=(-6, 7),
        textcoords="offset points",
        ha="right",
    )
ax.set(
    xlabel="position t (tokens)", ylabel="relative error of the logits", ylim=(3e-9, 10)
)
ax.set_title("Coarse tables break the relative-position identity")
looks.show(
    fig,
    alt="Relative error of the logits against the position, to 131,072. Angles and "
    "tables in bfloat16 rise to errors of about 1; bfloat16 tables stay at a few "
    "thousandths; float32 angles rise with the position; float64 angles with "
    "float32 tables stay below 1e-7.",
)

# %% [markdown]
# Read the curves from the bottom.
#
# - Float64 angles rounded once, to float32 tables: the rounding of float32, at every position. This is what
#   `rope_tables` does.
# - Float32 angles: fine at first, then the error grows with the position, because a float32 near 100,000 can move only
#   in steps of 0.008 radians.
# - bfloat16 tables: a relative error of a few thousandths everywhere, however close the tokens are. The authors'
#   training code keeps its tables in bfloat16, so its logits satisfy the identity to two or three digits. The paper's
#   results were trained in that way: it is a coarser function, not a broken one; what you may not do is expect it to
#   agree with an exact implementation to rounding.
# - bfloat16 *angles*: position, speed and their product are all rounded, so the error grows from the start; above 256
#   neighbouring tokens even begin to share a position, and from about 1,000 on the answer is noise. A model cast to
#   bfloat16 as a whole does this silently. That is why `rope_tables` makes its tables from integer positions on
#   each call.
#
# ## 7 · Why MLA needs a detour
#
# Multi-head latent attention (MLA, DeepSeek-V2) also caches something small: one latent vector $c_s$ of width $d_c$ per
# token. Head $i$'s key is expanded from it by a learned matrix, $k_s^{(i)} = c_s W_i$. The trick that makes MLA fast is
# never to expand: *absorb* $W_i$ into the query, once per step, and compare with the latents themselves,
#
# $$ q^{(i)} (c_s W_i)^\top = \bigl(q^{(i)} W_i^\top\bigr)\, c_s^\top . $$

# %%
d_c, M = 48, 100
W = torch.randn(h, d_c, d_head).double() / math.sqrt(d_c)
c = torch.randn(M, d_c).double()  # the cache: M latents
q = torch.randn(h, d_head).double()

keys = torch.einsum("sc,hcd->shd", c, W)  # M × h × d_h numbers
expanded = torch.einsum("hd,shd->hs", q, keys)
queries = torch.einsum("hd,hcd->hc", q, W)  # h × d_c numbers: the absorbed queries
absorbed = torch.einsum("hc,sc->hs", queries, c)
assert_close(expanded, absorbed)
print(
    f"numbers built: {keys.numel():,} for the keys, {queries.numel():,} for the queries"
)

# %% [markdown]
# Now rotate. The logit becomes
#
# $$ q^{(i)} \Theta_t\,(c_s W_i \Theta_s)^\top = q^{(i)}\, \Theta_{t-s}\, W_i^\top\, c_s^\top , $$
#
# and $\Theta_{t-s}$ stands *between* the query and $W_i^\top$. The absorbed query $q^{(i)} \Theta_{t-s} W_i^\top$ is now a
# different one for each cached position $s$: nothing is left to absorb once.
#
# Could the latent be rotated instead, before it is cached? That would need a $d_c \times d_c$ matrix $S_s$ with
# $S_s W_i = W_i \Theta_s$ for *all* heads. Let us look for the best one, by least squares.


# %% claim="mla-detour"
def cannot_be_absorbed(W, s):
    """Relative error of the best S: S W_i ≈ W_i Θ_s for all heads; W (h, d_c, d_h)."""
    rotated = (W @ rope_matrix(s)).transpose(0, 1).flatten(1)  # (d_c, h · d_h)
    plain = W.transpose(0, 1).flatten(1)
    S = torch.linalg.lstsq(plain.T, rotated.T).solution.T
    return ((S @ plain - rotated).norm() / rotated.norm()).item()


widths = [12, 24, 48, 96, 144, 168, 192]  # h · d_h = 192
mla = [
    cannot_be_absorbed(torch.randn(h, d_c, d_head).double(), s=1000) for d_c in widths
]
assert mla[0] > 0.9 and mla[-1] < 1e-8

# %% tags=["hide-input"]
fig, ax = plt.subplots()
fractions = [d_c / (h * d_head) for d_c in widths]
ax.plot(fractions, mla, **looks.of("mla").line_style())
points = dict(textcoords="offset points")
ax.annotate(
    "MLA: the best rotation of the latent", (0.5, mla[3]), xytext=(8, 8), **points
)
fraction = 2 * (h + d_head) / (h * d_head)
ax.plot(fraction, 0, **looks.of("tpa").line_style(), ms=10, clip_on=False)
ax.annotate("TPA, rank 2: exact", (fraction, 0), xytext=(0, 14), ha="center", **points)
ax.set(
    xlabel="cached numbers per key, as a fraction of $h \\cdot d_h$", ylim=(-0.02, 1.08)
)
ax.set_ylabel("relative error of the rotated keys")
ax.set_title("A random latent can be rotated only if it compresses nothing")
looks.show(
    fig,
    alt="Relative error of the best rotation of MLA's latent against its width, as a "
    "fraction of the keys': it falls from near 1 and reaches 0 only at the right "
    "end, where the latent is as large as the keys. TPA of rank 2 stands at error "
    "0 at less than half the width.",
)

# %% [markdown]
# For random up-projections the error falls to zero only at the right end, where $d_c = h\,d_h$ and the latent is as
# large as the keys themselves. TPA's $b$ factors already *live in the feature space* of a head, where $\Theta_s$ acts; what
# stands to their left mixes heads, and does not get in the way. (The triangle is the keys' part of a rank-2 cache,
# $2(h + d_h)$ numbers, drawn at the tiny size of this notebook; it is exact at any rank. MLA's latent serves keys
# *and* values; the axis counts it for the keys alone.)
#
# MLA's way out is a **decoupled** part: the latent carries content and no position, and a second, narrow key $k_s^R$ of
# width $d_R$, shared by all heads, carries position and is rotated before it is cached:
#
# $$ \text{logit} = \bigl(q^{(i)} W_i^\top\bigr) c_s^\top + \bigl(q^{R,(i)} \Theta_t\bigr)\bigl(k^R_s \Theta_s\bigr)^\top . $$

# %% tags=["nbval-check-output"]
# The paper's small model. MLA: d_c = 256, d_R = 32.
# TPA: h = 34, d_h = 64, R_K = R_V = 2.
print("MLA caches d_c + d_R              =", 256 + 32, "numbers per token and layer")
print(
    "TPA caches (R_K + R_V)(h + d_h)   =",
    (2 + 2) * (34 + 64),
    "numbers per token and layer",
)

# %% [markdown]
# So the price of the detour is $d_R$ more cached numbers, extra projections, and a head whose content features never
# see a position. It is not a price in bytes against TPA: at this size MLA caches *less*. What TPA gains is that RoPE
# fits in without any special part: every feature is rotated, as in the model one would have had without compression.
#
# ## Exercises
#
# ### Exercise 1 · What commutes with RoPE? (★★☆, 10 minutes)
#
# Theorem 3.1 holds because multiplying from the left commutes with rotating on the right. Which of the following may be
# done to the rows of $b_k$ **either before or after** RoPE, at *every* position, with the same result? Write down
# your six answers first:
#
# - multiply from the left by an $R \times R$ matrix;
# - multiply from the right by a learned $d_h \times d_h$ matrix;
# - multiply feature $e$ by a learned gain $g_e$ (as RMSNorm's gain does);
# - divide each row by its length;
# - add a learned row vector to each row;
# - multiply by a number that depends on the token.
#
# Then write a function that finds out by experiment: `operation` takes rows of shape $(\dots, R, d_h)$ with $R = 3$ and
# returns rows of that shape; return `True` if it commutes with RoPE and `False` if not. The checker tries it on
# these six and on some that are not listed.
#
# <details><summary>Hint 1</summary>
#
# Take a random `b` of shape $(1, T, R, d_h)$, with the ranks in the place of `any`, and several positions, none of
# them 0 alone.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Compare `operation(apply_rope(b, cos, sin))` with `apply_rope(operation(b), cos, sin)`.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Work in float64, and compare with `torch.allclose` at a tolerance like `rtol=1e-9`: rounding is not a difference,
# and a difference of $10^{-4}$ is one.
#
# </details>


# %% tags=["exercise"]
def commutes_with_rope(operation, d_head):
    raise NotImplementedError


# %% tags=["solution"]
def commutes_with_rope(operation, d_head):
    b = torch.randn(1, 5, 3, d_head, dtype=torch.float64)  # (B, T, R, d_h)
    cos, sin = rope_tables(torch.arange(1, 6), d_head, 100.0, b.dtype)
    return torch.allclose(
        operation(apply_rope(b, cos, sin)),
        apply_rope(operation(b), cos, sin),
        rtol=1e-9,
    )
    # From the left, unit length, a number: yes. From the right (MLA's up-projection),
    # a gain for each feature, a bias: no.


# %%
checks.ex03_1(commutes_with_rope)

# %% [markdown]
# ### Exercise 2 · The other layout (★★☆, 10 minutes)
#
# Write RoPE in the **interleaved** layout: plane $j$ is made of features $2j$ and $2j+1$. Same row-vector convention,
# same sense of rotation, same tables, same shapes as `apply_rope`. The result is
# interleaved again, in the dtype of `x`.
#
# <details><summary>Hint 1</summary>
#
# `x[..., 0::2]` and `x[..., 1::2]` are the first and the second features of all planes.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Rotate as `apply_rope` does, with `cos[:, None]` and `sin[:, None]`, so that the tables get an axis for `any`.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `torch.stack((first, second), dim=-1).flatten(-2)` interleaves the two results again.
#
# </details>


# %% tags=["exercise"]
def apply_rope_interleaved(x, cos, sin):
    # x: (B, T, any, d_h); cos, sin: (T, d_h/2); returns the shape of x
    raise NotImplementedError


# %% tags=["solution"]
def apply_rope_interleaved(x, cos, sin):
    x1, x2 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).flatten(-2)


# %%
checks.ex03_2(apply_rope_interleaved)

# %% [markdown]
# ### Exercise 3 · Move a cache (★★☆, 10 minutes)
#
# A cache holds pre-rotated factors $b_k$ of $M$ tokens; the unrotated ones are gone. You cut the first `by` tokens of
# the text off, and want the cache of what is left to look *as if that text had started at position 0*: each remaining
# token's position becomes smaller by `by`. Write the function that turns the cached factors into what they must be now
# (the one exception to "never again").
#
# (Is it needed for attention to be right? Think about that too: if new queries keep counting from the old positions,
# wish 1 says that nothing has to be moved.)
#
# <details><summary>Hint 1</summary>
#
# Each cached row is $b\,\Theta_s$ and is to become $b\,\Theta_{s-\text{by}}$. What must it be multiplied by?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $\Theta_{s-\text{by}} = \Theta_s \Theta_{-\text{by}}$: one and the same rotation for all tokens, whatever their positions.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The tables of the single position `-by`, in `b_k.dtype`, broadcast over all tokens.
#
# </details>


# %% tags=["exercise"]
def move_back(b_k, by, base):
    # b_k: (B, M, R, d_h), each already rotated at its own position;
    # use rope_tables(..., b_k.dtype) and apply_rope
    raise NotImplementedError


# %% tags=["solution"]
def move_back(b_k, by, base):
    # b Θ_s is to become b Θ_{s - by} = b Θ_s Θ_{-by}:
    # one and the same rotation, by -by, for all tokens.
    return apply_rope(
        b_k, *rope_tables(torch.tensor([-by]), b_k.shape[-1], base, b_k.dtype)
    )


# %%
checks.ex03_3(move_back)

# %% [markdown]
# ### Exercise 4 · Find the bug from outside (★★★, 20 minutes)
#
# You are given an attention layer that you cannot read: `layer(x, start)` takes tokens `x` of shape
# `(1, T, layer.d_model)` in float64, at positions `start, start + 1, ...`, and returns its logits `(1, h, T, T)` and
# its outputs `(1, T, h, d_h)`. Write a function that tells which of the four versions above it is, from its behaviour
# alone: `"right"`, `"only keys rotated"`, `"values rotated too"` or `"bfloat16 tables"`. The checker will try layers
# with large and with tiny activations.
#
# <details><summary>Hint 1</summary>
#
# The shift test: call the layer with the same `x` at `start=0` and at a far start. What changes in each of the four
# versions?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Rotated values leave the logits alone and change the outputs. Narrow tables change the logits a little, an unrotated
# query changes them by all of their size.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Divide the norm of the change by the norm of what changes: above 0.1, between $10^{-6}$ and 0.1, or below.
#
# </details>


# %% tags=["exercise"]
def find_bug(layer):
    # x = torch.randn(1, 32, layer.d_model, dtype=torch.float64)
    # logits, out = layer(x, start=0)
    raise NotImplementedError


# %% tags=["solution"]
def find_bug(layer):
    x = torch.randn(1, 32, layer.d_model, dtype=torch.float64)
    before, after = layer(x, start=0), layer(x, start=1000)
    logits, out = (
        ((new - old).norm() / old.norm()).item() for old, new in zip(before, after)
    )
    if logits > 0.1:
        return "only keys rotated"
    if logits > 1e-6:
        return "bfloat16 tables"
    return "values rotated too" if out > 1e-6 else "right"


# %%
checks.ex03_4(find_bug)

# %% [markdown]
# ## Summary
#
# - RoPE rotates each pair of features by an angle proportional to the position; a dot product then depends on the
#   distance alone, because $\Theta_t \Theta_s^\top = \Theta_{t-s}$.
# - Conventions to state whenever code is shared: rows times $\Theta_t$ (clockwise), half-split pairs, absolute positions,
#   tables in float32 from float64 angles.
# - **Theorem 3.1**: rotating $B$ is rotating the assembled matrix, because heads are mixed from the left and features
#   rotated from the right. So $b_q$ and $b_k$ are rotated, $b_v$ never, and the cache holds rotated $b_k$, final once
#   written.
# - The shift test finds RoPE that is not relative; look at logits *and* outputs. It does not notice RoPE that is
#   missing, or that has another layout, direction or base: compare those with a reference.
# - MLA's up-projection stands to the right of the latent, where RoPE acts, and random ones cannot be moved past it;
#   hence its separate rotated part.
#
# **Next:** [04 · MHA, MQA and GQA as special cases](04_special_cases.ipynb)
