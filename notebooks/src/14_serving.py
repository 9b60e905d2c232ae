# %% [markdown]
# # 14 · Serving with a factor cache
#
# {badge}
#
# **You will be able to**
# - decode prompts of unequal lengths, and say what padding wastes and how continuous batching avoids it;
# - keep a factor cache in pages, and share a long system prompt between sequences;
# - store factors in 8 or 4 bits, and say which of them is the most delicate and why;
# - say what several GPUs split and what they copy, and so where TPA's cache stops shrinking;
# - decode speculatively, and decide which hardware and which load favour which mechanism.
#
# **You need** notebooks 05 (the cache) and 06 (attention in factor space); 09 for the accountant.
#
# **Time** about 90 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# Notebook 07 ended with `generate`: one batch, one cache, start to end. A server serves many users at once, at any time,
# for answers of any length, often behind the same long instructions. What stands between the two is small and has
# little to do with TPA, which is the good news: a factor cache can be padded, paged, shared, rounded and rolled back
# like any other. Here we do each of these, and measure.

# %% tags=["hide-input"]
import copy
import functools
import inspect
import os
import time

import matplotlib.pyplot as plt
import numpy as np

from tpa_minimal import quantized, serving
from tpa_minimal.course import checks, looks
from tpa_minimal.experiments import data, evaluate, train
from tpa_minimal.memory import GB, MODELS, Layer
from tpa_minimal.tpa import T6, FactorCache, T6Config

looks.style()
torch.manual_seed(0)
FULL = os.environ.get("TPA_FULL") == "1"

# %% [markdown]
# ## 1 · A model, and requests
#
# So that quality means something, a small T6 reads the built-in lessons for some seconds, and so does a smaller one,
# which will help it later.

# %%
lessons = data.prepare("lessons", 400_000, progress=False)
sizes = dict(vocab_size=lessons.vocab_size, d_head=16, max_len=512, init="authors")
held_out = list(lessons.validation_batches(batch_size=16, seq_len=64, max_batches=8))


# %%
steps = 3000 if FULL else 300
model = T6(T6Config(n_layer=2, d_model=64, n_head=8, **sizes))
draft = T6(T6Config(n_layer=1, d_model=32, n_head=4, **sizes))
for each in (model, draft):
    train.fit(each, lessons, steps, lr=8e-3)


# %%
@torch.no_grad()
def losses(model):
    """The loss of each token of the held-out lessons, in nats."""
    found = []
    for inputs, targets in held_out:
        log_p = model(inputs).log_softmax(-1)
        found.append(-log_p.gather(-1, targets[..., None]).flatten())
    return torch.cat(found)


# %%
for name, one in (("model", model), ("draft", draft)):
    print(
        f"{name}: {one.num_parameters():,} weights, loss {losses(one).mean():.2f} nats"
    )

# %% [markdown]
# And here are 24 requests: questions from the held-out lessons, with answers that may have from a few to many tokens.
# (A real server learns the length of an answer when it ends. Ours are given, so that nothing depends on chance.)

# %%
tokenizer = lessons.tokenizer
asked = [evaluate.lesson_questions(task, 8) for task in evaluate.LESSONS]
prompts = [torch.tensor(tokenizer.encode(q.context)) for qs in zip(*asked) for q in qs]
answers = np.random.default_rng(3).geometric(1 / 24, len(prompts)).clip(2, 120).tolist()
requests = list(zip(prompts, answers))
print("tokens of the prompts:", *map(len, prompts))
print("tokens of the answers:", *answers)

# %% [markdown]
# ## 2 · Unequal prompts, and what padding wastes
#
# Prompts of unequal lengths do not fit into one tensor. Notebook 05 gave the remedy: pad on the left, by any token, and
# tell the model how much. RoPE sees differences of positions only, so a row that begins later is not a different text:

# %%
batch = requests[:4]
longest = max(len(prompt) for prompt, _ in batch)
padding = torch.tensor([longest - len(prompt) for prompt, _ in batch])
padded = torch.stack(
    [torch.nn.functional.pad(p, (longest - len(p), 0)) for p, _ in batch]
)
exact = copy.deepcopy(model).double()  # float64, where no rounding decides
together = exact.generate(padded, 20, temperature=0, padding=padding)
for (prompt, _), row in zip(batch, together):
    alone = exact.generate(prompt[None], 20, temperature=0)
    assert torch.equal(row[-20:], alone[0, -20:])
print("padding:", padding.tolist(), "- each row writes what it writes alone")

# %% [markdown]
# Right, and wasteful: the cache has places for padding, and a row that is done waits for the row that is not. In a
# static batch each row takes as many places as the longest prompt and the longest answer together. What share of these
# places holds no token that anybody wants?
#
# ### Exercise 14.1 · What a static batch wastes (★☆☆, 5 minutes)
# Write `wasted(prompts, answers)`: two lists with the lengths of each row's prompt and answer. Return the share of the
# places of the batch, between 0 and 1, that hold neither prompt nor answer.
#
# <details><summary>Hint 1</summary>
#
# All answers begin at the same place, behind the longest prompt. How many places has a row then? And the batch?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `len(prompts) * (max(prompts) + max(answers))` places, and `sum(prompts) + sum(answers)` tokens.
#
# </details>


