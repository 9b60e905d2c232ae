# %% [markdown]
# # 05 · The factor cache
# {badge}
#
# **You will be able to**
# - say what TPA caches, in which form, and how many bytes that is;
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

from tpa_minimal.course import checks, looks
from tpa_minimal.tpa import T6Config, apply_rope, assemble, factor_attention, factor_bound, rope_tables

looks.style()
torch.manual_seed(0)
_ = torch.set_grad_enabled(False)  # nothing is trained in this notebook


def assert_same(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


# %% [markdown]
# ## 1 · From hidden state to six factors
#
# To attend to a past token, a new token needs its keys and values. TPA makes them from the factors A_K, B_K, A_V, B_V
# (Eq. 3.1), so those four are what is worth remembering: (R_K + R_V)(h + d_h) numbers per token, where MHA remembers
# 2·h·d_h.
#
# All six factors are linear maps of the same hidden state, so one matrix product makes them all, and its result is
# cut into pieces. We work in float64, where "the same" means ten digits or more.

# %% tags=["nbval-check-output"]
config = T6Config(vocab_size=32, n_layer=1, d_model=64, n_head=8, d_head=16, max_len=64)  # ranks 6, 2, 2
shapes = [(6, 8), (6, 16), (2, 8), (2, 16), (2, 8), (2, 16)]  # (R, h) or (R, d_h) of a_q, b_q, a_k, b_k, a_v, b_v
sizes = [rank * width for rank, width in shapes]
weight = torch.randn(sum(sizes), 64, dtype=torch.float64) / 8
x = torch.randn(2, 32, 64, dtype=torch.float64)  # (B, T, d_model)


def project(x):
    parts = F.linear(x, weight).split(sizes, dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes)]


[tuple(factor.shape) for factor in project(x)]

# %% [markdown]
# Notebook 03 showed that rotating B_K is rotating the assembled K (Theorem 3.1), so b_k can be rotated *once, before
# it is stored*. That takes the token's **absolute** position: the first new token stands at `start`, the number of
# tokens before it.


# %% claim="prerotated"
def factors(x, start=0):
    a_q, b_q, a_k, b_k, a_v, b_v = project(x)
    positions = torch.arange(start, start + x.shape[1])
    cos, sin = rope_tables(positions, 16, 10000.0, torch.float64)
    return a_q, apply_rope(b_q, cos, sin), a_k, apply_rope(b_k, cos, sin), a_v, b_v


whole = factors(x)
for one, other in zip(factors(x[:, 20:], start=20), whole):
    assert_same(one, other[:, 20:])  # made late or early, a token's factors are the same

# %% [markdown]
# That assertion is the whole idea of caching: a token's factors depend on the token and its position, never on what
# comes later.
#
# ## 2 · Attention when the queries are the *last* tokens
#
# With a cache, T new queries meet M ≥ T keys. Query i stands at position M − T + i, so the causal mask is a triangle
# aligned at the **bottom right**. PyTorch's `is_causal=True` aligns it at the top left, which is the same only when T
# = M.

# %%
zeros, values = torch.zeros(1, 1, 5, 4), torch.arange(5.0).view(1, 1, 5, 1)
mean = F.scaled_dot_product_attention(zeros[:, :, :1], zeros, values, is_causal=True)
print(f"one query, five keys with values 0 to 4: is_causal averages to {mean.item()}, the right mask to 2.0")
torch.ones(2, 5, dtype=torch.int).tril(5 - 2)  # two queries, five keys: the last query sees all

# %% [markdown]
# With `is_causal` the newest token saw only the oldest. No error, no warning, and a whole prompt (T = M) is right:
# remember this one.

# %% tags=["tpa"]
# {{tpa: causal_attention}}

# %% [markdown]
# The full pass over all 32 tokens is what every way of caching has to reproduce:


# %%
def attend(a_q, b_q, a_k, b_k, a_v, b_v):
    return causal_attention(assemble(a_q, b_q), assemble(a_k, b_k), assemble(a_v, b_v))  # (B, T, h, d_h)


expected = attend(*whole)

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
# each step: M steps copy about M²/2 tokens. The alternative is to set the room aside once and write each token into
# its place. Time one step of each at several lengths, with the sizes of the paper's small model (h 34, d_h 64).


# %%
def milliseconds(action, *arguments):
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        action(*arguments)
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[3]  # the median


def concatenate(held, new):
    return [torch.cat(pair, dim=2) for pair in zip(held, new)]


