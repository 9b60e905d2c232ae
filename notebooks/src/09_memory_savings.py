# %% [markdown]
# # 09 · How much memory does TPA save, and when?
#
# {badge}
#
# **You will be able to**
# - compute the cache of any model under MHA, MQA, GQA, MLA and TPA, and name the baseline of every ratio;
# - check such a formula against real cache objects and against the memory of the process;
# - say how much memory a 70B-class model with TPA would need on your GPU, and what that changes;
# - tell from a model's sizes when TPA is *not* worth it;
# - look into a trained model and see what its head and feature factors encode.
#
# **You need** notebooks 01 (the cache), 02 and 05 (factors and their cache). This notebook applies what those derived.
#
# **Time** about 80 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# ## 1 · One number per token
#
# A cache's size is what it keeps of one token, times everything else: layers, tokens, sequences, bytes per number.
# Only the first factor differs between mechanisms. Table 1 of the paper lists it; `memory.py` has the same formulas
# and nothing else. Take one layer of Llama 3 70B: 64 query heads of width 128, and 8 shared key-value heads.

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

# %% tags=["hide-input"]
numbers = ", ".join(f"{name} {one.cached_numbers:,}" for name, one in layers.items())
title = "A layer of Llama 3 70B: sharing and factorizing both shrink the cache"
looks.show(
    diagrams.per_token_bars(layers, title),
    alt=f"Bars of the numbers cached per token and layer: {numbers}.",
)

# %% [markdown]
# The labels say TPA $(R_Q, R_K, R_V)$; only the last two count for the cache.
#
# Three things to see. Llama 3 70B does not ship MHA's 16,384 numbers (the first LLaMA 65B and Qwen1.5 72B did). TPA
# with ranks 1 keeps one head factor (64 numbers) and one feature factor (128) for the keys, and the same for the
# values: $2 \cdot (64 + 128) = 384$. And MQA keeps fewer than any of them, 256: **TPA is not the smallest cache there
# is**. Its claim is to be small *without* forcing all heads to share one key.
#
# So a ratio needs its baseline. Here is each of the two TPA layers against two baselines:

# %% claim="ratio-names-its-baseline" tags=["nbval-check-output"]
from tpa_minimal.memory import ratios

names = ("TPA (16, 1, 1)", "TPA (16, 2, 2)")
found = [ratios(layers[name], layers["GQA, 8 heads (shipped)"]) for name in names]
rows = [[base, *(f"{one[base]:.1f} times" for one in found)] for base in found[0]]
looks.table(["less than", *names], rows, "How many times less the layer caches")

# %% [markdown]
# "42.7 times less" and "5.3 times less" describe the same layer. The first compares it with a Llama 3 70B that does
# not exist, the second with the one that you would replace. For a model that already shares its keys, quote the second.
#
# ## 2 · Is the formula true?
#
# A formula about memory should be measured, twice. First against the cache objects: one small layer of each kind, fed
# a few tokens.

# %% claim="table-1-cache"
import functools

from tpa_minimal.baselines import MultiHeadAttention, MultiHeadLatentAttention
from tpa_minimal.tpa import T6, T6Config, TensorProductAttention

sizes = dict(d_model=32, n_head=16, d_head=64, rank_q=2, rank_k=1, rank_v=1)
config = T6Config.for_layer(**sizes)
real = {
    "mha": MultiHeadAttention,
    "gqa": functools.partial(MultiHeadAttention, n_kv_head=4),
    "mqa": functools.partial(MultiHeadAttention, n_kv_head=1),
    "mla": MultiHeadLatentAttention,
    "tpa": TensorProductAttention,
}
x, rows = torch.randn(3, 10, 32), []  # 3 sequences of 10 tokens
for mechanism, attention in real.items():
    layer = attention(config)
    cache = layer.new_cache(batch_size=3)
    layer(x, cache)
    formula = Layer(mechanism, **sizes, n_kv_head=4)
    computed = formula.cached_numbers * 3 * 10 * 4  # float32: 4 bytes
    assert cache.nbytes == computed
    assert sum(p.numel() for p in layer.parameters()) == formula.parameters
    rows.append([mechanism.upper(), formula.cached_numbers, computed, cache.nbytes])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "numbers per token", "bytes by formula", "bytes of the cache object"]
