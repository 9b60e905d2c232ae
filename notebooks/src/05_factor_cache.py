# %% [markdown]
# # 05 · The factor cache
# {badge}
#
# **You will be able to**
# - write TPA as a layer of a dozen lines, and say what it must remember to decode;
# - build a cache from naive concatenation up to a preallocated value that the caller owns;
# - show that prefill, chunks of any size and single tokens give the same output;
# - recognize the classic cache bugs by their symptoms, and know which test catches which.
#
# **You need** [02](02_tensor_product_factorization.ipynb) and [03](03_rope_and_prerotation.ipynb).
#
# **Time** about 70 minutes to read and do; the code runs in at most 40 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import math
import time

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.tpa import (
    DECODE_TOKENS,
    RoPE,
    T6Config,
    apply_rope,
    assemble,
    factor_attention,
    factor_bound,
    rope_tables,
)

looks.style()
torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook


def assert_same(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


# %% [markdown]
# ## 1 · The layer, without any cache
#
# Everything that notebooks 02 and 03 derived fits into one small layer: project the token to six factors, rotate two
# of them, assemble $Q$, $K$ and $V$ (Eq. 3.1), attend, and mix the heads. All six factors are linear maps of the same
# hidden state, so one matrix product makes them all, and its result is cut into pieces.


# %%
class MinimalTPA(nn.Module):
    def __init__(self, c):
        super().__init__()
        ranks, self.config = (c.rank_q, c.rank_k, c.rank_v), c
        self.shapes = [(R, width) for R in ranks for width in (c.n_head, c.d_head)]
        self.sizes = [R * width for R, width in self.shapes]
        self.factor_proj = nn.Linear(c.d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(c.n_head * c.d_head, c.d_model, bias=False)

    def factors(self, x, start=0):  # x: (B, T, d_model)
        parts = self.factor_proj(x).split(self.sizes, dim=-1)
        parts = (part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes))
        a_q, b_q, a_k, b_k, a_v, b_v = parts  # (B, T, R, h) or (B, T, R, d_h)
        positions, c = torch.arange(start, start + x.shape[1]), self.config
        cos, sin = rope_tables(positions, c.d_head, c.rope_base, x.dtype)
        return a_q, apply_rope(b_q, cos, sin), a_k, apply_rope(b_k, cos, sin), a_v, b_v

    def forward(self, x):
        a_q, b_q, a_k, b_k, a_v, b_v = self.factors(x)
        q, k, v = assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, h, T, d_h)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out_proj(heads.flatten(2))


# %%
config = T6Config.for_layer(d_model=64, n_head=8, d_head=16, max_len=64)
minimal = MinimalTPA(config).double()  # in float64 "the same" means ten digits or more
x = torch.randn(2, 32, 64, dtype=torch.float64)  # (B, T, d_model)
factors = minimal.factors
names = ("a_q", "b_q", "a_k", "b_k", "a_v", "b_v")
rows = [[name, str(tuple(factor.shape))] for name, factor in zip(names, factors(x))]

# %% tags=["hide-input", "nbval-check-output"]
looks.table(["factor", "shape (B, T, R, h or d_h)"], rows, "Six factors of 32 tokens")

# %% [markdown]
# To train, this is all there is. To write text it is wasteful: each new token would need the whole past computed
# again. What does a new token want from a past one? Its keys and values, and these are made from the factors $A_K$,
# $B_K$, $A_V$, $B_V$. So those four are worth remembering: $(R_K + R_V)(h + d_h)$ numbers per token, where MHA
# remembers $2\,h\,d_h$.
#
# Notebook 03 showed that rotating $B_K$ is rotating the assembled $K$ (Theorem 3.1), so `b_k` can be rotated *once,
# before it is stored*. That takes the token's **absolute** position: the first new token is at position `start`, the
# number of tokens before it.

# %% claim="prerotated"
whole = factors(x)
for one, other in zip(factors(x[:, 20:], start=20), whole):
    assert_same(one, other[:, 20:])  # made late or early, they are the same

# %% [markdown]
# That assertion is the whole idea of caching: a token's factors depend on the token and its position, never on what
# comes later.
#
# ## 2 · Attention when the queries are the *last* tokens
#
# From here on $C$ tokens are cached, $T$ are new, and $M = C + T$ can be attended to. The queries are the *last* $T$
# positions: query $i$ is at position $C + i$, so the causal mask is a triangle aligned at the **bottom right**.
# PyTorch's `is_causal=True` aligns it at the top left, which is the same only when $C = 0$.

