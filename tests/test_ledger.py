"""Each claim of the ledger points at a notebook cell and a test that exist."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from paper_ledger import LEDGER  # noqa: E402


@pytest.mark.parametrize("row", LEDGER, ids=lambda row: f"{row.notebook[:2]}-{row.claim}")
def test_the_cell_and_the_test_exist(row):
    notebook = nbformat.read(ROOT / "notebooks" / f"{row.notebook}.ipynb", as_version=4)
    claims = [cell.metadata.get("claim") for cell in notebook.cells]
    assert row.claim in claims, f"{row.notebook} has no cell with claim={row.claim!r}, only {set(claims) - {None}}"
    path, _, name = row.test.partition("::")
    functions = {
        n.name for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)
    }
    assert name in functions, f"{path} has no test {name}"
    assert name.startswith("test_")


def test_the_course_teaches_the_paper():
    assert {row.notebook[:2] for row in LEDGER} >= {f"{n:02d}" for n in range(1, 8)}


def test_every_claim_in_a_notebook_is_in_the_ledger():
    written = {(row.notebook, row.claim) for row in LEDGER}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "claim" in cell.metadata:
                assert (path.stem, cell.metadata.claim) in written
