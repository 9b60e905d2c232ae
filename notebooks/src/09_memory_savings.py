# %% [markdown]
# # 09 · How much memory does TPA save, and when?
#
# {badge}
#
# **You will be able to**
# - compute the cache of any model under MHA, MQA, GQA, MLA and TPA, and name the baseline of every ratio;
# - check such a formula against real cache objects and against the memory of the process;
# - say what a 70B-class model would hold with TPA on your GPU, and what that changes;
# - tell from a model's sizes when TPA is *not* worth it;
# - look into a trained model and see what its head and feature factors encode.
#
# **You need** notebooks 01 (the cache), 02 and 05 (factors and their cache). Nothing is derived here that you have
# not met.
#
# **Time** about 45 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# ## 1 · One number per token
#
# A cache is as large as what it keeps of one token, times everything else: layers, tokens, sequences, bytes per
# number. Only the first factor differs between mechanisms. Table 1 of the paper lists it; `memory.py` holds the same
# formulas, and nothing but formulas. Take the sizes of one layer of Llama 3 70B: 64 query heads of width 128, 8
# shared key-value heads.

# %%
from tpa_minimal.course import diagrams, explorer, looks
from tpa_minimal.memory import GB, MODELS, Layer

looks.style()
shape = dict(d_model=8192, n_head=64, d_head=128)
layers = {
    "MHA": Layer("mha", **shape),
    "GQA, 8 heads (shipped)": Layer("gqa", **shape, n_kv_head=8),
    "MLA, 512 + 64": Layer("mla", **shape, d_c=512, d_rope=64),
    "MQA": Layer("mqa", **shape),
    "TPA (16, 1, 1)": Layer("tpa", **shape, rank_q=16, rank_k=1, rank_v=1),
    "TPA (16, 2, 2)": Layer("tpa", **shape, rank_q=16, rank_k=2, rank_v=2),
}
diagrams.per_token_bars(
    layers, "A layer of Llama 3 70B: sharing and factorizing both cut MHA's cache"
)

# %% [markdown]
# The labels say TPA (R_Q, R_K, R_V); only the last two count for the cache.
#
# Three things to see. Llama 3 70B does not ship MHA's 16,384 (the first LLaMA 65B and Qwen1.5 72B did). TPA with ranks
# 1 keeps one head factor (64 numbers) and one feature factor (128) for keys and the same for values: 2 · (64 + 128) =
# 384. And MQA keeps less than any of them, 256: **TPA is not the smallest cache there is**. Its claim is to be small
# *without* forcing all heads to share one key.
#
# So a ratio needs its baseline. Each of the two TPA layers against two baselines:

# %% claim="ratio-names-its-baseline"
from tpa_minimal.memory import ratios

for name in ("TPA (16, 1, 1)", "TPA (16, 2, 2)"):
    print(name, "caches")
    for baseline, ratio in ratios(
        layers[name], layers["GQA, 8 heads (shipped)"]
    ).items():
        print(f"  {ratio:5.1f} times less than {baseline}")

# %% [markdown]
# "42.7 times less" and "5.3 times less" describe the same layer. The first compares with a Llama 3 70B that does not
# exist, the second with the one that you would replace. For a model that already shares its keys, quote the second.
#
# ## 2 · Is the formula true?
#
# A formula about memory deserves to be measured, twice. First against the cache objects: one small layer of each
# kind, fed a few tokens.

# %% claim="table-1-cache" tags=["nbval-check-output"]
import functools

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention

config = T6Config(
    vocab_size=64,
    n_layer=1,
    d_model=32,
    n_head=16,
    d_head=64,
    rank_q=2,
    rank_k=1,
    rank_v=1,
)
real = {
    "mha": MultiHeadAttention,
    "gqa": functools.partial(MultiHeadAttention, n_kv_head=4),
    "mqa": functools.partial(MultiHeadAttention, n_kv_head=1),
    "mla": MultiHeadLatentAttention,
    "tpa": TensorProductAttention,
}
x = torch.randn(3, 10, 32)  # 3 sequences of 10 tokens
for mechanism, attention in real.items():
    layer = attention(config)
    cache = layer.new_cache(batch_size=3)
    layer(x, cache)
    formula = Layer(mechanism, 32, 16, 64, n_kv_head=4, rank_q=2, rank_k=1, rank_v=1)
    assert cache.nbytes == formula.cached_numbers * 3 * 10 * 4  # float32: 4 bytes
    assert sum(p.numel() for p in layer.parameters()) == formula.parameters
    print(
        f"{mechanism}: {formula.cached_numbers:5d} numbers per token, {cache.nbytes:7,} bytes held, as computed"
    )