# %% tags=["hide-input"]
looks.show(*diagrams.causal_mask(cached=5, new=3))

# %% [markdown]
# Left: with five tokens cached, the three new queries miss most of what is behind them. Move the sliders: at $C = 0$
# the two agree, and at $T = 1$, a decode step, the newest token sees only the oldest.

# %% tags=["hide-input"]
looks.control(diagrams.causal_mask, cached=(0, 8, 5), new=(1, 8, 3))

# %%
zeros, values = torch.zeros(1, 1, 5, 4), torch.arange(5.0).view(1, 1, 5, 1)
mean = F.scaled_dot_product_attention(zeros[:, :, :1], zeros, values, is_causal=True)
print("one query, five keys with values 0 to 4; the mean should be 2.0")
print("with is_causal it is", mean.item())

# %% [markdown]
# No error, no warning, and a whole prompt ($C = 0$) is right: remember this one. `unseen` writes the rule down once,
# and `causal_attention` uses it.

# %% tags=["tpa"]
# {{tpa: unseen causal_attention}}

# %% [markdown]
# About `padding`: prompts of different lengths become one batch by filling the shorter ones up on the left, and
# `padding` says by how many tokens in each row, which is masked out. (A padding position sees itself, for a softmax over nothing would be not a number.) Positions need no correction, because
# RoPE sees only differences of positions.
#
# The full pass over all 32 tokens is what every way of caching has to reproduce:


# %%
def attend(a_q, b_q, a_k, b_k, a_v, b_v):
    q, k, v = assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v)
    return causal_attention(q, k, v)  # (B, T, h, d_h)


expected = attend(*whole)
assert_same(minimal.out_proj(expected.flatten(2)), minimal(x))

# %% [markdown]
# ## 3 · The naive cache: concatenate
#
# The simplest memory is four tensors that grow by `torch.cat`.

# %%
past, outputs = None, []
for t in range(32):
    a_q, b_q, *new = factors(x[:, t : t + 1], start=t)
    past = new if past is None else [torch.cat(pair, dim=1) for pair in zip(past, new)]
    outputs.append(attend(a_q, b_q, *past))
assert_same(torch.cat(outputs, dim=1), expected)

# %% [markdown]
# Correct, and the right thing for a first test. But `cat` makes a new tensor and copies the whole past into it at
# each step: writing $M$ tokens copies about $M^2/2$. The alternative is to set the room aside once and write each
# token into its place. Time one step of each at several lengths, with the sizes of the paper's small model ($h = 34$,
# $d_h = 64$).


# %%
def milliseconds(action, *arguments):
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        action(*arguments)
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[3]  # the median


def concatenate(past, new):
    return [torch.cat(pair, dim=2) for pair in zip(past, new)]


def write(past, new):
    return [place[:, :, -1:].copy_(n) for place, n in zip(past, new)]


# %%
lengths = [512, 2048, 8192, 32768]
by_cat, by_copy = [], []
new = [torch.ones(1, 2, 1, width) for width in (34, 64, 34, 64)]
for length in lengths:
    past = [n.repeat(1, 1, length, 1) for n in new]
    by_cat.append(milliseconds(concatenate, past, new))
    by_copy.append(milliseconds(write, past, new))
assert by_cat[-1] > 5 * by_copy[-1]

# %% tags=["hide-input"]
fig, ax = plt.subplots()
curves = (by_cat, "concatenate", "o-"), (by_copy, "write into its place", "s--")
for times, name, line in curves:
    ax.loglog(lengths, times, line)
    place = dict(xytext=(8, -4), textcoords="offset points")
    ax.annotate(name, (lengths[-1], times[-1]), **place)
ax.set(xlabel="C, tokens already cached", ylabel="one append [ms]", xlim=(400, 300_000))
ax.set_title("Concatenation copies the whole past for each new token")
alt = "Time of one append against the cached tokens: cat's rises, a write's is flat."
looks.show(fig, alt)

