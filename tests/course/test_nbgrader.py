"""The nbgrader form of the course, run through nbgrader itself: the release, then marks for three students."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpa_minimal.course import handout
from tpa_minimal.course.grade import exercises

pytest.importorskip("nbgrader", reason="nbgrader is not installed: it is in the extra `dev`")
NOTEBOOKS = sorted((handout.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NAME = "05_factor_cache"
MIXED = {  # wrong, right, and the third left open
    "append": "def append(room, length, new):\n    return new",
    "longest_context": "def longest_context(config, budget, batch_size, bytes_per_number):\n"
    "    c = config\n    numbers = c.n_layer * (c.rank_k + c.rank_v) * (c.n_head + c.d_head)\n"
    "    return budget // (numbers * batch_size * bytes_per_number)",
}
FULL = os.environ.get("TPA_FULL") == "1"


def nbgrader(folder, *arguments):
    bin = Path(sys.executable).parent  # nbgrader calls alembic by its name
    path = os.pathsep.join([str(bin), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(handout.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([bin / "nbgrader", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def marked(cells):
    return [cell for cell in cells if "nbgrader" in cell["metadata"]]


def text(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "course"
    assert handout.main([str(folder), "--nbgrader"]) == 0
    return folder


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_exercise_has_an_answers_cell_with_its_stub_and_points(course, notebook):
    found = marked(cells(course / "source" / notebook.stem / notebook.name))
    ours = exercises(notebook)
    assert len(found) == 2 * len(ours) > 0
    for exercise, answer, check in zip(ours, found[::2], found[1::2]):
        stub, _, solution = text(answer).partition("\n### BEGIN SOLUTION\n")
        assert stub == exercise.stub.rstrip() and "NotImplementedError" not in solution
        assert answer["metadata"]["nbgrader"]["grade_id"] == exercise.name
        assert f"verdict = checks.{exercise.checker}({exercise.name})\n### BEGIN HIDDEN TESTS" in text(check)
        assert 1 <= check["metadata"]["nbgrader"]["points"] <= 3


def test_nbgrader_releases_stubs_and_gives_points_for_right_answers_only(course):
    source = course / "source" / NAME / f"{NAME}.ipynb"
    content = json.loads(source.read_text(encoding="utf-8"))
    if not FULL:  # the cells that the exercises need
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        helper = [cell for cell in code if text(cell).startswith("def run(")]
        content["cells"] = [*code[:2], *helper, *marked(content["cells"])]
        source.write_text(json.dumps(content), encoding="utf-8")
    nbgrader(course, "generate_assignment", NAME)
    release = json.loads((course / "release" / NAME / f"{NAME}.ipynb").read_text(encoding="utf-8"))
    stubs = {
        cell["id"]: text(cell) for cell in release["cells"] if cell["metadata"].get("nbgrader", {}).get("solution")
    }
    assert [stub.rstrip() for stub in stubs.values()] == [
        e.stub.rstrip() for e in exercises(handout.ROOT / "notebooks" / f"{NAME}.ipynb")
    ]
    assert not re.search("SOLUTION|HIDDEN|assert verdict", json.dumps(release))
    expected = {"mixed": (1, 6), "right": (6, 6)} if FULL else {"mixed": (1, 6)}  # ★★☆, ★☆☆ and ★★★
    for student in expected:
        for cell, solved in zip(release["cells"], content["cells"]):
            if (answer := cell["metadata"].get("nbgrader", {})).get("solution"):
                cell["source"] = (
                    text(solved) if student == "right" else MIXED.get(answer["grade_id"], stubs[cell["id"]])
                )
        folder = course / "submitted" / student / NAME
        folder.mkdir(parents=True)
        (folder / f"{NAME}.ipynb").write_text(json.dumps(release), encoding="utf-8")
    nbgrader(course, "autograde", NAME)
    nbgrader(course, "export")
    with open(course / "grades.csv", newline="", encoding="utf-8") as file:
        got = {row["student_id"]: (float(row["score"]), float(row["max_score"])) for row in csv.DictReader(file)}
    assert got == expected