# %% [markdown]
# An object may tell a story about itself, so ask the operating system too. The script below runs in a process of its
# own. It decodes 128 tokens for 128 sequences, token by token, and notes how many bytes of the process were in use
# before, after each step (*held*), and at the highest moment (*peak*, temporary results of a step included).

# %%
MEASURE = """
import functools, json
import psutil, torch
from tpa_minimal import baselines, memory, tpa

grouped = lambda n: functools.partial(baselines.MultiHeadAttention, n_kv_head=n)
attentions = {"MQA": grouped(1), "TPA": tpa.TensorProductAttention, "MLA": baselines.MultiHeadLatentAttention,
              "GQA": grouped(4), "MHA": grouped(16)}  # small caches first, so that each sets a new peak
config = tpa.T6Config(64, 1, 32, 16, 64, rank_q=2, rank_k=1, rank_v=1, max_len=128)
in_use, x, rows = psutil.Process().memory_info, torch.zeros(128, 1, 32), {}
torch.set_grad_enabled(False)
for name, attention in attentions.items():
    layer = attention(config)
    warm = layer.new_cache(128, 3)
    for _ in range(3):  # load what a step needs before looking
        layer(x, warm)
    del warm
    before, cache, held = in_use().rss, layer.new_cache(128), 0
    while cache.length < 128:
        layer(x, cache)
        held = max(held, in_use().rss - before)
    highest = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # in kB
    peak = int(highest) * 1024 - before
    sizes = memory.Layer(name.lower(), 32, 16, 64, n_kv_head=4, rank_k=1, rank_v=1)
    rows[name] = dict(formula=sizes.cached_numbers * 128 * 128 * 4, cache=cache.nbytes, held=held, peak=peak)
    del cache
print(json.dumps(rows))
"""

# %%
import json
import os
import subprocess
import sys

# A fixed threshold makes the allocator return freed blocks at once; otherwise one mechanism would reuse another's.
environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
if sys.platform == "linux":  # elsewhere a process's memory is counted in other ways
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    for row in rows.values():
        assert row["formula"] == row["cache"]
    off = max(abs(row["held"] - row["formula"]) / 1e6 for row in rows.values())
    above = {
        name: round((row["peak"] - row["formula"]) / 1e6, 1)
        for name, row in rows.items()
    }
    print(f"held: at most {off:.2f} MB from the formula; peak above it [MB]: {above}")
    assert off < 1 and max(above.values()) < 16

# %%
import matplotlib.pyplot as plt

if sys.platform == "linux":
    fig, ax = plt.subplots(figsize=(7.5, 3.4))
    places = range(len(rows))
    ax.bar(
        places,
        [row["formula"] / 1e6 for row in rows.values()],
        0.55,
        color="0.85",
        edgecolor="black",
        label="formula",
    )
    for key, marker, label in (
        ("cache", "x", "cache object"),
        ("held", "o", "held"),
        ("peak", "^", "peak"),
    ):
        values = [row[key] / 1e6 for row in rows.values()]
        ax.plot(
            places,
            values,
            marker,
            color="black",
            markerfacecolor="none",
            markersize=9,
            label=label,
        )
    ax.set_yscale("log")
    ax.set_xticks(places, rows)
    ax.set_ylabel("memory [MB]")
    ax.grid(axis="x", visible=False)
    ax.legend()
    ax.set_title(
        "Formula, cache object and held memory agree; the peak of a step lies above"
    )
    plt.show()

# %% [markdown]
# Bars, crosses and circles coincide: what the process holds differs from the formula by less than 1 MB. The triangles
# lie some MB higher, as printed. That is the working memory of one step for 128 sequences. It grows with the context
# too (the weights of one query are h numbers per position; TPA's tables stop growing at 16,384 positions), and is not
# part of the formula.
#
# ## 3 · The question people come with
#
# *I run a 70B-class GQA model with a context of 128k on an 80 GB GPU. What would TPA hold?*
#
# *Would*, because a trained GQA model cannot be switched to TPA of low rank: these are the numbers of a model that
# somebody would first have to train (§5; [notebook 12](12_bring_your_own_model.ipynb) shows what can be converted and
# what is lost). GB is 10⁹ bytes; a card sold as 24 or 80 GB has about 7 % more (GiB), of which the driver and
# activations take a part: near the edge, trust neither.