# %% [markdown]
# The lower line is flat: a write costs the same however long the past is. (Concatenation has a second price: each
# step has tensors of a new shape, for which `torch.compile` must compile again.)
#
# ## 4 · A preallocated value
#
# Now as a class, in four small decisions.
#
# **Room and views.** One tensor per factor, filled up to `length`. What `append` returns are *views* of the filled
# part: no copy. Each rank's rows lie one after another in memory, `(B, R, max_len, width)`, because that is how
# notebook 06 multiplies them; a transpose, which moves nothing, gives back the order `(B, T, R, width)` of the rest of
# the course.

# %%
room = torch.zeros(2, 2, 64, 16)  # (B, R_K, max_len, d_h)
place = room[:, :, 3:5].transpose(1, 2)  # positions 3 and 4, as (B, 2, R_K, d_h)
place.copy_(torch.ones(2, 2, 2, 16))
print(f"numbers set in the room through its view: {room.sum():.0f}")

# %% [markdown]
# **Check first, write second.** A cache that finds out halfway that the tokens do not fit has already lost what was
# there, or holds three new factors and one old. And `copy_` *broadcasts*: hand it one sequence where two are expected
# and both rows silently get it.

# %%
place.copy_(torch.full((1, 2, 2, 16), 7.0))  # a batch of one, into a cache for two
print("the second sequence now holds the first one's", room[1, 0, 3, 0].item())

# %% [markdown]
# So `append` compares every shape before it writes anything.
#
# **The length is the only state.** To forget is to lower it; what lies beyond is overwritten by the next append. That
# is all `truncate` does, and it makes rolling back free.
#
# **The caller owns it.** The cache is an argument of `forward`, not an attribute of the layer. Two conversations are
# two caches, and a call without one cannot be affected by earlier calls with one.

# %% tags=["tpa"]
# {{tpa: FactorCache Cache}}

# %% [markdown]
# The class knows nothing of TPA but `shapes`, a pair (rank, width) for each thing kept. So the caches of MHA, MQA and
# MLA are the same class with other shapes, and every comparison of bytes in this course weighs them all on one scale.
# `detach` keeps a cache from holding on to the graph of every past step when gradients are on. `Cache` is one of these
# per layer of a model. Try it:

# %%
shapes = [(2, 8), (2, 16), (2, 8), (2, 16)]  # (R, width) of a_k, b_k, a_v, b_v
cache = FactorCache(shapes, batch_size=2, max_len=64, dtype=torch.float64)
cached = cache.append(*(factor[:, :30] for factor in whole[2:]))
cached = cache.append(*(factor[:, 30:] for factor in whole[2:]))
for view, factor in zip(cached, whole[2:]):
    assert torch.equal(view, factor)
assert cached[0].data_ptr() == cache.view(0, 1)[0].data_ptr()  # a view, no copy

# %%
tokens_33_more = [factor[:, :1].expand(-1, 33, -1, -1) for factor in whole[2:]]
try:
    cache.append(*tokens_33_more)
except ValueError as error:
    print(error)
assert cache.length == 32 and torch.equal(cache.view(0, 32)[1], whole[3])  # untouched

# %% [markdown]
# ## 5 · The layer, with its cache
#
# `TensorProductAttention` is `MinimalTPA` and the cache. One decision is new. With all factors at hand there are two
# ways to attend:
#
# - **assemble** $K$ and $V$ of the whole context and call the fused kernel. Building them costs the same for one
#   query as for a thousand, and each query after that is cheaper, so it is right for training and for a long prompt;
# - **stay in factor space** (`factor_attention`, derived in the next notebook): $K$ and $V$ are never built, so a step
#   with one or a few new tokens does not rebuild the whole past.
#
# They are equal to rounding, and the layer takes factor space when there is a past and at most `DECODE_TOKENS` tokens
# are new. (That number is a rounded measurement; where the lines cross depends on context and machine: notebook 06,
# section 8.)

# %% tags=["nbval-check-output"]
start = 31
a_q, b_q, *_ = factors(x[:, start:], start)
assert_same(factor_attention(a_q, b_q, *whole[2:], start=start), expected[:, start:])
print("DECODE_TOKENS =", DECODE_TOKENS)

# %% tags=["tpa"]
# {{tpa: TensorProductAttention}}

# %% [markdown]
# `project` and `factors` are section 1; `rope` is there so that a model can make the tables once for all its layers
# (notebook 07). `forward` has three numbered steps, and the position of a new token comes from one place only,
# `cache.length`. `factor_widths`, `factors` and `attend` are separate methods so that a variant (notebook 11), or a
# bug (below), can replace one of them in a few lines.
#
# The output projection starts at zero, as in the authors' code, so a fresh layer returns zeros, and *zeros agree with
# anything*. For honest comparisons give it the weights of the minimal layer, whose output it must then reproduce:

# %%
layer = TensorProductAttention(config).double()
assert not layer(x).any()
layer.load_state_dict(minimal.state_dict())
expected = layer(x)  # all at once, without a cache
assert_same(expected, minimal(x))

# %% [markdown]
# ## 6 · Four ways that agree
#
# The same 32 tokens as one prompt, as a prompt and single tokens, in uneven chunks, and one by one. After the first
# call, chunks of more than 16 tokens use the assembled path, others factor space, so both are tried.


# %%
def run(layer, x, sizes):
    cache = layer.new_cache(x.shape[0])
    return torch.cat([layer(part, cache) for part in x.split(sizes, dim=1)], dim=1)


for sizes in ([32], [20] + [1] * 12, [7, 1, 18, 6], [1] * 32):
    difference = (run(layer, x, sizes) - expected).abs().max()
    print(f"{str(sizes)[:28]:30s}largest difference {difference:.0e}")
    assert difference < 1e-10

# %% [markdown]
# In float64 the differences are at the level of rounding. In float32 they would be some nine digits larger, because
# sums are taken in another order, and a bug that shifts an output a little would hide in that noise. That is why
# correctness tests of a cache belong in float64.
#
# Because the cache is a value, calls with and without it can be mixed, and going back is one line:

# %%
cache = layer.new_cache(batch_size=2)
layer(x[:, :20], cache)
assert_same(layer(x), expected)  # a call without the cache neither sees nor disturbs it
layer(torch.randn_like(x[:, :8]), cache)  # eight tokens that we regret
cache.truncate(20)
assert_same(layer(x[:, 20:], cache), expected[:, 20:])

# %% [markdown]
# And a ragged batch: the second row is a text of 25 tokens behind seven of padding, and it gives what the text gives
# alone.

# %%
padding = torch.tensor([0, 7])
together, alone = layer(x, padding=padding), layer(x[1:, 7:])
assert_same(together[1:, 7:], alone)
assert_same(together[:1], expected[:1])

# %% [markdown]
# ## 7 · Bytes: measured = formula

# %% claim="cache-size"
rows = []
for name in ("tiny", "small-124M", "xl-1.5B"):
    c = T6Config.preset(name)
    widths = c.n_head, c.d_head
    shapes = [(rank, width) for rank in (c.rank_k, c.rank_v) for width in widths]
    cache = FactorCache(shapes, batch_size=3, max_len=100, dtype=torch.bfloat16)
    cache.append(*(torch.zeros(3, 70, *shape) for shape in shapes))
    formula = (c.rank_k + c.rank_v) * (c.n_head + c.d_head)
    assert cache.nbytes == formula * 2 * 70 * 3  # numbers × bytes × tokens × sequences
    rows.append([name, 2 * c.n_head * c.d_head, formula, cache.nbytes])

# %% tags=["hide-input", "nbval-check-output"]
header = ["model", "numbers of K and V", "numbers of their factors", "bytes cached"]
looks.table(header, rows, "Per token and layer; bytes of 3 × 70 tokens in bfloat16")

# %% [markdown]
# `nbytes` counts what is cached; the room set aside is for `max_len` tokens from the start.
#
# Is that small? It depends on what it is compared with. Here are the real caches of the paper's small models, each
# with the head count that gives its layer about the same weights; and MHA with as many heads as TPA. "TPA (6, 2, 2)"
# names the ranks $(R_Q, R_K, R_V)$:

# %% claim="cache-small-models" tags=["nbval-check-output"]
from functools import partial

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention

MODELS = {
    "MHA, 34 heads": (MultiHeadAttention, 34),
    "MHA, 12 heads": (MultiHeadAttention, 12),
    "TPA (6, 2, 2), 34 heads": (TensorProductAttention, 34),
    "MLA (256 + 32), 12 heads": (MultiHeadLatentAttention, 12),
    "GQA, 2 KV heads of 22": (partial(MultiHeadAttention, n_kv_head=2), 22),
    "MQA, 1 KV head of 23": (partial(MultiHeadAttention, n_kv_head=1), 23),
}
numbers, weights = {}, {}
for name, (mechanism, n_head) in MODELS.items():
    small_layer = mechanism(T6Config.preset("small-124M", n_head=n_head))
    cache = small_layer.new_cache(batch_size=1, max_len=8)
    small_layer(torch.randn(1, 8, 768), cache)
    numbers[name] = cache.nbytes // (8 * 4)
    weights[name] = sum(parameter.numel() for parameter in small_layer.parameters())

