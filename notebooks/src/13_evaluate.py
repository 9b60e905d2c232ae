# %% [markdown]
# # 13 · Evaluate: what a benchmark number says
#
# {badge}
#
# **You will be able to**
# - compute by hand what a benchmark computes: the log-likelihood of each ending, and the pick;
# - say why `acc` and `acc_norm` differ, and what each of them is biased towards;
# - put a chance level and a standard error beside an accuracy, and say how many questions a difference needs;
# - say what the averages in the paper's tables support, and what they do not;
# - evaluate a run of your own, offline or on the paper's nine tasks.
#
# **You need** [07](07_t6.ipynb), a T6 and its logits. [08](08_train_on_fineweb_edu.ipynb) tells where a run comes from.
#
# **Time** about 55 minutes to read and do; the code runs in at most 60 s on two CPU cores

# %% tags=["setup"]
# (filled in by notebooks/build.py)

# %%
import contextlib
import math
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tpa_minimal.course import checks, looks
from tpa_minimal.experiments import bench, evaluate, train
from tpa_minimal.files import read_json
from tpa_minimal.tpa import T6

looks.style()
FULL = device == "cuda" or os.environ.get("TPA_FULL") == "1"

# %% [markdown]
# ## 1 · A model to ask
#
# We need a model that knows something. A small T6 reads the built-in lessons for some seconds: short texts about
# invented people, places and things, which end in questions about what was just said. It has about a 700th of the weights of
# the paper's *small* model.

# %%
steps = 4000 if FULL else 300
settings = train.TrainConfig(
    out=Path(tempfile.mkdtemp()) / "run",
    data="lessons",
    tokens=1_000_000,
    steps=steps,
    batch_size=16,
    seq_len=64,
    lr=6e-3,
    eval_every=steps,
    changes=dict(n_layer=2, d_model=64, n_head=8, d_head=16, init="authors"),
)
with contextlib.redirect_stdout(None):
    result = train.train(settings, progress=False)
subject = evaluate.open_model(str(result.out))
model, tokenizer = subject.model, subject.run.tokenizer
print(
    f"{model.num_parameters():,} weights; "
    f"held-out loss {result.metrics[-1]['val_loss']:.2f} nats"
)

# %% [markdown]
# ## 2 · One question, by hand
#
# A multiple-choice benchmark does not ask the model to *choose*. A model of this size would not understand the request.
# It asks how probable each ending is as a continuation of the text, and counts the most likely one as the model's
# answer. Here is a question in the style of HellaSwag: how does the story go on?

# %%
context = "On Monday Milla left Tolary early. On the way Milla found"
endings = [
    " a golden hat. The road was long and dusty.",  # right
    " a.",
    " Monday early and is south of it.",
    " in the 12 times Milla.",
]


def log_likelihood_of(ending):
    head, tail = tokenizer.encode(context), tokenizer.encode(ending)
    with torch.no_grad():
        logits = model(torch.tensor([head + tail]))[0]  # (T, V)
    log_p = logits.log_softmax(-1)
    places = range(
        len(head) - 1, len(head) + len(tail) - 1
    )  # each token is predicted one place before it stands
    return [log_p[place, token].item() for place, token in zip(places, tail)]


# %%
for token, log_p in zip(tokenizer.encode(endings[0]), log_likelihood_of(endings[0])):
    print(
        f"{tokenizer.decode([token])!r:10} "
        f"p = {math.exp(log_p):6.1%}   log p = {log_p:6.2f}"
    )
print(f"sum = {sum(log_likelihood_of(endings[0])):.2f}")

# %% [markdown]
# That is all there is to it: by the chain rule the probability of the ending is the product of these, its
# log-likelihood their sum. Mind the index: the row of logits *at* a token is about the *next* one, so the ending's
# first token is predicted at the last position of the context. Off by one here, and a benchmark returns plausible nonsense.
#
# The harness of the paper does this for thousands of questions, and so does `evaluate.log_likelihoods`, in batches:

# %% claim="likelihood-ranking"
sums = [sum(log_likelihood_of(ending)) for ending in endings]
pairs = [(tokenizer.encode(context), tokenizer.encode(ending)) for ending in endings]
batched = [score for score, _ in evaluate.log_likelihoods(model, pairs)]
assert np.allclose(sums, batched, atol=1e-3)
for ending, score in zip(endings, sums):
    print(f"{score:8.2f}  {context.split('. ')[-1]}{ending}")

