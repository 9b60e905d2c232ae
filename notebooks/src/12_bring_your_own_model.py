# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 12 · Bring your own model
#
# {badge}
#
# **You will be able to**
#
# - turn a Hugging Face LLaMA into a T6 with fixed-A TPA that gives the same logits, and say what each step undoes;
# - use any T6 as a transformers model: padded batches, beam search, sampling, `Trainer`, adapters;
# - put TPA into a LLaMA as `self_attn`, so that `model.generate` goes on working;
# - carry the authors' T6 checkpoints to this package and back;
# - take a trained model down in rank, save and load it, and say what survives and why contextual factors do not fit.
#
# **You need** notebook 04 (MHA, MQA and GQA as TPA); 03 for RoPE's sense of rotation; 11 for fixed A.
#
# **Time** about 75 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %% [markdown]
# Notebook 04 showed that MHA, MQA and GQA *are* TPA, with constant head factors. So any model with such layers is a
# starting point: convert it exactly first, then change it and watch what is lost. `tpa_minimal/huggingface.py` does the
# carrying; here we take it apart.
#
# `transformers` is optional. Where it is not installed, the cells that need it say so and do nothing.

# %% tags=["hide-input"]
import importlib.util
import os
import tempfile
from functools import partial

import matplotlib.pyplot as plt
from torch.testing import assert_close

from tpa_minimal import huggingface as convert
from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.course import checks, looks
from tpa_minimal.experiments import data, train
from tpa_minimal.tpa import T6, T6Config, apply_rope, assemble, rope_tables

looks.style()
torch.manual_seed(0)
if have_transformers := importlib.util.find_spec("transformers") is not None:
    import transformers
print(
    "transformers is",
    transformers.__version__
    if have_transformers
    else "not installed: some cells do nothing",
)

# %% [markdown]
# ## What a LLaMA does differently
#
# A T6 block is LLaMA's block, but for five details. Each can be undone exactly, and mostly by changing weights alone.
#
# | LLaMA (in transformers) | T6 | undone by |
# |---|---|---|
# | RoPE rotates by $+\theta$ | rotates by $-\theta$ | negating half the rows of $W_q$ and $W_k$ |
# | RMSNorm has a gain | has none | multiplying the gain into the next matrix |
# | RMSNorm has its own eps | torch's default | a norm with that eps, set in the backbone |
# | output layer of its own | the embedding again | a subclass, `LlamaT6` |
# | norms and rotary tables in float32, always | as wide as the model | doing the same, if asked to compare in float64 |
#
# The first is the prettiest. Write $x\,\Theta_t$ for our rotation; LLaMA has $x\,\Theta_t^\top$. With $D$ the diagonal matrix of
# $+1$ on the first half of a head's features and $-1$ on the second, $D\,\Theta_t\,D = \Theta_t^\top$: mirroring, rotating and
# mirroring back rotates the other way. So feed our RoPE mirrored queries and keys. The mirror cancels in
# $(q D)(k D)^\top = q k^\top$.
#
# One trap outside of all this: weights in transformers' format pair feature $i$ with $i + d_h/2$, as we do. Meta's original
# files interleave the pairs. Convert them with transformers' script first: the wrong layout raises no error and gives
# wrong logits from the second token on.

# %% claim="llama-rotation"
x = torch.randn(1, 5, 3, 8, dtype=torch.float64)
D = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
cos, sin = rope_tables(torch.arange(5), 8, 10000.0, torch.float64)
assert_close(apply_rope(x * D, cos, sin) * D, apply_rope(x, cos, -sin))
print("mirror, rotate, mirror = rotate the other way")

# %% [markdown]
# The gain of a norm is as easy: $W(g\odot x) = (W\,\mathrm{diag}(g))\,x$, so column $j$ of the matrix that follows is
# multiplied by $g_j$. The last norm's gain goes into the output layer, which therefore can no longer be the embedding.
#
# Group $j$ of GQA becomes rank $j$, with a constant head factor that is $G$ on the group's heads and 0 elsewhere; the
# $G$ cancels $1/R$. Altogether:

