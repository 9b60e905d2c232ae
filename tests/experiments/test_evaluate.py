"""Log-likelihoods against plain loops and the harness's own model; questions, reports and the command line."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tpa_minimal import huggingface
from tpa_minimal.baselines import MultiHeadAttention
from tpa_minimal.experiments import data, evaluate, lessons, train
from tpa_minimal.tpa import T6, T6Config

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("TPA_SHARED", ROOT.parent / "shared"))
needs_hub = pytest.mark.skipif(
    not (SHARED / "hub" / "eval").exists() or importlib.util.find_spec("lm_eval") is None,
    reason="no loopback hub beside the project (set TPA_SHARED), or no lm-eval",
)


def random_model(attention=None, dtype=torch.float64, vocab_size=1024, max_len=96):
    config = T6Config(vocab_size, n_layer=2, d_model=16, n_head=2, d_head=8, max_len=max_len)
    model = T6(config, **({} if attention is None else {"attention": attention})).to(dtype)
    for parameter in model.parameters():  # the output projections start at zero, and then context would not matter
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def subject_of(model):
    return evaluate.Subject("random", model, evaluate.load_tokenizer("lessons"))


def by_a_loop(model, context, continuation):
    """One token at a time: log p(token | all before it, as far as the model can see)."""
    tokens, total, greedy = context + continuation, 0.0, True
    seen = tokens[-(model.config.max_len + 1) :]
    for i in range(len(seen) - len(continuation), len(seen)):
        logits = model(torch.tensor([seen[:i]]))[0, -1]
        total += logits.log_softmax(-1)[seen[i]].item()
        greedy &= logits.argmax().item() == seen[i]
    return total, greedy


# ---------------------------------------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("attention", [None, MultiHeadAttention])
def test_log_likelihoods_are_a_plain_loop_over_the_logits(attention):
    model = random_model(attention, vocab_size=50)
    draw = np.random.default_rng(0)

    def some(n):
        return draw.integers(50, size=n).tolist()

    shared = some(20)
    pairs = [(some(a), some(b)) for a, b in ((1, 1), (30, 1), (3, 40), (60, 7), (1, 96), (150, 5), (95, 2), (96, 1))]
    pairs += [(shared, some(1)) for _ in range(4)]  # four letters of one question
    pairs += [(shared, (best := by_greedy(model, shared, 3))), (shared, best[:1])]
    found = evaluate.log_likelihoods(model, pairs)
    for pair, (score, greedy) in zip(pairs, found):
        right, as_greedy = by_a_loop(model, *pair)
        assert score == pytest.approx(right, abs=1e-10) and greedy == as_greedy
    assert [greedy for _, greedy in found][-2:] == [True, True] and not found[1][1]


@torch.no_grad()
def by_greedy(model, context, n):
    return model.generate(torch.tensor([context]), n, temperature=0)[0, len(context) :].tolist()


@pytest.mark.parametrize("most", [1, 7, 50, 10**6])
def test_batches_of_any_size_give_the_same(monkeypatch, most):
    model = random_model(vocab_size=50)
    pairs = [(list(range(n)), [3, n % 50]) for n in range(1, 40)]
    expected = evaluate.log_likelihoods(model, pairs)
    monkeypatch.setattr(evaluate, "_batch_tokens", lambda model: most)
    for (a, b), (c, d) in zip(evaluate.log_likelihoods(model, pairs), expected):
        assert a == pytest.approx(c, abs=1e-10) and b == d


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model, sizes = random_model(vocab_size=50), []
    pairs = [(list(range(n)), [3]) for n in range(1, 40)]
    expected, hidden = evaluate.log_likelihoods(model, pairs), model.hidden

    def small_memory(tokens):
        sizes.append(tokens.numel())
        if tokens.numel() > 100:
            raise torch.OutOfMemoryError("out of memory")
        return hidden(tokens)

    monkeypatch.setattr(model, "hidden", small_memory)
    assert np.allclose([a for a, _ in evaluate.log_likelihoods(model, pairs)], [a for a, _ in expected], atol=1e-10)
    assert sizes[0] > 400 and max(sizes[-10:]) <= 100
    monkeypatch.setattr(model, "hidden", lambda tokens: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate.log_likelihoods(model, pairs[:1])


def test_a_batch_takes_a_quarter_of_the_free_memory(monkeypatch):
    import psutil

    model = random_model(vocab_size=50304)
    for free, most in ((2**40, 2**13), (4 * 4 * 160_000 * 100, 100), (1, 1)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("", (), {"available": free}))
        assert most / 1.2 <= evaluate._batch_tokens(model) <= 1.2 * most


@pytest.mark.parametrize(
    "context, continuation, said",
    [
        ([], [1], "without a single token"),
        ([1], [], "without a single token"),
        ([1], [2] * 97, "max_len=96"),
        ([1], [50], "--tokenizer"),
        ([50, 1], [1], "--tokenizer"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(context, continuation, said):
    with pytest.raises(evaluate.EvaluationError, match=said):
        evaluate.log_likelihoods(random_model(vocab_size=50), [([1], [2]), (context, continuation)])


# ---------------------------------------------------------------------------------------------------- tokenizers


def bos_tokenizer(folder):
    """A tokenizer of transformers', as LLaMA's: it puts a BOS before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text for (text, _), _ in zip(lessons.documents(), range(200))], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def test_a_tokenizer_of_transformers_adds_its_bos_once(tmp_path):
    pytest.importorskip("transformers")
    bos_tokenizer(tmp_path)
    tokenizer = evaluate.load_tokenizer(str(tmp_path))
    assert (tokenizer.first, tokenizer.end) == (0, 1)
    context, continuation = tokenizer.pair("A red lamp. ", "A bell.")
    assert context[0] == 0 and 0 not in context[1:] + continuation
    assert tokenizer.pair("<s>A red lamp. ", "A bell.") == (context, continuation)
    assert tokenizer.encode("A bell.", False) == tokenizer.encode("A bell.", None)[1:]


