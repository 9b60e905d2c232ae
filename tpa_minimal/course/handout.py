"""What a class gets: `python -m tpa_minimal handout FOLDER`; with `--nbgrader`, the same as an nbgrader course.

The folder holds the students' notebooks, the package as a wheel, and the list of what to install; no solutions, no
notebook sources, no instructor's pages. The set-up cell of every notebook finds the wheel beside it.

An nbgrader course is the instructor's: its `source` folder holds an assignment for each notebook that has exercises,
with solutions, which `nbgrader generate_assignment` takes out, and points, one for each star of an exercise.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tpa_minimal.course.grade import CALL
from tpa_minimal.experiments.options import finish, parse
from tpa_minimal.files import read_json

LINK = re.compile(r"(?<!!)\[([^\]\[]+)\]\((?!https?:|mailto:|data:|attachment:)([^)\s]+)\)")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = """\
# conda env create -f environment.yml && conda activate tpa-minimal && jupyter lab
# Without conda, from this folder: python -m pip install "./{wheel}[course,experiments]"
# On Linux without a GPU install a small torch first: pip install torch --index-url https://download.pytorch.org/whl/cpu
name: tpa-minimal
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
      - ./{wheel}[course,experiments]
"""
COURSE = """\
c = get_config()
c.CourseDirectory.course_id = "tpa-minimal"
c.ClearSolutions.code_stub = {"python": ""}  # the exercise's own stub stands above each solution
c.ExecutePreprocessor.timeout = 120  # seconds for a cell
"""
SOLVED = """\
{stub}
### BEGIN SOLUTION
{solution}
### END SOLUTION"""
CHECKED = """\
{check}
### BEGIN HIDDEN TESTS
assert verdict == "ok"
### END HIDDEN TESTS"""


@dataclass(frozen=True)
class Settings:
    """Make the folder that students get: their notebooks, the package as a wheel, an environment file."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where to make it: a folder that does not exist yet."""
    nbgrader: bool = False
    """Make an nbgrader course for the instructor instead: an assignment with solutions and points for each notebook."""


def hand_out(folder: Path, nbgrader: bool = False) -> list[Path]:
    """Make `folder` whole or not at all, and return its files; raises ValueError where it cannot be made."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not notebooks or not (ROOT / "pyproject.toml").exists():
        raise ValueError(f"{ROOT}: is no clone of the project, which a hand-out is made from")
    if folder.exists():
        raise ValueError(f"{folder}: is there already; name a new folder, so that nothing of the old one stays in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".handout-", dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        wheel = build_wheel(made)
        if nbgrader:
            fill_course(made, wheel, notebooks)
        else:
            fill_handout(made, wheel, notebooks)
        made.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def fill_handout(made: Path, wheel: Path, notebooks: list[Path]) -> None:
    """Put what students get beside the wheel."""
    shutil.copytree(ROOT / "notebooks" / "images", made / "images")
    shutil.copy(ROOT / "LICENSE", made)
    names = {path.relative_to(made).as_posix() for path in made.rglob("*")} | {path.name for path in notebooks}
    for notebook in notebooks:
        text = json.dumps(student_copy(notebook, names), indent=1, ensure_ascii=False) + "\n"
        (made / notebook.name).write_text(text, encoding="utf-8")
    (made / "environment.yml").write_text(ENVIRONMENT.format(wheel=wheel.name), encoding="utf-8")


def fill_course(made: Path, wheel: Path, notebooks: list[Path]) -> None:
    """Put an nbgrader course beside the wheel: `source/NN_name/` with the notebook, the wheel and the images."""
    (made / "nbgrader_config.py").write_text(COURSE, encoding="utf-8")
    for notebook in notebooks:
        assignment = made / "source" / notebook.stem
        shutil.copytree(ROOT / "notebooks" / "images", assignment / "images")
        shutil.copy(wheel, assignment)
        names = {path.relative_to(assignment).as_posix() for path in assignment.rglob("*")} | {notebook.name}
        text = json.dumps(assignment_of(notebook, names), indent=1, ensure_ascii=False) + "\n"
        (assignment / notebook.name).write_text(text, encoding="utf-8")
    wheel.unlink()


def assignment_of(notebook: Path, names: set[str]) -> dict:
    """A notebook with nbgrader's marks: stub and solution in the answer's cell, points in that of the checker."""
    content = student_copy(notebook, names)
    solved = read_json(notebook.parent / "solutions" / notebook.name)["cells"]
    answers = ["".join(cell["source"]) for cell in solved if "solution" in cell["metadata"].get("tags", [])]
    stars = "★"
    for cell in content["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            stars = (re.findall("★+", text) or [stars])[-1]
            continue
        cell["outputs"], cell["execution_count"] = [], None
        mark = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
        if "exercise" in cell["metadata"].get("tags", []):
            named = re.search(r"^(?:def|class) \w+\b", text, re.MULTILINE)[0]
            solution = next(answer for answer in answers if named in answer)
            cell["source"] = SOLVED.format(stub=text.rstrip(), solution=solution.rstrip())
            cell["metadata"]["nbgrader"] = {**mark, "grade_id": named.split()[1], "solution": True}
        elif call := CALL.search(text):
            cell["source"] = CHECKED.format(check=text.replace(call[0], f"verdict = {call[0]}").rstrip())
            cell["metadata"]["nbgrader"] = {
                **mark,
                "grade_id": call[1],
                "grade": True,
                "locked": True,
                "points": len(stars),
            }
    return content


def student_copy(notebook: Path, names: set[str]) -> dict:
    """A notebook's content for students: links to files that they do not get lead to the repository, or are text."""
    address = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[
        1
    ]

    def link(match: re.Match) -> str:
        words, target = match[1], match[2]
        if target.partition("#")[0] in names | {""}:
            return match[0]
        if target.startswith("solutions/"):
            return words
        path = (notebook.parent / target).resolve().relative_to(ROOT).as_posix()
        return f"[{words}]({address}/blob/main/{path})"

    content = read_json(notebook)
    for cell in content["cells"]:
        if "solution" in cell["metadata"].get("tags", []):
            raise ValueError(f"{notebook}: holds a cell tagged `solution`; run `python notebooks/build.py`")
        if cell["cell_type"] == "markdown":
            cell["source"] = LINK.sub(link, "".join(cell["source"])).splitlines(keepends=True)
    return content


def build_wheel(into: Path) -> Path:
    """The package as a wheel, built without a network from a copy; raises ValueError with pip's last words."""
    with tempfile.TemporaryDirectory() as temporary:  # setuptools leaves its build folder beside the sources
        copy = Path(temporary) / "source"
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / "tpa_minimal", copy / "tpa_minimal", ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
                   "--disable-pip-version-check", "--wheel-dir", str(into), str(copy)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel was made"])[-1]
        raise ValueError(f"pip could not build the wheel: {last} (are pip, setuptools and wheel installed here?)")
    return wheels[0]


def main(arguments: list[str] | None = None) -> int:
    """The command line: makes the folder and lists it. Where it cannot be made, the status is 2."""
    settings = parse(Settings, arguments, "python -m tpa_minimal handout")
    try:
        files = hand_out(settings.folder.expanduser(), settings.nbgrader)
    except (ValueError, OSError) as error:
        return finish("python -m tpa_minimal handout", 2, str(error))
    for path in files:
        print(f"{path.stat().st_size / 1024:>8.0f} KB  {path}")
    return 0
