"""How good is a model? Held-out loss, the lessons' own questions, and the benchmarks of the paper.

    python -m tpa_minimal evaluate RUN                                     offline: `heldout` and `lessons`
    python -m tpa_minimal evaluate RUN --tasks paper --num-fewshot 0 2     the paper's nine tasks
    python -m tpa_minimal evaluate RUN --tasks arc_easy,boolq --limit 100  any tasks of lm-evaluation-harness by name

RUN is the folder of a training run, or a folder or hub repository that `save_pretrained` or `push_to_hub` wrote. All
questions are multiple choice: the answer that the model finds most likely counts (`acc`), or the most likely per
letter (`acc_norm`). Benchmarks are EleutherAI's lm-evaluation-harness with its own prompts and metrics; only the
log-likelihoods are computed here, and equal those of its `hf` model.

Exit status: 0 done; 2 a wrong value or something unavailable; 130 after Ctrl-C, with finished tasks saved.
"""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import logging
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from tpa_minimal import huggingface
from tpa_minimal.experiments import data, lessons, sources
from tpa_minimal.experiments.checkpoint import SettingError, latest_checkpoint
from tpa_minimal.experiments.models import Loaded, load_checkpoint
from tpa_minimal.experiments.settings import find_device
from tpa_minimal.experiments.sources import short
from tpa_minimal.files import FileError, check_folder, read_json, write_json, write_whole
from tpa_minimal.tpa import T6

PAPER_TASKS = (
    "arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "mmlu", "sciq",
)  # fmt: skip
# The averages over these nine that the paper reports (Sec. 6), in percent, by size and shots.
PAPER_MECHANISMS = ("mha", "mqa", "gqa", "mla", "tpa-kv-only", "tpa")
PAPER_AVERAGES = {
    ("small", 0): (46.19, 45.14, 45.04, 46.20, 45.94, 46.21),
    ("small", 2): (48.11, 45.21, 47.16, 47.63, 47.85, 47.93),
    ("medium", 0): (50.11, 50.44, 50.35, 50.13, 50.04, 51.41),
    ("medium", 2): (52.34, 51.77, 52.51, 51.78, 52.69, 53.12),
    ("large", 0): (52.52, 52.13, 52.30, 53.32, 53.52, 53.10),
    ("xl", 0): (54.49, 54.48, 54.33, 54.08, 54.57, 55.01),
}
QUESTIONS = 400  # of each kind of lesson, if no limit is given: a standard error of 2.5 points at most
HELD_OUT_TOKENS = 2**20  # at most so many are scored, if no limit is given


class EvaluationError(ValueError):
    """What cannot be evaluated: the message is one line that names the value and the remedy."""


# ---------------------------------------------------------------------------------------------- log-likelihoods