# %% tags=["exercise"]
def wasted(prompts, answers):
    raise NotImplementedError


# %% tags=["solution"]
def wasted(prompts, answers):
    places = len(prompts) * (max(prompts) + max(answers))
    return 1 - (sum(prompts) + sum(answers)) / places


# %%
checks.ex14_1(wasted)

# %% [markdown]
# Measured on the caches themselves, for our requests in batches of 4:

# %%
held = needed = 0
for first in range(0, len(requests), 4):
    rows = requests[first : first + 4]
    length = max(len(p) for p, _ in rows) + max(n for _, n in rows)
    cache = model.new_cache(batch_size=4, max_len=length)
    with torch.no_grad():
        model(torch.zeros(4, length, dtype=torch.long), cache)
    held += cache.nbytes
    needed += sum(len(p) + n for p, n in rows) * cache.nbytes // (4 * length)
print(f"{held:,} bytes held, {needed:,} needed: {1 - needed / held:.0%} wasted")
assert held > 1.5 * needed

# %% [markdown]
# ## 3 · Continuous batching
#
# The remedy for the waiting: decide anew *at each step* who is in the batch. Finished sequences leave, waiting ones enter.
# The picture shows it for our requests, one line for each place in the batch:


# %% tags=["hide-input"]
def schedule(slots, static):
    """(slot, first step, steps) of each request in order, and the number of steps of all."""
    free, found = [0] * slots, []
    for i, n in enumerate(answers):
        if static and i % slots == 0:
            free = [max(free)] * slots
        slot = free.index(min(free)) if not static else i % slots
        found.append((slot, free[slot], n))
        free[slot] += n
    return found, max(free)


def draw(slots):
    fig, axes = plt.subplots(2, 1, figsize=(7.6, 3.8), sharex=True)
    ends = []
    for ax, static in zip(axes, (True, False)):
        found, end = schedule(slots, static)
        ends.append(end)
        for k, (slot, first, n) in enumerate(found):
            ax.barh(
                slot,
                n,
                left=first,
                color=looks.COLOURS[k % 3],
                edgecolor="white",
                hatch=["", "//", ".."][k % 3],
            )
        ax.set(yticks=range(slots), ylabel="place")
        ax.grid(axis="y", visible=False)
        ax.invert_yaxis()
        name = "Static: all wait for the slowest" if static else "Continuous"
        ax.set_title(f"{name}, {end} steps")
    axes[1].set_xlabel("step")
    alt = f"Bars of 24 requests in {slots} places. In static batches, with gaps, they take {ends[0]} steps; "
    return (
        fig,
        alt + f"with continuous batching, without gaps until the end, {ends[1]}.",
    )


# %%
looks.show(*draw(slots=4))

# %%
looks.control(draw, slots=(1, 8, 4))

# %% [markdown]
# With one place there is nothing to gain, and with as many places as requests nothing either: the longest answer
# decides. In between the gaps close.
#
# What does a model need for this? In a step, each row is at a position of its own: its new token is rotated by *its*
# length, and it sees *its* cache. `serving.decode` does this in ten lines, with the layers as they are:
#
# ```python
# x = model.embedding(tokens)[:, None]                                     # (B, 1, d_model)
# positions = torch.tensor([cache.length for cache in caches])
# for block, *layer in zip(model.blocks, *caches):
#     rope, cache = block.attention.rope, Ragged(layer)                    # several caches as one batch's
#     tables = [table[:, None] for table in rope_tables(positions, *rope, x.dtype)]
#     x = block(x, cache, rope=tables, padding=cache.padding)
# ```
#
# `Ragged` appends to each cache and hands out all of them as one batch, padded on the left for this one step. (The
# kernel of a real server reads each where it lies, and pads nothing.) On top of it the scheduler: admit, step, retire.

# %%
source = inspect.getsource(serving.serve)
print(source[source.index("    texts, waiting") :])

# %% [markdown]
# Does everybody get the text that they would get alone?

# %%
texts, _ = serving.serve(exact, requests, 4, lambda: exact.new_cache(1, 200))
for (prompt, n), text in zip(requests, texts):
    alone = exact.generate(prompt[None], n, temperature=0)[0]
    assert text == alone.tolist()
print(len(texts), "texts, each as it is alone")

# %% [markdown]
# And what is the gain in time, not only in steps?


# %%
def timed(static):
    start = time.perf_counter()
    texts, steps = serving.serve(
        model, requests, 4, functools.partial(model.new_cache, 1, 200), static
    )
    return texts, steps, time.perf_counter() - start


# %%
rows = []
for name, static in (("static", True), ("continuous", False)):
    runs = [timed(static) for _ in range(2)]
    steps, seconds = runs[0][1], min(seconds for _, _, seconds in runs)
    assert steps == schedule(4, static)[1]
    rows.append([name, steps, f"{sum(answers) / seconds:.0f}"])

# %% tags=["hide-input"]
looks.table(
    ["batching", "steps", "new tokens per second"], rows, "24 requests in 4 places"
)