def test_white_space_between_context_and_continuation_belongs_to_the_continuation():
    tokenizer, encode = evaluate.load_tokenizer("lessons"), data.load_tokenizer("lessons").encode_ordinary
    assert tokenizer.pair("Answer: ", "Bolea") == (encode("Answer:"), encode(" Bolea"))
    assert tokenizer.pair("Answer:", " Bolea") == (encode("Answer:"), encode(" Bolea"))
    assert tokenizer.first == tokenizer.end == 1023


@pytest.mark.parametrize("name", ["nonsense", "no/such/tokenizer"])
def test_a_tokenizer_that_does_not_exist(name, monkeypatch):
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(evaluate.EvaluationError, match=f"--tokenizer {name}.*gpt2, lessons") as caught:
        evaluate.load_tokenizer(name)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- the lessons' questions


@pytest.mark.parametrize("task", evaluate.LESSONS)
def test_questions_are_the_same_everywhere_and_their_choices_differ(task):
    questions = evaluate.lesson_questions(task, 50)
    assert questions == evaluate.lesson_questions(task, 60)[:50] != evaluate.lesson_questions(task, 50, seed=1)
    for question in questions:
        assert len(set(question.choices)) == 4 and 0 <= question.answer < 4
    assert {question.answer for question in questions} == {0, 1, 2, 3}


def test_the_right_answers_by_other_means():
    for q in evaluate.lesson_questions("lessons_recall", 100):
        assert [choice.strip() in q.context for choice in q.choices] == [n == q.answer for n in range(4)]
    for q in evaluate.lesson_questions("lessons_spelling", 100):
        words = set(re.findall(r"\w+", q.context))
        assert [choice.split()[0] in words for choice in q.choices] == [n == q.answer for n in range(4)]
    for q in evaluate.lesson_questions("lessons_counting", 100):
        step, start, *listed = map(int, re.findall(r"\d+", q.context))
        asked = listed.pop()
        right = asked + step if listed[0] < listed[1] else asked - step
        assert int(q.choices[q.answer].strip(" .")) == right
        assert lessons.is_held_out(*sorted((min(listed), step)))