# %% tags=["nbval-check-output"]
tpa = numbers["TPA (6, 2, 2), 34 heads"]
rows = [[name, weights[name], n, f"{n / tpa:.2f}"] for name, n in numbers.items()]
header = ["layer", "weights", "numbers cached per token", "times TPA's"]
looks.table(header, rows, "One layer of the paper's small model, caches measured")
assert list(numbers.values()) == [4352, 1536, 392, 288, 256, 128]

# %% [markdown]
# So TPA's cache is 3.92 times smaller than that of the MHA of equal weights, and 11.10 times smaller than that of an
# MHA layer with as many heads. MLA, GQA with two KV heads and MQA cache less than TPA, and the paper's case against
# GQA and MQA is quality, not bytes. "10× and more" is a ratio to MHA with as many heads, and it needs many wide heads
# at a low rank. With high ranks it turns round: $(R_K + R_V)(h + d_h)$ exceeds MHA's $2\,h\,d_h$ once
# $R_K + R_V > 2\,h\,d_h / (h + d_h)$:

# %%
rows = []
for h, d_h in ((8, 16), (34, 64), (64, 128)):
    mha, per_rank = 2 * h * d_h, h + d_h
    ratios = [f"{mha / (ranks * per_rank):.1f}×" for ranks in (2, 4)]
    rows.append([f"h = {h}, d_h = {d_h}", mha, *ratios, f"{mha / per_rank:.1f}"])

# %% tags=["hide-input", "nbval-check-output"]
header = ["heads", "MHA's numbers", "ranks 1", "ranks 2", "even at R_K + R_V ="]
looks.table(header, rows, "How many times less TPA caches than MHA with the same heads")

# %% [markdown]
# ## 8 · Six bugs, planted
#
# Cache bugs do not crash. They return fluent nonsense, or worse, text that is a little worse than it should be. Here
# are six that are found in real code, each as the one method that it gets wrong.


# %%
class RestartsPositions(TensorProductAttention):
    def factors(self, x, start=0, rope=None):
        return super().factors(x, 0)  # every call thinks it is the first


class CountsTokensItself(TensorProductAttention):
    seen = 0

    def factors(self, x, start=0, rope=None):
        self.seen += x.shape[1]  # instead of asking the cache
        return super().factors(x, self.seen - x.shape[1])


class RotatesAgain(TensorProductAttention):
    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        if start > 0:  # "what comes out of the cache is not rotated yet"
            b_k = apply_rope(b_k, *self.rope.tables(0, b_k))
        return super().attend(a_q, b_q, a_k, b_k, a_v, b_v, start)


# %%
class MasksFromTheLeft(TensorProductAttention):
    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        pairs = (a_q, b_q), (a_k, b_k), (a_v, b_v)
        q, k, v = (assemble(a, b).transpose(1, 2) for a, b in pairs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class DecodesWithoutMask(TensorProductAttention):
    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start, padding=None):
        pairs, first = ((a_q, b_q), (a_k, b_k), (a_v, b_v)), start == 0
        q, k, v = (assemble(a, b).transpose(1, 2) for a, b in pairs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=first).transpose(1, 2)


class RemembersInTheModule(TensorProductAttention):
    memory = None

    def forward(self, x, cache=None):
        if cache is not None and self.memory is None:
            self.memory = cache  # "one cache is enough"
        return super().forward(x, None if cache is None else self.memory)


# %% [markdown]
# And six tests. Each runs a layer in one way and returns its error at each of the 32 positions.


# %%
def without_cache(layer):
    return layer(x)


def second_prompt(layer):
    run(layer, torch.randn_like(x[:, :16]), [16])  # somebody else's conversation
    return run(layer, x, [32])


def truncated(layer):
    cache = layer.new_cache(batch_size=2)
    start = layer(x[:, :8], cache)
    layer(torch.randn_like(x[:, :8]), cache)
    cache.truncate(8)
    return torch.cat((start, layer(x[:, 8:], cache)), dim=1)