looks.table(header, rows, "Formula and object, 3 sequences of 10 tokens")

# %% [markdown]
# A cache object could be wrong about itself, so ask the operating system too. `watch_memory.measure` starts a process
# of its own. It decodes 128 tokens for 128 sequences, token by token, and notes how many bytes the process has in use:
# before, after each step (*between steps*), and at the highest moment (*peak*, temporary results of a step included).

# %%
import sys

from tpa_minimal.experiments import watch_memory

if sys.platform == "linux":  # elsewhere a process's memory is counted in other ways
    measured = watch_memory.measure()
    for row in measured.values():
        assert row["formula"] == row["cache"]
        assert abs(row["between_steps"] - row["formula"]) < 1e6
        assert row["peak"] - row["formula"] < 16e6

# %% tags=["hide-input"]
if sys.platform == "linux":
    rows = []
    for name, row in measured.items():
        kinds = ("formula", "between_steps", "peak")
        rows.append([name, *(f"{row[kind] / 1e6:.2f}" for kind in kinds)])
    header = ["", "formula", "process, between steps", "process, peak"]
    looks.table(header, rows, "The cache of 128 sequences of 128 tokens, in MB")

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

if sys.platform == "linux":
    fig, ax = plt.subplots(figsize=(7.5, 3.4))
    for place, (name, row) in enumerate(measured.items()):
        ax.bar(place, row["formula"] / 1e6, 0.55, **looks.of(name.lower()).bar_style())
    for key, marker in (("between_steps", "o"), ("peak", "^")):
        values = [row[key] / 1e6 for row in measured.values()]
        look = dict(markerfacecolor="white", markeredgecolor="black", markersize=9)
        label = f"process, {key.replace('_', ' ')}"
        ax.plot(range(len(values)), values, marker, label=label, **look)
    ax.set_yscale("log")
    ax.set_xticks(range(len(measured)), measured)
    ax.set_ylabel("memory [MB]")
    ax.grid(axis="x", visible=False)
    ax.legend()
    ax.set_title("Formula (bars) and process agree; the peak of a step lies above")
    looks.show(
        fig,
        alt="Bars of the cache of MQA, TPA, MLA, GQA and MHA by formula, on a "
        "logarithmic scale. The memory of the process between steps lies on each bar's "
        "end; its peak lies some MB higher.",
    )

# %% [markdown]
# Between steps the process has less than 1 MB more or less in use than the formula says. The peaks lie some MB higher,
# as the table shows. That is the working memory of one step for 128 sequences. It grows with the context too (one
# query's weights are $h$ numbers per position; TPA's scores are computed in blocks of 16,384 positions and stop growing
# there), and is not part of the formula.
#
# ## 3 · The question that brings people here
#
# *I run a 70B-class GQA model with a context of 128k on an 80 GB GPU. How much memory would TPA need?*
#
# *Would*, because a trained GQA model cannot be switched to TPA of low rank: these are the numbers of a model that
# somebody would first have to train (§5; [notebook 12](12_bring_your_own_model.ipynb) shows what can be converted and
# what is lost). A GB is 10⁹ bytes. A card sold as 24 or 80 GB has about 7 % more, since its makers count in GiB, and
# the driver and the activations take a part of it: near the edge, trust neither.

# %% claim="llama-70b-question"
llama = MODELS["Llama 3 70B"]
versions = {
    "as shipped": llama,
    "TPA (16, 1, 1)": llama.with_tpa(16, 1, 1),
    "TPA (16, 2, 2)": llama.with_tpa(16, 2, 2),
}
rows = []
everything = {"MHA, 64 heads": llama.with_attention(layers["MHA"]), **versions}
for name, version in everything.items():
    per_token, cache = version.bytes_per_token() / 1e3, version.cache_bytes(131_072)
    weights = version.parameters / 1e9
    rows.append([name, f"{per_token:.1f} kB", f"{cache / GB:.2f} GB", f"{weights:.2f}"])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "cache per token", "cache of 128k tokens", "billion weights"]