# %% claim="llama-70b-question" tags=["nbval-check-output"]
llama = MODELS["Llama 3 70B"]
versions = {
    "as shipped": llama,
    "TPA (16, 1, 1)": llama.with_tpa(16, 1, 1),
    "TPA (16, 2, 2)": llama.with_tpa(16, 2, 2),
}
print(
    f"{llama.name}: {llama.layer.describe()}, {llama.n_layer} layers, sizes from {llama.source}"
)
for name, version in {
    "MHA, 64 heads": llama.with_attention(layers["MHA"]),
    **versions,
}.items():
    print(
        f"{name:15s} {version.bytes_per_token() / 1e3:6.1f} kB per token, {version.cache_bytes(131_072) / GB:6.2f} GB "
        f"for 128k tokens; {version.parameters / 1e9:.2f} billion weights"
    )

# %% [markdown]
# **42.9 GB as shipped, 8.1 GB with ranks (16, 1, 1), 16.1 GB with (16, 2, 2)**, all in bfloat16: 5.3 and 2.7 times
# less. A TPA layer with these heads also has fewer weights than the GQA layer, so the model shrinks by more than 4
# billion. With heads added until the layer has GQA's weights (110 and 107 heads) the ratios are 4.3 and 2.2.
#
# But the cache is not alone on the GPU. In bfloat16 the weights alone take 141 GB: *no* cache fits on 80 GB, and TPA
# does not change that. What does fit depends on how the weights are stored:

# %% tags=["nbval-check-output"]
for dtype in ("bfloat16", "int8", "int4"):
    most = [
        f"{version.largest_context(80 * GB, weight_dtype=dtype):9,}"
        for version in versions.values()
    ]
    print(
        f"weights in {dtype:8s} {llama.weight_bytes(dtype) / GB:6.1f} GB; largest context: "
        + " | ".join(most)
    )

# %% [markdown]
# With 8-bit weights the shipped model has room for 28,827 tokens, TPA for 226,110 with ranks 1 and 111,007 with
# ranks 2. Only rank 1 reaches 128k. That is 7.8 times the tokens, not 5.3, because the weights take 4.4 GB less: 72,000
# of the 226,110 tokens are due to that. The model was made for 131,072 tokens; beyond them the room buys *more
# sequences at once*, as it does with 4-bit weights, where all three reach 128k. (Activations, and the scales of
# quantized weights, come on top: leave some GB free.)

# %%
title = "Llama 3 70B: TPA lowers the cache, which still grows with every token"
diagrams.cache_against_context(llama, memory=80 * GB, weight_dtype="int4", title=title)

# %%
title = "Llama 3 70B on one GPU: where the weights fit, TPA leaves room for more tokens"
diagrams.largest_context_by_memory(llama, weight_dtype="int4", title=title)

# %% [markdown]
# In both figures the scales are logarithmic: equal distances are equal ratios, and k is 1,024 tokens, so 136,484 is
# 133k. On these axes TPA moves the line down and leaves its slope. The cache still grows with every token.
#
# For your own model, change the first line:

# %% tags=["nbval-check-output"]
model, budget, context = MODELS["Llama 3 8B"], 24 * GB, 131_072
for version in (model, model.with_tpa(16, 1, 1), model.with_tpa(16, 2, 2)):
    cache, weights = version.cache_bytes(context), version.weight_bytes("bfloat16")
    print(
        f"{version.layer.describe():26s} cache {cache / GB:5.2f} GB, {model.cache_bytes(context) / cache:.1f} times "
        f"less than shipped; weights {weights / GB:5.2f} GB; {'fits' if cache + weights <= budget else 'does not fit'}"
    )

# %% [markdown]
# ## 4 · Explore
#
# Now your own model and GPU. Where the notebook runs, the next cell shows controls; on a page that only displays it,
# you see the picture of the first setting. Try the context at 1k, then the ranks at 6 and 6, then DeepSeek-V3.
#
# A setting can also be passed: `explorer.explorer(explorer.Settings(model="Llama 3 8B", context=65_536, memory_gb=24))`;
# `explorer.explorer_figure` takes the same and gives the picture alone.