TESTS = {
    "no cache": without_cache,
    "one prompt": lambda layer: run(layer, x, [32]),
    "token by token": lambda layer: run(layer, x, [1] * 32),
    "chunks of 8": lambda layer: run(layer, x, [8] * 4),
    "second prompt": second_prompt,
    "truncated": truncated,
}

# %%
BUGS = [RestartsPositions, RotatesAgain, MasksFromTheLeft]
BUGS += [DecodesWithoutMask, RemembersInTheModule, CountsTokensItself]


def error(kind, test):
    copy = kind(config).double()
    copy.load_state_dict(layer.state_dict())
    try:
        return (test(copy) - expected).abs().amax(dim=(0, 2))  # by position
    except ValueError:  # the layer's own checks noticed
        return torch.full((32,), math.inf)


rows = []
for kind in [TensorProductAttention, *BUGS]:
    wrong = [error(kind, test).max() > 1e-10 for test in TESTS.values()]
    rows.append([kind.__name__, *("WRONG" if found else "ok" for found in wrong)])

# %% tags=["hide-input", "nbval-check-output"]
looks.table(["layer", *TESTS], rows, "Which test notices which bug")

# %% [markdown]
# Read it by columns. *No cache* and *one prompt*, the two tests that everybody writes first, notice nothing. *Token
# by token* notices three bugs; the missing mask passes it, because a single query has nothing to mask, and needs
# *chunks*. State kept in the module shows only with a *second prompt*, and a layer that counts for itself only after
# *truncate*: RoPE sees differences of positions, so being wrong by the same amount everywhere is not wrong at all.
#
# Where the errors lie tells one bug from the other three:

# %% tags=["hide-input"]
chunked = torch.stack([error(kind, TESTS["chunks of 8"]) for kind in BUGS[:4]])
fig, ax = plt.subplots(figsize=(7, 2.6))
exponents = chunked.clamp(min=1e-16).log10()
image = ax.imshow(exponents, cmap="Greys", aspect="auto", vmin=-16, vmax=0)
fig.colorbar(image, label="log₁₀ of the error")
ax.set(xlabel="position (chunks of 8)", yticks=range(4))
ax.set_yticklabels([kind.__name__ for kind in BUGS[:4]])
ax.set_xticks([0, 8, 16, 24])
ax.grid(visible=False)
ax.set_title("Only the missing mask spares the last token of each chunk")
alt = "The error of four layers by position. The first chunk of 8 is right; then "
alt += "three are wrong everywhere; without a mask each chunk's last token is right."
looks.show(fig, alt)

# %% [markdown]
# All four are right in the first chunk. From position 8 on everything is wrong if positions restart, if keys are
# rotated twice or if the mask starts at the left. Without a mask the *last* token of each chunk is right: it is the
# one that is meant to see the whole chunk.
#
# **The fixes** are the lines you have read: positions come from `cache.length` and nowhere else; `factors` rotates,
# once, and nothing rotates what was cached; `causal_attention` aligns its mask at the end; the cache is an argument.
# The test suite of this project runs all six columns, on random shapes and chunkings, with a batch of more than one.
#
# ## Exercises
#
# ### Exercise 05.1 · An append that loses nothing (★★☆, 15 minutes)
# Write `append` for an MHA cache held in one tensor `room` (B, h, max_len, d_h) whose first `length` positions are
# filled. Store `new` (B, h, T, d_h) after them and return a view of all that is held, (B, h, length + T, d_h). If it
# does not fit, or its shape is wrong, raise `ValueError` (an `assert` is skipped under `python -O`) and leave `room`
# as it was.
#
# <details><summary>Hint 1</summary>
#
# Do all comparisons before the first write. Which shape must `new` have, given the room that is left?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The place for it is `room[:, :, length:end]`. A slice past the end is *shorter* and `copy_` *broadcasts*, both
# silently: so compare `end` with the room, and the two shapes.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# Then `place.copy_(new)`, and return `room[:, :, :end]`, which is a view.
#
# </details>


# %% tags=["exercise"]
def append(room: Tensor, length: int, new: Tensor) -> Tensor:
    raise NotImplementedError