# %% [markdown]
# The steps are a count and the same everywhere; tokens per second are this machine's, prefill of the prompts included.
# Where they gain less than the steps do, remember what a step costs: here it is a sum over rows, done one by one, so
# that an empty place costs nothing, and the static run leaves out whoever is done. On a GPU a step of one row takes
# about as long as one of four, because it reads all weights once either way. There the steps are what counts.
#
# ## 4 · Pages, and a prefix that is shared
#
# Who knows how long an answer will be? A cache that sets aside `max_len` positions at once holds mostly nothing. So
# servers cut the memory into **pages** of some positions (vLLM calls them blocks), and a sequence keeps a **table** of
# its pages: position $t$ lies in page `table[t // page_size]`, at place `t % page_size`. A page is taken from the pool
# when the last one is full. `PagedCache` is that, with the interface of `FactorCache`, so the model does not notice.
#
# The table has a second use. Many requests begin with the same long system prompt. Its factors are the same, so its
# pages can be, too: a **fork** copies the table, not the pages, and raises their *reference counts*. Only a sequence
# that writes to a page that others hold makes a copy first, *copy on write*.

# %%
instructions = " ".join(q.context.split("\n")[0] for q in asked[0][:3])
system_prompt = torch.tensor([tokenizer.encode(instructions)])
pools = serving.new_pools(model, n_pages=40, page_size=16)
system = serving.paged_cache(pools)
with torch.no_grad():
    model(system_prompt, system)
    users = [serving.fork(system) for _ in range(3)]
    for cache, prompt in zip(users, prompts):
        logits = model(prompt[None], cache)
print(system_prompt.shape[1], "tokens of system prompt, then", *map(len, prompts[:3]))

# %% tags=["hide-input"]
tables = {"system": system[0].table} | {
    f"user {k + 1}": cache[0].table for k, cache in enumerate(users)
}
holders = pools[0].holders
fig, ax = plt.subplots(figsize=(7.8, 3))
for y, (name, table) in enumerate(tables.items()):
    ax.text(-0.2, y, name, ha="right", va="center")
    for x, page in enumerate(table):
        shared = holders[page] > 1
        box = dict(
            facecolor=looks.COLOURS[0] if shared else "white",
            edgecolor=looks.COLOURS[0],
        )
        ax.add_patch(
            plt.Rectangle((x + 0.06, y - 0.4), 0.88, 0.8, linewidth=1.5, **box)
        )
        ax.text(
            x + 0.5,
            y,
            f"{page}" + (f"\n×{holders[page]}" if shared else ""),
            ha="center",
            va="center",
            fontsize=9,
            color="white" if shared else "black",
        )
ax.set(
    xlim=(-1.6, max(map(len, tables.values()))), ylim=(3.6, -0.6), xticks=[], yticks=[]
)
ax.grid(visible=False)
ax.spines[:].set_visible(False)
ax.set_title("Block tables: blue pages are shared, ×4 is the reference count")
n_shared = sum(count > 1 for count in holders)
looks.show(
    fig,
    f"The block tables of a system prompt and three users: {n_shared} pages are shared by all four, "
    "the others, with other numbers, belong to one sequence each.",
)

# %% [markdown]
# Page numbers in the boxes, one line for each sequence. The prompt's full pages are there once. Its last page is not
# full, so each user, whose text begins in the middle of that page, has a copy.

# %%
for prompt, cache in zip(prompts, users):
    whole = torch.cat((system_prompt, prompt[None]), dim=1)
    separate = model.new_cache(1)
    with torch.no_grad():
        model(whole, separate)
    for layer, plain in zip(cache, separate):
        kept = zip(layer.view(0, layer.length), plain.view(0, plain.length))
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in kept)

# %%
alone = sum(cache.nbytes for cache in (system, *users))
in_pages = sum(pool.nbytes for pool in pools)
set_aside = 4 * 512 * system.nbytes // system.length
print(f"separate caches, no page half empty: {alone:,} bytes")
print(f"pages that are held:                 {in_pages:,} bytes")
print(f"room for 512 positions each:         {set_aside:,} bytes")
assert in_pages < alone < set_aside

# %% [markdown]
# The factors are those of separate caches. The pages hold less than separate caches would, although some are half
# empty, and a small part of what four caches of `max_len` positions set aside.
#
# One limit to know: $b_k$ is stored *rotated*, so what is shared must stand at the same positions in all sequences. A
# common *beginning* does. A document in the middle of two different texts does not; moving it means rotating its $b_k$
# by the difference, and its later layers have seen other texts anyway.
#
# ### Exercise 14.2 · How many pages? (★★☆, 10 minutes)
# A system prompt of `prefix` tokens stays in the cache. Each of `lengths` is a text that is forked from it and brings
# that many tokens of its own, 1 or more. How many pages of `page_size` positions are held by all of them together?
#
# <details><summary>Hint 1</summary>
#
# The full pages of the prefix are there once. What happens to its last page, if it is not full?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A text's table has ⌈(prefix + n) / page_size⌉ pages, of which ⌊prefix / page_size⌋ are shared.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# The prefix itself holds ⌈prefix / page_size⌉ pages: the full ones, and its own half-full one.
#
# </details>