caption = f"{llama.name}: {llama.layer.describe()}, {llama.n_layer} layers; sizes from "
looks.table(header, rows, caption + llama.source)

# %% [markdown]
# **42.9 GB as shipped, 8.1 GB with ranks (16, 1, 1), 16.1 GB with (16, 2, 2)**, all in bfloat16: 5.3 and 2.7 times
# less. A TPA layer with these heads also has fewer weights than the GQA layer, so the model shrinks by more than 4
# billion weights. We could spend these on more heads instead. Heads also cost cache, so the ratios fall:

# %% tags=["nbval-check-output"]
from tpa_minimal.memory import match_heads

for rank in (1, 2):
    ranks = dict(rank_q=16, rank_k=rank, rank_v=rank)
    heads = match_heads("tpa", llama.layer.parameters, 8192, 128, **ranks)
    numbers = Layer("tpa", 8192, heads, 128, **ranks).cached_numbers
    ratio = llama.layer.cached_numbers / numbers
    print(f"R_K = R_V = {rank}, {heads} heads: {ratio:.1f} times less than shipped")

# %% [markdown]
# But the cache is not alone on the GPU. In bfloat16 the weights alone take 141 GB: *no* cache fits on 80 GB, and TPA
# does not change that. What does fit depends on how the weights are stored:

# %%
rows = []
for dtype in ("bfloat16", "int8", "int4"):
    most = [v.largest_context(80 * GB, weight_dtype=dtype) for v in versions.values()]
    rows.append([dtype, f"{llama.weight_bytes(dtype) / GB:.1f} GB", *most])

# %% tags=["hide-input", "nbval-check-output"]
header = ["weights in", "shipped weights", *versions]
looks.table(header, rows, "Llama 3 70B on 80 GB: the largest context, in tokens")

# %% [markdown]
# With 8-bit weights the shipped model has room for 28,827 tokens, TPA for 226,110 with ranks 1 and 111,007 with
# ranks 2. Only rank 1 reaches 128k. That is 7.8 times the tokens, not 5.3, because the weights take 4.4 GB less: 72,000
# of the 226,110 tokens are due to that. The model was made for 131,072 tokens; beyond them the room buys *more
# sequences at once*, as it does with 4-bit weights, where all three reach 128k. (Activations, and the scales of
# quantized weights, come on top: leave some GB free.)

# %% tags=["hide-input"]
title = "Llama 3 70B: TPA lowers the cache, which still grows with every token"
picture = diagrams.cache_against_context(
    llama, memory=80 * GB, weight_dtype="int4", title=title
)
looks.show(
    picture,
    alt="Cache in GB against the context, both logarithmic: four parallel lines. From "
    "the highest: MHA, GQA as shipped, TPA of ranks 2, TPA of ranks 1. A level at 44.7 "
    "GB is what int4 weights leave free on 80 GB; GQA reaches it just above 128k.",
)

# %% tags=["hide-input"]
title = "Llama 3 70B on one GPU: where the weights fit, TPA leaves room for more tokens"
picture = diagrams.largest_context_by_memory(llama, weight_dtype="int4", title=title)
looks.show(
    picture,
    alt="Bars of the largest context on GPUs of 24, 48, 80, 141 and 180 GB with int4 "
    "weights. On 24 GB nothing fits. On the others MHA has room for the fewest tokens, "
    "then GQA, TPA of ranks 2 and TPA of ranks 1.",
)

# %% [markdown]
# In both figures the scales are logarithmic: equal distances are equal ratios, and k is 1,024 tokens, so 136,484 is
# 133k. On these axes TPA moves the line down and leaves its slope. The cache still grows with every token.
#
# For your own model, change the first line:

# %%
model, budget, context = MODELS["Llama 3 8B"], 24 * GB, 131_072
rows = []
for version in (model, model.with_tpa(16, 1, 1), model.with_tpa(16, 2, 2)):
    cache, weights = version.cache_bytes(context), version.weight_bytes("bfloat16")
    ratio = f"{model.cache_bytes(context) / cache:.1f} times"
    fits = "fits" if cache + weights <= budget else "does not fit"
    total = [f"{cache / GB:.2f} GB", ratio, f"{weights / GB:.2f} GB", fits]
    rows.append([version.layer.describe(), *total])