# %%
explorer.explorer()

# %% [markdown]
# The model list holds published configurations, each with the repository that it comes from:

# %% tags=["nbval-check-output"]
print("kB per token:    shipped  (16, 1, 1)  (16, 2, 2)")
for model in MODELS.values():
    sizes = [
        m.bytes_per_token() / 1e3
        for m in (model, model.with_tpa(16, 1, 1), model.with_tpa(16, 2, 2))
    ]
    numbers = "{:8.1f}{:12.1f}{:12.1f}".format(*sizes)
    print(f"{model.name:16s}{numbers}  {model.layer.describe()}; {model.source}")
    if model.note:
        print(f"{'':16s}({model.note})")

# %% [markdown]
# ## 5 · When is it not worth it?
#
# **At ranks above break-even.** TPA keeps (R_K + R_V)(h + d_h) numbers, G shared heads keep 2 G d_h. TPA loses as
# soon as R_K + R_V > 2 G d_h / (h + d_h); for MHA, put G = h; for MLA, > (d_c + d_R) / (h + d_h). In the map the heavy
# line is that boundary, where the two tie.

# %% claim="break-even"
from tpa_minimal.memory import break_even_ranks

marks = {"paper, small": (34, 64), "Llama 70B": (64, 128)}
print(
    f"Llama 70B: break-even with its 8 shared heads at R_K + R_V = {break_even_ranks(64, 128, 8):.1f}"
)
assert (
    Layer("tpa", **shape, rank_k=5, rank_v=5).cached_numbers
    < layers["GQA, 8 heads (shipped)"].cached_numbers
)
assert (
    Layer("tpa", **shape, rank_k=5, rank_v=6).cached_numbers
    > layers["GQA, 8 heads (shipped)"].cached_numbers
)
diagrams.ratio_map(marks=marks)

# %%
diagrams.ratio_map((1, 2, 4), n_kv_head=8, marks={"Llama 70B": (64, 128)})

# %% [markdown]
# Against MHA (first map) savings grow towards many wide heads: the "10 times or more" lives in the upper right, at
# low ranks. Against 8 shared heads (second map, from h = 8 on, where GQA is still MHA) they are smaller for every h
# above 8, and with *more heads* they shrink, since the head factors grow with h while GQA's cache does not.
#
# **Where others already cache less.** The paper compares mechanisms at equal parameters per layer, which gives each
# its own number of heads (KV-only: full queries, only K and V factorized):

# %% claim="paper-sizes-cache"
from tpa_minimal.memory import PAPER_HEADS, match_heads

numbers = {}
for name, heads in PAPER_HEADS["small-124M"].items():
    numbers[name] = Layer(name, 768, heads, 64, n_kv_head=2).cached_numbers
    nearest = match_heads(
        name, 4 * 768**2, 768, 64, **({"n_kv_head": 2} if name == "gqa" else {})
    )
    print(
        f"{name:12s}{heads:3d} heads (nearest to 4 d_model²: {nearest:2d}), {numbers[name]:5,} numbers cached"
    )

assert (
    numbers["mqa"] < numbers["gqa"] < numbers["mla"] < numbers["tpa"] < numbers["mha"]
)

# %% [markdown]
# At the paper's small size TPA caches 3.9 times less than MHA and *more* than all the others. Its argument there is
# quality at a small cache: the reported zero-shot averages are 46.21 for TPA, 46.20 for MLA, 46.19 for MHA, and 45.14
# and 45.04 for MQA and GQA, from single runs (our own small runs: notebook 08). (Three head counts, those of MLA,
# KV-only and TPA, are not the nearest whole number, as notebook 07 found too; the paper does not say why.)
#
# **For few cached tokens**, context times sequences. The cache competes with the weights. For one sequence:

# %% tags=["nbval-check-output"]
one = versions["TPA (16, 1, 1)"]
for context in (1024, 8192, 131_072):
    weights = llama.weight_bytes("int4")
    share = llama.cache_bytes(context) / (weights + llama.cache_bytes(context))
    less = 1 - one.cache_bytes(context) / llama.cache_bytes(context)
    print(
        f"{context:7,} tokens: the cache is {share:5.1%} of all; TPA's cache saves {share * less:5.1%} of the memory"
    )

