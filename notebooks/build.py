"""Build the student's and the solved notebooks from their one source, notebooks/src/NN_name.py.

    python notebooks/build.py               build and execute all notebooks
    python notebooks/build.py 03 05         only these
    python notebooks/build.py --stamp       write the repository's address of pyproject.toml into every badge, set-up
                                            cell and the README, keeping all outputs
    python notebooks/build.py 03 --figures DIR    also write the figures of the student's notebook to DIR

A source is a jupytext percent script. The builder fills in three things: `{badge}` in the title cell, the cell tagged
`setup`, and `# {{tpa: name name}}` in a cell tagged `tpa`, which becomes the text of those definitions of
tpa_minimal/tpa.py. Cells tagged `exercise` go to the student's notebook only, those tagged `solution` to the solved.
"""

import argparse
import ast
import base64
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
BUDGET = re.compile(r"the code runs in at most (\d+) s on two CPU cores")
DIRECTIVE = re.compile(r"^# \{\{tpa: (.+)\}\}$", re.MULTILINE)
INSTALLED_FROM = re.compile(r"git\+(https://[^\s\"]+)")

FOLDED = "# The code of this picture or table"
SETUP = """\
import importlib
import pathlib
import subprocess
import sys
from importlib.util import find_spec

NEEDED = ["tpa_minimal", "matplotlib", "ipywidgets", "datasets", "tiktoken"]
here = pathlib.Path.cwd()
places = [here, pathlib.Path("/content"), pathlib.Path("/content/drive/MyDrive")]
wheels = [str(wheel) for place in places for wheel in place.glob("tpa_minimal-*.whl")]
clones = [str(place) for place in here.parents if (place / "tpa_minimal" / "tpa.py").exists()]
if find_spec("tpa_minimal") is None and not wheels:
    sys.path += clones[:1]
if not all(map(find_spec, NEEDED)):  # pip keeps the torch and numpy that are there
    source = [*wheels, *clones, "git+{repository}@v{version}"][0]
    package = f"{{source}}[course,experiments]" if wheels or clones else (
        f"tpa-minimal[course,experiments] @ {{source}}")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], capture_output=True)
    importlib.invalidate_caches()
if not all(map(find_spec, NEEDED)):
    class Missing(Exception):
        def _render_traceback_(self):
            return [str(self)]

    raise Missing("The course's package is not installed: go online and run this cell again, put its "
                  "wheel beside this notebook, or open the notebook from a clone of {repository}.")

import torch
"""
DEVICE = """
device = "cuda" if torch.cuda.is_available() else "cpu"
print(f"Running on {{device}}. The code of this notebook takes at most {seconds} s on two CPU cores.")"""
NO_DEVICE = """
print("The code of this notebook takes at most {seconds} s on two CPU cores.")"""


def sources() -> list[Path]:
    """All notebook sources, in course order."""
    return sorted((NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))


def target(source: Path, solved: bool) -> Path:
    """Where the notebook built from `source` is kept."""
    return NOTEBOOKS / ("solutions" if solved else ".") / f"{source.stem}.ipynb"


def repository() -> str:
    """The repository's public address; pyproject.toml is the only place that states it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^Repository = "(.+)"$', text, re.MULTILINE)[1]


def version() -> str:
    """The package's version, as pyproject.toml states it."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def badge(path: str) -> str:
    """A link that opens the notebook in Colab; empty where the repository is not on GitHub, which Colab needs."""
    if not repository().startswith("https://github.com/"):
        return ""
    colab = repository().replace("https://github.com", "https://colab.research.google.com/github")
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/blob/main/{path})"