# %% tags=["exercise"]
def pages_held(prefix, lengths, page_size):
    raise NotImplementedError


# %% tags=["solution"]
def pages_held(prefix, lengths, page_size):
    def pages(n):
        return -(-n // page_size)  # rounded up

    own = sum(pages(prefix + n) - prefix // page_size for n in lengths)
    return pages(prefix) + own


# %%
checks.ex14_2(pages_held)

# %% [markdown]
# When the pool is empty, `append` refuses, and nothing that was held is lost. A real server then lets a sequence wait,
# or drops its pages and computes them again later.

# %%
try:
    system[0].append(*(torch.zeros(1, 600, *kept.shape[2:]) for kept in pools[0].kept))
except ValueError as error:
    print(error)
free = pools[0].free
for cache in users:
    cache.truncate(0)  # a user leaves
print(f"{free} pages were free, {pools[0].free} are now")

# %% [markdown]
# What does sharing do for a real model? Take Llama 3 8B on one GPU of 80 GB, in bfloat16: a system prompt of 32,768
# tokens for all, and 2,048 more for each user. How many users fit beside the weights?

# %%
llama = MODELS["Llama 3 8B"]
latent = Layer("mla", 4096, 32, 128, d_c=512, d_rope=64)
versions = {
    "GQA-8, as shipped": llama,
    "MLA (512 + 64)": llama.with_attention(latent),
    "TPA (16, 1, 1)": llama.with_tpa(16, 1, 1),
    "TPA (16, 2, 2)": llama.with_tpa(16, 2, 2),
}

# %%
rows = []
for name, version in versions.items():
    separate = version.largest_batch(80 * GB, 32_768 + 2_048)
    left = 80 * GB - version.cache_bytes(32_768)  # the prompt once, and the users' own
    rows.append([name, separate, version.largest_batch(left, 2_048)])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "users, separate caches", "users, prompt shared"]
looks.table(header, rows, "Llama 3 8B in 80 GB: 32,768 shared tokens and 2,048 own")

# %% [markdown]
# Sharing multiplies the users by about 16, whatever the mechanism; TPA's saving multiplies with it. The two are
# independent, and the larger factor here is not TPA's. (Activations come on top, and no mechanism but the shipped one has been trained.)
#
# ## 5 · Eight bits
#
# Each row of a factor, the $h$ or $d_h$ numbers that one outer product of one token brings, is divided by its largest
# number and rounded to whole numbers from −127 to 127: 8 bits a number, and one scale of 16 bits a row. With 4 bits the
# numbers go from −7 to 7, two in a byte.

# %%
row = model.blocks[0].attention.factors(torch.randn(1, 1, 64))[3][0, 0, 0].detach()
for bits in (8, 4):
    rows = quantized.quantize(row, bits)
    print(
        f"{bits} bits: scale {rows.scales.item():.4f}, bytes {rows.codes.numel()} + 2,"
        f" largest error {(rows.to(torch.float32) - row).abs().max():.4f}"
    )

# %% [markdown]
# Attention stays in factor space: `factor_attention` takes the cache in blocks anyway and turns each block into its
# working type, and *that* is where codes become numbers. A copy of the cache in full precision never exists. The result
# is that of the rounded factors exactly:


# %%
class RoundedCache(FactorCache):
    """The numbers that the codes stand for, at full width."""

    def append(self, *new):
        return super().append(*(quantized.quantize(x, 8).to(x.dtype) for x in new))


# %%
tokens = held_out[0][0][:2]
cache, plain = quantized.new_cache(exact, 2, bits=8), exact.new_cache(2)
for layer in plain:
    layer.__class__ = RoundedCache
with torch.no_grad():
    for chunk in tokens.split([40, 3, 1, 20], dim=1):
        difference = (exact(chunk, cache) - exact(chunk, plain)).abs().max()
        assert difference < 1e-10
print(f"largest difference of a logit {difference:.0e}, from {cache.nbytes:,} bytes")
print(f"where bfloat16 takes {plain.nbytes // 4:,}")

# %% [markdown]
# ### How many bytes?

# %% tags=["nbval-check-output"]
mechanisms = {
    "TPA (6, 2, 2), 34 heads": Layer("tpa", 768, 34, 64),
    "MHA, 12 heads": Layer("mha", 768, 12, 64),
    "GQA, 2 KV heads of 22": Layer("gqa", 768, 22, 64, n_kv_head=2),
    "MLA (256 + 32)": Layer("mla", 768, 12, 64, d_c=256, d_rope=32),
}
rows = []
for name, layer in mechanisms.items():
    row = [2 * layer.cached_numbers, *(layer.quantized_bytes(bits) for bits in (8, 4))]
    rows.append([name, *row, f"{row[0] / row[1]:.2f}", f"{row[0] / row[2]:.2f}"])
shapes = [(2, 34), (2, 64)] * 2
for bits, formula in ((8, rows[0][2]), (4, rows[0][3])):
    cache = quantized.QuantizedCache(shapes, batch_size=3, max_len=10, bits=bits)
    cache.append(*(torch.randn(3, 10, *shape) for shape in shapes))
    assert cache.nbytes == 3 * 10 * formula

# %% tags=["hide-input", "nbval-check-output"]
header = [
    "",
    "bfloat16",
    "8 bits",
    "4 bits",
    "8 bits, times less",
    "4 bits, times less",
]
looks.table(header, rows, "Bytes per token and layer of the paper's small models")

# %% [markdown]
# The scales are the price of short rows: TPA has eight rows of 34 or 64 numbers, and each brings 2 bytes of scale. So
# 8 bits save 1.92 times here and 4 bits 3.70 times, a little less than the 2 and 4 times of a single long row.
#
# ### What does it cost?
#
# Round one factor at a time as the cache would, and look at the loss on held-out text. Each token is compared with
# itself, so that the standard error is that of the *difference*. We go down to 2 bits to see the order.


# %%
def rounded(model, bits):
    """A copy that rounds a_k, b_k, a_v, b_v to so many bits each; None: not at all."""
    model = copy.deepcopy(model)

    def factors(layer, *args):
        a_q, b_q, *kept = type(layer).factors(layer, *args)
        kept = [
            x if b is None else quantized.quantize(x, b).to(x.dtype)
            for x, b in zip(kept, bits)
        ]
        return a_q, b_q, *kept

    for block in model.blocks:
        block.attention.factors = functools.partial(factors, block.attention)
    return model


# %%
NAMES = ("a_k", "b_k", "a_v", "b_v")
with torch.no_grad():
    exact_losses, exact_logits = losses(model), model(held_out[0][0])

# %%
costs = {}
for name in (*NAMES, "all four"):
    for bits in (8, 4, 3, 2):
        one = rounded(model, [bits if name in (n, "all four") else None for n in NAMES])
        more = losses(one) - exact_losses
        with torch.no_grad():
            moved = (one(held_out[0][0]) - exact_logits).abs().max().item()
        costs[name, bits] = (
            more.mean().item(),
            more.std().item() / len(more) ** 0.5,
            moved,
        )

# %% tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6))
widths = [8, 4, 3, 2]
for (name, style), colour in zip(
    zip((*NAMES, "all four"), ("o-", "s--", "^-.", "D:", "x-")), looks.COLOURS
):
    more, error, moved = zip(*(costs[name, bits] for bits in widths))
    axes[0].errorbar(widths, more, yerr=error, fmt=style, color=colour, label=name)
    axes[1].plot(widths, moved, style, color=colour)
axes[0].set_yscale("symlog", linthresh=1e-3)
axes[0].set(ylabel="loss added [nats per token]", ylim=(-5e-4, None))
axes[1].set(yscale="log", ylabel="largest change of a logit")
for ax in axes:
    ax.set(xlabel="bits of a number", xticks=widths)
    ax.invert_xaxis()
axes[0].legend(fontsize=8)
axes[0].set_title("Loss: nothing to see at 8 bits")
axes[1].set_title("Largest change of a logit")
looks.show(
    fig,
    "Added loss and largest change of a logit against bits, for each factor and all: no loss to see at 8 bits, "
    "rising below; the key's feature factors b_k end highest of the four.",
)

# %%
rows = []
for bits in (8, 4, 2):
    for name in (*NAMES, "all four"):
        more, error, moved = costs[name, bits]
        rows.append(
            [f"{bits} bits, {name}", f"{more:+.5f}", f"{error:.5f}", f"{moved:.2f}"]
        )
assert all(abs(costs[name, 8][0]) < 2e-4 for name in NAMES)
assert max(NAMES, key=lambda name: costs[name, 2][0]) == "b_k"
assert costs["all four", 2][0] > 10 * costs["all four", 4][0]
for bits in (4, 3, 2):
    a_k, b_k, a_v, b_v = (costs[name, bits][2] for name in NAMES)
    assert min(a_k, b_k) > max(a_v, b_v)

# %% tags=["hide-input"]
header = ["rounded", "loss added [nats]", "standard error", "largest change of a logit"]
looks.table(header, rows, "What rounding costs, over 8,192 held-out tokens")

# %% [markdown]
# At 8 bits the loss does not move: whatever there is, is a ten-thousandth of a nat or less. 4 bits for everything cost
# a few thousandths, most of them for $b_v$. At 2 bits, where no error hides in the noise, **$b_k$ is the most delicate**,
# then $b_v$, then the two head factors. And below 8 bits single logits are moved more by the keys' factors than by the
# values'. Why? Look at the second layer, each factor rounded to 4 bits in turn, and at what comes out of attention:

# %%
inputs, layer = [], model.blocks[1].attention
hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
with torch.no_grad():
    model(held_out[0][0])
    factors = layer.factors(inputs[0])
hook.remove()

# %%
with torch.no_grad():
    right, rows = layer.attend(*factors, start=0), []
    for i, name in enumerate(NAMES, start=2):
        changed = list(factors)
        changed[i] = quantized.quantize(factors[i], 4).to(torch.float32)
        row_error = (changed[i] - factors[i]).norm() / factors[i].norm()
        off = layer.attend(*changed, start=0) - right
        typical = off.norm() / right.norm()
        largest = off.abs().max() / right.abs().max()
        rows.append([name, *(f"{x:.3f}" for x in (row_error, typical, largest))])
assert rows[1][1] > rows[0][1] and rows[3][1] > rows[2][1]  # b above a
assert min(rows[:2], key=lambda r: r[3])[3] > max(rows[2:], key=lambda r: r[3])[3]

# %% tags=["hide-input"]
header = [
    "4 bits for",
    "error of the factor",
    "of the output, typical",
    "of the output, largest",
]
looks.table(
    header,
    rows,
    "Relative errors in the second layer (root mean square; of the largest)",
)

# %% [markdown]
# Two reasons, and both are in the table:
#
# - **b before a.** A row of $b$ has $d_h = 16$ numbers here and one of $a$ has $h = 8$. The more numbers share a scale,
#   the further the largest stands above the rest, and the coarser is the step for these. So $b$ has the larger error.
# - **Keys before values.** The error of a value enters the output as it is, weighted and averaged over all positions: for $b$
#   it is *typically* larger than that of a key, and never very large. The error of a key enters a score, and the softmax
#   raises $e$ to the score. An error of 7 % changes nothing where the score is near 0, and much where it is large,
#   which is where the model looks for something in particular. So a key's errors are rare and large.
#
# If bits are to be saved unequally, then, save them at the head factors: `bits=(4, 8, 4, 8)`.

# %%
rows = []
for bits in ((8, 8, 8, 8), (4, 8, 4, 8), (4, 4, 4, 4)):
    cache = quantized.QuantizedCache(
        model.blocks[0].attention.shapes[2:], 1, 1, bits=bits
    )
    cache.append(*(torch.randn(1, 1, *shape) for shape in layer.shapes[2:]))
    more = losses(rounded(model, bits)) - exact_losses
    rows.append(
        [
            f"{bits}",
            cache.nbytes,
            f"{more.mean():+.5f} ± {more.std() / len(more) ** 0.5:.5f}",
        ]
    )

# %% tags=["hide-input"]
header = [
    "bits of a_k, b_k, a_v, b_v",
    "bytes per token and layer",
    "loss added [nats]",
]
looks.table(header, rows, "This model: unequal bits (192 bytes in bfloat16)")

# %% [markdown]
# What this does *not* show: that a model of a billion weights bears the same. Large models are known to have a few
# features of keys that are far larger than the others, and these make a common scale coarse; one then scales each
# *feature* (KIVI, arXiv 2402.02750), or rotates before rounding. Measure on your own model, and measure the loss, not the error.
#
# ## 6 · Several GPUs
#
# A model that does not fit on one GPU is split over several, layer by layer *by heads*: each GPU computes some of the
# heads, and one sum puts the outputs together (tensor parallelism). MHA's cache splits with the heads. What about TPA's?
# Head $i$ reads column $i$ of $a_k$ and $a_v$, and *all* of $b_k$ and $b_v$. So the head factors are split, and the
# feature factors are copied to every GPU.

# %%
from tpa_minimal import parallel

layer = exact.blocks[0].attention
x = torch.randn(1, 12, 64, dtype=torch.float64)
parts = [parallel.heads_of(layer, index, count=2) for index in range(2)]
with torch.no_grad():
    added = sum(part(x) for part in parts)
    assert torch.allclose(added, layer(x), atol=1e-12)
for name, whole, half in zip(NAMES, layer.shapes[2:], parts[0].shapes[2:]):
    print(f"{name}: {whole} becomes {half} on each of 2")

# %% [markdown]
# (Here both halves run one after the other, in one process. `parallel.shard` does it over a process group, and the
# tests run it in two processes.) The consequence, for a layer of Llama 3 70B:

# %%
shape = dict(d_model=8192, n_head=64, d_head=128)
layers = {
    "MHA": Layer("mha", **shape),
    "GQA-8, as shipped": Layer("gqa", **shape, n_kv_head=8),
    "MLA (512 + 64)": Layer("mla", **shape, d_c=512, d_rope=64),
    "TPA (16, 1, 1)": Layer("tpa", **shape, rank_q=16, rank_k=1, rank_v=1),
    "TPA (16, 2, 2)": Layer("tpa", **shape, rank_q=16, rank_k=2, rank_v=2),
}

# %%
counts = (1, 2, 4, 8)
rows = [
    [name, *(layer.split(N).cached_numbers for N in counts)]
    for name, layer in layers.items()
]
assert rows[3][1:] == [384, 320, 288, 272] and rows[1][-1] == 256

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "1 GPU", *(f"each of {N}" for N in counts[1:])]
looks.table(header, rows, "Numbers cached per token and layer on each GPU")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.4))
for (name, *numbers), mechanism in zip(rows, ("mha", "gqa", "mla", "tpa", "tpa")):
    look = looks.of(mechanism).line_style()
    if name.endswith("2)"):
        look = looks.TPA_LOOKS[1].line_style()
    ax.plot(counts, numbers, **look, label=name)
