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
# - say in one picture what TPA caches, and read off what that weighs beside ordinary attention
# - choose your way through the course
#
# **You need** Python and PyTorch; a first acquaintance with attention. No GPU, no network.
#
# **Time** about 10 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import math
import tempfile
import time

from tpa_minimal import T6Config
from tpa_minimal.course import checks, diagrams, looks
from tpa_minimal.experiments import data, generate, train
from tpa_minimal.tpa import rms_norm

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
# of rank 6, 2 and 2. We come to the ranks in a moment. We train it briefly on these lessons.

# %%
config = T6Config.preset("tiny", vocab_size=lessons.vocab_size)
print(config)

# %%
run = train.train(
    train.TrainConfig(
        out=tempfile.mkdtemp(),
        data="lessons",
        tokens=400_000,
        steps=80,
        batch_size=8,
        seq_len=128,
        eval_every=80,
    ),
    progress=False,
    log=lambda line: None,
)
model = run.model.eval()
before, after = run.metrics[0]["val_loss"], run.metrics[-1]["val_loss"]
print(f"{model.num_parameters():,} parameters")
print(f"validation loss before {before:.2f}, after {after:.2f} nats per token")
assert after < before - 1

# %% [markdown]
# The loss is the average surprise per token, $-\ln p$ of the token that came (in *nats*, the unit of the natural
# logarithm), on texts that the model has not seen. Guessing evenly among all tokens of
# the vocabulary would give the first number below, and the untrained model is somewhat *worse* than that. It does not
# guess at all: it repeats its input. Ask a freshly made model for its most likely next token:

# %%
untrained = train.T6(config).to(next(model.parameters()).device)
tokens = torch.tensor(
    [lessons.val[:100].tolist()], device=next(model.parameters()).device
)
repeats = (untrained(tokens).argmax(-1) == tokens).sum().item()
print(
    f"guessing evenly: ln {config.vocab_size} = {math.log(config.vocab_size):.2f} nats"
)
print(f"untrained: {repeats} of 100 predicted tokens are the token that was just read")
assert repeats == 100

# %% [markdown]
# The reason: at the start the attention and feed-forward parts add nothing (their output projections are zero), and the
# matrix that reads a token in also writes the scores out. So the score is largest for the token itself. From there
# the loss falls by several nats; such a short run teaches which words are common, but hardly how they form sentences:

# %%
print(generate.generate_text(model, lessons.tokenizer, "", 60, temperature=0.7))

# %% [markdown]
# ## Writing with a memory
#
# To write the next token, attention needs the keys and values of *all* earlier ones. Without a cache they are computed
# again at every step; with one they are kept. The tokens are the same, the time is not:

# %%
prompt = torch.tensor([lessons.val[:16].tolist()], device=tokens.device)
written, seconds = {}, {}
for use_cache in (True, False):
    start = time.perf_counter()
    written[use_cache] = model.generate(prompt, 240, temperature=0, use_cache=use_cache)
    seconds[use_cache] = time.perf_counter() - start
assert torch.equal(written[True], written[False])
print(
    f"240 tokens with the cache: {seconds[True]:.1f} s; without: {seconds[False]:.1f} s"
)

# %% [markdown]
# ## The idea, in one picture
#
# What does TPA keep in its cache? In each layer a token has a key for each of its 16 heads: a small matrix $K_t$ with a
# row for each head and a column for each feature. Ordinary multi-head attention (MHA) caches that matrix, and another
# one for the values. TPA makes it from **factors**: a vector $a$ that says *which heads*, and a vector $b$ that says
# *which features*. Every entry of $a$ times every entry of $b$ ($a \otimes b$, an outer product) makes a whole matrix, and
# the mean of $R$ of these is $K_t$. The number $R$ is the **rank**, here 2. Only the factors are cached. Below are those of one
# token in the last layer of the model that you have just trained:

# %% tags=["hide-input"]
with torch.no_grad():
    tokens = written[True][:, :64]
    x = model.embedding(tokens)
    for block in model.blocks[:-1]:
        x = block(x)
    a_k, b_k = model.blocks[-1].attention.factors(rms_norm(x))[2:4]
a, b = a_k[0, 32].cpu(), b_k[0, 32].cpu()  # (R, h) and (R, d_h)
looks.show(
    diagrams.hero(a, b),
    alt="One token's keys, 16 heads by 32 features, as one half of the sum of two "
    "outer products. The vectors a and b at the margins of each product are in "
    "colour: 2 times (16 + 32) = 96 numbers are cached. The products and the keys "
    "are hatched: their 512 numbers are never built.",
)

# %% [markdown]
# 96 numbers in place of 512, and attention can work with the 96 directly (notebook 06 shows how). The price: a token
# can no longer have just *any* matrix of keys, only one of rank 2. Notebook 02 takes this picture apart.
#
# ## What the memory weighs
#
# Here is the point of it all. While the model writes we look at the bytes of two real caches: TPA's, which holds
# factors, and that of MHA with the same 16 heads of width 32, which holds keys and values.

# %%
lengths = [1, *range(16, 257, 16)]
weights = [generate.measure_caches(model, length) for length in lengths]
for tpa, mha in weights:
    assert abs(mha / tpa - 16 / 3) < 1e-9

# %% tags=["hide-input"]
story = model.generate(prompt, 240, temperature=0.8)[0].tolist()
texts = [lessons.tokenizer.decode(story[:n]) for n in lengths]
texts = [" ".join(text.split()) for text in texts]
tpa, mha = zip(*weights)
looks.animate(
    diagrams.filling_caches(lengths, {"mha": mha, "tpa": tpa}, texts),
    alt="While the model writes 256 tokens, two bars grow in proportion: the cache "
    f"of MHA reaches {mha[-1]:,} bytes, that of TPA {tpa[-1]:,} bytes.",
)