rows[0][2] = "–"  # the shipped model itself

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "cache", "less than shipped", "weights", f"in {budget / GB:.0f} GB"]
looks.table(header, rows, f"{model.name}, {context:,} tokens, bfloat16")

# %% [markdown]
# ## 4 · Explore
#
# Now your own model and GPU. The first cell shows one setting, and stays in a saved or exported notebook:

# %%
explorer.show()

# %% [markdown]
# Where the notebook runs, the next cell has controls. Try the context at 1k, then the ranks at 6 and 6, then
# DeepSeek-V3, then 8 GPUs. Both cells also take a setting of yours, such as
# `explorer.Settings(model="Llama 3 8B", context=65_536, memory_gb=24)`.

# %%
explorer.explore()

# %% [markdown]
# The model list has published configurations, each with the repository that it comes from:

# %%
rows = []
for model in MODELS.values():
    three = (model, model.with_tpa(16, 1, 1), model.with_tpa(16, 2, 2))
    cached = [f"{one.bytes_per_token() / 1e3:.1f}" for one in three]
    described = [model.layer.describe(), model.source, model.note or "–"]
    rows.append([model.name, *cached, *described])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "shipped", "TPA (16, 1, 1)", "TPA (16, 2, 2)", "layer", "source", "note"]
looks.table(header, rows, "kB of cache per token in bfloat16")

# %% [markdown]
# ## 5 · When is it not worth it?
#
# **At ranks above break-even.** TPA keeps $(R_K + R_V)(h + d_h)$ numbers, $G$ shared heads keep $2\,G\,d_h$. TPA
# loses as soon as
#
# $$R_K + R_V > \frac{2\,G\,d_h}{h + d_h};$$
#
# for MHA put $G = h$; for MLA the limit is $(d_c + d_R) / (h + d_h)$. In the map the heavy line is that boundary,
# where the two are equal.

# %% claim="break-even"
from tpa_minimal.memory import break_even_ranks

limit = break_even_ranks(64, 128, 8)
print(f"Llama 3 70B: break-even with its 8 shared heads at R_K + R_V = {limit:.1f}")
shipped = layers["GQA, 8 heads (shipped)"].cached_numbers
assert Layer("tpa", **shape, rank_k=5, rank_v=5).cached_numbers < shipped
assert Layer("tpa", **shape, rank_k=5, rank_v=6).cached_numbers > shipped

# %% tags=["hide-input"]
marks = {"paper, small": (34, 64), "Llama 70B": (64, 128)}
looks.show(
    diagrams.ratio_map(marks=marks),
    alt="Four maps over heads and head width, for ranks 1, 2, 4 and 8: how many times "
    "less TPA caches than MHA. The ratio grows to the upper right and falls with the "
    "rank; the hatched corner, where TPA caches more, grows with the rank.",
)

# %% tags=["hide-input"]
looks.show(
    diagrams.ratio_map((1, 2, 4), n_kv_head=8, marks={"Llama 70B": (64, 128)}),
    alt="Three maps for ranks 1, 2 and 4: how many times less TPA caches than GQA with "
    "8 key-value heads. The ratio grows with the head width and falls with the heads.",
)

# %% [markdown]
# Against MHA (first map) savings grow towards many wide heads: "10 times or more" is in the upper right, at low ranks.
# Against 8 shared heads (second map, from $h = 8$ on, where GQA is still MHA) they are smaller for every $h$ above 8,
# and with *more heads* they shrink, since the head factors grow with $h$ while GQA's cache does not.
#
# **Where other mechanisms already cache less.** The paper compares mechanisms at equal parameters per layer, which
# gives each its own number of heads (KV-only: full queries, only K and V factorized):

# %% claim="paper-sizes-cache"
from tpa_minimal.memory import PAPER_HEADS