# %% [markdown]
# **For models that look back a short way only.** Where most layers keep a sliding window, as in Gemma 3, the window
# has done most of the work before TPA comes:

# %% tags=["nbval-check-output"]
gemma = MODELS["Gemma 3 27B"]
everywhere = gemma.layer.cached_numbers * gemma.n_layer * 131_072 * 2
print(
    f"Gemma 3 27B, 128k tokens: {gemma.cache_bytes(131_072) / GB:.1f} GB; without windows {everywhere / GB:.1f} GB"
)
for ranks in ((16, 1, 1), (16, 2, 2)):
    print(
        f"  with its windows and TPA {ranks}: {gemma.with_tpa(*ranks).cache_bytes(131_072) / GB:.1f} GB"
    )
deepseek = MODELS["DeepSeek-V3"]
for ranks in ((16, 1, 1), (16, 2, 2)):
    shipped, own = (
        deepseek.layer.cached_numbers,
        deepseek.with_tpa(*ranks).layer.cached_numbers,
    )
    print(
        f"DeepSeek-V3: {shipped} numbers per token and layer, with TPA {ranks}: {own}"
    )

# %% [markdown]
# DeepSeek-V3's latent is already so small that only rank 1 is below it, by a ninth, and rank 2 nearly doubles it.
#
# **Where fewer bits will do.** The shipped cache in 8 bits takes 21.5 GB for 128k tokens, in 4 bits 10.7 GB, and nothing
# has to be trained anew. (TPA's factors could be stored so too; nobody has shown that here.)
#
# **Where heads are divided over GPUs.** All heads share b, so each of N GPUs holds all of it: (R_K + R_V)(h/N + d_h)
# numbers against 2 (G/N) d_h. For the 70B on 8 GPUs that is 272 with ranks 1 and 544 with ranks 2, against 256 as
# shipped. Dividing the cache by positions (notebook 10) keeps the saving.
#
# **And always:** a TPA version is another model, which has to be trained. The quality results of the paper are for
# ranks (6, 2, 2) and models up to 1.5 billion weights; rank 1 appears in its speed measurements. Nobody has shown a
# 70B TPA.
#
# ## 6 · What does it cost to decode?
#
# Memory is not time. App. A.4 counts multiply-adds for one new token against M cached ones:
#
# - MHA, MQA, GQA: 2 h d_h M. Sharing keys saves memory, no arithmetic.
# - MLA, decoding from its latents: every head uses the latent and the rotated key as its key, and the latent as its
#   value: h (2 d_c + d_R) M.
# - TPA: (R_Q R_K d_h + h R_Q R_K + h R_V d_h) M: the products of feature factors are shared by all heads (notebook
#   06).
#
# This is the paper's order of the sums. The code of this course assembles the few queries first, (R_K + R_V) h (d_h + 1)
# M: here 16,512 with ranks 1 and 33,024 with ranks 2, against MHA's 16,384.

# %% claim="app-a4-costs" tags=["nbval-check-output"]
for label, layer in layers.items():
    numbers = layer.cached_numbers
    print(
        f"{label:24s}{layer.decode_multiply_adds(1):7,} multiply-adds and {numbers:6,} numbers read per cached token"
    )
example = Layer(
    "mla", 7168, 64, 128, d_c=512, d_c_q=1536, d_rope=64
)  # the paper's third worked example
assert example.decode_multiply_adds(1) == 69_632
assert (
    Layer("tpa", 7168, 64, 128, rank_q=16, rank_k=1, rank_v=1).decode_multiply_adds(1)
    == 11_264
)

# %%
title = "Both TPA layers read far less than MHA and GQA; by App. A.4 rank 1 also computes less"
diagrams.decode_cost(
    {label: layer for label, layer in layers.items() if label != "MQA"}, title=title
)

# %% [markdown]
# Left: in the paper's order ranks (16, 1, 1) compute less than MHA, (16, 2, 2) more. Right: both read far less.
# Decoding one sequence is usually limited by reading, so the right-hand side decides; with a large batch or a slow
# processor the left one does. MLA reads little and computes most. These are counts, not seconds: for seconds, see
# notebook 10 and `python -m tpa_minimal.experiments.bench`.
#
# ## 7 · Trained heads looked at
#
# What do the cached factors hold? Train a small T6 for some seconds on the built-in lessons, short texts whose
# questions can be answered from their beginning.