# %%
looks.table(
    ["tokens", "MHA, bytes", "TPA, bytes", "MHA / TPA"],
    [(n, h, t, f"{h / t:.2f}") for n, t, h in list(zip(lengths, tpa, mha))[::4]],
    caption="Two caches of 4 layers in float32, 16 heads of width 32, ranks 2 and 2",
)

# %% [markdown]
# Both caches grow by a fixed number of bytes per token; TPA's grows $5\tfrac13$ times more slowly. That ratio belongs to
# *this* configuration (16 heads of width 32, rank 2) and to *this* comparison (MHA with the same heads). Other sizes
# give other ratios, and there are other ways to save, such as keys that several heads share (GQA):


# %%
def numbers(heads, width, rank):
    """Cached per token and layer: by MHA, by TPA, and by two shared key-value heads."""
    return 2 * heads * width, 2 * rank * (heads + width), 2 * 2 * width


sizes = {"this model": (16, 32, 2), "a toy": (4, 32, 2), "large, rank 1": (64, 128, 1)}
looks.table(
    ["", "heads", "width", "rank", "MHA", "TPA", "MHA / TPA", "GQA, 2 heads"],
    [
        (name, *size, mha, tpa, f"{mha / tpa:.1f}", gqa)
        for name, size in sizes.items()
        for mha, tpa, gqa in [numbers(*size)]
    ],
    caption="Numbers cached per token and layer",
)

# %% [markdown]
# Two shared heads would hold 128 numbers in this model where TPA holds 192. What each way gives up is a question that
# notebooks 01 and 09 take seriously.
#
# ## The letters of this course
#
# One card for all notebooks. The formulas use the paper's letters, the code the names on the right.
#
# | symbol | meaning | in code |
# |---|---|---|
# | $C$, $T$, $M = C + T$ | positions in the cache, new positions in this call, all that can be attended to | `start`, `T`, `M` |
# | $t$, $s$ | position of a query, position of a key | |
# | $d_\text{model}$ | width of a token's vector $x_t$ between the layers | `d_model` |
# | $h$, $d_h$ | number of heads, width of a head | `n_head`, `d_head` |
# | $i$, $e$, $r$ | index of a head, of a feature, of an outer product | |
# | $Q_t$, $K_t$, $V_t$ | queries, keys, values of one token: $h \times d_h$ matrices | `q`, `k`, `v` |
# | $R_Q$, $R_K$, $R_V$ | ranks: the number of outer products in each | `rank_q`, `rank_k`, `rank_v` |
# | $a_r$, $A_K$ | head factor, and the $R_K \times h$ matrix of those of the keys ($A_Q$, $A_V$ likewise) | `a_k` |
# | $b_r$, $B_K$ | feature factor, and the $R_K \times d_h$ matrix of those of the keys ($B_Q$, $B_V$ likewise) | `b_k` |
# | $G$ | number of key and value heads in GQA | `n_kv_head` |
# | $d_c$, $d_R$ | width of MLA's latent and of its rotated key | `d_c`, `d_rope` |
# | $\theta_j$, $\Theta_t$ | speed of RoPE's plane $j$, and the rotation at position $t$ (the paper writes $T_t$) | `RoPE` |
#
# In the shapes of `tpa.py` the first axis, `B`, is the batch. TPA $(6, 2, 2)$ means $(R_Q, R_K, R_V) = (6, 2, 2)$.
#
# Units: a cache is counted in numbers per token *and layer* unless said otherwise. GB is $10^9$ bytes, GiB is $2^{30}$;
# 128k tokens are 131,072; one multiply–add counts as two operations where operations are counted.
#
# ## How the exercises work
#
# Each exercise is a function to fill in, followed by a checker. A checker prints `[todo]` while nothing is written,
# `[fail]` with a diagnosis, or `[ok]`. Try it (3 minutes):
#
# **Exercise 00.1.** ★☆☆ How many numbers does MHA cache per token and layer, with `n_head` heads of width `d_head`?
#
# <details><summary>Hint 1</summary>
#
# How many heads does a token leave a key in, and how wide is one key?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Each of the `n_head` heads caches a key *and* a value, of `d_head` numbers each. Queries are used once and not
# cached.
#
# </details>


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
# | [11](11_variants.ipynb) variants | tell TPA's relatives apart, and what each gives up | |
# | [12](12_bring_your_own_model.ipynb) bring your own model | convert a LLaMA exactly, and lower its rank | |
# | [13](13_evaluate.ipynb) evaluate | score a model on benchmarks, and read the scores with their errors | |
# | [14](14_serving.ipynb) serving | decide whether TPA can be deployed: ragged batches, pages, 8 bits, several GPUs | |
#
# In a hurry: 01, 02, 03, 05 and 09. To reuse the module: copy
# `tpa_minimal/tpa.py`, which needs only PyTorch, and read 05 to 07.
#
# ## Summary
#
# - T6 with TPA trains and generates like any other language model (after half a minute, not yet sense); its cache holds
#   factors, "which heads" and "which features", instead of keys and values.
# - Measured here: 5⅓ times fewer bytes than MHA with the same heads, in this configuration.
# - A ratio means nothing without its two configurations. We will always name them.
#
# Next: [01 · Attention and the KV cache](01_attention_and_the_kv_cache.ipynb)
