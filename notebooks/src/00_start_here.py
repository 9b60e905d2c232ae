# %% [markdown]
# # 00 · Start here
# {badge}
#
# A language model remembers its conversation in a *KV cache*, and for long conversations that cache can fill more
# memory than the weights. **Tensor Product Attention** (TPA; [Zhang et al., arXiv
# 2501.06425](https://arxiv.org/abs/2501.06425)) caches something smaller, from which keys and values follow. This
# course builds it from nothing, line by line. Here you check that your set-up works, and see in one minute what the
# course is about.
#
# **You will be able to**
# - tell whether your set-up is complete, and whether a GPU is in use
# - train a T6 (LLaMA's block with TPA inside) and let it write, with and without its cache
# - read off what its cache weighs, beside that of ordinary attention with the same heads
# - choose your way through the course
#
# **You need** Python and PyTorch; to have met attention once. No GPU, no network.
#
# **Time** about 10 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import tempfile
import time

import matplotlib.pyplot as plt

from tpa_minimal import T6Config
from tpa_minimal.course import checks, looks
from tpa_minimal.experiments import data, train

looks.style()

# %% [markdown]
# If both cells ran without an error, your set-up is complete; the line above says whether a GPU is in use.
#
# ## A model in half a minute
#
# The package can write its own training text, called *the lessons*: short factual texts about invented people, places
# and things, so that nothing has to be downloaded. (Notebook 08 trains on FineWeb-Edu instead.)

# %%
lessons = data.prepare("lessons", tokens=400_000, progress=False)
text = lessons.tokenizer.decode(lessons.train[:90].tolist())
print(text)

# %% [markdown]
# The preset `tiny` is a T6 of about a million parameters: 4 layers, 16 heads of width 32, and queries, keys and values
# of rank 6, 2 and 2. What those ranks are is the subject of notebook 02. We train it briefly on these lessons.

# %%
config = T6Config.preset("tiny", vocab_size=lessons.vocab_size)
print(config)

# %%
run = train.train(
    train.TrainConfig(
        out=tempfile.mkdtemp(), data="lessons", tokens=400_000, steps=80, batch_size=8, seq_len=128, eval_every=80
    ),
    progress=False,
    log=lambda line: None,
)
model = run.model.eval()
print(f"{model.num_parameters():,} parameters")
print(
    f"validation loss before {run.metrics[0]['val_loss']:.2f}, after {run.metrics[-1]['val_loss']:.2f} nats per token"
)
assert run.metrics[-1]["val_loss"] < run.metrics[0]["val_loss"] - 1

# %% [markdown]
# The loss is the average surprise per token on texts that the model has not seen. It starts somewhat above that
# of even guessing, ln 1024 = 6.93, since an untrained T6 is not undecided but wrong at random, and falls by several nats. So short a training teaches which words are common, hardly how they form a sentence:

# %%
print(train.generate_text(model, lessons.tokenizer, "", 60, temperature=0.7))

# %% [markdown]
# ## Writing with a memory
#
# To write the next token, attention needs the keys and values of *all* earlier ones. Without a cache they are computed
# again at every step; with one they are kept. The tokens are the same, the time is not:

# %%
prompt = torch.tensor([lessons.val[:16].tolist()], device=next(model.parameters()).device)
tokens, seconds = {}, {}
for use_cache in (True, False):
    start = time.perf_counter()
    tokens[use_cache] = model.generate(prompt, 240, temperature=0, use_cache=use_cache)
    seconds[use_cache] = time.perf_counter() - start
assert torch.equal(tokens[True], tokens[False])
print(f"240 tokens with the cache: {seconds[True]:.1f} s; without: {seconds[False]:.1f} s")

# %% [markdown]
# ## What the memory weighs
#
# Here is the point of it all. We fill two real caches with the same number of tokens and ask each for its bytes:
# TPA's, which holds *factors*, and that of ordinary multi-head attention (MHA) with the same 16 heads of width 32,
# which holds keys and values.