# %%
if have_transformers:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        rms_norm_eps=1e-5, eos_token_id=None, pad_token_id=255,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    for name, weight in llama.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(
                weight, 0.5, 2
            )  # fresh gains are 1, and folding a 1 wrongly would go unnoticed
    t6 = convert.llama_to_t6(llama)
    tokens = torch.randint(250, (2, 100))
    with torch.no_grad():
        assert_close(t6(tokens), llama(tokens).logits, rtol=0, atol=1e-4)
    text = llama.generate(tokens, max_new_tokens=30, do_sample=False)
    assert torch.equal(t6.generate(tokens, 30, temperature=0), text)
    print(
        "same logits to 1e-4, and the same 30 tokens:",
        text[0, -30:].tolist()[:8],
        "...",
    )

# %% [markdown]
# Is it *equal*, or only close? Float64 decides: a mistake stays, rounding falls from 1e-7 to 1e-16. Here transformers
# has a surprise. Its norms and rotary tables are float32 even in a float64 model, so a float64 LLaMA is only as exact
# as float32 in these places. `llama_to_t6` asks the model's norm and imitates it. Switch the imitation off and see.

# %%
if have_transformers:
    llama = llama.double()
    with torch.no_grad():
        expected = llama(tokens).logits
        for in_float32 in (True, False):
            t6 = convert.llama_to_t6(llama)
            if not in_float32:
                exact = convert.LlamaT6(
                    t6.config, **{**t6.llama, "in_float32": False}
                ).double()
                exact.load_state_dict(t6.state_dict())
                t6 = exact
            error = (t6(tokens) - expected).abs().max()
            print(
                f"float32 inside, as transformers: {in_float32!s:5}  "
                f"largest difference {error:.0e}"
            )
            assert (error < 1e-9) == in_float32

# %% [markdown]
# What has no place in a T6 is refused, not dropped: biases, adapters that are not merged, custom layer classes, a window
# of attention shorter than the text, and architectures with more parts, such as Qwen3's norms of queries and keys. Mistral
# and Qwen2 are LLaMA with a window and with biases, and convert if they have neither. RoPE of the types default, linear,
# llama3 and yarn is carried over; types whose frequencies change with the length of the text are refused, since rotated
# factors in a cache cannot follow.

# %%
if have_transformers:
    biased = transformers.LlamaConfig(
        **{**config.to_diff_dict(), "attention_bias": True}
    )
    biased = transformers.LlamaForCausalLM(biased)
    torch.nn.init.ones_(biased.model.layers[0].self_attn.k_proj.bias)
    try:
        convert.llama_to_t6(biased)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## T6 as a transformers model
#
# `T6ForCausalLM` wraps any T6, with any attention of this package, as transformers wants a model: thin, since all that
# computes is `tpa.py`. `generate` then brings sampling, beam search and assisted decoding, and `Trainer` and PEFT work.
# What you meet first is the ragged batch: prompts of unequal lengths are padded on the left, and a mask says so.

# %%
if have_transformers:
    wrapped = convert.T6ForCausalLM(convert.llama_to_t6(llama.float()))
    prompts = [tokens[:1, :7], tokens[1:, :20]]
    batch = torch.full((2, 20), 255)
    batch[0, -7:], batch[1] = prompts[0], prompts[1]
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=255)
    together = wrapped.generate(batch, attention_mask=batch != 255, **options)
    for prompt, row in zip(prompts, together):
        alone = wrapped.model.generate(prompt, 12, temperature=0)
        assert torch.equal(row[-12:], alone[0, -12:])
    print("a padded batch writes what each prompt writes alone")

# %% [markdown]
# Why does padding on the left change nothing? The padding is masked, and it moves all of a row's positions by the same
# amount, of which RoPE sees nothing. Packed texts, holes in the mask and custom position ids are another matter: T6
# counts one by one, and so the wrapper refuses them.
#
# The cache in there is a `FactorCache` per layer. Here is what beam search holds of one layer.

# %%
if have_transformers:
    beams = wrapped.generate(
        batch,
        attention_mask=batch != 255,
        num_beams=3,
        return_dict_in_generate=True,
        **options,
    )

# %%
if have_transformers:
    kept = beams.past_key_values.layers[0].factors
    shape = tuple(kept.view(0, kept.length)[1].shape)
    print("(batch x beams, positions, ranks, width) of b_k:", shape)

# %% [markdown]
# ## TPA in another model
#
# The other way to bring TPA and a LLaMA together: leave the model where it is and exchange `self_attn`, by
# `convert.LlamaSelfAttention`. Its cache is transformers' own `DynamicCache`, which stores whatever two tensors it is
# given: instead of keys and values it gets, rank by rank, $(a_k, b_k)$ and $(a_v, b_v)$ side by side. Fixed A has no $a$
# to store. What `save_pretrained` writes after this, fine-tuned or not, is a LLaMA again, since fixed A with the masks
# of groups *is* LLaMA's attention.