# %% [markdown]
# ### Exercise 1 · The log-likelihood of an ending (★★☆, 8 minutes)
# Write `log_likelihood(logits, tokens, n_context)`. `tokens` (T,) is a context of `n_context` tokens and an ending;
# `logits` (T, V) are the model's for all of them. Return the sum of log p of the ending's tokens, in nats. It can be
# done without a loop.
#
# <details><summary>Hint 1</summary>
#
# Which row of the logits is about token `n_context`? The one before it. And which row predicts the last token?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `logits[n_context - 1 : -1]` are the rows that predict the ending; `log_softmax(-1)` makes them log-probabilities, and
# `gather` takes one number from each row.
#
# </details>


# %% tags=["exercise"]
def log_likelihood(logits, tokens, n_context):
    raise NotImplementedError


# %% tags=["solution"]
def log_likelihood(logits, tokens, n_context):
    log_p = logits[n_context - 1 : -1].log_softmax(
        -1
    )  # the rows that predict the ending
    return log_p.gather(1, tokens[n_context:, None]).sum()


# %%
checks.ex13_1(log_likelihood)

# %% [markdown]
# ## 3 · Long endings lose
#
# Every further token multiplies by a number below 1. So the sum favours short endings, however silly. The harness
# therefore reports a second accuracy, `acc_norm`, that compares the log-likelihood *per character* (spaces inside and
# punctuation count). Per token would depend on the tokenizer, per byte on the script.

# %% tags=["hide-input"]
characters = [len(ending.strip()) for ending in endings]
per_character = [score / n for score, n in zip(sums, characters)]
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), sharey=True)
names = [ending.strip()[:22] + ("…" if len(ending) > 23 else "") for ending in endings]
for ax, scores, label in zip(
    axes, (sums, per_character), ("sum [nats]", "per character [nats]")
):
    best = int(np.argmax(scores))
    styles = [looks.COLOURS[0] if i == best else "0.5" for i in range(len(endings))]
    ax.barh(
        names,
        scores,
        color=styles,
        hatch=["//" if i == best else "" for i in range(len(endings))],
    )
    ax.set(xlabel=label)
    ax.invert_yaxis()
axes[0].invert_yaxis()
fig.suptitle(
    "The sum prefers two tokens of nothing; per character, the story wins",
    x=0.02,
    ha="left",
    fontsize=12,
)
picked = [names[int(np.argmax(scores))] for scores in (sums, per_character)]
looks.show(
    fig,
    f"Bars of four endings: by the sum, '{picked[0]}' is highest, per character '{picked[1]}'.",
)

# %% [markdown]
# Blue is the pick. The story was right and loses by the sum. Neither rule is neutral, though. Take a model that knows
# *nothing* and gives each of $n_\text{vocab}$ tokens the same probability. An ending of $n$ tokens then has the log-likelihood
# $-n \ln n_\text{vocab}$, so by the sum the shortest ending wins, and per character the one with the most characters per token. Where right answers tend to be
# longer than wrong ones, `acc` puts such a model *below* the chance level, and `acc_norm` may put it above.
#
# Rule of thumb: `acc_norm` where endings are sentences of unequal length (HellaSwag, ARC, PIQA), `acc` where all are of
# one length (BoolQ's yes and no, MMLU's letters A to D; WinoGrande compares one and the same ending after two contexts).
# And always name which of the two a number is.
#
# ### Exercise 2 · Two picks (★☆☆, 5 minutes)
# Write `picks(log_likelihoods, endings)`: the place in the list (from 0) of the pick by `acc`, and of the pick by
# `acc_norm`. Each ending begins with a space, which is none of its characters.
#
# <details><summary>Hint 1</summary>
#
# `scores.index(max(scores))` is the place of the highest score.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# For the second pick, divide each log-likelihood by `len(ending.strip())` first.
#
# </details>


# %% tags=["exercise"]
def picks(log_likelihoods, endings):
    raise NotImplementedError


# %% tags=["solution"]
def picks(log_likelihoods, endings):
    per_character = [
        score / len(ending.strip()) for score, ending in zip(log_likelihoods, endings)
    ]
    return tuple(
        scores.index(max(scores)) for scores in (log_likelihoods, per_character)
    )


# %%
checks.ex13_2(picks)

# %% [markdown]
# ## 4 · Chance, and the standard error
#
# Guessing among four answers is right 25 times in 100. *About* 25 times: with n questions, each right with probability
# p, the share of right answers has the standard deviation
#
# $$\mathrm{SE} = \sqrt{\frac{p\,(1-p)}{n}}.$$
#
# Let a thousand guessers answer 400 questions each:

