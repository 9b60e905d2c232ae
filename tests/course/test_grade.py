"""Marking: right answers pass, and whatever else a submission does changes nothing but its own row."""

import csv
import json
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from tpa_minimal.course import checks
from tpa_minimal.course.checks import judging
from tpa_minimal.course.grade import Exercise, Settings, decode, encode, exercises, grade, main, verdict

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))
import build  # noqa: E402

HERE = "tpa_minimal.course.checks"
RIGHT = "def numbers_cached_by_mha(n_head, d_head):\n    return 2 * n_head * d_head"
STUB = "def numbers_cached_by_mha(n_head, d_head):\n    raise NotImplementedError  # your line here"
WRONG = "def numbers_cached_by_mha(n_head, d_head):\n    return n_head * d_head"
CHECK = "checks.ex00_1(numbers_cached_by_mha)"
SETUP = "import math\nfrom tpa_minimal.course import checks"


def code(source, *tags):
    return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source, "outputs": []}


def notebook(*cells):
    return json.dumps({"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def with_answer(answer, setup=SETUP, check=CHECK):
    return notebook(code(setup), code(answer, "exercise"), code(check))


@pytest.fixture
def ours(tmp_path):
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "00_start_here.ipynb").write_text(with_answer(STUB))
    return folder


@pytest.fixture
def marked(tmp_path, ours):
    """Marks submissions of notebook 00, given as text by student; returns (status, diagnosis) by student."""

    def run(submissions, **options):
        for student, text in submissions.items():
            folder = tmp_path / "class" / student
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "00_start_here.ipynb").write_text(text, encoding="utf-8")
        settings = dict(out=tmp_path / "grades.csv", notebooks=ours, seconds=6.0, jobs=1) | options
        grade(Settings(tmp_path / "class", **settings))
        with open(settings["out"], newline="", encoding="utf-8") as file:
            return {row["student"]: (row["status"], row["diagnosis"]) for row in csv.DictReader(file)}

    return run