@torch.inference_mode()
def log_likelihoods(
    model: T6, pairs: Sequence[tuple[list[int], list[int]]], *, progress: bool = False
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats of each pair of token lists, and whether greedy decoding would write it.

    Inputs longer than the model's max_len lose tokens from the left, as in lm-evaluation-harness. Batches are as
    large as memory allows. Rows are padded on the right, where causal attention does not look. Raises
    EvaluationError for an empty context or continuation, a continuation longer than max_len, or an unknown token.
    """
    max_len, rows = model.config.max_len, {}
    for number, (context, continuation) in enumerate(pairs):
        _check_pair(model, context, continuation)
        tokens = (context + continuation)[-(max_len + 1) :]
        # The four letters that answer one question share their input.
        rows.setdefault(tuple(tokens[:-1]), []).append((number, continuation))
    waiting = sorted(rows, key=len, reverse=True)
    most, results = _batch_tokens(model), [(0.0, False)] * len(pairs)
    with tqdm(total=len(pairs), desc="log-likelihoods", disable=not progress, mininterval=0.5) as bar:
        while waiting:
            batch = waiting[: max(1, most // len(waiting[0]))]
            wanted = [(row, *pair) for row, tokens in enumerate(batch) for pair in rows[tokens]]
            try:
                scores = _score(model, batch, [(row, continuation) for row, _, continuation in wanted])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                most = len(batch) * len(batch[0]) // 2
                continue
            for (_, number, _), score in zip(wanted, scores):
                results[number] = score
            waiting = waiting[len(batch) :]
            bar.update(len(wanted))
    return results


def _check_pair(model: T6, context: list[int], continuation: list[int]) -> None:
    c = model.config
    if not context or not continuation:
        raise EvaluationError("a question or an answer without a single token: leave out the task that has it")
    if len(continuation) > c.max_len:
        raise EvaluationError(
            f"an answer of {len(continuation)} tokens is longer than the model's context of max_len={c.max_len}; "
            f"leave out that task, or evaluate a model with a longer context"
        )
    if max(max(context), max(continuation)) >= c.vocab_size:
        raise EvaluationError(
            f"the tokenizer writes token {max(max(context), max(continuation))} and the model knows "
            f"{c.vocab_size} tokens; name the model's own tokenizer with --tokenizer"
        )


def _batch_tokens(model: T6) -> int:
    """How many tokens a batch may have: a quarter of the free memory, and no more than makes it faster."""
    c, weight = model.config, model.embedding.weight
    # Live at once, roughly: the residual stream and its norms, q, k, v and their output, SwiGLU's three, the logits.
    numbers = 8 * c.d_model + 5 * c.n_head * c.d_head + 3 * c.d_ff + 3 * c.vocab_size
    if weight.device.type == "cuda":
        free, fast = torch.cuda.mem_get_info(weight.device)[0], 2**17
    else:
        import psutil

        free, fast = psutil.virtual_memory().available, 2**13
    return min(fast, max(1, free // 4 // (4 * numbers)))


def _score(model: T6, inputs: list[tuple[int, ...]], wanted: list[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
    """Scores of each (row of `inputs`, continuation that ends one token after the row's end)."""
    device = model.embedding.weight.device
    tokens = torch.zeros(len(inputs), max(map(len, inputs)), dtype=torch.long)
    for row, some in zip(tokens, inputs):
        row[: len(some)] = torch.tensor(some)
    rows = torch.tensor([row for row, continuation in wanted for _ in continuation])
    places = torch.cat([torch.arange(len(inputs[row]) - len(tail), len(inputs[row])) for row, tail in wanted])
    targets = torch.tensor([token for _, continuation in wanted for token in continuation], device=device)
    hidden = model.hidden(tokens.to(device))  # (B, T, d_model)
    logits = model.logits(hidden[rows.to(device), places.to(device)])  # (N, vocab_size)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = log_p.gather(1, targets[:, None])[:, 0].double().cpu()  # (N,)
    greedy = (log_p.argmax(-1) == targets).cpu()
    lengths = [len(continuation) for _, continuation in wanted]
    return [(c.sum().item(), bool(g.all())) for c, g in zip(chosen.split(lengths), greedy.split(lengths))]


# ------------------------------------------------------------------------------------------- models and tokenizers


class Tokenizer(NamedTuple):
    """What scoring needs of a tokenizer, tiktoken's or transformers'."""

    name: str
    encode: Callable[[str, bool | None], list[int]]  # text, and whether special tokens are added: None as by default
    end: int  # the token that ends a document
    first: int  # what stands for an empty context

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows it, encoded as one text; white space goes to what follows."""
        whole, context = context + continuation, context.rstrip()
        head = self.encode(context, None)
        return head, self.encode(whole, None)[len(head) :]


def of_tiktoken(encoding) -> Tokenizer:
    """A `tiktoken.Encoding` for scoring; it adds no special tokens."""
    return Tokenizer(
        encoding.name, lambda text, _: encoding.encode_ordinary(text), encoding.eot_token, encoding.eot_token
    )


def of_transformers(tokenizer) -> Tokenizer:
    """A tokenizer of transformers', used as lm-evaluation-harness does: a BOS where it adds one, and never two."""
    end = tokenizer.eos_token_id
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise EvaluationError(
            f"--tokenizer {tokenizer.name_or_path}: has no BOS and no EOS token; set its eos_token and save it again"
        )
    opening = tokenizer.decode(first)

    def encode(text: str, special: bool | None) -> list[int]:
        special = False if special is None and text.startswith(opening) else special
        return tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))

    return Tokenizer(tokenizer.name_or_path, encode, first if end is None else end, first)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "gpt2" or "lessons", or that of a folder or hub repository, by transformers.

    Raises EvaluationError if it is unavailable.
    """
    if name in data.TOKENIZERS:
        return of_tiktoken(data.load_tokenizer(name))
    if importlib.util.find_spec("transformers") is None:
        raise EvaluationError(f"--tokenizer {name}: transformers is not installed; pip install transformers")
    from transformers import AutoTokenizer

    try:
        return of_transformers(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, EvaluationError):
            raise
        remedy = f"name {', '.join(data.TOKENIZERS)}, or a folder or hub repository with a tokenizer of transformers"
        raise EvaluationError(f"--tokenizer {name}: cannot be loaded ({short(error)}); {remedy}") from error


class Subject(NamedTuple):
    """A model to be evaluated, its tokenizer, and the training run that it is of, if any."""

    name: str
    model: T6
    tokenizer: Tokenizer
    run: Loaded | None = None
    checkpoint: Path | None = None


def open_model(name: str, *, tokenizer: str | None = None, device: str | torch.device = "cpu") -> Subject:
    """The model of a run's last checkpoint, or of a folder or hub repository, with a tokenizer.

    tokenizer: by default the run's own, or that in the model's folder or repository. Raises EvaluationError or
    SettingError where there is none or it cannot be read.
    """
    folder = Path(name)
    checkpoint = folder if (folder / "state.json").exists() else latest_checkpoint(folder)
    if checkpoint:
        run = load_checkpoint(checkpoint, device)
        return Subject(name, run.model.eval(), load_tokenizer(tokenizer or run.tokenizer.name), run, checkpoint)
    try:
        model = huggingface.from_pretrained(name, device=device)
    except Exception as error:  # a hub fails in the ways of whichever HTTP library is beneath
        raise EvaluationError(
            f"{name}: is no run and no model that can be read ({short(error)}); name the folder of a run, or a "
            "folder or hub repository that save_pretrained or push_to_hub wrote"
        ) from error
    held = [file for file in ("tokenizer.json", "tokenizer_config.json") if (folder / file).exists()]
    if tokenizer is None and folder.is_dir() and not held:
        raise EvaluationError(f"{name}: holds a model and no tokenizer; name the model's own with --tokenizer")
    return Subject(name, model, load_tokenizer(tokenizer or name))


# -------------------------------------------------------------------------------------------------- held-out text


def held_out(subject: Subject, limit: int | None = None, progress: bool = False) -> dict:
    """Loss (nats per token), perplexity and bits per byte of a run on its own validation split.

    The text is cut into windows as long as those that the run was trained on, side by side, each scored from its
    second token on; standard errors are over the windows, `limit` at most. Returns a dict like the harness's. Raises
    EvaluationError for a model that is no run or a run whose data has changed, and data.DataError.
    """
    _require_run(subject)
    settings, encoding = subject.run.settings, subject.run.tokenizer
    with contextlib.redirect_stdout(sys.stderr):
        text = data.prepare(settings.data, settings.tokens, tokenizer=encoding.name, progress=progress)
    if text.meta["sha256"] != read_json(subject.checkpoint / "state.json")["sha256"]:
        raise EvaluationError(
            f"{subject.name}: its data {settings.data} has other tokens now than when it was trained, so what was held "
            "out is unknown; bring back the same documents, or choose other --tasks"
        )
    T, n = settings.seq_len, limit or max(1, HELD_OUT_TOKENS // settings.seq_len)
    batches = text.validation_batches(batch_size=64, seq_len=T, max_batches=math.ceil(n / 64))
    windows = [(x[:1], y) for xs, ys in batches for x, y in zip(xs.tolist(), ys.tolist())][:n]
    nats = [-score / T for score, _ in log_likelihoods(subject.model, windows, progress=progress)]  # per token
    letters = sum(len(encoding.decode_bytes([t for t in y if t != encoding.eot_token])) for _, y in windows)
    loss, per_byte = statistics.fmean(nats), len(windows) * T / letters / math.log(2)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    # Beside each value its derivative by the loss, which turns the loss's standard error into its own.
    result = {"alias": "heldout", "sample_len": len(windows), **_metric("loss", loss, nats)}
    result |= _metric("perplexity", perplexity, nats, perplexity)
    return result | _metric("bits_per_byte", loss * per_byte, nats, per_byte)


def _require_run(subject: Subject) -> None:
    if subject.run is None:
        raise EvaluationError(
            f"{subject.name}: heldout needs a training run, whose validation split it reads; choose other --tasks"
        )


def _metric(name: str, value: float, samples: Sequence[float], scale: float = 1) -> dict:
    """A value and its standard error, that of the mean of `scale` times the samples; for a single one "N/A".

    The names are the harness's.
    """
    error = scale * statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else "N/A"
    return {f"{name},none": value, f"{name}_stderr,none": error}


# ------------------------------------------------------------------------------------------- the lessons' questions


class Question(NamedTuple):
    """A text, how it may go on, and which of these continuations is right."""

    context: str
    choices: list[str]
    answer: int


def _recall(draw: lessons.Draw) -> Question:
    """What was said of a person: the other choices name another job, animal, food, day or place."""
    context, _, asked = lessons.profile(draw).partition("\nAnswer:")
    right = asked.split("\n")[0]  # " Graivis works as a baker."
    where = [right.partition(" in ")[2][:-1], *draw.names("place", 4)]
    kinds = (lessons.JOBS, lessons.ANIMALS, lessons.FOODS, lessons.DAYS, where)
    said, kind = next((value, kind) for kind in kinds for value in kind if right.endswith(f" {value}."))
    others = draw.some([value for value in kind if value != said], 3)
    choices = draw.some([right, *(right.replace(f" {said}.", f" {other}.") for other in others)], 4)
    return Question(f"{context}\nAnswer:", choices, choices.index(right))


def _spelling(draw: lessons.Draw) -> Question:
    """An invented name, written out again: the other choices differ from it in one or both of two of its parts."""
    kinds = (lessons.ONSETS, lessons.NUCLEI, lessons.MEDIALS, lessons.ENDINGS["person"])
    parts = (0, 0, 0, 0)
    while not lessons.is_held_out(*parts):
        parts = tuple(draw.below(len(kind)) for kind in kinds)
    others = [(part + 1 + draw.below(len(kind) - 1)) % len(kind) for part, kind in zip(parts, kinds)]
    first, second = draw.some(range(4), 2)
    # All four combinations of two parts: were each other choice one part off, whoever goes by the sound of parts alone
    # would prefer some choice to the right one in seven cases of eight.
    names = [
        lessons.name("person", tuple(others[i] if i in changed else parts[i] for i in range(4)))
        for changed in ((), (first,), (second,), (first, second))
    ]
    told = names[0], draw.one(lessons.COLOURS), draw.one(lessons.OBJECTS)
    context = f"{lessons.keepsake(*told)}\nQuestion: {lessons.keepsake_question(*told)[0]}\nAnswer:"
    choices = draw.some([f" {name} has" for name in names], 4)
    return Question(context, choices, choices.index(f" {names[0]} has"))


def _counting(draw: lessons.Draw) -> Question:
    """The number that comes after another in a list: the other choices are the three before it."""
    context, _, right = lessons.counting(draw).partition("\nAnswer:")
    listed = context.partition(": ")[2].partition(".")[0].split(", ")
    choices = draw.some([f" {number}." for number in listed[-4:]], 4)
    return Question(f"{context}\nAnswer:", choices, choices.index(right))


LESSONS = {"lessons_recall": _recall, "lessons_spelling": _spelling, "lessons_counting": _counting}


def lesson_questions(task: str, n: int = QUESTIONS, seed: int = 0) -> list[Question]:
    """The first `n` questions of a kind of LESSONS, about names and numbers that no training lesson has."""
    draw = lessons.Draw(seed, held_out=True)
    return [LESSONS[task](draw) for _ in range(n)]


def answer(subject: Subject, questions: Sequence[Question], progress: bool = False) -> dict:
    """`acc`, `acc_norm` (log-likelihood per letter) and their standard errors, in a dict like the harness's."""
    pairs = [subject.tokenizer.pair(q.context, choice) for q in questions for choice in q.choices]
    scores = iter(log_likelihoods(subject.model, pairs, progress=progress))
    right = {"acc": [], "acc_norm": []}
    for question in questions:
        nats = [next(scores)[0] for _ in question.choices]
        per_letter = [score / len(choice.strip()) for score, choice in zip(nats, question.choices)]
        for name, values in (("acc", nats), ("acc_norm", per_letter)):
            right[name].append(float(values.index(max(values)) == question.answer))
    acc, acc_norm = right.values()
    return _metric("acc", statistics.fmean(acc), acc) | _metric("acc_norm", statistics.fmean(acc_norm), acc_norm)