# %%
draw = np.random.default_rng(0)
n, p = 400, 0.25
scores = (draw.random((1000, n)) < p).mean(axis=1)
print(
    f"from {scores.min():.1%} to {scores.max():.1%}; "
    f"standard deviation {scores.std():.2%}"
)
print(f"the formula says {math.sqrt(p * (1 - p) / n):.2%}")
assert abs(scores.std() / math.sqrt(p * (1 - p) / n) - 1) < 0.1

# %% [markdown]
# The best of a thousand guessers looks well above chance. An accuracy without its chance level *and* its standard error
# says little.
#
# Now the question that the paper's small models pose. Suppose that one model truly answers 46.2 % of all such questions
# and another 46.3 %. How often does the better one score higher?


# %%
def share_won(n, p=0.462, q=0.463):
    """How often the model with q beats the one with p, over n questions each."""
    error = math.sqrt((p * (1 - p) + q * (1 - q)) / n)
    return 0.5 * (1 + math.erf((q - p) / error / math.sqrt(2)))


# %% tags=["hide-input"]
n = np.logspace(2, 7, 200)
fig, ax = plt.subplots(figsize=(7, 3))
ax.plot(n, [share_won(x) for x in n])
ax.axhline(0.5, color="black", linestyle=":", linewidth=1.2)
ax.text(1e7, 0.505, "a coin", ha="right", va="bottom")
for x in (1_000, 35_507, 1_000_000):
    ax.plot(x, share_won(x), "o", color=looks.COLOURS[1])
    ax.annotate(
        f"{x:,}: {share_won(x):.0%}",
        (x, share_won(x)),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
    )
ax.set(
    xscale="log",
    xlabel="questions",
    ylabel="the better model is ahead",
    ylim=(0.45, 1.02),
)
ax.set_title("Asked all nine tasks, 46.3 % is ahead of 46.2 % six times in ten")
looks.show(
    fig,
    "How often 46.3 % is ahead of 46.2 %: 52 % of times with 1,000 questions, 92 % with a million.",
)

# %% [markdown]
# The middle dot is at the number of questions that all nine tasks of the paper have together (§5).
#
# ### Exercise 3 · How many questions? (★★☆, 8 minutes)
# Write `questions_needed(p, q)`: the smallest n at which the difference of two accuracies p and q, each measured on n
# questions of its own, reaches 1.96 of its standard errors. The variances of independent numbers add.
#
# <details><summary>Hint 1</summary>
#
# One answer has the variance $p\,(1 - p)$, an accuracy over $n$ questions has it divided by $n$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Solve $|p - q| = 1.96\,\sqrt{(p\,(1 - p) + q\,(1 - q))/n}$ for $n$, and round up.
#
# </details>


# %% tags=["exercise"]
def questions_needed(p, q):
    raise NotImplementedError


# %% tags=["solution"]
def questions_needed(p, q):
    variance = p * (1 - p) + q * (1 - q)  # of one question's difference
    return math.ceil(1.96**2 * variance / (p - q) ** 2)


# %%
checks.ex13_3(questions_needed)

# %% [markdown]
# For 46.2 and 46.3 % the answer is 1.9 million. Two models that answer the *same* questions need fewer, since what is
# easy for one is mostly easy for the other, and only the questions on which they differ count. To use that one needs
# the answers question by question; from two accuracies alone it cannot be known.
#
# ## 5 · What the paper's tables support
#
# The paper reports the average accuracy over nine tasks. These are the questions that the harness asks in each:

# %%
questions = dict(
    arc_easy=2376, arc_challenge=1172, boolq=3270, hellaswag=10042, openbookqa=500,
    piqa=1838, winogrande=1267, mmlu=14042, sciq=1000,
)  # fmt: skip
assert set(questions) == set(evaluate.PAPER_TASKS)
# p (1 - p) is a quarter at most, and each task counts a ninth, whatever its length.
error = 100 * math.sqrt(sum(0.25 / n for n in questions.values())) / 9
of_difference = math.sqrt(2) * error
print(
    f"{sum(questions.values()):,} questions; "
    f"standard error of an average at most {error:.2f} points,"
)
print(f"of the difference of two at most {of_difference:.2f}")
print(
    f"as if {0.25 / (error / 100) ** 2:,.0f} questions had been asked; "
    f"46.2 and 46.3 need 1.9 million"
)