def write(held, new):
    return [place[:, :, -1:].copy_(n) for place, n in zip(held, new)]


lengths = [512, 2048, 8192, 32768]
by_cat, by_copy = [], []
new = [torch.ones(1, 2, 1, width) for width in (34, 64, 34, 64)]
for length in lengths:
    held = [n.repeat(1, 1, length, 1) for n in new]
    by_cat.append(milliseconds(concatenate, held, new))
    by_copy.append(milliseconds(write, held, new))

# %%
fig, ax = plt.subplots()
for times, name, line in ((by_cat, "concatenate", "o-"), (by_copy, "write into its place", "s--")):
    ax.loglog(lengths, times, line)
    ax.annotate(name, (lengths[-1], times[-1]), xytext=(8, -4), textcoords="offset points")
ax.set(xlabel="tokens already held", ylabel="one append (ms)", xlim=(400, 300_000))
ax.set_title("Concatenation copies the whole past for each new token")
plt.show()
assert by_cat[-1] > 5 * by_copy[-1]

# %% [markdown]
# The lower line is flat: a write costs the same however long the past is. (Concatenation has a second price: each
# step has tensors of a new shape, which `torch.compile` must compile for again.)
#
# ## 4 · A preallocated value
#
# Now as a class, in four small decisions.
#
# **Room and views.** One tensor per factor, filled up to `length`. What `append` returns are *views* of the filled
# part: no copy. Each rank's rows lie one after another in memory, `(B, R, max_len, width)`, because that is how
# notebook 06 multiplies them; a transpose, which moves nothing, gives back the order (B, T, R, ·) of the rest of the
# course.

# %%
room = torch.zeros(2, 2, 64, 16)  # (B, R_K, max_len, d_h)
place = room[:, :, 3:5].transpose(1, 2)  # positions 3 and 4, as (B, 2, R_K, d_h)
place.copy_(torch.ones(2, 2, 2, 16))
print(f"numbers set in the room through its view: {room.sum():.0f}")

# %% [markdown]
# **Check first, write second.** A cache that finds out halfway that the tokens do not fit has already lost what it
# held, or holds three new factors and one old. And `copy_` *broadcasts*: hand it one sequence where two are expected
# and both rows get it, without a word.

# %%
place.copy_(torch.full((1, 2, 2, 16), 7.0))  # a batch of one, into a cache for two
print("the second sequence's cache now holds", room[1, 0, 3, 0].item(), "from the first sequence's token")

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
# `detach` keeps a cache from holding on to the graph of every past step when gradients are on. `widths` is for the
# variants of notebook 11, which store less of some factors. `Cache` is one of these per layer of a model. Try it:

# %%
cache = FactorCache(config, batch_size=2, dtype=torch.float64)
held = cache.append(*(factor[:, :30] for factor in whole[2:]))
held = cache.append(*(factor[:, 30:] for factor in whole[2:]))
for view, factor in zip(held, whole[2:]):
    assert torch.equal(view, factor)
assert held[0].data_ptr() == cache._a_k.data_ptr()  # a view: nothing was copied

# %%
tokens_33_more = [factor[:, :1].expand(-1, 33, -1, -1) for factor in whole[2:]]
try:
    cache.append(*tokens_33_more)
except ValueError as error:
    print(error)
assert cache.length == 32 and torch.equal(cache._views(0, 32)[1], whole[3])  # untouched

# %% [markdown]
# ## 5 · The layer
#
# `TensorProductAttention` puts it together: factors, cache, attention, output matrix. One decision is new. With all
# factors at hand there are two ways to attend:
#
# - **assemble** K and V of the whole context and call the fused kernel. Building them costs the same for one query as
#   for a thousand, and each query after that is cheaper, so it is right for training and for a long prompt;
# - **stay in factor space** (`factor_attention`, derived in the next notebook): K and V are never built, so a step
#   with one or a few new tokens does not rebuild the whole past.
#
# They are equal to rounding, and the layer takes factor space when there is a past and at most 16 tokens are new. (16
# is a rounded measurement; where the lines cross depends on context and machine: notebook 06, section 8.)

# %%
start = 31
a_q, b_q, *_ = factors(x[:, start:], start)
assert_same(factor_attention(a_q, b_q, *whole[2:], start=start), expected[:, start:])

# %% tags=["tpa"]
# {{tpa: TensorProductAttention}}