# %%
import torch.nn.functional as F

from tpa_minimal.experiments import data
from tpa_minimal.experiments.train import learning_rate, new_optimizer

lessons = data.prepare("lessons", tokens=300_000, progress=False)
torch.manual_seed(0)
config = T6Config(
    lessons.vocab_size, n_layer=2, d_model=128, n_head=8, d_head=32, max_len=256
)
model, steps = T6(config), 120
optimizer = new_optimizer(model, lr=4e-3)

# %%
losses = []
for step in range(steps):
    optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 4e-3)
    inputs, targets = lessons.batch("train", step, batch_size=8, seq_len=128, seed=0)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.1f} at the start, {sum(losses[-10:]) / 10:.1f} at the end")
assert sum(losses[-10:]) / 10 < 3.5

# %% [markdown]
# Take one text and catch what enters each attention layer; `factors` then gives what would be cached.

# %%
text = "Count by 12 from 51: 51, 63, 75, 87, 99.\nQuestion: Which number comes after 87?\nAnswer:"
tokens = torch.tensor([lessons.tokenizer.encode(text)])
words = [lessons.tokenizer.decode([i]).replace("\n", "↵") for i in tokens[0].tolist()]
seen = []
hooks = [
    block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in model.blocks
]
with torch.no_grad():
    model(tokens)
    factors = [block.attention.factors(x) for block, x in zip(model.blocks, seen)]
for hook in hooks:
    hook.remove()
a_q, b_q, a_k, b_k, a_v, b_v = factors[1]
print(f"{len(words)} tokens; a_k {tuple(a_k.shape)}, b_k {tuple(b_k.shape)}")

# %%
fig, axes = plt.subplots(2, 1, figsize=(9, 4.4), sharex=True)
for r, ax in enumerate(axes):
    table = a_k[0, :, r].T  # (h, T)
    limit = a_k.abs().max()
    image = ax.imshow(
        table, cmap=plt.get_cmap("PuOr", 21), vmin=-limit, vmax=limit, aspect="auto"
    )
    ax.plot(
        *torch.where(table.T < 0), ".", color="black", markersize=2
    )  # for readers without colour
    ax.set_ylabel(f"head\n(rank {r + 1})")
    ax.set_yticks(range(8), range(1, 9))
    ax.grid(visible=False)
axes[1].set_xticks(range(len(words)), words, rotation=90, fontsize=8)
fig.colorbar(image, ax=axes, label="entry of $a_K$")
axes[0].set_title(
    "$A_K$: each token says how strongly it shows itself to each head (dots: negative)"
)
plt.show()

# %% [markdown]
# A column is what one token's head factor says. Columns differ: the mix of heads is *contextual*. Under MHA, MQA or
# GQA these tables would be constant along each row, the same for every token (notebook 04). The feature factors, in
# turn, say *what* the token shows. Compare them between tokens, before rotation so that position plays no part:

# %%
with torch.no_grad():
    plain = model.blocks[1].attention.project(seen[1])[3][
        0
    ]  # b_k before RoPE: (T, R_K, d_h)
alike = F.cosine_similarity(plain[:, None, 0], plain[None, :, 0], dim=-1)  # (T, T)
digits = torch.tensor([word.strip().isdigit() for word in words])
among = alike[digits][:, digits][~torch.eye(int(digits.sum()), dtype=torch.bool)].mean()
across = alike[digits][:, ~digits].mean()
print(
    f"mean cosine in the whole text: digit and digit {among:.2f}, digit and other token {across:.2f}"
)

end = words.index(
    "."
)  # up to here the text counts; all but two of the digits stand there
count, digit = alike[:end, :end], digits[:end]
pairs = ~torch.eye(end, dtype=torch.bool)
for name, one, other in (
    ("digits", digit, digit),
    ("other tokens", ~digit, ~digit),
    ("digit and other", digit, ~digit),
):
    print(
        f"in the count alone: {name} {count[one[:, None] & other & pairs].mean():.2f}"
    )

