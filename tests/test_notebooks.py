"""What every committed notebook must be: built from its source, executed, small, clean, and true to tpa.py."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import build  # noqa: E402

TAGS = {"hide-input", "setup", "tpa", "exercise", "solution", "nbval-check-output"}
SOURCES = build.sources()
BUILT = [(source, solved) for source in SOURCES for solved in (False, True)]
each_built = pytest.mark.parametrize("source, solved", BUILT, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def read(source, solved=False):
    return nbformat.read(build.target(source, solved), as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def tree(node):
    return ast.dump(node, include_attributes=False)


def module_definitions():
    body = ast.parse((ROOT / "tpa_minimal" / "tpa.py").read_text(encoding="utf-8")).body
    return {node.name: tree(node) for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def built_definitions():
    """(name, tree, notebook) of each top-level definition in a cell tagged `tpa` of a student's notebook."""
    for source in SOURCES:
        for cell in tagged(read(source), "tpa"):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    yield node.name, tree(node), source.stem


def test_the_course_is_complete():
    numbers = [source.stem[:2] for source in SOURCES]
    assert numbers == sorted(set(numbers)) and set(numbers) >= {f"{n:02d}" for n in range(10)}


def test_every_definition_of_the_module_is_built_in_exactly_one_notebook():
    names = [name for name, _, _ in built_definitions()]
    assert sorted(names) == sorted(module_definitions())


def test_definitions_in_notebooks_equal_the_module_as_syntax_trees():
    module = module_definitions()
    for name, built, notebook in built_definitions():
        assert built == module.get(name), f"{notebook}: its `{name}` differs from tpa_minimal/tpa.py"


def test_an_altered_cell_is_noticed():
    module = module_definitions()
    name, built, _ = next(built_definitions())
    assert built.replace("Constant(value=2)", "Constant(value=3)") != module[name] or "Constant(value=2)" not in built
    assert tree(ast.parse("def assemble(a, b):\n    return a.mT @ b").body[0]) != module["assemble"]


@each_built
def test_built_notebook_is_up_to_date_with_its_source(source, solved):
    built, fresh = read(source, solved), build.compose(source, solved)
    advice = f"run: python notebooks/build.py {source.stem[:2]}"
    assert [cell.cell_type for cell in built.cells] == [cell.cell_type for cell in fresh.cells], advice
    for old, new in zip(built.cells, fresh.cells):
        assert old.source == new.source, f"cell {old.id} differs from the source; {advice} (or --stamp)"
        assert old.metadata == new.metadata


@each_built
def test_built_notebook_is_executed_in_order_and_clean(source, solved):
    path = build.target(source, solved)
    notebook = read(source, solved)
    nbformat.validate(notebook)
    assert path.stat().st_size < 400_000
    assert "widgets" not in notebook.metadata
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    for cell in notebook.cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not {"image/svg+xml", "application/vnd.jupyter.widget-view+json"} & set(output.get("data", {}))
    text = path.read_text(encoding="utf-8")
    for trace in ("/root/", "/home/", "/work/", "/tmp/", "/Users/", "\\\\Users\\\\", "site-packages"):
        assert trace not in text, f"{path.name} shows a path of the machine that built it: {trace}"


@each_source
def test_shape_of_a_notebook(source):
    notebook = read(source)
    title = notebook.cells[0].source
    assert title.startswith(f"# {source.stem[:2]} · ")
    assert "colab-badge.svg" in title and "**You will be able to**" in title and "**You need**" in title
    outcomes = title.split("**You will be able to**")[1].split("**You need**")[0]
    assert 3 <= outcomes.count("\n- ") <= 5
    assert "minutes to read and do" in title and 1 <= int(build.BUDGET.search(title)[1]) <= 60
    assert "setup" in notebook.cells[1].metadata.tags
    lengths = [
        len(cell.source.splitlines())
        for cell in code_cells(notebook)[1:]
        if not {"tpa", "hide-input"} & set(cell.metadata.get("tags", []))
    ]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 30
    assert any("ummary" in cell.source for cell in notebook.cells if cell.cell_type == "markdown")


@each_built
def test_code_fits_without_scrolling(source, solved):
    for cell in code_cells(build.compose(source, solved)):
        if not {"tpa", "setup", "hide-input"} & set(
            cell.metadata.get("tags", [])
        ):  # the module's own lines, and folded
            assert not [line for line in cell.source.splitlines() if len(line) > 88], cell.id
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            assert len(cell.source.splitlines()[0]) <= 36, f"{cell.id}: its first line does not fit in a narrow window"