IMITATION = "print('[ok] ex00_1: well done')\n"
# Attempts to be marked right, or to end the marking; each is put into the answer's cell, with a wrong answer.
FORGED = {
    "prints": IMITATION + WRONG,
    "prints_when_called": WRONG.replace("return", f"{IMITATION.strip()}; return"),
    "replaces_checker": f"import {HERE} as c\nc.ex00_1 = lambda f: 'ok'\nc.ex00.ex00_1 = lambda f: 'ok'\n" + WRONG,
    "replaces_agree": f"import {HERE}.judging as j\nj.agree = lambda *a, **k: True\nj.judge = j.agree\n" + WRONG,
    "replaces_print": "import builtins\nbuiltins.print = lambda *a, **k: None\n" + WRONG,
    "equals_everything": "class Any(int):\n    def __eq__(self, other): return True\n    __sub__ = __eq__\n"
    "def numbers_cached_by_mha(n_head, d_head):\n    return Any(7)",
    "writes_to_the_marker": "import os\nfor d in range(99):\n    try: open(f'/proc/{os.getppid()}/fd/{d}', 'w').write("
    "'[0, [[\"ex00_1\", \"ok\", \"\"]]]\\n')\n    except Exception: pass\n" + WRONG,
    "asks_for_the_checker": "import gc, sys\nfound = 0\n"
    "for ask in (gc.get_objects, gc.get_referrers, sys._current_frames):\n"
    "    try: found += len(ask()) + 1\n    except PermissionError: pass\n"
    + WRONG.replace("return", "return (2 if found else 1) *"),
    "asks_the_frames": "import sys\ndef numbers_cached_by_mha(n_head, d_head):\n    frame = sys._getframe()\n"
    "    try: raise ValueError\n    except ValueError as error: frames = [frame, error.__traceback__.tb_frame]\n"
    "    for frame in frames:\n        while frame:\n            if 'right' in frame.f_locals:\n"
    "                return frame.f_locals['right'](n_head, d_head)\n            frame = frame.f_back\n    return 7",
    "patches_the_frames_above": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    "    frame.f_globals.update(STATUSES=('ok',), verdict=lambda *a: ('ok', ''))\n    frame = frame.f_back\n" + WRONG,
    "replaces_modules": f"import sys, types\nfor name in list(sys.modules):\n    if name.startswith({HERE!r}):\n"
    "        sys.modules[name] = types.SimpleNamespace(ex00_1=lambda f: 'ok')\n" + WRONG,
    "starts_processes": "import os, multiprocessing, subprocess\n"
    "for start in (os.fork, multiprocessing.Process().start,"
    " lambda: subprocess.Popen(['true']), lambda: os.posix_spawn('/bin/true', ['true'], {})):\n"
    "    try: start()\n    except PermissionError: pass\n" + WRONG,
    "leaves_a_thread": "import threading\ndef spin():\n    while True: pass\n"
    "threading.Thread(target=spin).start()\n" + WRONG,
    "prints_look_alikes": "print('\uff3bok\uff3d ex00_1', '[\u03bfk] ex00_1', '\u202e]ko[')\n" + WRONG,
    "raises_look_alikes": WRONG.replace("return", "raise ValueError('\u202e=HYPERLINK(1)\\n[ok] ex00_1'); return"),
    "returns_a_deep_list": WRONG.replace("return", "x = []\n    for _ in range(10**5): x = [x]\n    return x;"),
    "is_right_once": "calls = []\n" + WRONG.replace("return", "calls.append(1); return (3 - min(len(calls), 2)) *"),
    "kills_the_marker": "import os\ntry: os.kill(os.getppid(), 9)\nexcept PermissionError: pass\n" + WRONG,
}  # fmt: skip
# Attempts after which nothing is left to judge.
ENDED = {
    "writes_to_descriptors": "import os\nfor d in range(3, 99):\n"
    "    try: os.write(d, b'[0, [[\"ex00_1\", \"ok\", \"\"]]]\\n')\n    except OSError: pass\n" + WRONG,
    "exit": "exit()\n" + RIGHT,
    "exits_when_called": RIGHT.replace("return", "raise SystemExit; return"),
    "exits_at_once": "import os\nos._exit(0)\n" + RIGHT,
    "loops": "while True: pass\n" + RIGHT,
    "loops_when_called": RIGHT.replace("return", "\n    while True:\n        pass\n    return"),
    "sleeps_and_catches": "import time\nwhile True:\n    try: time.sleep(9)\n    except BaseException: pass\n" + RIGHT,
    "memory": RIGHT.replace("return", "x = bytearray(2**36); return"),
    "replaces_builtins": "import builtins\nbuiltins.isinstance = builtins.len = lambda *a: True\n"
    "builtins.Exception = BaseException\n" + WRONG,
    "answers_the_next_calls_too": "import os\n" + WRONG.replace("return", "os.write(3, b'{\"kind\": "
    "\"value\", \"changed\": [], \"value\": {\"kind\": \"int\", \"value\": \"0x1\"}}\\n'); return"),
    "sleeps_when_called": RIGHT.replace("return", "__import__('time').sleep(99); return"),
    "memory_in_pieces": "kept = [bytearray(2**20) for _ in range(2**16)]\n" + RIGHT,
    "returns_a_flood": RIGHT.replace("return", "return 'x' * 2**27 or"),
    "closes_the_socket": "import os\nos.closerange(3, 9)\n" + RIGHT,
    "makes_a_link": "import os\nos.symlink('/etc/passwd', 'left')\n" + RIGHT,
    "syntax": "def numbers_cached_by_mha(n_head, d_head:\n    return",
    "other_name": "def cached(n_head, d_head):\n    return 2 * n_head * d_head",
}  # fmt: skip


