"""The rooms of the package: an import only ever goes down the list, and nothing heavy is loaded by accident."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tpa_minimal"
MODULE = {
    "tpa": set(),
    "baselines": {"tpa"},
    "variants": {"tpa"},
    "parallel": {"tpa"},
    "memory": set(),
    "files": set(),
    "cpu_decode": {"tpa"},
    "flash_decode": {"tpa"},
    "quantized": {"tpa"},
    "serving": {"tpa"},
    "decode_graph": {"tpa", "flash_decode"},
    "huggingface": {"tpa", "baselines", "variants", "memory", "files"},
}
LABORATORY = [
    "options",
    "watch_memory",
    "lessons",
    "sources",
    "shards",
    "data",
    "checkpoint",
    "processes",
    "settings",
    "models",
    "metrics",
    "generate",
    "report",
    "train",
    "evaluate",
    "bench",
    "recall",
    "contrasts",
    "compare",
]  # each may import those before it
CLASSROOM = ["looks", "diagrams", "explorer", "checks", "grade", "handout"]


def may_import(name):
    """What the file may import of ours, by its dotted name without the package's."""
    room, _, file = name.rpartition(".")
    if not room:
        return MODULE[name]
    below = set(MODULE)
    if room == "experiments":
        return below | {f"experiments.{other}" for other in LABORATORY[: LABORATORY.index(file)]}
    below |= {f"experiments.{other}" for other in LABORATORY}
    if room == "course":
        if file == "grade":  # calls all checkers
            below |= {"course", "course.checks.judging"}
        return below | {f"course.{other}" for other in CLASSROOM[: CLASSROOM.index(file)]}
    return below | {"course.checks.judging", "course.looks"}


def ours(path):
    """Dotted names of our own modules that a file imports, at any depth, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "tpa_minimal"):
            base = (node.module or "").removeprefix("tpa_minimal").strip(".")
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            yield from (name if (PACKAGE / f"{name.replace('.', '/')}.py").exists() else base for name in names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("tpa_minimal.") for a in node.names if a.name.startswith("tpa_minimal."))


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stem not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_go_down(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    assert set(ours(path)) <= may_import(name)


def test_no_file_uses_a_name_with_an_underscore_of_another():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {
            alias.asname or alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tpa_minimal"):
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not node.attr.startswith("_") or node.attr.startswith("__"), (
                    f"{path}: {node.value.id}.{node.attr}"
                )


def test_no_pickle_anywhere():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "notebooks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.stem == "grade":  # runs students' answers, in confined processes: that is its one exec
            assert text.count("exec(compile(") == 1
            text = text.replace("exec(compile(", "")
        assert not re.search(
            r"\bimport pickle|torch\.load\(|trust_remote_code=True|\beval\(|\bexec\(",
            text.replace("model.eval()", "").replace(".eval(", ""),
        ), path


def test_dependencies_have_lower_bounds_only():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([\w.\-\[\]]+)(.*)",$', text, re.MULTILINE)
    assert len(listed) > 10
    for name, bound in listed:
        assert not re.search(r"==|<|~=", bound.split(";")[0]) or name == "jupyter-book", (
            f"{name}{bound}"
        )  # 2 needs a network


def test_every_makefile_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets and {"demo", "test", "lab", "notebooks", "lint", "help"} <= targets
