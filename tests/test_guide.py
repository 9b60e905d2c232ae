"""The guide keeps its promises: minutes, sums, exercises, diagnoses, answers and commands are checked one by one."""

import ast
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tpa_minimal.__main__ import COMMANDS, main
from tpa_minimal.memory import GB, MODELS, Layer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402
import slides  # noqa: E402

GUIDE = (ROOT / "notebooks" / "README.md").read_text("utf-8")
INSTRUCTOR = (ROOT / "notebooks" / "instructor.md").read_text("utf-8")
SOURCES = build.sources()
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def title(source):
    return build.compose(source, solved=False).cells[0].source


def stated(source):
    return int(re.search(r"about (\d+) minutes to read and do", title(source))[1])


def exercise_minutes(source):
    """The minutes of each exercise, in order, as its heading says."""
    return [int(n) for n in re.findall(r"\((?:★+☆*, |Try it )?(\d+) minutes\)", source.read_text("utf-8"))]


def exercise_names(source):
    return re.findall(r"^checks\.(ex\d\d_\d+)\(", source.read_text("utf-8"), re.MULTILINE)


def counted(source):
    """The minutes by the guide's rule: prose, shown code, figures and tables, exercises."""
    words = lines = pictures = 0
    for cell in build.compose(source, solved=False).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
            words += len(re.sub(r"\$[^$]*\$", "formula", text).split())
        else:
            pictures += len(re.findall(r"looks\.(?:show|table|animate)\(", cell.source))
            if not {"setup", "hide-input", "exercise"} & set(cell.metadata.get("tags", [])):
                lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    return words / 130 + lines * 6 / 60 + pictures / 2 + sum(exercise_minutes(source))