ax.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="numbers on each GPU")
ax.set_xticks(counts, counts)
ax.minorticks_off()
ax.legend(fontsize=8, loc="upper right", ncols=2)
ax.set_ylim(150, 60_000)
ax.set_title("MHA and GQA split, MLA and TPA's feature factors are copied")
looks.show(
    fig,
    "Numbers per token on each GPU against the number of GPUs, both logarithmic: MHA and GQA fall in proportion, "
    "MLA is level, TPA falls a little. At 8 GPUs GQA, with 256, has come below TPA of rank 1, with 272.",
)

# %% [markdown]
# On one GPU TPA with ranks 1 caches 384 numbers, 5.3 times less than GQA-8. On each of 8 it caches 272 numbers against 256: **the
# saving is gone**. MLA does not split at all. Splitting by heads is not the only way: give each GPU whole *sequences*
# (data parallel attention) or whole stretches of positions ([notebook 10](10_flash_decode.ipynb)), and each mechanism
# keeps its ratio. That is how MLA models are served.
#
# ## 7 · Speculative decoding
#
# Decoding reads all weights and the cache for *one* token. Reading them for five tokens takes little longer, where
# memory is the limit. But the second token is not known before the first. So let a small, fast **draft** guess a few,
# and let the model check all of them in one chunk: row $i$ of its logits says what comes after token $i$. As long as
# the draft guessed what the model would have said, its tokens are right. At the first wrong one the model's own word
# takes its place, and `truncate` makes the cache forget the rest.
#
# ### Exercise 14.3 · What may be kept? (★★☆, 10 minutes)
# `proposed` is a list of n tokens from the draft. `says` has n + 1 tokens: `says[i]` is what the model would write in
# the place of `proposed[i]`, after all that is proposed before it; the last is what it would write after all of them.
# Return the list of tokens that can be appended to the text.
#
# <details><summary>Hint 1</summary>
#
# Until which place is `says` about a text that the model itself would have written?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Count the leading places with `proposed[i] == says[i]`, and stop at the first other one. If k are right, `says[k]` is
# right, too: all before it was.
#
# </details>