cached, rows = {}, []
for name, heads in PAPER_HEADS["small-124M"].items():
    cached[name] = Layer(name, 768, heads, 64, n_kv_head=2).cached_numbers
    more = {"n_kv_head": 2} if name == "gqa" else {}
    nearest = match_heads(name, 4 * 768**2, 768, 64, **more)
    rows.append([name, heads, nearest, cached[name]])
order = ("mqa", "gqa", "mla", "tpa", "mha")
assert [cached[name] for name in order] == sorted(cached[name] for name in order)

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "heads", "heads nearest to 4 d_model² weights", "numbers cached"]
looks.table(header, rows, "The paper's small size, per token and layer")

# %% [markdown]
# At the paper's small size TPA caches 3.9 times less than MHA and *more* than all the others. Its argument there is
# quality at a small cache: the reported zero-shot averages are 46.21 for TPA, 46.20 for MLA, 46.19 for MHA, and 45.14
# and 45.04 for MQA and GQA, from single runs (our own small runs: [notebook 08](08_train_on_fineweb_edu.ipynb)). (Three
# head counts, those of MLA, KV-only and TPA, are not the nearest whole number, as notebook 07 found too; the paper does
# not say why.)
#
# **With few cached tokens**, that is, context times sequences. The cache is then small beside the weights. For one
# sequence:

# %%
one, rows = versions["TPA (16, 1, 1)"], []
for context in (1024, 8192, 131_072):
    before = llama.cache_bytes(context)
    total = llama.weight_bytes("int4") + before
    saved = (before - one.cache_bytes(context)) / total
    rows.append([f"{context:,} tokens", f"{before / total:.1%}", f"{saved:.1%}"])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "the cache's share", "saved by TPA's cache"]
looks.table(header, rows, "Llama 3 70B with int4 weights: shares of all memory")

# %% [markdown]
# **For models that look back a short way only.** Where most layers have a sliding window, as in Gemma 3, the window
# has saved most of the memory already. And where a latent is small, as in DeepSeek-V3, little is left to save:

# %%
gemma, deepseek = MODELS["Gemma 3 27B"], MODELS["DeepSeek-V3"]
full = gemma.layer.cached_numbers * gemma.n_layer * 131_072 * 2  # bfloat16
rows = [["Gemma 3 27B without its windows", f"{full / GB:.1f} GB", "–"]]
both = (gemma, deepseek)
for ranks in (None, (16, 1, 1), (16, 2, 2)):
    one, other = (model.with_tpa(*ranks) if ranks else model for model in both)
    name = f"with TPA {ranks}" if ranks else "as shipped"
    numbers = f"{other.layer.cached_numbers:,}"
    rows.append([name, f"{one.cache_bytes(131_072) / GB:.1f} GB", numbers])

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "Gemma 3 27B, 128k tokens", "DeepSeek-V3, numbers per token and layer"]
looks.table(header, rows, "Two models that cache little already")

# %% [markdown]
# Of TPA only rank 1 is below DeepSeek-V3's latent, by a ninth; rank 2 nearly doubles it.
#
# **Where fewer bits are enough.** The shipped cache of Llama 3 70B takes 21.5 GB for 128k tokens in 8 bits and 10.7 GB
# in 4 bits, and nothing has to be trained again. ([Notebook 14](14_serving.ipynb) does the same with TPA's factors.)

# %% tags=["nbval-check-output"]
for dtype in ("int8", "int4"):
    cache = llama.cache_bytes(131_072, dtype=dtype)
    print(f"shipped cache of 128k tokens in {dtype}: {cache / GB:.1f} GB")

# %% [markdown]
# **Where heads are divided over GPUs.** All heads read $b$, so each of $N$ GPUs keeps all of it: $(R_K + R_V)(h/N +
# d_h)$ numbers against $2\,(G/N)\,d_h$. (With more GPUs than key-value heads each keeps one.) `split` says what is left
# on one GPU, here of the layers of §1:

# %%
counts, rows = (1, 2, 4, 8, 16), []
for name, layer in layers.items():
    rows.append([name, *(f"{layer.split(N).cached_numbers:,}" for N in counts)])