# ------------------------------------------------------------------------------------------------- the harness


@functools.cache
def _task_manager():
    """The harness's index of its tasks, which takes seconds to make. Raises EvaluationError without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "--tasks: lm-evaluation-harness is not installed; pip install 'tpa-minimal[evaluate]', or choose "
            "heldout,lessons, which need nothing"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has a warning for each of MMLU's 57 subjects
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_tasks(name: str) -> None:
    """Raise EvaluationError unless the harness's tasks under a name, with their questions, can be evaluated."""
    known = _task_manager().all_tasks
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *LESSONS], n=3)
        hint = f"; similar are {', '.join(near)}" if near else ""
        raise EvaluationError(f"--tasks {name}: does not exist{hint}; `lm-eval ls tasks` lists those of the harness")
    try:
        with _bounded_hub():
            tasks = _task_manager().load([name])["tasks"]
    except Exception as error:  # what a hub raises depends on the HTTP library beneath
        raise EvaluationError(
            f"--tasks {name}: its questions cannot be loaded ({short(error)}); connect to the network once, set "
            "HF_ENDPOINT to a mirror that has them, or choose heldout,lessons, which need none"
        ) from error
    for each, task in tasks.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "loglikelihood_rolling"):
            raise EvaluationError(
                f"--tasks {name}: {each} has the model write text ({task.OUTPUT_TYPE}), and only log-likelihoods are "
                "computed here; leave it out"
            )