def test_forged_and_endless_answers_change_nothing_but_their_own_row(marked):
    submissions = {name: with_answer(answer) for name, answer in {**FORGED, **ENDED}.items()}
    submissions["aaa"] = submissions["zzz"] = with_answer(RIGHT)
    got = marked(submissions, seconds=3.0)
    assert got["aaa"] == got["zzz"] == ("ok", "")
    assert {name: got[name][0] for name in FORGED} == dict.fromkeys(FORGED, "fail")
    # A forged line that is read by itself is a wrong answer; with the true one behind it, no answer at all.
    assert got["answers_the_next_calls_too"][0] in ("fail", "did not run")
    ended = ENDED.keys() - {"answers_the_next_calls_too"}
    assert {name: got[name][0] for name in ended} == dict.fromkeys(ended, "did not run")
    assert "not finished after 3 s" in got["loops"][1] and "SystemExit" in got["exit"][1]
    assert "SyntaxError" in got["syntax"][1] and "another release" in got["other_name"][1]
    assert "memory" in got["memory"][1]
    assert "a key and" in got["prints"][1] or "value" in got["prints"][1]  # the checker's own diagnosis


def test_what_stands_around_the_answer_does_not_count(marked):
    got = marked(
        {
            "deleted_checker": notebook(code(RIGHT, "exercise")),
            "wrong_without_checker": notebook(code(WRONG, "exercise")),
            "strict_off": with_answer(WRONG, "import os\nos.environ['TPA_STRICT'] = '0'"),
            "own_checker": with_answer(WRONG, "class checks:\n    ex00_1 = print", "print('[ok] ex00_1: well done')"),
            "broken_setup": with_answer(RIGHT, "import no_such_library\nraise SystemExit"),
            "untagged": notebook(code(RIGHT)),
            "helper_elsewhere": notebook(
                code("def twice(x):\n    return 2 * x"), code(RIGHT.replace("2 *", "twice(1) *"), "exercise")
            ),
            "magic": with_answer("%time\n!ls\n" + RIGHT),
            "stub": with_answer(STUB),
            "stub_with_a_comment": with_answer("# later\n" + STUB),
        }
    )
    right = ("deleted_checker", "broken_setup", "untagged", "helper_elsewhere", "magic")
    assert {name: got[name][0] for name in right} == dict.fromkeys(right, "ok")
    wrong = ("wrong_without_checker", "strict_off", "own_checker")
    assert {name: got[name][0] for name in wrong} == dict.fromkeys(wrong, "fail")
    assert got["stub"][0] == got["stub_with_a_comment"][0] == "todo"


BROKEN = ["", "{", "[]", '{"cells": 3}', '{"cells": [3]}', "[" * 100_000, '{"worksheets": []}', '{"cells": [{}]}',
          notebook({"cell_type": "code", "source": 3, "metadata": 4}), notebook(code("(" * 5000))]  # fmt: skip


def test_a_broken_notebook_is_a_row_of_its_own(marked):
    got = marked({str(i): text for i, text in enumerate(BROKEN)} | {"sound": with_answer(RIGHT)})
    assert got.pop("sound") == ("ok", "") and len(got) == len(BROKEN)
    assert all(status == "did not run" and say for status, say in got.values())


def test_an_answer_reaches_neither_the_files_nor_the_network_nor_other_processes(marked, tmp_path):
    for_all = "import os, pathlib, socket, subprocess\n"
    deeds = {
        "writes": f"open({str(tmp_path / 'left')!r}, 'w').write('x')",
        "deletes": f"os.remove({str(tmp_path / 'kept')!r})",
        "connects": "socket.create_connection(('127.0.0.1', 9))",
        "grades": f"open({str(tmp_path / 'grades.csv')!r}, 'a').write('eve,00_start_here,ex00_1,ok,,-')",
        "starts": f"subprocess.run(['touch', {str(tmp_path / 'left')!r}])",
    }
    (tmp_path / "kept").write_text("kept")
    submissions = {name: with_answer(for_all + deed + "\n" + RIGHT) for name, deed in deeds.items()}
    got = marked(submissions)
    assert all(status == "did not run" and "PermissionError" in say for status, say in got.values())
    assert (tmp_path / "kept").exists() and not (tmp_path / "left").exists()