# %%
fig, ax = plt.subplots(figsize=(6.6, 5.6))
image = ax.imshow(alike, cmap=plt.get_cmap("PuOr", 21), vmin=-1, vmax=1)
ax.plot(*torch.where(alike < 0), ".", color="black", markersize=2)
ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
ax.set_yticks(range(len(words)), words, fontsize=8)
ax.grid(visible=False)
fig.colorbar(image, label="cosine of two $b_K$ (rank 1)")
ax.set_title(
    "$B_K$ (rank 1): in the count, digits differ from the rest (dots: negative)"
)
plt.show()

# %% [markdown]
# The large block is the count. Within it the gap between digits and other tokens is smaller than in the whole text, so
# much of what makes two digits alike is only that they stand in the same passage. Equal tokens do not always have equal features either, because the layer below has mixed in
# what stands before them.
#
# How strong is the restriction that TPA imposes? For each token, K_t is an 8 × 32 matrix of rank 2 at most: only two
# singular values are not zero. That says nothing about the keys of the whole text. Put them side by side, one row
# per token, and see how many directions they need.

# %% claim="rank-of-keys"
from tpa_minimal.tpa import assemble

k = assemble(a_k, b_k)[0]  # (T, h, d_h)
per_token = torch.linalg.svdvals(k)  # (T, 8)
whole = torch.linalg.svdvals(k.flatten(1))  # all keys, (T, h · d_h)
assert (per_token[:, 2] < 1e-4 * per_token[:, 0]).all()
assert (whole > 0.01 * whole[0]).sum() > 4  # far more than R_K

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
relative = (per_token / per_token[:, :1]).clamp(min=1e-9)
left.semilogy(range(1, 9), relative.T, color="0.7", linewidth=0.8)
left.semilogy(range(1, 9), relative.median(0).values, "o-", color="black")
left.set_title("Each token's $K_t$: rank $R_K$ = 2")
right.semilogy(
    range(1, len(whole) + 1), whole / whole[0], "o-", color="black", markersize=4
)
right.set_title("All tokens' keys: many directions")
for ax in (left, right):
    ax.set_xlabel("number of the singular value")
    ax.set_ylabel("singular value / largest")
plt.show()

# %% [markdown]
# Left, each grey line is a token: after the second singular value only rounding is left. Right, the keys of the text
# as a whole are not confined to two directions, since every token brings its own factors. Static low-rank weights
# (LoRA, or a narrow latent) would bend the right-hand curve; TPA bends the left one. Last, the attention that
# results:

# %%
q = assemble(a_q, b_q)[0]
logits = torch.einsum("thd,shd->hts", q, k) / config.d_head**0.5
ahead = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
weights = logits.masked_fill(ahead, float("-inf")).softmax(-1)  # (h, T, T)
torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
assert (weights.triu(1) == 0).all()

# %%
fig, axes = plt.subplots(2, 4, figsize=(9, 4.8), sharex=True, sharey=True)
for head, ax in enumerate(axes.flat):
    image = ax.imshow(weights[head] ** 0.5, cmap="Greys", vmin=0, vmax=1)
    ax.set_title(f"head {head + 1}", fontsize=10)
    ax.grid(visible=False)
fig.supxlabel("attended token")
fig.supylabel("querying token")
fig.colorbar(image, ax=axes, label="√ of the weight")
fig.suptitle(
    "Eight heads, related patterns, from two key factors per token", x=0.01, ha="left"
)
plt.show()

# %% [markdown]
# The upper right is empty: no token sees what comes after it. The heads are related, being mixtures of the same
# factors, but they are not copies. After some seconds of training do not read more into them.
#
# ## Exercises
#
# ### Exercise 09.1 · The cache of a TPA model with windows (★☆☆, 10 minutes)
# Return the bytes of the cache of a TPA model. `n_local` of its `n_layer` layers look back `window` tokens and keep
# no more.
#
# <details><summary>Hint 1</summary>
#
# How many positions does a layer with a window cache, if the context is longer than the window? If it is shorter?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $(L - n_\text{local})\,M + n_\text{local} \min(M, w)$ positions in all layers together, with $(R_K + R_V)(h + d_h)$
# numbers each.
#
# </details>


# %% tags=["exercise"]
def tpa_cache_bytes(
    n_layer,
    n_head,
    d_head,
    rank_k,
    rank_v,
    context,
    batch_size,
    bytes_per_number,
    n_local,
    window,
):
    raise NotImplementedError