@contextlib.contextmanager
def _bounded_hub() -> Iterator[None]:
    """Where the hub does not answer within seconds, only what was downloaded before is used, at once."""
    import datasets
    import huggingface_hub.constants as hub
    import requests

    before, shown = (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE), datasets.is_progress_bar_enabled()
    try:
        sources.within(5, lambda: requests.head(hub.ENDPOINT, timeout=5))
        offline = False
    except (TimeoutError, requests.RequestException):
        offline = True
    try:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (offline or was for was in before)
        datasets.disable_progress_bars()  # two for each of MMLU's 57 subjects
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        if shown:
            datasets.enable_progress_bars()


def harness_model(subject: Subject, progress: bool = False):
    """The model as an `lm_eval.api.model.TemplateLM`, for `lm_eval.simple_evaluate(model=...)`.

    It counts what it is asked in `asked`, log-likelihoods by (task, question), and inputs cut to max_len in `cut`.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model, tokenizer = subject.model, subject.tokenizer

    class Harness(TemplateLM):
        asked, cut = Counter(), 0
        eot_token_id, prefix_token_id = tokenizer.end, tokenizer.first

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode(string, add_special_tokens)

        def loglikelihood(self, requests, disable_tqdm=False):
            self.asked.update((request.task_name, request.doc_id) for request in requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
            pairs = [(context, continuation) for _, context, continuation in requests]
            self.cut += sum(len(a) + len(b) > model.config.max_len + 1 for a, b in pairs)
            return log_likelihoods(model, pairs, progress=progress)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            rolling = functools.partial(
                get_rolling_token_windows, prefix_token=tokenizer.first, max_seq_len=model.config.max_len, context_len=1
            )
            windows = [
                [make_disjoint_window(pair) for pair in rolling(tokenizer.encode(request.args[0], None))]
                for request in requests
            ]
            scores = iter(log_likelihoods(model, [pair for some in windows for pair in some], progress=progress))
            return [sum(next(scores)[0] for _ in some) for some in windows]

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError("only log-likelihoods are computed here")

    return Harness()


def _benchmark(subject: Subject, task: str, shots: int, limit: int | None, progress: bool) -> dict:
    """A task of the harness, as `evaluate` keeps it: results by task, chance, questions, and inputs cut."""
    import lm_eval

    model = harness_model(subject, progress)
    with _bounded_hub():
        found = lm_eval.simple_evaluate(
            model, tasks=[task], num_fewshot=shots, limit=limit, task_manager=_task_manager(), log_samples=False,
            bootstrap_iters=1000,
        )  # fmt: skip
    choices = [1 / n for n in model.asked.values() if n > 1]
    return {
        "results": {**found["results"], **found.get("groups", {})},
        "chance": statistics.fmean(choices) if choices else None,
        "questions": sum(counts["effective"] for counts in found["n-samples"].values()),
        "cut": model.cut,
    }


# ------------------------------------------------------------------------------------------------------- evaluating


def task_names(tasks: str) -> list[str]:
    """The names in a list such as "lessons,arc_easy": `lessons` and `paper` stand for several.

    Raises EvaluationError for a name that does not exist or questions that cannot be loaded.
    """
    short = {"lessons": list(LESSONS), "paper": list(PAPER_TASKS)}
    listed = [name.strip() for name in tasks.split(",") if name.strip()]
    names = list(dict.fromkeys(task for name in listed for task in short.get(name, [name])))
    if not names:
        raise EvaluationError(f"--tasks {tasks!r}: names none; choose heldout, lessons, paper or tasks of the harness")
    for name in names:
        if name != "heldout" and name not in LESSONS:
            _check_tasks(name)
    return names


def new_report(subject: Subject, limit: int | None) -> dict:
    """A report without results: what was evaluated, with which versions."""
    step = subject.run.step if subject.run else None
    model = {
        "name": Path(subject.name).resolve().name if Path(subject.name).exists() else subject.name,
        "step": step, "parameters": subject.model.num_parameters(), "max_len": subject.model.config.max_len,
        "tokenizer": subject.tokenizer.name,
    }  # fmt: skip
    versions = {"torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["lm-eval"] = importlib.metadata.version("lm-eval")
    return {
        "model": model,
        "limit": limit,
        "versions": versions,
        "results": {},
        "chance": {},
        "questions": {},
        "cut": {},
    }


def evaluate(
    subject: Subject,
    tasks: str = "heldout,lessons",
    num_fewshot: Iterable[int] = (0,),
    limit: int | None = None,
    *,
    report: dict | None = None,
    progress: bool = False,
    keep: Callable[[dict], None] = lambda report: None,
) -> dict:
    """Evaluate a model on tasks, each with each number of shots, and return the report.

    limit: of questions for a task (of windows, for heldout). The report's `results` are the harness's own, by task
    and number of shots: report["results"]["arc_easy"]["2"]["acc,none"]; those of heldout and the lessons, which are
    zero-shot, have the same form. `chance` is what guessing scores. An earlier `report` is added to, and `keep` gets
    the report after each task. Raises EvaluationError, before any work where it can be known.
    """
    shots_asked = sorted(set(num_fewshot))
    if (limit is not None and limit < 1) or not shots_asked or shots_asked[0] < 0:
        raise EvaluationError(f"--limit {limit} --num-fewshot {shots_asked}: need 1 or more, and 0 or more")
    names = task_names(tasks)
    if "heldout" in names:
        _require_run(subject)
    report = report or new_report(subject, limit)
    for task in names:
        own = task == "heldout" or task in LESSONS
        for shots in [0] if own else shots_asked:
            found = _own(subject, task, limit, progress) if own else _benchmark(subject, task, shots, limit, progress)
            for name, values in found.pop("results").items():
                report["results"].setdefault(name, {})[str(shots)] = values
            for key, value in found.items():
                report[key].setdefault(task, {})[str(shots)] = value
            if found["cut"]:
                print(
                    f"evaluate: {task}, {shots}-shot: {found['cut']:,} inputs are longer than the model's context, "
                    f"max_len={subject.model.config.max_len}, and lost tokens from the left, as in "
                    "lm-evaluation-harness; take fewer shots, or a model with a longer context",
                    file=sys.stderr,
                )
            keep(report)
    return report


def _own(subject: Subject, task: str, limit: int | None, progress: bool) -> dict:
    """heldout or one of LESSONS, in the form of `_benchmark`."""
    if task == "heldout":
        values = held_out(subject, limit, progress)
        return {"results": {task: values}, "chance": None, "questions": values["sample_len"], "cut": 0}
    questions = lesson_questions(task, limit or QUESTIONS)
    lengths = [len(a) + len(b) for a, b in (subject.tokenizer.pair(q.context, q.choices[0]) for q in questions)]
    return {
        "results": {task: {"alias": task, "sample_len": len(questions), **answer(subject, questions, progress)}},
        "chance": statistics.fmean(1 / len(q.choices) for q in questions),
        "questions": len(questions),
        "cut": sum(length > subject.model.config.max_len + 1 for length in lengths),
    }


# --------------------------------------------------------------------------------------------------------- the report


def table(report: dict) -> str:
    """The results in Markdown: shares in percent with standard errors, and the paper's averages beside them."""
    shots = sorted({int(n) for by_shots in report["questions"].values() for n in by_shots})
    about = ", ".join(f"{key} {value}" for key, value in report["model"].items() if value is not None)
    limit = f"; at most {report['limit']} questions a task" if report["limit"] else ""
    lines = [about + limit, ""]
    lines += _row("task", "metric", *(f"{n}-shot" for n in shots), "chance")
    lines += ["|---" * (len(shots) + 3) + "|"]
    for task, by_shots in report["questions"].items():
        chance = next(iter(report["chance"][task].values()))
        values = {n: report["results"][task][n] for n in by_shots}
        metrics = dict.fromkeys(key for some in values.values() for key in some if key.endswith(",none"))
        for key in metrics:
            if "_stderr" not in key:
                cells = [_cell(values.get(str(n), {}), key) for n in shots]
                lines += _row(task, key.removesuffix(",none"), *cells, f"{chance:.1%}" if chance else "")
    if set(PAPER_TASKS) & report["questions"].keys():
        lines += ["", *_paper_rows(report, shots)]
    return "\n".join(lines)


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _cell(values: dict, key: str) -> str:
    value, error = values.get(key), values.get(key.replace(",", "_stderr,"), "N/A")
    if value is None:
        return ""
    scale, digits = (100, 1) if key.startswith("acc") else (1, 3)
    return f"{value * scale:.{digits}f}" + ("" if error == "N/A" else f" ± {error * scale:.{digits}f}")