assert layers["TPA (16, 1, 1)"].split(8).cached_numbers == 2 * (8 + 128) == 272
assert layers["GQA, 8 heads (shipped)"].split(8).cached_numbers == 256

# %% tags=["hide-input", "nbval-check-output"]
header = ["GPUs", *map(str, counts)]
caption = "Numbers per token and layer on each GPU, the heads being divided over all"
looks.table(header, rows, caption)

# %% [markdown]
# Splitting by heads divides MHA's and GQA's cache and copies MLA's latent, MQA's one key and most of TPA's. On 8 GPUs
# TPA with ranks 1 keeps 272 numbers on each where GQA keeps 256. The explorer has a control for it, as in
# `explorer.show(explorer.Settings(gpus=8))`, and [notebook 14](14_serving.ipynb) splits a real layer. Dividing the
# cache by positions instead ([notebook 10](10_flash_decode.ipynb)) keeps the saving.
#
# **And always:** a TPA version is another model, which has to be trained. The paper's quality results are for ranks
# (6, 2, 2) and models of up to 1.5 billion weights; rank 1 appears in its speed measurements. We know of no trained 70B
# TPA.
#
# ## 6 · What does it cost to decode?
#
# Memory is not time. App. A.4 counts the multiply-adds of one new token against $M$ cached ones:
#
# - MHA, MQA, GQA: $2\,h\,d_h\,M$. Sharing keys saves memory, not arithmetic.
# - MLA, decoding from its latents: every head uses the latent and the rotated key as its key, and the latent as its
#   value: $h\,(2 d_c + d_R)\,M$.
# - TPA: $(R_Q R_K d_h + h R_Q R_K + h R_V d_h)\,M$: the products of feature factors are shared by all heads
#   ([notebook 06](06_attention_in_factor_space.ipynb)).
#
# This is the paper's order of the sums. The code of this course assembles the few queries first and then needs
# $(R_K + R_V)\,h\,(d_h + 1)\,M$.

# %% claim="app-a4-costs"
rows = []
for label, layer in layers.items():
    ranks = layer.rank_k + layer.rank_v
    ours = ranks * 64 * (128 + 1) if layer.mechanism == "tpa" else "–"
    paper = layer.decode_multiply_adds(1)
    rows.append([label, paper, ours, layer.cached_numbers])
third = dict(d_model=7168, n_head=64, d_head=128)  # the paper's third worked example
example = Layer("mla", **third, d_c=512, d_c_q=1536, d_rope=64)
assert example.decode_multiply_adds(1) == 69_632
example = Layer("tpa", **third, rank_q=16, rank_k=1, rank_v=1)
assert example.decode_multiply_adds(1) == 11_264

# %% tags=["hide-input", "nbval-check-output"]
header = ["", "multiply-adds (App. A.4)", "in this course's order", "numbers read"]
looks.table(header, rows, "Per cached token, in one layer of Llama 3 70B's sizes")

# %% tags=["hide-input"]
title = "Both TPA layers read far less than MHA and GQA; rank 1 also computes less"
shown = {label: layer for label, layer in layers.items() if label != "MQA"}
looks.show(
    diagrams.decode_cost(shown, title=title),
    alt="Two panels against the context, logarithmic. Left, multiply-adds by App. A.4: "
    "MLA needs the most, then TPA of ranks 2, then MHA and GQA alike, then TPA of "
    "ranks 1. Right, bytes of cache read: MHA by far the most, then GQA, then TPA "
    "of ranks 2, MLA and TPA of ranks 1.",
)

# %% [markdown]
# Left: in the paper's order ranks (16, 1, 1) compute less than MHA, (16, 2, 2) more. Right: both read far less.
# Decoding one sequence is usually limited by reading, so the right-hand side decides; with a large batch or a slow
# processor the left one does. MLA reads little and computes most. These are counts, not seconds: for seconds, see
# [notebook 10](10_flash_decode.ipynb) and `python -m tpa_minimal bench`.
#
# ## 7 · A look at trained heads
#
# What do the cached factors encode? Train a small T6 for some seconds on the built-in lessons, short texts whose
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
# Take one text and record the input of each attention layer; `factors` then gives what would be cached.