# %% tags=["solution"]
def tpa_cache_bytes(
    n_layer,
    n_head,
    d_head,
    rank_k,
    rank_v,
    context,
    batch_size,
    bytes_per_number,
    n_local,
    window,
):
    positions = (n_layer - n_local) * context + n_local * min(context, window)
    return (
        (rank_k + rank_v)
        * (n_head + d_head)
        * positions
        * batch_size
        * bytes_per_number
    )


# %%
from tpa_minimal.course import checks

checks.ex09_1(tpa_cache_bytes)

# %% [markdown]
# ### Exercise 09.2 · The largest rank that still pays (★☆☆, 10 minutes)
# A model ships `n_kv_head` shared heads. Return the largest rank R = R_K = R_V at which TPA caches at least `times`
# times less than it does, and 0 if not even rank 1 does. (`times` may be a fraction.)
#
# <details><summary>Hint 1</summary>
#
# Per token and layer the model caches $2 G d_h$ numbers, and TPA $2R(h + d_h)$. What does "`times` times less" say
# about them?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $2R(h + d_h) \cdot \text{times} \le 2 G d_h$; equality counts. Solve for $R$, and round down.
#
# </details>


# %% tags=["exercise"]
def largest_rank(n_head, d_head, n_kv_head, times):
    raise NotImplementedError


# %% tags=["solution"]
def largest_rank(n_head, d_head, n_kv_head, times):
    shipped, per_rank = 2 * n_kv_head * d_head, 2 * (n_head + d_head)
    rank = 0
    while (rank + 1) * per_rank * times <= shipped:
        rank += 1
    return rank


# %%
checks.ex09_2(largest_rank)

# %% [markdown]
# ### Exercise 09.3 · Read the leaflet (★★☆, 10 minutes)
# A leaflet about a TPA version of Llama 3 70B says six things. For each, return `"true"`, `"false"`, or `"baseline"`
# where the figure is right against another baseline than the one it claims.
#
# - **a** "With ranks (16, 1, 1) it caches 42.7 times less than the Llama 3 70B that people run today."
# - **b** "With ranks (16, 2, 2), a context of 131,072 tokens takes 16.1 GB of cache in bfloat16."
# - **c** "So in bfloat16 the model with that context fits on one 80 GB GPU."
# - **d** "Even at 1,000 tokens, total memory falls by more than a half."
# - **e** "At the paper's small size TPA caches 11.1 times less than the MHA model it was compared with."
# - **f** "Because R_K + R_V = 4 is below break-even with 8 shared heads, (16, 2, 2) would also beat the latent of
#   DeepSeek-V3."
#
# <details><summary>Hint 1</summary>
#
# For every figure, work out TPA's cache, and then the cache of the baseline that is *named*.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Llama 3 70B: 80 layers, 64 heads of width 128 in 8 groups, 70.6 billion weights. MHA with 64 heads, the shipped GQA
# and TPA cache 16,384, 2,048 and $(R_K + R_V) \cdot 192$ numbers per token and layer.
#
# </details>


# %% tags=["exercise"]
def leaflet():
    raise NotImplementedError  # return dict(a="...", b="...", c="...", d="...", e="...", f="...")


# %% tags=["solution"]
def leaflet():
    return dict(a="baseline", b="true", c="false", d="false", e="baseline", f="false")


# %%
checks.ex09_3(leaflet)

# %% [markdown]
# ## Summary
#
# - Cache = numbers per token and layer × layers × tokens × sequences × bytes. TPA's first factor is (R_K + R_V)(h +
#   d_h). Cache objects and process memory agree with it.
# - A 70B-class GQA model with 128k tokens holds 42.9 GB of cache; TPA would hold 8.1 GB with ranks (16, 1, 1), 16.1
#   GB with (16, 2, 2). On 80 GB the weights must be 8-bit or less for any of this to matter.
# - It is not worth it where R_K + R_V > 2 G d_h / (h + d_h), for few cached tokens, where windows, a small latent or
#   fewer bits have done the work, where heads are divided over GPUs, or where retraining is out of the question.
# - Name the baseline. 42.7× and 5.3× can be the same layer.
#
# **Next:** [10 · flash decode](10_flash_decode.ipynb), where fewer bytes sometimes become fewer milliseconds.