# %% [markdown]
# The small tasks spoil it: OpenBookQA's 500 questions weigh as much as MMLU's 14,042. Now the averages, with such an
# error on each.

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7.4, 3.6))
rows = list(evaluate.PAPER_AVERAGES)
for k, name in enumerate(evaluate.PAPER_MECHANISMS):
    x = np.arange(len(rows)) + 0.12 * (k - 2.5)
    y = [evaluate.PAPER_AVERAGES[row][k] for row in rows]
    look = looks.of(name)
    ax.errorbar(
        x,
        y,
        yerr=error,
        color=look.colour,
        marker=look.marker,
        linestyle="",
        linewidth=1,
        label=name.upper(),
    )
ax.set_xticks(range(len(rows)), [f"{size}\n{shots}-shot" for size, shots in rows])
ax.set(ylabel="average of nine tasks [%]")
ax.legend(ncols=3, fontsize=8, loc="lower right")
ax.set_title("Within a size the mechanisms mostly lie inside each other's errors")
looks.show(
    fig,
    "The paper's averages with error bars of one standard error; within a size most of them overlap.",
)

# %% claim="paper-averages"
pairs = beyond = 0
for (size, shots), averages in evaluate.PAPER_AVERAGES.items():
    row = dict(zip(evaluate.PAPER_MECHANISMS, averages))
    best = max(row, key=row.get)
    gaps = [
        abs(a - b) / of_difference for i, a in enumerate(averages) for b in averages[:i]
    ]
    pairs, beyond = pairs + len(gaps), beyond + sum(gap > 1.96 for gap in gaps)
    ahead = (row["tpa"] - row["mha"]) / of_difference
    print(
        f"{size:6} {shots}-shot: best {best:11} {row[best]:.2f}, TPA {row['tpa']:.2f}, "
        f"TPA - MHA {row['tpa'] - row['mha']:+.2f}: {ahead:+.1f} standard errors"
    )
print(f"{beyond} of {pairs} differences are beyond 1.96 standard errors")

# %% [markdown]
# Read it as one reads a measurement:
#
# - **Supported:** at equal weights TPA is about as good as MHA and MLA. In no row is it behind the best by more than
#   0.42 points. At the small size with two shots MQA is clearly behind.
# - **Not supported:** that TPA is *better* than MHA or MLA at the small size (46.21, 46.19, 46.20), or that it is
#   worse with two shots (47.93 against MHA's 48.11). At the large size KV-only (53.52) and MLA (53.32) are ahead of TPA
#   (53.10), by less than an error. Against MHA, TPA's lead is beyond 1.96 errors in one row, medium zero-shot (+1.30).
# - **Beyond this error:** each number is one training run. Another seed would move it too, by an amount that no number
#   of questions reveals; [notebook 08](08_train_on_fineweb_edu.ipynb) shows how far seeds lie apart in small models.
#   And of 90 pairs, four or five would be beyond 1.96 errors by luck alone. Twelve are: five are MQA behind at the small
#   size with two shots, five TPA ahead at the medium size, two KV-only ahead at the large one. The pairs are not
#   independent.
#
# The case for TPA therefore rests on what is *equal*: the same quality from a cache that is several times smaller than
# MHA's ([notebook 09](09_memory_savings.ipynb) says against which baseline).
#
# ### Exercise 4 · Supported or not? (★★☆, 6 minutes)
# Answer `True` or `False`, taking 0.61 points for the standard error of a difference.
#
# - `a`: zero-shot at the small size, TPA is better than MHA and MLA.
# - `b`: with two shots at the small size, MQA is worse than TPA.
# - `c`: with two shots at the small size, MHA is better than TPA.
# - `d`: at the large size, TPA has the highest average of the six.
# - `e`: in no row is TPA behind the best by more than one standard error.
# - `f`: if the models were trained again from other seeds, the averages would stay within such an error.
#
# <details><summary>Hint 1</summary>
#
# Find the two numbers of each statement in the figure or in the cell above, and divide their difference by 0.61. About
# two standard errors or more support a statement.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# What was drawn at random in this error: the questions, or the training run?
#
# </details>


# %% tags=["exercise"]
def supported():
    raise NotImplementedError  # return dict(a=..., b=..., c=..., d=..., e=..., f=...)


# %% tags=["solution"]
def supported():
    return dict(a=False, b=True, c=False, d=False, e=True, f=False)


# %%
checks.ex13_4(supported)