# %%
text = (
    "Count by 12 from 51: 51, 63, 75, 87, 99.\n"
    "Question: Which number comes after 87?\nAnswer:"
)
tokens = torch.tensor([lessons.tokenizer.encode(text)])
words = [lessons.tokenizer.decode([i]).replace("\n", "↵") for i in tokens[0].tolist()]
seen = []
hooks = [
    block.attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for block in model.blocks
]
with torch.no_grad():
    model(tokens)
    last = model.blocks[-1].attention
    a_q, b_q, a_k, b_k, a_v, b_v = last.factors(seen[-1], start=0)
for hook in hooks:
    hook.remove()
print(f"{len(words)} tokens; a_k {tuple(a_k.shape)}, b_k {tuple(b_k.shape)}")


# %% tags=["hide-input"]
def map_of(ax, values, limit):
    """A matrix in colour, orange below zero and blue above; dots mark what is below."""
    image = ax.imshow(
        values, cmap=plt.get_cmap("PuOr", 21), vmin=-limit, vmax=limit, aspect="auto"
    )
    rows, columns = torch.where(values < 0)
    ax.plot(columns, rows, ".", color="black", markersize=2)
    ax.grid(visible=False)
    return image


fig, axes = plt.subplots(2, 1, figsize=(8.6, 4.4), sharex=True)
for r, ax in enumerate(axes):
    image = map_of(ax, a_k[0, :, r].T, a_k.abs().max())  # (h, T)
    ax.set_ylabel(f"head\n(rank {r + 1})")
    ax.set_yticks(range(8), range(1, 9))
axes[1].set_xticks(range(len(words)), words, rotation=90, fontsize=8)
fig.colorbar(image, ax=axes, label="entry of $a_K$")
title = "$A_K$: how strongly each token shows itself to each head (dots: negative)"
axes[0].set_title(title)
looks.show(
    fig,
    alt="Two colour maps, one per rank, of the key head factors: 8 heads by the tokens "
    "of the text. Neighbouring columns differ in sign and size, so the mix of heads "
    "changes from token to token. Dots mark negative entries.",
)

# %% [markdown]
# A column is one token's head factor. Columns differ: the mix of heads is *contextual*. Under MHA, MQA or GQA these
# maps would be constant along each row, the same for every token ([notebook 04](04_special_cases.ipynb)). The feature
# factors say *what* the token shows. Compare them between tokens, before rotation so that position plays no part:

# %%
with torch.no_grad():
    _, _, _, plain, _, _ = last.project(seen[-1])  # b_k before RoPE
plain = plain[0, :, 0]  # (T, d_h), of the first rank
alike = F.cosine_similarity(plain[:, None], plain[None], dim=-1)  # (T, T)
digits = torch.tensor([word.strip().isdigit() for word in words])
end = words.index(".")  # the count ends here; all but two of the digits are in it
rows = []
for name, upto in (("the whole text", len(words)), ("the count alone", end)):
    cosines, digit = alike[:upto, :upto], digits[:upto]
    others = ~torch.eye(upto, dtype=torch.bool)  # a token is not compared with itself
    kinds = ((digit, digit), (~digit, ~digit), (digit, ~digit))
    means = [cosines[one[:, None] & other & others].mean() for one, other in kinds]
    rows.append([name, *(f"{mean:.2f}" for mean in means)])

# %% tags=["hide-input"]
header = ["in", "two digits", "two other tokens", "a digit and another token"]
looks.table(header, rows, "Mean cosine of two tokens' first key feature factors")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6.6, 5.6))
image = map_of(ax, alike, 1)
ax.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
ax.set_yticks(range(len(words)), words, fontsize=8)
fig.colorbar(image, label="cosine of two $b_K$ (rank 1)")
ax.set_title("$B_K$ (rank 1), every token against every other (dots: negative)")
looks.show(
    fig,
    alt="A square map of cosines between the tokens' first key feature factors. The "
    "count at the beginning of the text forms a block of similar tokens.",
)