def rows(text, begin):
    """The cells of the table that follows `begin`, without its header."""
    lines = text[text.index(begin) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    found = []
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            return found
        found.append([part.strip() for part in line.strip("|").split("|")])
    return found


@each_source
def test_the_minutes_of_a_notebook_are_counted_and_add_up(source):
    together, exercises = stated(source), exercise_minutes(source)
    assert len(exercises) == len(exercise_names(source)), "each exercise names its minutes: (★☆☆, 10 minutes)"
    assert abs(together - counted(source)) <= 7.5, f"{source.stem}: by the guide's rule {counted(source):.0f} minutes"
    seconds = build.BUDGET.search(title(source))[1]
    (row,) = [row for row in rows(GUIDE, "## The map") if f"({source.stem}.ipynb)" in row[0]]
    assert row[1:] == [f"{n} min" for n in (together - sum(exercises), sum(exercises), together)] + [f"{seconds} s"]
    line = f"**Minutes.** {together}: {together - sum(exercises)} to read and run, exercises "
    line += " + ".join(map(str, exercises)) + "."
    section = INSTRUCTOR[INSTRUCTOR.index(f"\n## {source.stem[:2]} · ") :].split("\n## ")[1]
    assert line in section


def test_the_course_s_total():
    assert len(rows(GUIDE, "## The map")) == len(SOURCES)
    hours, minutes = divmod(sum(map(stated, SOURCES)), 60)
    total = f"{hours} hours and {minutes} minutes" if minutes else f"{hours} hours"
    seconds = sum(int(build.BUDGET.search(title(source))[1]) for source in SOURCES)
    assert f"Together {total}, with at most {math.ceil(seconds / 60)} minutes of computing." in GUIDE
    assert total in (ROOT / "README.md").read_text("utf-8")


def test_the_workshop_adds_up():
    deck = slides.slides(slides.SOURCE.read_text("utf-8"))
    parts = [sum(s.minutes for s in deck if s.part == part) for part in dict.fromkeys(s.part for s in deck)]
    plan = rows(GUIDE, "**A half-day workshop**")
    for minutes, what in plan:
        if part := re.fullmatch(r"slides, part (\d)", what):
            assert int(minutes) == parts[int(part[1]) - 1], what
        elif named := re.fullmatch(r"(\d\d), exercises (.+)", what):
            (source,) = [s for s in SOURCES if s.stem.startswith(named[1])]
            assert int(minutes) == sum(exercise_minutes(source)[int(n) - 1] for n in re.findall(r"\d", named[2])), what
        else:
            assert what == "break" or "explorer" in what
    assert f"Together {sum(int(minutes) for minutes, _ in plan)} minutes." in GUIDE and "Together 240 minutes." in GUIDE
    assert {part for _, part in plan if "part" in part} == {f"slides, part {n + 1}" for n in range(len(parts))}


def test_the_module_adds_up():
    plan, named = rows(GUIDE, "**A three-week module**"), []
    for _, numbers, minutes, in_class, at_home, _ in plan:
        notebooks = [s for s in SOURCES if s.stem[:2] in numbers.split(", ")]
        assert len(notebooks) == numbers.count(",") + 1 and sum(map(stated, notebooks)) == int(minutes)
        assert int(in_class) == 2 * 90 and int(in_class) + int(at_home) == int(minutes)
        named += [s.stem[:2] for s in notebooks]
    assert len(named) == len(set(named))
    total, in_class = (sum(int(row[k]) for row in plan) for k in (2, 3))
    assert f"Together {total} minutes, of them {in_class} in class." in GUIDE


def test_each_exercise_shows_an_objective():
    shown = [f"ex{n.replace('.', '_')}" for row in rows(GUIDE, "## What students can do") for n in row[2].split(", ")]
    assert sorted(shown) == sorted(name for source in SOURCES for name in exercise_names(source))
    assert all(row[2].startswith(row[0]) for row in rows(GUIDE, "## What students can do"))


def test_the_diagnoses_explained_are_those_of_the_checkers():
    explained = {row[0].strip("`"): row[1].strip("“”") for row in rows(INSTRUCTOR, "## What the diagnoses mean")}
    assert list(explained) == [name for source in SOURCES for name in exercise_names(source)]
    for name, words in explained.items():
        tree = ast.parse((ROOT / "tpa_minimal" / "course" / "checks" / f"{name[:4]}.py").read_text("utf-8"))
        (checker,) = [node for node in tree.body if getattr(node, "name", "") == name]
        said = [node.value for node in ast.walk(checker) if isinstance(node, ast.Constant) and type(node.value) is str]
        assert any(words in text for text in said), f"{name} does not say: {words}"


def test_the_rubric_and_the_two_model_answers_add_up():
    weights = {row[0]: int(row[1]) for row in rows(INSTRUCTOR, "## The week-3 page")}
    assert sum(weights.values()) == 100
    section = INSTRUCTOR[INSTRUCTOR.index("## The week-3 page") :].split("\n## ")[0]
    for kind in ("good", "weak"):
        total, text = re.search(
            rf"\*\*A {kind} answer: (\d+) points\.\*\*(.+?)(?=\n\n|\Z)", section, re.DOTALL
        ).groups()
        marks = {name: int(re.search(rf"\b{name} (\d+)", text, re.IGNORECASE)[1]) for name in weights}
        assert sum(marks.values()) == int(total) and all(marks[name] <= weights[name] for name in weights)


def test_the_numbers_of_the_good_answer_are_computed():
    model, context = MODELS["Llama 3 8B"], 131_072
    tpa = model.with_tpa(16, 1, 1)
    mha = model.with_attention(Layer("mha", 4096, 32, 128))
    cache, small = model.cache_bytes(context), tpa.cache_bytes(context)
    sizes = [cache, model.weight_bytes(), small, tpa.weight_bytes()]
    sizes += [model.cache_bytes(context, dtype=dtype) for dtype in ("int4", "int8")]
    good = re.search(r"\*\*A good answer.+?”", INSTRUCTOR, re.DOTALL)[0]
    for size in sizes:
        assert f"{size / GB:.2f} GB" in good
    assert f"{cache / small:.1f} times less" in good and f"{mha.cache_bytes(context) / small:.1f}" in good
    fits = [weights + held <= 24 * GB for weights, held in
            ((sizes[1], sizes[0]), (sizes[3], sizes[2]), (sizes[1], sizes[4]), (sizes[1], sizes[5]))]  # fmt: skip
    assert fits == [False, True, True, False]  # as shipped, TPA, 4 bits, 8 bits
    assert f"will need {cache / 42 / GB:.1f} GB" in INSTRUCTOR


def test_the_quiz_has_twelve_questions_and_its_numbers_are_computed():
    questions = re.findall(r"^\d+\. .+", GUIDE[GUIDE.index("## A quiz") :].split("\n## ")[0], re.MULTILINE)
    answers = re.findall(r"^\d+\. .+", INSTRUCTOR[INSTRUCTOR.index("## Answers") :].split("\n## ")[0], re.MULTILINE)
    assert len(questions) == len(answers) == 12
    tpa = Layer("tpa", 768, 34, 64, rank_q=6, rank_k=2, rank_v=2)
    mha, wide = Layer("mha", 768, 12, 64), Layer("mha", 768, 34, 64)
    per_token = 80 * Layer("gqa", 8192, 64, 128, n_kv_head=8).cached_numbers * 2
    in_answers = {
        1: [f"{mha.cached_numbers:,}"],
        2: [str(tpa.cached_numbers), *(f"{m.cached_numbers / tpa.cached_numbers:.1f} times" for m in (mha, wide))],
        4: [f"{per_token:,} bytes"],
        7: [str(6 * 2)],
        10: [f"{layer.decode_multiply_adds(1):,}" for layer in (tpa, mha)],
        11: [f"{math.exp(2 - 5):.2f}"],
    }
    for number, found in in_answers.items():
        assert all(text in answers[number - 1] for text in found), answers[number - 1]
    evaluated = next(source for source in SOURCES if "evaluate" in source.stem).read_text("utf-8")
    assert "0.61" in answers[11] and all(number in evaluated for number in ("46.21", "46.20", "46.19"))


def commands():
    """Every command of the two pages, as words: lines of their sh blocks, and code in the text that is a command."""
    for page in (GUIDE, INSTRUCTOR):
        blocks = re.findall(r"^ *```sh\n(.*?)```", page, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines() if line.strip()]
        rest = re.sub(r"^ *```sh\n.*?```", "", page, flags=re.MULTILINE | re.DOTALL)
        lines += re.findall(r"`((?:make|python|nbgrader|jupyter) [^`]+)`", rest)
        for line in lines:
            words = shlex.split(line)
            while re.fullmatch(r"[A-Z_]+=\S+", words[0]):  # variables of the environment
                words.pop(0)
            yield tuple(words)


@pytest.mark.parametrize("words", sorted(set(commands())), ids=" ".join)
def test_each_command_of_the_guide_exists(words, capsys):
    wheel = f"tpa_minimal-{build.version()}-py3-none-any.whl"
    options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
    program, *rest = (Path(words[0]).name, *words[1:])
    if program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        assert set(rest) <= targets
    elif rest[:2] == ["-m", "tpa_minimal"]:
        assert rest[2] in {*COMMANDS, "COMMAND"}
        if rest[2] in COMMANDS:
            with pytest.raises(SystemExit) as end:
                main([rest[2], "--help"])
            said = capsys.readouterr().out
            assert not end.value.code and all(option in said for option in options)
    elif rest[:2] == ["-m", "pip"]:
        done = subprocess.run([sys.executable, "-m", "pip", rest[2], "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and all(option in done.stdout for option in options)
        assert rest[-3:-1] == ["torch", "--index-url"] or rest[-1].endswith(f"{wheel}[course,experiments]")
    elif program == "nbgrader":  # tests/course/test_nbgrader.py runs these
        ran = (ROOT / "tests" / "course" / "test_nbgrader.py").read_text("utf-8")
        assert f'nbgrader(course, "{rest[0]}"' in ran and set(rest[1:]) <= {source.stem for source in SOURCES}
    elif program == "jupyter":
        labapp = pytest.importorskip("jupyterlab.labapp")
        assert rest[0] == "lab" and options <= {"--no-browser", "--ServerApp.root_dir"}
        assert "no-browser" in labapp.LabApp.flags and hasattr(labapp.LabApp.serverapp_class, "root_dir")
    else:
        assert program in ("cp", "cd", "source") and (program != "source" or rest == [".venv/bin/activate"])


def test_the_marking_recipe_works_word_by_word(tmp_path, monkeypatch, capsys):
    line = "python -m tpa_minimal grade SUBMISSIONS --out grades.csv"
    assert line in GUIDE and line in INSTRUCTOR
    folder = tmp_path / "SUBMISSIONS" / "ada"
    folder.mkdir(parents=True)
    shutil.copy(build.target(SOURCES[0], solved=True), folder)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[3:]) == 0
    assert "ada" in (tmp_path / "grades.csv").read_text("utf-8")
    assert capsys.readouterr().out.splitlines()[1].split() == ["ex00_1", "1", "0", "0", "0"]