# %% [markdown]
# ## 6 · Evaluate a run of your own
#
# A small model scores what a guesser scores on ARC or MMLU, whatever it has learned. So `evaluate` has questions from
# the lessons, about names and numbers that no training lesson contains: *recall* of what was said about somebody,
# *spelling* an invented name again, and *counting* on in a list. And `heldout`: loss, perplexity ($e^\text{loss}$) and bits
# per byte ($\text{loss} \cdot \text{tokens} / (\ln 2 \cdot \text{bytes})$, which compares across tokenizers) on the run's own
# validation text. Neither needs a network.

# %%
for task in evaluate.LESSONS:
    question = evaluate.lesson_questions(task, 1)[0]
    print(f"[{task}] {question.context}")
    print("   ", question.choices, "right:", question.answer, "\n")

# %%
torch.manual_seed(0)
untrained = subject._replace(name="untrained", model=T6(model.config))
reports = {}
for who in (untrained, subject):
    with contextlib.redirect_stderr(None):
        reports[who.name] = evaluate.evaluate(who, "heldout,lessons", limit=200)
before, after = reports.values()
print(evaluate.table(after).split("\n", 2)[2])

# %% [markdown]
# The loss has fallen a long way, and no kind of answer is clearly above chance. Where one lies *below* it by several
# errors, that is no contradiction: this model knows by now which names and numbers are frequent, and prefers them,
# right or wrong. Such preferences are the same in all questions, so the errors, which take questions for independent,
# are too small for it. A model first learns which words there are and which follow which, and only much later to look
# things up in the text.
#
# Longer training does move the answers. The file `results/evaluate_tiny.json` holds two runs of the preset `tiny`, with
# 1.2 million weights: 300 steps of 2,048 tokens, and one with batches of 4,096 tokens that was stopped at step 918.

# %%
longer = read_json(bench.RESULTS / "evaluate_tiny.json")
for report in longer:
    print(evaluate.table(report), "\n")

# %% tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.4))
found = [report["results"] for report in (before, after, *longer)]
losses = [results["heldout"]["0"]["loss,none"] for results in found]
for task, style in zip(evaluate.LESSONS, ("o-", "s--", "^:")):
    mine = [results[task]["0"] for results in found]
    values, errors = (
        [100 * m[key] for m in mine] for key in ("acc,none", "acc_stderr,none")
    )
    ax.errorbar(
        losses, values, yerr=errors, fmt=style, label=task.removeprefix("lessons_")
    )
ax.axhline(25, color="black", linestyle=":", linewidth=1.2)
ax.text(1.01, 25, "chance", va="center", transform=ax.get_yaxis_transform())
ax.set(
    xlabel="held-out loss [nats per token]",
    ylabel="acc [%], one standard error",
    ylim=(0, 104),
)
ax.invert_xaxis()
ax.legend(loc="upper left")
ax.set_title("From left to right: the loss falls first, the answers come late")
looks.show(
    fig,
    "Accuracy against held-out loss: far from answering until a loss of 1.5, then spelling, counting and recall rise.",
)
assert losses[1] < 0.5 * losses[0]

# %% [markdown]
# Spelling comes first, counting next; recall, which has to find the right *kind* of fact, is on its way. Loss is the
# finer instrument: each *token* counts, not each question. What a model can do with it, only questions tell.
#
# From the command line, for a run, a converted or a pulled model:
#
#     python -m tpa_minimal evaluate RUN
#     python -m tpa_minimal evaluate RUN --tasks paper --num-fewshot 0 2
#
# The second asks the paper's nine tasks through EleutherAI's lm-evaluation-harness (`pip install "tpa-minimal[evaluate]"`;
# needs a network the first time), zero-shot and with two solved examples before each question, and prints the table
# with its standard errors beside the paper's averages. Log-likelihoods equal those of the harness's own model class.
#
# ## Summary
#
# - A multiple-choice score ranks log-likelihoods; the model never sees the other choices.
# - Sums favour short endings, per character favours long tokens: name the metric.
# - An accuracy needs its chance level and its standard error; to tell 46.2 from 46.3 takes 1.9 million questions.
# - An average over nine tasks has a standard error of up to 0.43 points, and a difference one of up to 0.61. The
#   paper's tables show TPA level with MHA and MLA; of these twelve differences three pass 1.96 errors, all at the medium
#   size and all in TPA's favour. Seeds come on top.
# - For small models, measure held-out loss first and questions that they can answer second.
#
# Next: [14 · Serving with a factor cache](14_serving.ipynb), what stands between such a model and a server.