# %% [markdown]
# The large block is the count. Within it the gap between digits and other tokens is smaller than in the whole text, so
# much of what makes two digits alike is only that they are in the same passage. Equal tokens do not always have equal
# features either, because the layer below has mixed in what comes before them.
#
# How strong is the restriction that TPA imposes? For each token, $K_t$ is an 8 × 32 matrix of rank 2 at most: only two
# singular values are not zero. That says nothing about the keys of the whole text. Put them side by side, one row
# per token, and see how many directions they need.

# %% claim="rank-of-keys"
from tpa_minimal.tpa import assemble

k = assemble(a_k, b_k)[0]  # (T, h, d_h)
per_token = torch.linalg.svdvals(k)  # (T, 8)
whole = torch.linalg.svdvals(k.flatten(1))  # all keys, (T, h · d_h)
assert (per_token[:, 2] < 1e-4 * per_token[:, 0]).all()
assert (whole > 0.01 * whole[0]).sum() > 4  # far more than R_K

# %% tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4))
relative = (per_token / per_token[:, :1]).clamp(min=1e-9)
look = dict(color=looks.of("tpa").colour, marker="o")
left.semilogy(range(1, 9), relative.T, color="0.55", linewidth=0.8)
left.semilogy(range(1, 9), relative.median(0).values, **look)
left.set_title("Each token's $K_t$: rank $R_K$ = 2")
right.semilogy(range(1, len(whole) + 1), whole / whole[0], **look, markersize=4)
right.set_title("All tokens' keys: many directions")
for ax in (left, right):
    ax.set_xlabel("number of the singular value")
    ax.set_ylabel("singular value / largest")
looks.show(
    fig,
    alt="Singular values, logarithmic. Left, of each token's keys: after the second "
    "only rounding is left. Right, of all tokens' keys together: they fall slowly, "
    "over many directions.",
)

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

# %% tags=["hide-input"]
fig, axes = plt.subplots(2, 4, figsize=(8.6, 4.8), sharex=True, sharey=True)
for head, ax in enumerate(axes.flat):
    image = ax.imshow(weights[head] ** 0.5, cmap="Greys", vmin=0, vmax=1)
    ax.set_title(f"head {head + 1}", fontsize=10)
    ax.grid(visible=False)
fig.supxlabel("attended token")
fig.supylabel("querying token")
fig.colorbar(image, ax=axes, label="√ of the weight")
title = "Eight heads, related patterns, from two key factors per token"
fig.suptitle(title, x=0.01, ha="left")
looks.show(
    fig,
    alt="Attention maps of eight heads. Everything above the diagonal is empty. The "
    "heads' patterns resemble one another but are not equal.",
)

# %% [markdown]
# The upper right is empty: no token sees what comes after it. The heads are related, being mixtures of the same
# factors, but they are not copies. After some seconds of training, do not read more into them than that.
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
# A model ships `n_kv_head` shared heads. Return the largest rank $R = R_K = R_V$ at which TPA caches at least `times`
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
    raise NotImplementedError  # return dict(a="...", b="...", ..., f="...")


# %% tags=["solution"]
def leaflet():
    return dict(a="baseline", b="true", c="false", d="false", e="baseline", f="false")


# %%
checks.ex09_3(leaflet)

# %% [markdown]
# ## Summary
#
# - Cache = numbers per token and layer × layers × tokens × sequences × bytes. TPA's first factor is
#   $(R_K + R_V)(h + d_h)$. Cache objects and process memory agree with it.
# - A 70B-class GQA model needs 42.9 GB of cache for 128k tokens; with TPA it would need 8.1 GB at ranks (16, 1, 1)
#   and 16.1 GB at (16, 2, 2). On 80 GB the weights must be 8-bit or less for any of this to matter.
# - It is not worth it where $R_K + R_V > 2\,G\,d_h / (h + d_h)$, for few cached tokens, where windows, a small latent or
#   fewer bits have saved the memory already, where heads are divided over GPUs, or where retraining is out of the
#   question.
# - Name the baseline. 42.7 and 5.3 times less can be the same layer.
#
# **Next:** [10 · flash decode](10_flash_decode.ipynb), where fewer bytes sometimes become fewer milliseconds.