# %%
lengths = [64, 128, 256, 512]
weights = [train.measure_caches(model, length) for length in lengths]
for length, (tpa, mha) in zip(lengths, weights):
    print(f"{length:4d} tokens: TPA {tpa:9,} bytes   MHA {mha:9,} bytes   ratio {mha / tpa:.2f}")
    assert abs(mha / tpa - 16 / 3) < 1e-9

# %%
fig, ax = plt.subplots()
for values, name, marker in zip(zip(*weights), ("TPA: factors", "MHA: keys and values"), "os"):
    kilobytes = [value / 1024 for value in values]
    ax.plot(lengths, kilobytes, marker=marker)
    ax.annotate(name, (lengths[-1], kilobytes[-1]), xytext=(-8, 6), textcoords="offset points", ha="right")
ax.set(xlabel="tokens remembered", ylabel="cache, KiB (float32)", ylim=(0, None))
ax.set_title("Same heads, 5.3 times less to remember")
plt.show()

# %% [markdown]
# Both caches grow by a fixed number of bytes per token; TPA's line is 5⅓ times less steep. That ratio belongs to
# *this* configuration (16 heads of width 32, rank 2) and to *this* comparison (MHA with the same heads). With rank 1
# and 64 heads of width 128 it is 42.7; with 4 heads of width 32 and rank 2 it is 1.8. And there are other ways to
# save: the same model with two shared key-value heads (GQA) would hold 128 numbers per token and layer where TPA
# holds 192. What each way gives up is a question that notebooks 01 and 09 take seriously.
#
# ## How the exercises work
#
# Each exercise is a function to fill in, followed by a checker. A checker prints `[todo]` while nothing is written,
# `[fail]` with a diagnosis, or `[ok]`. Try it (3 minutes):
#
# **Exercise 00.1.** How many numbers does MHA cache per token and layer, with `n_head` heads of width `d_head`?


# %% tags=["exercise"]
def numbers_cached_by_mha(n_head, d_head):
    raise NotImplementedError  # your line here


# %% tags=["solution"]
def numbers_cached_by_mha(n_head, d_head):
    return 2 * n_head * d_head  # a key and a value for each head


# %%
checks.ex00_1(numbers_cached_by_mha)

# %% [markdown]
# ## The map
#
# | notebook | you end up able to | builds of `tpa.py` |
# |---|---|---|
# | [01](01_attention_and_the_kv_cache.ipynb) attention and the KV cache | write MHA; say why its cache grows and what MQA, GQA and MLA trade for less | |
# | [02](02_tensor_product_factorization.ipynb) tensor product factorization | derive TPA from rank and outer products | config, `assemble` |
# | [03](03_rope_and_prerotation.ipynb) RoPE and pre-rotation | prove that rotating factors is rotating keys | RoPE |
# | [04](04_special_cases.ipynb) special cases | show MHA, MQA and GQA as exact special cases | |
# | [05](05_factor_cache.ipynb) the factor cache | build the cache and the layer, and measure them | cache, layer |
# | [06](06_attention_in_factor_space.ipynb) attention in factor space | attend without ever building a key | `factor_attention` |
# | [07](07_t6.ipynb) T6 | assemble the model, match parameters, generate | SwiGLU, block, T6 |
# | [08](08_train_on_fineweb_edu.ipynb) train on FineWeb-Edu | train, stop, resume, and read curves | |
# | [09](09_memory_savings.ipynb) memory savings | say what TPA saves on your model, and when it does not | |
# | [10](10_flash_decode.ipynb) flash decode | write the GPU kernel, and check it on a CPU | |
# | [11](11_variants.ipynb) variants · [12](12_bring_your_own_model.ipynb) bring your own model | go further | |
#
# In a hurry: 01, 02, 03, 05 and 09. To reuse the module: copy
# `tpa_minimal/tpa.py`, which needs only PyTorch, and read 05 to 07.
#
# ## Summary
#
# - T6 with TPA trains and generates like any other language model (after half a minute, not yet sense); its cache holds
#   factors instead of keys and values.
# - Measured here: 5⅓ times fewer bytes than MHA with the same heads, in this configuration.
# - A ratio means nothing without its two configurations. We will always name them.
#
# Next: [01 · Attention and the KV cache](01_attention_and_the_kv_cache.ipynb)