# %%
if have_transformers:
    before = llama.generate(tokens, max_new_tokens=20, num_beams=3, do_sample=False)
    convert.use_tpa(llama)
    result = llama.generate(
        tokens,
        max_new_tokens=20,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert torch.equal(result.sequences, before)
    kept = result.past_key_values.layers[0].keys
    print(
        type(llama.model.layers[0].self_attn.attention).__name__,
        "generates the same; b_k of one layer:",
    )
    print("(batch x beams, ranks, positions, d_head) =", tuple(kept.shape))

# %% [markdown]
# To put a *contextual* TPA there, wrap it: `convert.LlamaSelfAttention(TensorProductAttention(config), layer_idx)`. It
# starts untrained, of course, and the model has to be trained with it.
#
# ## The authors' checkpoints
#
# The authors' `model/T6.py` computes the same function with other names and one other layout. Their head factors are
# read head by head, `(h, R)`, ours rank by rank, `(R, h)`, so that a factor of one rank is one row. Their feature
# factors are rank by rank already. Both ways:

# %%
sizes = T6Config(vocab_size=64, n_layer=1, d_model=24, n_head=4, d_head=8, rank_q=3)
ours = T6(sizes).state_dict()
theirs = convert.t6_to_authors_state_dict(ours, sizes)
print(*list(theirs)[2:5], sep="\n")
back = convert.authors_t6_state_dict(theirs, sizes)
assert all(torch.equal(back[name], weight) for name, weight in ours.items())

# %% [markdown]
# One thing does not carry over, on purpose: their rotary tables are rounded to bfloat16 (notebook 03), ours are not.
# (We compared with their code, its tables made in float32: logits agree to about $10^{-5}$. Their code is not run here.)
#
# ## Down in rank
#
# An exact conversion caches exactly as much as before. The promise of TPA is less. Can a *trained* model be taken
# there without training from scratch? To ask this of real activations we need a trained model; some seconds give a
# small one: GQA with 8 heads in 4 groups, on the built-in lessons.

# %%
lessons = data.prepare("lessons", 400_000, progress=False)
sizes = T6Config(
    vocab_size=lessons.vocab_size,
    n_layer=2,
    d_model=64,
    n_head=8,
    d_head=16,
    max_len=128,
)
steps = 1500 if os.environ.get("TPA_FULL") == "1" else 250
held_out = list(lessons.validation_batches(batch_size=16, seq_len=64, max_batches=8))


# %%
@torch.no_grad()
def held_out_loss(model):
    return sum(train.loss_sum(model, *batch).item() for batch in held_out) / sum(
        t.numel() for _, t in held_out
    )


# %%
gqa = T6(sizes, attention=partial(MultiHeadAttention, n_kv_head=4))
train.fit(gqa, lessons, steps, lr=4e-3)
gqa_loss = held_out_loss(gqa)
for block in gqa.blocks:
    block.attention = convert.mha_to_tpa(block.attention)
assert abs(held_out_loss(gqa) - gqa_loss) < 1e-4
print(f"GQA, and the TPA that it became: held-out loss {gqa_loss:.2f} nats per token")

# %% [markdown]
# Now take the inputs $x_t$ of a layer and its keys $K_t$, a matrix of $h\times d_h$ for each token, and ask how well
# sums of $R$ outer products can do. Three answers:
#
# - **per-token SVD**: the best rank-$R$ matrix for each token on its own. No method with rank $R$ can beat it, but no
#   linear map of $x_t$ need produce its factors;
# - **fixed A**: one set of head factors for all tokens. The best is known in closed form: the leading eigenvectors of
#   $\sum_t K_t K_t^\top$ (`convert.fit_fixed`), and $B$ is then a linear map of $x_t$ by itself;
# - **contextual**: both factors linear in $x_t$, as TPA has them. With one fixed, the other is a linear regression, so
#   we alternate (`convert.fit_contextual`).

# %%
inputs = []
block = gqa.blocks[1]
hook = block.attention.register_forward_pre_hook(
    lambda _, args: inputs.append(args[0].flatten(0, 1))
)
with torch.no_grad():
    gqa(torch.cat([tokens for tokens, _ in held_out[:2]]))
    hook.remove()
    x = inputs[0].double()  # (N, d_model)
    K = convert.tpa_to_mha(block.attention).k_proj.weight.double()
    K = (x @ K.T).unflatten(-1, (8, 16))  # (N, h, d_h), not rotated

# %%
print("inputs", tuple(x.shape), " keys", tuple(K.shape))


# %% [markdown]
# Each function below returns the relative error of its best approximation of rank $R$.


# %%
def error(fitted, target):
    return ((fitted - target).norm() / target.norm()).item()


def fixed_error(y, R):
    a = convert.fit_fixed(y, R)
    return error(assemble(a.expand(len(y), 1, -1, -1), (a @ y / R)[:, None])[:, 0], y)


def contextual_error(x, y, R):
    W_a, W_b = convert.fit_contextual(x, y, R)
    return error(torch.einsum("rhm,rdl,nm,nl->nhd", W_a, W_b, x, x) / R, y)


def svd_error(y, R):
    U, S, V = torch.linalg.svd(y, full_matrices=False)
    return error((U[..., :R] * S[:, None, :R]) @ V[:, :R], y)


# %% tags=["hide-input"]
ranks = [1, 2, 3, 4]
errors = {
    "contextual, linear in x": [contextual_error(x, K, R) for R in ranks],
    "fixed A, closed form": [fixed_error(K, R) for R in ranks],
    "per-token SVD (bound)": [svd_error(K, R) for R in ranks],
}
numbers_per_rank = [
    8 + 16,
    16,
    8 + 16,
]  # cached for the keys: h + d_h, or d_h where A is fixed

fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True)
for (label, values), style, numbers in zip(
    errors.items(), ("o-", "s--", "^:"), numbers_per_rank
):
    axes[0].plot(ranks, values, style, label=label)
    axes[1].plot([numbers * R for R in ranks], values, style)