# %% [markdown]
# `project` and `factors` are section 1. `forward` has three numbered steps, and the position of a new token comes
# from one place only, `cache.length`. `factor_widths`, `rope`, `restore` and `attend` are separate methods so that a
# variant (notebook 11), or a bug (below), can replace one of them in two lines.
#
# The output matrix starts at zero, as in the authors' code, so a fresh layer returns zeros, and *zeros agree with
# anything*. For honest comparisons fill it first:

# %%
layer = TensorProductAttention(config).double()
assert not layer(x).any()
nn.init.normal_(layer.out_proj.weight, std=0.1)
expected = layer(x)  # all at once, without a cache

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
# In float32 the differences would be some 10⁻⁶, because sums are taken in another order; in float64 they are at the
# level of rounding. That is why correctness tests of a cache belong in float64: a bug that shifts an output by 10⁻⁶
# hides in float32's noise and not here.
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
# ## 7 · Bytes: measured = formula

# %% claim="cache-size" tags=["nbval-check-output"]
for name in ("tiny", "small-124M", "xl-1.5B"):
    c = T6Config.preset(name)
    cache = FactorCache(c, batch_size=3, max_len=100, dtype=torch.bfloat16)
    new = [torch.zeros(3, 70, 2, width) for width in (c.n_head, c.d_head) * 2]
    cache.append(*new)
    formula = (c.rank_k + c.rank_v) * (c.n_head + c.d_head)
    assert cache.nbytes == formula * 2 * 70 * 3  # numbers × bytes × tokens × sequences
    print(f"{name:11s} {formula} numbers per token and layer, {cache.nbytes:,} bytes measured")

# %% [markdown]
# `nbytes` counts what is held; the room set aside is for `max_len` tokens from the start. No stored tensor has the
# size of K or V: with h = 34 and d_h = 64 one token's keys are 2,176 numbers, and its four factors together 392.
#
# Is that small? It depends on what it is compared with. Here are the real caches of the paper's small models, each
# with the head count that gives its layer about the same weights, and MHA with TPA's 34 heads, which would have 2.8
# times the weights:

# %% claim="cache-small-models"
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
numbers = {}
for name, (mechanism, n_head) in MODELS.items():
    small_layer = mechanism(T6Config.preset("small-124M", n_head=n_head))
    cache = small_layer.new_cache(batch_size=1, max_len=8)
    small_layer(torch.randn(1, 8, 768), cache)
    numbers[name] = cache.nbytes // (8 * 4)
assert list(numbers.values()) == [4352, 1536, 392, 288, 256, 128]

# %%
fig, ax = plt.subplots()
bars = ax.barh(list(numbers)[::-1], list(numbers.values())[::-1], hatch=["", "", "", "//", "", ""])
ax.bar_label(bars, fmt="{:,.0f}", padding=4)
ax.set(xlabel="numbers cached per token and layer", xlim=(0, 4900))
ax.set_title("TPA caches far less than MHA, but more than MLA, GQA-2 and MQA")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# So the small model's saving is 3.9× against the MHA model of equal weights and 11.1× against an MHA layer with as
# many heads; MLA, GQA with two KV heads and MQA hold less than TPA, and the paper's case against GQA and MQA is
# quality, not bytes. MQA always holds less; how many groups GQA may have was exercise 04.2. "10× and more" is a ratio to MHA with as many heads, and needs many wide heads at a low rank: with h = 64, d_h
# = 128 and R_K = R_V = 1 it is 384 against 16,384, or 42.7× (21.3× with rank 2).
# With high ranks it turns round: (R_K + R_V)(h + d_h) exceeds MHA's 2·h·d_h once R_K + R_V > 2·h·d_h / (h + d_h).
#
# ## 8 · Six bugs, planted
#
# Cache bugs do not crash. They return fluent nonsense, or worse, text that is a little worse than it should be. Here
# are six that are found in real code, each as the one method that it gets wrong.


# %%
class RestartsPositions(TensorProductAttention):
    def factors(self, x, start=0):
        return super().factors(x, 0)  # every call thinks it is the first


class CountsTokensItself(TensorProductAttention):
    seen = 0

    def factors(self, x, start=0):
        self.seen += x.shape[1]  # instead of asking the cache
        return super().factors(x, self.seen - x.shape[1])


