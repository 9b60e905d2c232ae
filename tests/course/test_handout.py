"""The hand-out holds what students need and nothing of what they should not get."""

import json
import re
import subprocess
import sys
import zipfile

import pytest

from tpa_minimal.course.handout import ROOT, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True).stdout
    folder = tmp_path_factory.mktemp("class") / "hand-out"
    assert main([str(folder)]) == 0
    assert subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True).stdout == before
    assert [path.name for path in folder.parent.iterdir()] == ["hand-out"]  # nothing half made beside it
    return folder


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_students_get_their_notebooks_and_the_package_and_no_answers(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    (wheel,) = [name for name in names if name.endswith(".whl")]
    images = {f"images/{path.name}" for path in (ROOT / "notebooks" / "images").iterdir()}
    assert names == notebooks | images | {wheel, "environment.yml", "LICENSE"}
    for name in notebooks:
        ours = cells(ROOT / "notebooks" / name)
        assert [cell["id"] for cell in cells(folder / name)] == [cell["id"] for cell in ours]
        assert not any("solution" in cell["metadata"].get("tags", []) for cell in cells(folder / name))
        code = [["".join(cell["source"]) for cell in part if cell["cell_type"] == "code"]
                for part in (ours, cells(folder / name))]  # fmt: skip
        assert code[0] == code[1]
    packed = zipfile.ZipFile(folder / wheel).namelist()
    assert "tpa_minimal/tpa.py" in packed and "tpa_minimal/course/checks/ex05.py" in packed
    assert not [name for name in packed if re.search(r"ipynb|notebooks|tests|instructor|__pycache__", name)]
    assert f"./{wheel}[course,experiments]" in (folder / "environment.yml").read_text()


def test_every_link_in_the_hand_out_leads_somewhere(folder):
    for path in folder.glob("*.ipynb"):
        for cell in cells(path):
            if cell["cell_type"] == "markdown":
                for target in re.findall(r"\]\((?!https?:|data:|attachment:|#)([^)\s]+)\)", "".join(cell["source"])):
                    assert (folder / target.partition("#")[0]).is_file(), f"{path.name}: {target}"


def test_the_wheel_installs_without_a_network_and_checks_an_answer(folder, tmp_path):
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([*install, str(tmp_path / "site"), str(wheel)], check=True, capture_output=True)
    program = (
        "from tpa_minimal.course import checks; import tpa_minimal; print(tpa_minimal.__file__)\n"
        "checks.ex00_1(lambda n_head, d_head: 2 * n_head * d_head)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path / "site") in done.stdout and "[ok]" in done.stdout


def test_a_folder_that_is_there_already_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    assert main([str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