axes[0].set(
    xlabel="rank R",
    xticks=ranks,
    ylabel="relative error of the keys",
    ylim=(-0.05, 1.05),
)
axes[1].set(xlabel="cached numbers per token for the keys")
axes[0].set_title("At equal rank: little between them")
axes[1].set_title("At equal cache: constants win")
axes[0].legend()
looks.show(
    fig,
    "Error of the keys against rank and against cached numbers: at equal cache the constants are best.",
)
assert errors["fixed A, closed form"][3] < 1e-5 < errors["contextual, linear in x"][3]

# %% [markdown]
# At $R = 4$, its number of groups, fixed A is exact. Contextual factors are not, at any rank here, and what they gain
# at small ranks does not pay for the $h$ more numbers that each rank caches (right). At the lower ranks neither comes
# down to the SVD. Why do contextual factors, with so much more freedom, not do better?
#
# Look at signs. A key of the old model is a linear map: $K(-x) = -K(x)$, it is **odd**. A product of two linear maps is
# **even**: $(W_a(-x))\otimes(W_b(-x)) = (W_ax)\otimes(W_bx)$. An even function can follow an odd one only where the
# inputs lie to one side, so that some direction of $x$ is nearly constant and can stand in for a constant. Two
# experiments: take the one side away, by mirroring every other input and with it its key; and give a constant, a
# coordinate that is always 1. Then contextual TPA contains fixed A.

# %% claim="contextual-is-even"
mirror = torch.ones(len(x), 1, dtype=x.dtype)
mirror[::2] = -1
with_one = torch.cat((x, torch.ones_like(mirror)), dim=1)
for R in (2, 4):
    as_it_is, mirrored = (
        contextual_error(x, K, R),
        contextual_error(x * mirror, K * mirror[:, :, None], R),
    )
    given = contextual_error(with_one, K, R)
    print(
        f"R={R}: fixed A {fixed_error(K, R):.2f}; contextual {as_it_is:.2f}, "
        f"mirrored {mirrored:.2f}, with 1 {given:.2f}"
    )
    assert given < as_it_is < mirrored and given < fixed_error(K, R) + 1e-3

# %% [markdown]
# Mirroring changes nothing for a linear map, nor for fixed A, and takes most of their success from contextual factors:
# they had lived off the inputs' lying to one side. With a constant they are at least as good as fixed A. So what a
# trained linear key asks for is a constant. A TPA trained from scratch need not notice: its later layers learn to live
# with even keys. A model that was trained otherwise has no reason to.
#
# What remains for a model that you have is fixed A at lower rank. What does it cost in loss, and how much of that do a
# few steps of further training give back?