def test_names_that_are_spelled_are_those_of_no_person_in_a_training_lesson():
    texts = [text for (text, held_out), _ in zip(lessons.documents(), range(4000)) if not held_out]
    trained = {name for text in texts for name in re.findall(r"[A-Z]\w+\b(?! (?:Hill|Bay|Bridge))", text)}
    asked = {re.match(r"\w+", q.context)[0] for q in evaluate.lesson_questions("lessons_spelling", 100)}
    assert len(trained) > 4000 and len(asked) > 90 and not trained & asked


def test_answers_are_ranked_by_likelihood_and_by_likelihood_per_letter(monkeypatch):
    # Of " yes" (3 letters) and " certainly" (9): -3 beats -6, but per letter -1 loses to -2/3.
    scores = {" yes": (-3.0, False), " certainly": (-6.0, False)}
    subject, encode = subject_of(random_model()), data.load_tokenizer("lessons").encode_ordinary
    table = {tuple(encode(text)): score for text, score in scores.items()}
    monkeypatch.setattr(
        evaluate, "log_likelihoods", lambda model, pairs, progress: [table[tuple(end)] for _, end in pairs]
    )
    questions = [evaluate.Question("Is it?", [" yes", " certainly"], n) for n in (0, 0, 0, 1)]
    found = evaluate.answer(subject, questions)
    assert (found["acc,none"], found["acc_norm,none"]) == (0.75, 0.25)
    assert found["acc_stderr,none"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert evaluate.answer(subject, questions[:1])["acc_stderr,none"] == "N/A"


def test_a_random_model_scores_what_guessing_does():
    subject = subject_of(random_model(dtype=torch.float32))
    report = evaluate.evaluate(subject, "lessons", limit=200)
    for task in evaluate.LESSONS:
        found = report["results"][task]["0"]
        assert abs(found["acc,none"] - report["chance"][task]["0"]) < 4 * found["acc_stderr,none"]


# --------------------------------------------------------------------------------------------- runs and reports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = train.TrainConfig(
        out=folder / "run", data="lessons", tokens=20_000, steps=4, batch_size=4, seq_len=32, lr=0.01, eval_every=4,
        changes=dict(n_layer=1, d_model=16, n_head=2, d_head=8),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPA_CACHE", str(folder / "cache"))
        result = train.train(config, progress=False, log=lambda line: None)
        yield result


@pytest.fixture(autouse=True)
def cache(run, monkeypatch):
    monkeypatch.setenv("TPA_CACHE", str(run.out.parent / "cache"))


def test_held_out_loss_is_that_of_training(run):
    subject = evaluate.open_model(str(run.out))
    found = evaluate.held_out(subject)
    T, loss = 32, []
    val = run.data.val.astype(np.int64)
    for start in range(0, len(val) - T, T):
        tokens = torch.from_numpy(val[start : start + T + 1])[None]
        loss.append(torch.nn.functional.cross_entropy(subject.model(tokens[:, :-1])[0], tokens[0, 1:]).item())
    assert found["sample_len"] == len(loss) and found["loss,none"] == pytest.approx(np.mean(loss), rel=1e-5)
    assert found["loss,none"] == pytest.approx(run.metrics[-1]["val_loss"], rel=1e-5)
    assert found["loss_stderr,none"] == pytest.approx(np.std(loss, ddof=1) / math.sqrt(len(loss)), rel=1e-4)
    assert found["perplexity,none"] == pytest.approx(math.exp(np.mean(loss)), rel=1e-5)
    text = run.data.tokenizer.decode(val[1 : 1 + T * len(loss)].tolist()).replace(data.END_OF_TEXT, "")
    bits = sum(loss) * T / math.log(2) / len(text.encode())
    assert found["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert found["bits_per_byte_stderr,none"] / found["loss_stderr,none"] == pytest.approx(
        bits / np.mean(loss), rel=1e-4
    )
    few = evaluate.held_out(subject, limit=5)
    assert few["sample_len"] == 5 and few["loss,none"] == pytest.approx(np.mean(loss[:5]), rel=1e-5)


def test_held_out_text_must_be_the_run_s_own(run, tmp_path):
    subject = evaluate.open_model(str(run.out))
    state = json.loads((subject.checkpoint / "state.json").read_text())
    state["sha256"]["val"] = "0" * 64
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(evaluate.EvaluationError, match="other tokens now"):
        evaluate.held_out(subject._replace(checkpoint=tmp_path))


def test_the_command_line_evaluates_a_run_offline(run, capsys, tmp_path):
    out = tmp_path / "found.json"
    assert evaluate.main([str(run.out), "--limit", "20", "--out", str(out)]) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert list(report["results"]) == ["heldout", *evaluate.LESSONS]
    recalled = report["results"]["lessons_recall"]["0"]
    value, error = (100 * recalled[key] for key in ("acc,none", "acc_stderr,none"))
    assert f"| lessons_recall | acc | {value:.1f} ± {error:.1f} | 25.0% |" in shown
    assert out.with_suffix(".md").read_text() == shown and "paper" not in shown
    assert report["model"] == {
        "name": "run", "step": 4, "parameters": run.model.num_parameters(), "max_len": 512, "tokenizer": "lessons",
    }  # fmt: skip
    # What is there stays, is renewed where it is evaluated again, and is replaced under another limit.
    report["results"]["arc_easy"] = {"0": {"acc,none": 0.5}}
    out.write_text(json.dumps(report))
    assert evaluate.main([str(run.out), "--limit", "20", "--tasks", "lessons_recall", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["results"] == report["results"]
    assert evaluate.main([str(run.out), "--limit", "10", "--tasks", "lessons_recall", "--out", str(out)]) == 0
    assert list(json.loads(out.read_text())["results"]) == ["lessons_recall"]


def test_the_default_file_is_in_the_run_s_folder(run, monkeypatch):
    assert evaluate.main([str(run.out), "--limit", "2", "--tasks", "lessons_counting"]) == 0
    assert json.loads((run.out / "evaluation.json").read_text())["limit"] == 2


def test_a_saved_model_with_its_tokenizer_named(tmp_path, capsys):
    huggingface.save_pretrained(random_model(dtype=torch.float32), tmp_path / "model")
    assert evaluate.main([str(tmp_path / "model"), "--tokenizer", "lessons", "--limit", "4"]) == 0
    assert "lessons_recall" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "model" / "evaluation.json").read_text())["results"]) == list(evaluate.LESSONS)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["RUN", "--tasks", ","], "names none"),
        (["RUN", "--limit", "0"], "--limit 0"),
        (["RUN", "--num-fewshot", "-1"], "0 or more"),
        (["RUN", "--out", "/nowhere/at/all.json"], "--out /nowhere/at/all.json"),
        (["RUN", "--out", "RUN"], "is a folder"),
        (["RUN", "--out", "RUN/metrics.jsonl"], "name another file"),
        (["RUN", "--device", "tpu"], "--device tpu"),
        (["/nowhere"], "/nowhere: is no run"),
        (["MODEL"], "MODEL: holds a model and no tokenizer"),
        (["MODEL", "--tokenizer", "lessons", "--tasks", "heldout"], "heldout needs a training run"),
        (["SMALL", "--tokenizer", "lessons", "--tasks", "lessons"], "name the model's own tokenizer"),
    ],
)
def test_what_cannot_be_is_one_line_with_status_2(run, tmp_path, capsys, monkeypatch, arguments, said):
    huggingface.save_pretrained(random_model(), tmp_path / "MODEL")
    huggingface.save_pretrained(random_model(vocab_size=64), tmp_path / "SMALL")
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("RUN", str(run.out)) for argument in arguments]
    before = (run.out / "metrics.jsonl").read_text()
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("python -m tpa_minimal evaluate: ") and said in error
    assert (run.out / "metrics.jsonl").read_text() == before