@each_built
def test_every_picture_has_alt_text_and_fits(source, solved):
    for cell in code_cells(read(source, solved)):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "image/png" not in data, f"{cell.id}: show figures by looks.show(fig, alt=...)"
            for image in re.findall(r"<img [^>]*>", data.get("text/html", "")):
                assert re.search(r' alt="[^"]{10,}"', image), f"{cell.id}: a picture without alt text"
                assert int(re.search(r' width="(\d+)"', image)[1]) <= 800


@each_source
def test_each_control_follows_its_static_twin(source):
    seen = ""
    for cell in code_cells(read(source)):
        if "looks.control(" in cell.source:
            assert "looks.show(*" in seen and "looks.show(" not in cell.source, cell.id
        seen += cell.source


@each_source
def test_exercises_have_stub_solution_and_checker(source):
    student, solved = read(source), read(source, solved=True)
    stubs, answers = tagged(student, "exercise"), tagged(solved, "solution")
    calls = [cell for cell in code_cells(student) if "checks.ex" in cell.source]
    if source.stem[:2] != "00":
        assert 2 <= len(calls) <= 4
    assert len(stubs) == len(calls) <= len(answers)  # a solved notebook may go on to use an answer
    assert not tagged(student, "solution") and not tagged(solved, "exercise")
    for stub in stubs:
        assert "raise NotImplementedError" in stub.source
    for call in calls:
        assert f"checks.ex{source.stem[:2]}" in call.source
        assert "[todo]" in "".join(output.get("text", "") for output in call.outputs)
    for call in code_cells(solved):
        if "checks.ex" in call.source:
            assert "[ok]" in "".join(output.get("text", "") for output in call.outputs)


@each_built
def test_the_repository_address_is_the_one_of_pyproject(source, solved):
    title, setup = read(source, solved).cells[:2]
    owner_and_name = build.repository().removeprefix("https://github.com/")
    path = build.target(source, solved).relative_to(ROOT).as_posix()
    assert f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{path})" in title.source
    assert f"git+{build.repository()}" in setup.source


@pytest.fixture
def opened(tmp_path):
    """Run a notebook's set-up cell as somebody would who has torch alone, in a folder; pip is only told what to do."""

    def run(folder, installs=False):
        setup = read(SOURCES[0]).cells[1].source
        script = f"""
import importlib.util, json, subprocess, sys
hidden = {{"tpa_minimal", "matplotlib", "ipywidgets", "datasets", "tiktoken"}}
real, told = importlib.util.find_spec, []
def find_spec(name):
    if name in hidden and not (name == "tpa_minimal" and {str(ROOT)!r} in sys.path):
        return None
    return object()
def run(command, **_):
    told.append(command[-1])
    hidden.clear() if {installs} else None
importlib.util.find_spec, subprocess.run = find_spec, run
sys.path[:] = [entry for entry in sys.path if entry != {str(ROOT)!r}]
try:
    exec(compile({setup!r}, "setup", "exec"))
except Exception as error:
    print(json.dumps(["".join(error._render_traceback_()), told]))
else:
    print(json.dumps([None, told]))
"""
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_setup_cell_works_wherever_a_notebook_is_opened(opened, tmp_path):
    said, told = opened(tmp_path)
    assert said.count("\n") == 0 and all(remedy in said for remedy in ("online", "wheel", "clone"))
    assert told == [f"tpa-minimal[course,experiments] @ git+{build.repository()}@v{build.version()}"]
    assert opened(tmp_path, installs=True) == [None, told]
    said, told = opened(NOTEBOOKS)  # in a clone: what else is missing comes from the clone's own list
    assert said and told == [f"{ROOT}[course,experiments]"]
    wheel = tmp_path / "tpa_minimal-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert opened(tmp_path, installs=True) == [None, [f"{wheel}[course,experiments]"]]


def test_what_stands_for_controls_is_kept_and_the_controls_are_not():
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a sentence"}
    (kept,) = build.tidy([nbformat.v4.new_output("display_data", data)])
    assert kept.data == {"text/plain": "a sentence"}


def test_an_address_that_is_not_on_github_gets_no_colab_badge(monkeypatch):
    monkeypatch.setattr(build, "repository", lambda: "https://example.org/owner/name")
    assert build.badge("notebooks/00_start_here.ipynb") == ""


def test_the_readme_names_the_same_address():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(build.INSTALLED_FROM.findall(readme)) == {build.repository()}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, tpa_minimal; print([m for m in {names} if m in sys.modules])".format(
        names=["datasets", "tiktoken", "matplotlib", "ipywidgets", "triton", "transformers"]
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.replace("'", '"')) == []


@each_source
def test_links_between_notebooks_lead_somewhere(source):
    linked = re.findall(r"\]\(([\w./]+\.(?:ipynb|py|md))\)", source.read_text("utf-8"))
    assert not [name for name in linked if not (build.NOTEBOOKS / name).exists()]