def definitions() -> dict[str, str]:
    """The text of each top-level definition of tpa_minimal/tpa.py, by name."""
    text = (ROOT / "tpa_minimal" / "tpa.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def compose(source: Path, solved: bool) -> nbformat.NotebookNode:
    """The notebook that `source` describes, not executed."""
    notebook = jupytext.read(source, fmt="py:percent")
    known = definitions()
    leave_out = "exercise" if solved else "solution"
    cells = [cell for cell in notebook.cells if leave_out not in cell.metadata.get("tags", [])]
    seconds = BUDGET.search(cells[0].source)
    if not seconds:
        raise SystemExit(f"{source.name}: the title cell must say 'the code runs in at most N s on two CPU cores'")
    path = target(source, solved).relative_to(ROOT).as_posix()
    uses_device = any(re.search(r"\bdevice\b", cell.source) for cell in cells[2:] if cell.cell_type == "code")
    for number, cell in enumerate(cells):
        tags = cell.metadata.get("tags", [])
        if number == 0:
            cell.source = cell.source.replace("{badge}", badge(path))
        if "setup" in tags:
            text = SETUP + (DEVICE if uses_device else NO_DEVICE)
            cell.source = text.format(repository=repository(), version=version(), seconds=seconds[1])
        if "tpa" in tags:
            cell.source = DIRECTIVE.sub(lambda m: "\n\n\n".join(known[name] for name in m[1].split()), cell.source)
        if solved and cell.cell_type == "markdown":  # one folder deeper; links to notebooks stay among the solved
            cell.source = re.sub(r"\]\((\.\./|README\.md)", r"](../\1", cell.source).replace("](solutions/", "](")
        if "hide-input" in tags:  # folded, its first line is what JupyterLab shows of it, and does not wrap
            cell.source = f"{FOLDED}\n{cell.source}"
        kept = {key: cell.metadata[key] for key in ("tags", "claim") if key in cell.metadata}
        if {"hide-input", "setup"} & set(tags):  # JupyterLab folds the code; jupyter-book reads the tag
            kept["tags"] = sorted({*tags, "hide-input"})
            kept["jupyter"] = {"source_hidden": True}
        cell.metadata = nbformat.from_dict(kept)
        cell.id = f"cell-{number:03d}"
    notebook.cells = cells
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode, solved: bool) -> None:
    """Run all cells in order, and keep only what belongs in the repository: text, tables and PNG figures."""
    os.environ["TPA_STRICT"] = "1" if solved else "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `make test` runs them
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)


def tidy(outputs: list) -> list:
    """The outputs without live widgets, each stream in one piece. Exits where a cell wrote to stderr."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        # A live widget cannot be shown from a file: code-hosting pages call it an invalid notebook. Its text can.
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if output.output_type == "stream" and output.name == "stderr":
            raise SystemExit(f"a cell wrote to stderr:\n{output.text}")
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text  # how a stream is cut into pieces depends on timing
        else:
            kept.append(output)
    return kept


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all."""
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def stamp() -> None:
    """Renew the text of all built notebooks and the README's addresses, keeping the outputs."""
    for source in sources():
        for solved in (False, True):
            path = target(source, solved)
            built = nbformat.read(path, as_version=4)
            fresh = compose(source, solved)
            if [cell.id for cell in built.cells] != [cell.id for cell in fresh.cells]:
                raise SystemExit(f"{path.name} has other cells than its source: run `make notebooks` instead")
            for old, new in zip(built.cells, fresh.cells):
                old.source = new.source
            write(built, path)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace(INSTALLED_FROM.search(text)[1], repository()), encoding="utf-8")


def write_figures(notebook: nbformat.NotebookNode, stem: str, folder: Path) -> None:
    """Write every PNG of a built notebook to `folder`, for looking at."""
    folder.mkdir(parents=True, exist_ok=True)
    for cell in notebook.cells:
        for k, output in enumerate(cell.get("outputs", [])):
            for picture in re.findall(r"data:image/png;base64,([^\"]+)", output.get("data", {}).get("text/html", "")):
                (folder / f"{stem[:2]}_{cell.id}_{k}.png").write_bytes(base64.b64decode(picture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help="numbers of notebooks, such as 03; all if none is given")
    parser.add_argument("--stamp", action="store_true")
    parser.add_argument("--figures", type=Path)
    arguments = parser.parse_args()
    if arguments.stamp:
        return stamp()
    chosen = [s for s in sources() if not arguments.which or s.stem[:2] in arguments.which]
    if not chosen:
        raise SystemExit(f"no notebook source in {NOTEBOOKS / 'src'} starts with {' or '.join(arguments.which)}")
    for source in chosen:
        for solved in (False, True):
            path = target(source, solved)
            print(f"building {path.relative_to(ROOT)}", file=sys.stderr)
            notebook = compose(source, solved)
            execute(notebook, solved)
            path.parent.mkdir(exist_ok=True)
            write(notebook, path)
            if arguments.figures and not solved:
                write_figures(notebook, source.stem, arguments.figures)


if __name__ == "__main__":
    main()