# %% tags=["exercise"]
def accept(proposed, says):
    raise NotImplementedError


# %% tags=["solution"]
def accept(proposed, says):
    k = 0
    while k < len(proposed) and proposed[k] == says[k]:
        k += 1
    return says[: k + 1]


# %%
checks.ex14_3(accept)

# %% [markdown]
# The whole loop, with tensors in place of lists:

# %%
source = inspect.getsource(serving.speculate)
print(source[source.index("    while tokens") :])

# %% [markdown]
# Now with our two models. The text must be, token for token, what the model alone writes; in float64, so that no tie is
# decided by rounding. (In float32 or bfloat16 a chunk rounds otherwise than single tokens, and now and then another
# token wins. That is so for any change of the batch.)

# %%
small, per_check = copy.deepcopy(draft).double(), {}
texts = [exact.generate(p[None], 40, temperature=0) for p in prompts[:6]]
for n_draft in (1, 2, 4, 8):
    accepted = []
    for prompt, text in zip(prompts, texts):
        tokens, right = serving.speculate(exact, small, prompt[None], 40, n_draft)
        assert torch.equal(tokens, text)
        accepted += right
    per_check[n_draft] = 1 + sum(accepted) / len(accepted)
    print(
        f"{n_draft} proposed: {sum(accepted) / len(accepted):.2f} accepted, "
        f"{per_check[n_draft]:.2f} tokens for each pass of the model"
    )