def test_rows_of_unchanged_submissions_are_kept_and_changed_ones_marked_anew(marked, tmp_path, monkeypatch):
    first = marked({"ada": with_answer(RIGHT), "bob": with_answer(WRONG)})
    table = tmp_path / "grades.csv"
    table.write_text(table.read_text().replace("ada,00_start_here,ex00_1,ok,", "ada,00_start_here,ex00_1,ok,seen"))
    again = marked({"bob": with_answer(RIGHT)})
    assert first["bob"][0] == "fail" and again == {"ada": ("ok", "seen"), "bob": ("ok", "")}
    assert marked({}, seconds=7.0)["ada"] == ("ok", "")  # other limits: marked anew


def test_the_summary_counts_each_exercise_and_shows_what_was_misunderstood(tmp_path, ours, capsys):
    for name, answer in (("ada", RIGHT), ("bob", WRONG), ("eve", WRONG), ("max", STUB)):
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / "class" / f"{name}_00_start_here.ipynb").write_text(with_answer(answer))
    out = tmp_path / "grades.csv"
    assert main([str(tmp_path / "class"), "--out", str(out), "--notebooks", str(ours), "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ex00_1", "1", "2", "1", "0"] and lines[2].split()[:2] == ["2", "x"]
    with open(out, newline="") as file:
        assert [row["student"] for row in csv.DictReader(file)] == ["ada", "bob", "eve", "max"]


@pytest.mark.parametrize("option", ["--seconds=0", "--seconds=nan", "--memory-gb=inf", "--jobs=-1"])
def test_a_limit_that_cannot_be_is_one_line(option, tmp_path, capsys):
    assert main([str(tmp_path), option]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and option.partition("=")[0] in err


def test_what_cannot_be_marked_is_refused_in_one_line(tmp_path, ours, capsys):
    (tmp_path / "class" / "ada").mkdir(parents=True)
    submissions = str(tmp_path / "class")
    for arguments in ([str(tmp_path / "nowhere")], [submissions]):
        assert main([*arguments, "--notebooks", str(ours), "--out", str(tmp_path / "g.csv")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    shutil.copy(ours / "00_start_here.ipynb", tmp_path / "class" / "ada")
    (tmp_path / "notes.csv").write_text("my,notes\n1,2\n")
    assert main([submissions, "--notebooks", str(ours), "--out", str(tmp_path / "notes.csv")]) == 2
    assert "no table of grades" in capsys.readouterr().err and (tmp_path / "notes.csv").read_text() == "my,notes\n1,2\n"
    assert main([submissions, "--notebooks", str(tmp_path), "--out", str(tmp_path / "g.csv")]) == 2


def test_data_that_crosses_the_pipe_comes_back_as_it_was():
    room = torch.arange(24.0).reshape(2, 3, 4)
    values = [None, True, 3, 10**30, 0.1, float("inf"), "ä", ..., (1, [2.0]), {"a": {1, 2}}, np.float64(0.5)]
    for value in values:
        back = decode(json.loads(json.dumps(encode(value, []))), [])
        assert back == value and type(back) is type(value)
    for tensor in (room, room.bfloat16(), room > 3, room[:0], torch.tensor(2)):
        back = decode(json.loads(json.dumps(encode(tensor, []))), [])
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype
    view = decode(json.loads(json.dumps(encode(room[:, 1:, ::2], [room]))), [room])
    assert torch.equal(view, room[:, 1:, ::2]) and view.data_ptr() == room[:, 1:].data_ptr()
    assert type(decode(encode(object(), []), [])).__name__ == "object"


@pytest.mark.parametrize("number", ["05", "11"])  # in-place writes, views and errors; a class
def test_the_courses_own_solutions_are_right_and_its_stubs_are_todo(tmp_path, number):
    source = next(path for path in build.sources() if path.stem.startswith(number))
    for folder, solved in (("ours", False), ("class/ada", True), ("class/bob", False)):
        (tmp_path / folder).mkdir(parents=True)
        nbformat.write(build.compose(source, solved), tmp_path / folder / f"{source.stem}.ipynb")
    book = grade(Settings(tmp_path / "class", tmp_path / "g.csv", tmp_path / "ours", jobs=1))
    found = {(row["student"], row["status"]) for rows in book.rows.values() for row in rows}
    assert found == {("ada", "ok"), ("bob", "todo")}
    assert len(exercises(tmp_path / "ours" / f"{source.stem}.ipynb")) * 2 == sum(map(len, book.rows.values()))


def test_files_that_are_no_plain_notebooks_are_rows_of_their_own(marked, tmp_path):
    folder = tmp_path / "class"
    submissions = {"sound": with_answer(RIGHT), "large": notebook(code(RIGHT, "exercise"), code("x = 1\n" * 2**18))}
    submissions["many"] = notebook(*[code("")] * 100_000, code(RIGHT, "exercise"))
    submissions["deep"] = with_answer(RIGHT).replace('"metadata": {}', '"metadata": ' + "[" * 10**5 + "]" * 10**5)
    for name in ("linked", "endless", "broken", "pipe", "folder"):
        (folder / name).mkdir(parents=True)
    (folder / "linked" / "00_start_here.ipynb").symlink_to(folder / "sound" / "00_start_here.ipynb")
    (folder / "endless" / "00_start_here.ipynb").symlink_to("/dev/zero")
    (folder / "broken" / "00_start_here.ipynb").symlink_to("nowhere")
    (folder / "folder" / "00_start_here.ipynb").mkdir()
    os.mkfifo(folder / "pipe" / "00_start_here.ipynb")
    got = marked(submissions)
    assert got.pop("sound") == got.pop("many") == ("ok", "")
    assert {status for status, _ in got.values()} == {"did not run"} and len(got) == 7
    for name in ("linked", "endless", "broken", "pipe", "folder"):
        assert got[name][1] == "00_start_here.ipynb: is not a plain file; hand in the notebook itself"
    assert "characters of code" in got["large"][1]


def test_what_a_diagnosis_holds_is_shown_as_plain_text(marked):
    reply = json.dumps({"kind": "did not run", "message": "=HYPERLINK('x')\u202e\n\x1b[2J"}).encode() + b"\n"
    answer = f"import os\nos.write(3, {reply!r})\nos._exit(0)\n{RIGHT}"
    status, said = marked({"eve": with_answer(answer)})["eve"]
    assert status == "did not run" and said.isprintable() and said.startswith("HYPERLINK")


CLASS = """
class Doubled(torch.nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.factor = {factor}

    def forward(self, x):
        return self.factor * super().forward(x)
"""


@pytest.mark.parametrize(
    "factor, status", [("2", "ok"), ("3", "fail"), ("torch.nn.Parameter(torch.ones(1))", "did not run")]
)
def test_a_class_with_an_init_of_its_own_is_marked_too(monkeypatch, factor, status):
    @judging.exercise
    def ex00_1(attempt):
        layer, x = attempt(3, 2), torch.ones(1, 3)
        if not judging.agree(layer(x), 2 * torch.nn.functional.linear(x, layer.weight, layer.bias)):
            raise judging.WrongAnswer("not doubled")

    monkeypatch.setattr(checks.ex00, "ex00_1", ex00_1)
    stub = "class Doubled(torch.nn.Linear):\n    def forward(self, x):\n        raise NotImplementedError"
    exercise = Exercise("ex00_1", "Doubled", stub, ())
    namespace = {"torch": torch, "__name__": "__main__"}
    got = verdict(exercise, [(True, CLASS.format(factor=factor))], namespace, Settings(Path(), seconds=20))
    assert got[0] == status, got


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_limit_that_a_callback_swallows_comes_back(monkeypatch):
    @judging.exercise
    def ex00_1(attempt):
        class Swallows:
            def __del__(self):  # Python drops what is raised here
                time.sleep(1.5)

        Swallows()
        time.sleep(30)

    monkeypatch.setattr(checks.ex00, "ex00_1", ex00_1)
    begin = time.monotonic()
    exercise = Exercise("ex00_1", "f", "def f(): pass", ())
    got = verdict(exercise, [(True, "def f(): return 1")], {}, Settings(Path(), seconds=1))
    assert got[0] == "did not run" and "not finished after 1 s" in got[1] and time.monotonic() - begin < 20