def report_of(tasks, shots=(0,)):
    values = {"acc,none": 0.4, "acc_stderr,none": 0.01, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.03}
    plain = {"acc,none": 0.4, "acc_stderr,none": 0.01}
    results = {
        task: {str(n): plain if task in ("boolq", "winogrande", "mmlu") else values for n in shots} for task in tasks
    }
    numbers = {task: dict.fromkeys(map(str, shots), 100) for task in tasks}
    chance = {task: dict.fromkeys(map(str, shots), 0.25) for task in tasks}
    return dict(model={"name": "m"}, limit=None, results=results, questions=numbers, chance=chance)


def test_the_table_sets_the_paper_s_averages_beside_ours():
    shown = evaluate.table(report_of(evaluate.PAPER_TASKS, (0, 2)))
    assert "| hellaswag | acc_norm | 50.0 ± 3.0 | 50.0 ± 3.0 | 25.0% |" in shown
    assert "| paper, small | 2 | 48.11 | 45.21 | 47.16 | 47.63 | 47.85 | 47.93 |" in shown
    assert "| paper, large | 0 | 52.52 |" in shown and "| paper, large | 2 |" not in shown
    assert "2-shot average of acc: 40.00 ± 0.33." in shown
    error = 100 * math.sqrt(6 * 0.03**2 + 3 * 0.01**2) / 9
    assert f"0-shot average of acc_norm where there is one, else acc: 46.67 ± {error:.2f}." in shown