# %% [markdown]
# If each proposal were right with probability α, whatever came before, a check of n proposals would bring
# $1 + \alpha + \alpha^2 + \dots + \alpha^n$ tokens. Take $\alpha$ from the run with one proposal:

# %% tags=["hide-input"]
alpha = per_check[1] - 1
n = np.arange(0, 9)
fig, ax = plt.subplots(figsize=(7, 3.2))
ax.plot(n, [sum(alpha**i for i in range(k + 1)) for k in n], ":", color="black")
ax.plot(list(per_check), list(per_check.values()), "o", color=looks.COLOURS[0])
ax.text(8, sum(alpha**i for i in range(9)), f"α = {alpha:.2f}", va="bottom", ha="right")
ax.set(xlabel="tokens proposed", ylabel="tokens for each pass", xticks=n)
ax.set_title("Ever fewer of many proposals are accepted")
looks.show(
    fig,
    "Tokens for each pass of the model against the number proposed: rising ever less; dots are measured, "
    f"a dotted line is the formula with α {alpha:.2f}.",
)

# %% [markdown]
# With many proposals the dots lie above the formula. Being right is not a coin tossed anew: the draft is right along a
# whole word or a phrase that it knows, and wrong where something must be looked up.


# %%
def seconds(run):
    start = time.perf_counter()
    for prompt in prompts[:4]:
        run(prompt[None])
    return time.perf_counter() - start


plain = seconds(lambda p: model.generate(p, 48, temperature=0))
ahead = seconds(lambda p: serving.speculate(model, draft, p, 48, 4))
print(f"4 proposed: {plain / ahead:.2f} times the speed of plain decoding here")