# %%
batches = [lessons.batch("train", step, 8, 64, seed=1)[0] for step in range(4)]
sample = torch.cat(batches)
cut, tuned = [], []
for R in (1, 2, 3):
    small = convert.reduce_rank(gqa, sample, rank_k=R, rank_v=R)
    cut.append(held_out_loss(small))
    tuned.append(held_out_loss(train.fit(small, lessons, 40, lr=1e-3)))
cut.append(gqa_loss)

# %% tags=["hide-input"]
fig, ax = plt.subplots()
size = [2 * 2 * R * 16 * 4 for R in ranks]  # layers · (keys, values) · R · d_h · bytes
ax.plot(size, cut, "o-", label="rank cut, closed form")
ax.plot(size[:3], tuned, "s--", label="and 40 steps of training")
ax.axhline(gqa_loss, color="0.4", lw=1)
ax.text(size[0], gqa_loss, "the GQA model", va="bottom")
ax.set(
    xlabel="cache (bytes per token, float32)",
    xticks=size,
    ylabel="loss on held-out text (nats per token)",
)
ax.set_title("A lower rank costs loss; a little training gives some back")
ax.legend()
looks.show(
    fig,
    "Held-out loss against cache bytes: a cut of the rank costs loss, and training gives some of it back.",
)
assert cut[0] > cut[3] and tuned[0] < cut[0]

# %% [markdown]
# **The honest finding.** Cutting a trained GQA's rank saves cache in proportion and costs loss, most at rank 1. Some
# training repairs part of it. This is what mean-pooling or SVD conversions of MHA to GQA do too; it is fixed-A TPA, not
# the contextual TPA of the paper, which has to be trained with its factors. (40 more steps would have helped the
# uncut model as well: it is far from converged. So the lower curve may not be read as "no loss".)
#
# ## Save, load, publish
#
# Any T6 of this package goes into a folder as `model.safetensors` and `config.json`, and comes back from it. A training
# run's checkpoints are such folders, and transformers opens them too. Reading executes nothing: the config names an
# attention from a fixed list, and tensors are only tensors. Before anything is built, the config is compared with the
# shapes that the file of weights lists.

# %%
with tempfile.TemporaryDirectory() as folder:
    convert.save_pretrained(small, folder)
    print(sorted(os.listdir(folder)))
    again = convert.from_pretrained(folder)
    assert torch.equal(again(sample[:1]), small(sample[:1]))
    if have_transformers:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(theirs(sample[:1]).logits, small(sample[:1]))
        print(type(theirs).__name__, "reads the same two files")

# %% [markdown]
# What survives such a round trip: weights bit for bit, their dtype, sizes, the kind of attention, the rotation of a
# converted LLaMA, and which weights are frozen. What does not: a class, a norm or a rotation of your own, or layers that
# differ among each other. Saving such a model is refused, since another one would come back.

# %%
odd = T6(sizes)
odd.blocks[1].attention.rope = odd.blocks[1].attention.rope._replace(base=500000.0)
try:
    convert.save_pretrained(odd, "never-made")
except ValueError as error:
    print(error)
assert not os.path.exists("never-made")

# %% [markdown]
# With a hub account, `convert.push_to_hub(model, "you/your-t6")` and `convert.from_pretrained("you/your-t6")` do the
# same over the network. And this converts a public LLaMA, where there is a network (any checkpoint of that
# architecture without biases will do):
#
# ```python
# llama = transformers.LlamaForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M", dtype=torch.float32)
# t6 = convert.llama_to_t6(llama, max_len=2048)
# ```
#
# Decoding with fixed A multiplies by the zeros of the group masks, so it takes $G$ times GQA's multiply–adds. It is a
# place to start from, not a faster LLaMA.
#
# ## Exercises
#
# ### 1 · The other way round (★★☆, 10 minutes)
#
# `weight` is a query or key projection of a LLaMA, `(heads · d_head, d_model)`. Return the weight with which *our* RoPE
# (feature $i$ paired with $i + d_h/2$) gives LLaMA's $q\cdot k$. There is more than one right answer.
#
# <details><summary>Hint 1</summary>
#
# LLaMA rotates with the opposite sense. What happens to a plane's rotation if one of its two features changes its
# sign?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Within every head, the features $i$ and $i + d_h/2$ need opposite signs; features of $q$ and $k$ are *rows* of the
# weight.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# `weight.unflatten(0, (-1, d_head))` has an axis for the heads and one for the features.
#
# </details>