# %% tags=["solution"]
def append(room: Tensor, length: int, new: Tensor) -> Tensor:
    end = length + new.shape[2]
    if end > room.shape[2]:
        raise ValueError(
            f"{length} positions held, {new.shape[2]} new, room for {room.shape[2]}"
        )
    place = room[:, :, length:end]
    if place.shape != new.shape:
        raise ValueError(f"expected {tuple(place.shape)}, got {tuple(new.shape)}")
    place.copy_(new)
    return room[:, :, :end]


# %%
checks.ex05_1(append)

# %% [markdown]
# ### Exercise 05.2 · How far does the memory reach? (★☆☆, 10 minutes)
# A model with `config` is to serve `batch_size` conversations at once, with caches in a type of `bytes_per_number`
# bytes. Up to how many tokens can each conversation grow in `budget` bytes of cache? (Only memory counts here, not
# `config.max_len`.)
#
# <details><summary>Hint 1</summary>
#
# How many numbers does one token leave in one layer? Queries leave none.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $(R_K + R_V)(h + d_h)$ numbers, in each of `n_layer` layers, for each of `batch_size` conversations, at
# `bytes_per_number` bytes. Divide and round down.
#
# </details>


# %% tags=["exercise"]
def longest_context(
    config: T6Config, budget: int, batch_size: int, bytes_per_number: int
) -> int:
    raise NotImplementedError


# %% tags=["solution"]
def longest_context(
    config: T6Config, budget: int, batch_size: int, bytes_per_number: int
) -> int:
    numbers = (config.rank_k + config.rank_v) * (
        config.n_head + config.d_head
    )  # per token and layer
    return budget // (numbers * config.n_layer * batch_size * bytes_per_number)


# %%
checks.ex05_2(longest_context)

# %% [markdown]
# ### Exercise 05.3 · Four patients (★★★, 25 minutes)
# `checks.ex05.patients()` returns four float64 layers. One is healthy; the others have bugs that you have *not* met above:
# one keeps only a window of the last few tokens, one stores its cache in too narrow a type, and one confuses the
# sequences of a batch. All share their weights' shapes and take inputs (B, T, 32), up to 64 tokens. Find out by
# experiments, not by reading the code, which is which, and return the four words `"healthy"`, `"window"`,
# `"rounding"`, `"batch"` in the patients' order. (A layer's own full pass without a cache is correct.)
#
# <details><summary>Hint 1</summary>
#
# Compare a layer's own full pass with prefill and decoding from a cache (`run` above), in float64.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# One sequence or two different ones? Few tokens or many? A small error or a large one? Each illness has its own
# pattern.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# A batch of one is exact for the layer that confuses sequences; rounding is small (about $10^{-3}$) and everywhere; a
# window is exact up to 8 tokens past the prompt's start and far off later.
#
# </details>


# %% tags=["exercise"]
def diagnose(patients: list) -> list[str]:
    raise NotImplementedError


# %% tags=["solution"]
def diagnose(patients: list) -> list[str]:
    def largest_error(patient, batch_size, prompt):
        x = torch.randn(batch_size, 40, 32, dtype=torch.float64)
        return (
            (run(patient, x, [prompt] + [1] * (40 - prompt)) - patient(x))
            .abs()
            .max()
            .item()
        )

    found = []
    for patient in patients:
        alone, together = largest_error(patient, 1, 20), largest_error(patient, 2, 20)
        if together < 1e-10:
            found.append("healthy")
        elif alone < 1e-10:
            found.append("batch")  # one sequence is fine, two are not
        else:
            found.append(
                "rounding" if together < 0.05 else "window"
            )  # a little wrong, or very
    return found


# %%
checks.ex05_3(diagnose)

# %% [markdown]
# ## Summary
# - TPA remembers `a_k`, `b_k`, `a_v` and `b_v`: $(R_K + R_V)(h + d_h)$ numbers per token and layer, `b_k` already
#   rotated.
# - The cache is a value: room set aside once, a length, checks before writes, views out. The caller owns it.
# - One prompt, any chunks and single tokens agree to rounding; test it in float64, with chunks, a second prompt,
#   truncation and a batch above one, because the easy tests pass with the bug in place.
# - Bytes are the formula's, measured. Which ratio that makes depends on the baseline: say which.
#
# **Next:** [06 · Attention in factor space](06_attention_in_factor_space.ipynb) computes with the cached factors
# without ever building $K$ or $V$. The lines that you built are in [tpa.py](../tpa_minimal/tpa.py), the solved
# notebook is [here](solutions/05_factor_cache.ipynb).