class RotatesAgain(TensorProductAttention):
    def restore(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        if start > 0:  # "what comes out of the cache is not rotated yet"
            b_k = apply_rope(b_k, *self.rope(torch.arange(b_k.shape[1]), b_k.dtype))
        return a_q, b_q, a_k, b_k, a_v, b_v


# %%
class MasksFromTheLeft(TensorProductAttention):
    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        q, k, v = (assemble(a, b).transpose(1, 2) for a, b in ((a_q, b_q), (a_k, b_k), (a_v, b_v)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class DecodesWithoutMask(TensorProductAttention):
    def attend(self, a_q, b_q, a_k, b_k, a_v, b_v, start):
        q, k, v = (assemble(a, b).transpose(1, 2) for a, b in ((a_q, b_q), (a_k, b_k), (a_v, b_v)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=start == 0).transpose(1, 2)


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

# %% tags=["nbval-check-output"]
BUGS = [RestartsPositions, RotatesAgain, MasksFromTheLeft, DecodesWithoutMask, RemembersInTheModule, CountsTokensItself]


def error(kind, test):
    copy = kind(config).double()
    copy.load_state_dict(layer.state_dict())
    try:
        return (test(copy) - expected).abs().amax(dim=(0, 2))  # by position
    except ValueError:  # the layer's own checks noticed
        return torch.full((32,), math.inf)


print(" " * 24 + "".join(f"{name:>16s}" for name in TESTS))
for kind in [TensorProductAttention, *BUGS]:
    passed = ["ok" if error(kind, test).max() < 1e-10 else "WRONG" for test in TESTS.values()]
    print(f"{kind.__name__:24s}" + "".join(f"{p:>16s}" for p in passed))

# %% [markdown]
# Read it by columns. *No cache* and *one prompt*, the two tests that everybody writes first, notice nothing. *Token
# by token* notices three bugs; the missing mask passes it, because a single query has nothing to mask, and needs
# *chunks*. State kept in the module shows only with a *second prompt*, and a layer that counts for itself only after
# *truncate*: RoPE sees differences of positions, so being wrong by the same amount everywhere is not wrong at all.
#
# Where the errors lie tells one bug from the other three:

# %%
chunked = torch.stack([error(kind, TESTS["chunks of 8"]) for kind in BUGS[:4]])
fig, ax = plt.subplots(figsize=(7, 2.6))
image = ax.imshow(chunked.clamp(min=1e-16).log10(), cmap="Greys", aspect="auto", vmin=-16, vmax=0)
fig.colorbar(image, label="log₁₀ of the error")
ax.set(xlabel="position (chunks of 8)", yticks=range(4), yticklabels=[kind.__name__ for kind in BUGS[:4]])
ax.set_xticks([0, 8, 16, 24])
ax.grid(visible=False)
ax.set_title("Only the missing mask spares the last token of each chunk")
plt.show()

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
        raise ValueError(f"{length} positions held, {new.shape[2]} new, room for {room.shape[2]}")
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
def longest_context(config: T6Config, budget: int, batch_size: int, bytes_per_number: int) -> int:
    raise NotImplementedError


# %% tags=["solution"]
def longest_context(config: T6Config, budget: int, batch_size: int, bytes_per_number: int) -> int:
    numbers = (config.rank_k + config.rank_v) * (config.n_head + config.d_head)  # per token and layer
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
        return (run(patient, x, [prompt] + [1] * (40 - prompt)) - patient(x)).abs().max().item()

    found = []
    for patient in patients:
        alone, together = largest_error(patient, 1, 20), largest_error(patient, 2, 20)
        if together < 1e-10:
            found.append("healthy")
        elif alone < 1e-10:
            found.append("batch")  # one sequence is fine, two are not
        else:
            found.append("rounding" if together < 0.05 else "window")  # a little wrong, or very
    return found


# %%
checks.ex05_3(diagnose)

# %% [markdown]
# ## Summary
# - TPA remembers a_k, b_k, a_v and b_v: (R_K + R_V)(h + d_h) numbers per token and layer, b_k already rotated.
# - The cache is a value: room set aside once, a length, checks before writes, views out. The caller owns it.
# - One prompt, any chunks and single tokens agree to rounding; test it in float64, with chunks, a second prompt,
#   truncation and a batch above one, because the easy tests pass with the bug in place.
# - Bytes are the formula's, measured. Which ratio that makes depends on the baseline: say which.
#
# **Next:** [06 · Attention in factor space](06_attention_in_factor_space.ipynb) computes with the cached factors
# without ever building K or V.