# %% tags=["exercise"]
def to_our_rotation(weight, d_head):
    raise NotImplementedError


# %% tags=["solution"]
def to_our_rotation(weight, d_head):
    sign = torch.ones(d_head, 1, dtype=weight.dtype)
    sign[d_head // 2 :] = -1
    return (weight.unflatten(0, (-1, d_head)) * sign).flatten(0, 1)


# %%
checks.ex12_1(to_our_rotation)

# %% [markdown]
# ### 2 · Fold a gain (★☆☆, 5 minutes)
#
# LLaMA computes `W @ (gain * x)`. Return the matrix that does it without a gain.
#
# <details><summary>Hint 1</summary>
#
# $(W (g \odot x))_i = \sum_j W_{ij}\, g_j\, x_j$: which index does the gain share with $W$?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The gain multiplies *columns*; a vector broadcasts along the last axis.
#
# </details>


# %% tags=["exercise"]
def fold(weight, gain):
    raise NotImplementedError


# %% tags=["solution"]
def fold(weight, gain):
    return weight * gain


# %%
checks.ex12_2(fold)

# %% [markdown]
# ### 3 · The authors' layout (★☆☆, 10 minutes)
#
# `weight` is a head-factor projection of theirs, `(n_head · rank, d_model)`, whose output they read as
# `(n_head, rank)`. Return it with rows in our order, to be read as `(rank, n_head)`.
#
# <details><summary>Hint 1</summary>
#
# Row $i R + r$ of theirs is head $i$, rank $r$. Where does it stand in ours?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Split the rows into two axes, exchange these, and flatten again. A `view` alone moves nothing.
#
# </details>


# %% tags=["exercise"]
def rank_major(weight, n_head, rank):
    raise NotImplementedError


# %% tags=["solution"]
def rank_major(weight, n_head, rank):
    return weight.unflatten(0, (n_head, rank)).transpose(0, 1).flatten(0, 1)


# %%
checks.ex12_3(rank_major)

# %% [markdown]
# ### 4 · Which rank saves anything? (★★☆, 15 minutes)
#
# A GQA model has $h$ heads of width $d_h$ in $G$ groups. Return two whole numbers: the largest $R_K=R_V=R$ at which
# fixed-A TPA caches *less* than the model does, and the largest at which contextual TPA does. (0 if none.) Then think
# about what this says of models that are GQA already.
#
# <details><summary>Hint 1</summary>
#
# GQA caches $2Gd_h$ numbers, fixed A $2Rd_h$, contextual A $2R(h + d_h)$ per token and layer.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# *Less*, so the rank may not be met exactly: the largest whole $R$ with $R q < p$ is `(p - 1) // q`.
#
# </details>


# %% tags=["exercise"]
def largest_ranks(n_head, d_head, n_kv_head):
    raise NotImplementedError


# %% tags=["solution"]
def largest_ranks(n_head, d_head, n_kv_head):
    fixed = n_kv_head - 1  # 2 R d_h < 2 G d_h
    contextual = (n_kv_head * d_head - 1) // (
        n_head + d_head
    )  # 2 R (h + d_h) < 2 G d_h
    return fixed, contextual


# %%
checks.ex12_4(largest_ranks)

# %% [markdown]
# ## Summary
#
# - A LLaMA becomes a T6 with fixed-A TPA by mirrored weights, folded gains, its own eps and its own output layer; the
#   logits are equal, and float64 shows it once transformers' float32 islands are imitated.
# - `T6ForCausalLM` makes any T6 a transformers model, padded batches included. Factors also fit into transformers' own
#   cache, so `generate` works with TPA as `self_attn`.
# - What a file cannot describe or a T6 cannot honour is refused: a wrong model that loads is worse than none.
# - The authors' checkpoints differ in names and in the order of the head factors' rows.
# - Fixed A goes down in rank in closed form, at a price. Contextual factors, fitted afterwards, imitate a trained
#   linear key only as far as its inputs lie to one side, because products of linear maps are even. Train them instead.
#
# Next: [13 · Evaluate](13_evaluate.ipynb), what a benchmark number says and what it does not.