# %% [markdown]
# More than two tokens for each pass, and yet no such gain in time: our draft has one layer of the model's two, so that a
# pass of it takes about half as long as the model's. Speculation pays where the draft is *far* cheaper than the model (1 billion
# weights beside 70) and where the model's pass is bound by memory, as with few sequences on a GPU. With large batches
# the pass is bound by arithmetic, and every refused token is arithmetic for nothing. TPA changes little in this: a
# chunk of up to 16 tokens stays in factor space (notebook 06), and forgetting is a smaller `length`.
#
# ## 8 · Time to the first token, and per token
#
# There are two times that a user notices. The **time to first token** is prefill: one pass over the prompt, all arithmetic.
# The **time per token** after it is decoding, and reads the cache. Here for two layers, on the machine at hand:

# %%
from tpa_minimal.experiments import bench

settings = bench.Latency(
    lengths=(256,), contexts=(4096,), d_model=128, n_head=16, repeats=3
)
measured = bench.latency(bench.settled(settings))
by_way = {}
for row in measured:
    by_way.setdefault(row["mechanism"], []).append(f"{row['median_ms']:.1f}")

# %% tags=["hide-input"]
header = ["", "first token, prompt of 256", "a token after it, 4,096 cached"]
caption = "Milliseconds, two layers with 16 heads of width 64, on this machine"
looks.table(header, [[name, *times] for name, times in by_way.items()], caption)

# %% [markdown]
# Read it with care: one machine, few repeats, a small model, and other programs may have been running. What may be
# expected elsewhere, and why:
#
# | | what bounds it | what TPA changes |
# |---|---|---|
# | prefill, any hardware | arithmetic | K and V are assembled and attention is MHA's; the projections are narrower than MHA's, so a little less |
# | decoding, GPU, long contexts, many sequences | reading the cache | fewer bytes, in proportion: the case for TPA; MLA and GQA with few heads have it, too |
# | decoding, GPU, short contexts, one sequence | reading the weights | nearly nothing: the cache is a small part of what is read |
# | decoding, CPU | arithmetic and memory alike | fewer bytes, but $R_Q R_K d_h + h R_Q R_K + h R_V d_h$ products per cached token ([notebook 09](09_memory_savings.ipynb)): low ranks gain, high ranks lose |
# | 8 GPUs, split by heads | each GPU's own cache | feature factors are copied; GQA-8 is level with it (§6) |
# | a cache moved to a CPU or another machine | the link | fewer bytes, in proportion |
#
# No GPU was at hand for this notebook: the lines about GPUs are the arithmetic of bytes, not measurements.
#
# ### Exercise 14.4 · Would you? (★★☆, 8 minutes)
# Answer `True` or `False`, for a layer of Llama 3 70B where one is meant.
#
# - `a`: split by heads over 8 GPUs, TPA (16, 1, 1) caches less on each than GQA-8 does.
# - `b`: with each GPU serving sequences of its own, TPA (16, 1, 1) caches less than GQA-8.
# - `c`: a poor draft makes the answers of speculative decoding poorer.
# - `d`: a document that stands in the middle of two different prompts can share its pages of $b_k$.
# - `e`: at equal bits, single logits suffer more from rounded keys than from rounded values.
# - `f`: since TPA caches less, the time to the first token of a long prompt falls in proportion.
#
# <details><summary>Hint 1</summary>
#
# §6 has the numbers for `a` and `b`, §5 the table for `e`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# For `c`: who has the last word about each token? For `d`: is $b_k$ stored before or after its rotation?
#
# </details>


# %% tags=["exercise"]
def would_you():
    raise NotImplementedError  # return dict(a=..., b=..., c=..., d=..., e=..., f=...)


# %% tags=["solution"]
def would_you():
    return dict(a=False, b=True, c=False, d=False, e=True, f=False)


# %%
checks.ex14_4(would_you)

# %% [markdown]
# ## Summary
#
# - Ragged batches are padded on the left and right to the token; continuous batching lets who is done make room, and so
#   takes fewer steps. In a step each row has a position of its own.
# - Pages with a table and reference counts share a common beginning between sequences, and copy on write.
# - 8 bits with a scale for each row cost no measurable loss here and make the cache 1.92 times smaller than bfloat16;
#   4 bits cost a little. $b_k$ is the most delicate: its rows are the widest, and keys stand in an exponent.
# - Splitting by heads copies $b_k$ and $b_v$. On 8 GPUs TPA's saving over GQA-8 is gone; split sequences or positions.
# - Speculation changes the time, never the text. How much it gains is decided by how cheap and how right the draft is.
# - TPA helps where reading the cache is what takes the time or the room. Ask that first.
#
# **Where this comes from:** continuous batching is Orca's (Yu et al., OSDI 2022), pages are vLLM's (Kwon et al., arXiv
# 2309.06180), speculation is by Leviathan et al. (arXiv 2211.17192), who also show how *sampled* text keeps the model's
# distribution exactly.
#
# This was the last notebook. [09](09_memory_savings.ipynb) has the accountant for your own model, and
# [12](12_bring_your_own_model.ipynb) converts it. The code is in [quantized.py](../tpa_minimal/quantized.py),
# [serving.py](../tpa_minimal/serving.py) and [parallel.py](../tpa_minimal/parallel.py), the solved notebook is
# [here](solutions/14_serving.ipynb).