def test_no_average_is_given_of_other_tasks_than_the_paper_s():
    shown = evaluate.table(report_of(evaluate.PAPER_TASKS[:-1]))
    assert "No 0-shot average of this model: sciq not evaluated." in shown and "0-shot average of acc:" not in shown
    assert "paper" not in evaluate.table(report_of(["lessons_recall"]))


# -------------------------------------------------------------------------------------------------- the harness

# Run apart: lm-eval and datasets read the address of the hub and the place of their caches as they are imported. An
# index of a few tasks stands for that of all 14,000, which takes seven seconds to make.
PREPARE = """
import functools, json, sys
from pathlib import Path
import lm_eval.tasks
from tpa_minimal.experiments import evaluate
folder = Path(lm_eval.tasks.__file__).parent
some = [folder / name for name in ("arc", "winogrande", "super_glue/boolq", "gsm8k", "wikitext")]
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_path=some, include_defaults=False)
"""

COMPARE = """
import torch, transformers
from lm_eval.models.huggingface import HFLM
from tpa_minimal import huggingface
torch.manual_seed(0)
folder = sys.argv[1]
config = transformers.LlamaConfig(
    vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.4,
)
llama = transformers.LlamaForCausalLM(config).eval()
huggingface.save_pretrained(huggingface.llama_to_t6(llama), folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=3, device="cpu")
subject = evaluate.open_model(folder)
ours = evaluate.harness_model(subject)
report = evaluate.evaluate(subject, "arc_easy,winogrande", [0, 2], limit=6)
import datasets.config, huggingface_hub.constants  # and now from what was downloaded
datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
rows = []
for shots in (0, 2):
    both = [
        lm_eval.simple_evaluate(
            lm, tasks=["arc_easy", "winogrande"], num_fewshot=shots, limit=6, task_manager=evaluate._task_manager(),
            bootstrap_iters=1000,
        )
        for lm in (theirs, ours)
    ]
    for task in ("arc_easy", "winogrande"):
        said = [[s["filtered_resps"] for s in found["samples"][task]] for found in both]
        results = [found["results"][task] for found in both]
        kept = [report[key][task][str(shots)] for key in ("results", "chance", "cut", "questions")]
        rows.append([task, shots, said, results, kept])
text = "Milla has a red lamp. Where does she live? " * 30  # longer than the context
asked = [lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (text[:n],), 0) for n in (40, len(text))]
print(json.dumps([rows, [lm.loglikelihood_rolling(asked) for lm in (theirs, ours)]]))
"""


def child(code, *arguments, tmp_path, endpoint):
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT),
        "TPA_CACHE": os.environ["TPA_CACHE"],
    }  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + code, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_text_reaches_a_t6_as_its_tokens_do():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    model, encode = random_model(), data.load_tokenizer("lessons").encode_ordinary
    texts = [("Milla has a red", " lamp."), ("", "Milla has"), ("Count by 2: ", "2, 4"), ("Count by 2:", " 2, 4")]
    requests = [
        Instance("loglikelihood", {}, pair, 0, metadata=("some task", n, 1)) for n, pair in zip((0, 0, 1, 1), texts)
    ]
    harness = evaluate.harness_model(subject_of(model))
    tokens = [(encode(a.rstrip()) or [1023], encode(" " * (a != a.rstrip()) + b)) for a, b in texts]
    for (found, greedy), pair in zip(harness.loglikelihood(requests), tokens):
        assert (pytest.approx(found, abs=1e-10), greedy) == by_a_loop(model, *pair)
    assert harness.asked == {("some task", 0): 2, ("some task", 1): 2} and harness.cut == 0