def _paper_rows(report: dict, shots: list[int]) -> Iterator[str]:
    """The paper's averages for these numbers of shots, and the model's own where all nine tasks were evaluated."""
    yield "The paper reports averages over its nine tasks, in percent, of one run each and without errors:"
    yield ""
    yield from _row("average of nine", "shots", *(name.upper() for name in PAPER_MECHANISMS))
    yield "|---" * (len(PAPER_MECHANISMS) + 2) + "|"
    for (size, n), averages in PAPER_AVERAGES.items():
        if n in shots:
            yield from _row(f"paper, {size}", str(n), *(f"{value:.2f}" for value in averages))
    yield ""
    for n in map(str, shots):
        found = [report["results"].get(task, {}).get(n) for task in PAPER_TASKS]
        missing = [task for task, values in zip(PAPER_TASKS, found) if values is None]
        if missing:
            yield f"No {n}-shot average of this model: {', '.join(missing)} not evaluated."
            continue
        for metric in ("acc", "acc_norm"):
            keys = [f"{metric},none" if f"{metric},none" in values else "acc,none" for values in found]
            mean = statistics.fmean(values[key] for values, key in zip(found, keys))
            errors = [values[key.replace(",", "_stderr,")] for values, key in zip(found, keys)]
            error = "" if "N/A" in errors else f" ± {100 * math.hypot(*errors) / len(errors):.2f}"
            where = "" if metric == "acc" else " where there is one, else acc"
            yield f"This model, {n}-shot average of {metric}{where}: {100 * mean:.2f}{error}."


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a run or a model: held-out loss, the lessons' questions, and the paper's benchmarks."""

    run: str
    """Folder of a training run, or folder or hub repository of a model that save_pretrained or push_to_hub wrote."""
    tasks: str | None = None
    """Names with commas between: heldout, lessons, paper (its nine), or any of lm-evaluation-harness (`lm-eval ls
    tasks`). By default heldout,lessons for a run and lessons for a model."""
    num_fewshot: tuple[int, ...] = (0,)
    """Solved examples before each question; several numbers are evaluated one after the other."""
    limit: int | None = None
    """Questions a task, or windows of held-out text."""
    out: Path | None = None
    """File for the results, RUN/evaluation.json by default; the table goes beside it, as Markdown. Results of the same
    model under the same limit that are in it already stay."""
    tokenizer: str | None = None
    """gpt2, lessons, or a folder or hub repository; by default the run's or the model's own."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def run(config: EvaluateConfig) -> dict:
    """Evaluate as `config` says, write the report and its table after each task, and return the report.

    Raises EvaluationError, SettingError or data.DataError for what cannot be done, OSError on writing.
    """
    device = find_device(config.device)
    out = config.out or Path(config.run if Path(config.run).is_dir() else ".", "evaluation.json")
    if not out.parent.is_dir() or out.is_dir():
        raise EvaluationError(f"--out {out}: is a folder, or in none that exists; name a file in one that does")
    try:
        check_folder(out.parent)  # before any long work
    except OSError as error:
        raise EvaluationError(f"--out {out}: {error}; name a file in another folder") from error
    subject = open_model(config.run, tokenizer=config.tokenizer, device=device)
    report = new_report(subject, config.limit)
    earlier = _earlier(out)
    if all(earlier.get(key) == report[key] for key in ("model", "limit")):
        report = {**earlier, "versions": report["versions"]}

    def keep(report: dict) -> None:
        write_json(out, report)
        text = table(report) + "\n"
        write_whole(out.with_suffix(".md"), lambda path: path.write_text(text, encoding="utf-8"))

    tasks = config.tasks or ("heldout,lessons" if subject.run else "lessons")
    return evaluate(subject, tasks, config.num_fewshot, config.limit, report=report, progress=True, keep=keep)


def _earlier(out: Path) -> dict:
    """The report that is in a file, or an empty dict. Raises EvaluationError for a file that is none."""
    if not out.exists():
        return {}
    try:
        found = read_json(out)
    except FileError as error:
        raise EvaluationError(f"--out {error}; move it away, or name another file") from error
    if not isinstance(found, dict) or not {"model", "results", "questions"} <= found.keys():
        raise EvaluationError(f"--out {out}: is there and holds no results of `evaluate`; name another file")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status that the module's docstring lists."""
    import tyro

    from tpa_minimal.experiments.options import finish, parse

    prog = "python -m tpa_minimal evaluate"
    config = parse(EvaluateConfig, arguments, prog, config=(tyro.conf.PositionalRequiredArgs,))
    try:
        print(table(run(config)))
    except (EvaluationError, SettingError, data.DataError) as error:
        return finish(prog, 2, str(error))
    except OSError as error:
        return finish(prog, 1, f"cannot write the results: {error}; make room, or choose another --out")
    except KeyboardInterrupt:
        return finish(prog, 130, "interrupted; the tasks that were finished are saved")
    return 0
