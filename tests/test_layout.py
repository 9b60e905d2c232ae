"""The rooms of the package: an import only ever goes down the list, and nothing heavy is loaded by accident."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tpa_minimal"
# Ground floor first; what each file may import of ours.
MAY_IMPORT = {
    "tpa": set(),
    "baselines": {"tpa"},
    "variants": {"tpa"},
    "memory": set(),
    "flash_decode": {"tpa"},
    "convert": {"tpa", "baselines", "variants"},
    "lessons": set(),
    "data": {"lessons"},
    "train": {"tpa", "baselines", "variants", "memory", "flash_decode", "convert", "data"},
    "bench": {"tpa", "baselines", "variants", "memory", "flash_decode", "convert", "data", "train"},
    "compare": {"tpa", "baselines", "variants", "memory", "flash_decode", "convert", "data", "train", "bench"},
    "plots": {"memory"},
    "checks": {"tpa", "baselines"},
}


def ours(path):
    """Names of our own modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "tpa_minimal"):
            module = (node.module or "").removeprefix("tpa_minimal").strip(".")
            yield from [module.split(".")[0]] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("tpa_minimal."))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_imports_only_go_down(path):
    assert path.stem in MAY_IMPORT, f"{path.name} has no place in the list"
    assert set(ours(path)) <= MAY_IMPORT[path.stem]


def test_no_pickle_anywhere():
    for path in [*PACKAGE.glob("*.py"), *(ROOT / "notebooks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\bimport pickle|torch\.load\(|trust_remote_code=True|\beval\(|\bexec\(",
            text.replace("model.eval()", "").replace(".eval(", ""),
        ), path


def test_dependencies_have_lower_bounds_only():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([\w.\-\[\]]+)(.*)",$', text, re.MULTILINE)
    assert len(listed) > 10
    for name, bound in listed:
        assert not re.search(r"==|<|~=", bound.split(";")[0]), f"{name}{bound}"


def test_every_makefile_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets and {"demo", "test", "lab", "notebooks", "lint", "help"} <= targets