def test_without_the_harness_the_lessons_are_still_there(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evaluate._task_manager.cache_clear()
    assert evaluate.main([str(run.out), "--tasks", "lessons_recall,arc_easy"]) == 2
    line = capsys.readouterr().err.strip()
    assert "pip install 'tpa-minimal[evaluate]'" in line and "heldout,lessons" in line and "\n" not in line
    assert evaluate.main([str(run.out), "--tasks", "lessons_recall,heldout", "--limit", "3"]) == 0


def test_a_task_that_has_the_model_write_is_refused(run, monkeypatch, capsys):
    pytest.importorskip("datasets")
    written = type("Task", (), {"OUTPUT_TYPE": "generate_until"})
    manager = type("Manager", (), {"all_tasks": ["writes"], "load": lambda self, names: {"tasks": {"a": written}}})()
    monkeypatch.setattr(evaluate, "_task_manager", lambda: manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert evaluate.main([str(run.out), "--tasks", "writes"]) == 2
    assert "--tasks writes: a has the model write text (generate_until)" in capsys.readouterr().err


REFUSE = """
import time
for tasks in ("arc_esy", "gsm8k", "winogrande"):
    print(f"status {evaluate.main([sys.argv[1], '--tasks', 'lessons_recall,' + tasks])}", file=sys.stderr)
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval")
def test_tasks_that_cannot_be_are_refused_before_any_work(run, tmp_path):
    before = sorted(run.out.iterdir())
    error = child(REFUSE, run.out, tmp_path=tmp_path, endpoint="http://127.0.0.1:9").stderr
    lines = [line for line in error.splitlines() if line.startswith(("python -m", "status"))]
    assert lines[1::2] == ["status 2"] * 3 and len(lines) == 6
    assert "--tasks arc_esy: does not exist; similar are arc_easy" in lines[0]
    assert "--tasks gsm8k: " in lines[2] and "--tasks winogrande: its questions cannot be loaded" in lines[4]
    assert "HF_ENDPOINT" in lines[4] and "log-likelihoods" not in error
    assert sorted(run.out.iterdir()) == before


@pytest.fixture(scope="module")
def hub():
    command = [sys.executable, str(SHARED / "hub" / "hub.py"), "--all", str(SHARED / "hub" / "eval")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as served:
        yield served.stdout.readline().strip()
        served.terminate()


@needs_hub
def test_a_converted_llama_scores_as_the_harness_s_own_model_does(hub, tmp_path):
    pytest.importorskip("transformers")
    bos_tokenizer(tmp_path / "llama")
    done = child(COMPARE, tmp_path / "llama", tmp_path=tmp_path, endpoint=hub)
    rows, (their_rolling, our_rolling) = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 4 and their_rolling == pytest.approx(our_rolling, rel=1e-6)
    assert "max_len=160, and lost tokens from the left" in done.stderr
    for task, shots, (theirs, ours), results, (kept, chance, cut, questions) in rows:
        assert len(theirs) == len(ours) == questions == 6
        for their_choices, our_choices in zip(theirs, ours):
            assert len(their_choices) == len(our_choices) >= 2
            for (a, greedy), (b, also) in zip(their_choices, our_choices):
                assert a == pytest.approx(b, abs=1e-4) and greedy == also and a < -1
        assert results[0] == results[1] == kept and kept["acc_stderr,none"] > 0
        assert chance == pytest.approx(0.5 if task == "winogrande" else 0.25, abs=0.05)
        # Two solved examples do not fit into 160 tokens, and both cut the same from the left.
        assert (cut > 0) == (shots == 2)
