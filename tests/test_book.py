"""The book holds every notebook and all its links lead somewhere, in the book and from a student's copy in work/."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jupytext
import pytest
import yaml
from sphinx.util.matching import patfilter
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import book  # noqa: E402
import build  # noqa: E402

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
PAGES = [*build.sources(), NOTEBOOKS / "README.md", NOTEBOOKS / "api.md"]


def files(text):
    """The targets of the links and images in Markdown that lead to a file of the project."""
    targets = ("".join(groups) for groups in LINK.findall(re.sub(r"`[^`\n]*`", "", text)))  # not in code
    return [target for target in targets if not urlsplit(target).scheme and not target.startswith("#")]


def links(path):
    """What a page of PAGES links to."""
    cells = jupytext.read(path, fmt="py:percent").cells if path.suffix == ".py" else []
    return files("\n".join(c.source for c in cells if c.cell_type == "markdown") or path.read_text("utf-8"))


def contents():
    """Every page that _toc.yml names, its patterns resolved as the book resolves them, among the notebooks to be."""
    site = parse_toc_yaml(NOTEBOOKS / "_toc.yml")
    known = [f"{folder}{source.stem}" for source in build.sources() for folder in ("", "solutions/")]
    return [*site, *(name for pattern in site.globs() for name in patfilter(known, pattern))]


def copied(tmp_path):
    """A folder as `make work` leaves it, from a project that has one empty file for each notebook."""
    for source in build.sources():
        for solved in (False, True):
            path = tmp_path / build.target(source, solved).relative_to(ROOT)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("ours", encoding="utf-8")
    shutil.copy(NOTEBOOKS / "README.md", tmp_path / "notebooks")
    return lambda: subprocess.run(["make", "-f", ROOT / "Makefile", "work"], cwd=tmp_path, check=True)


def test_the_table_of_contents_holds_every_notebook_once():
    listed = contents()
    wanted = {f"{folder}{source.stem}" for source in build.sources() for folder in ("", "solutions/")}
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted | {"README", "api"}


def test_nothing_is_executed_when_the_book_is_built():
    config = yaml.safe_load((NOTEBOOKS / "_config.yml").read_text("utf-8"))
    assert config["execute"]["execute_notebooks"] == "off"
    assert "sphinx-mathjax-offline" in config["sphinx"]["extra_extensions"]


def test_the_module_page_holds_every_file_of_the_module():
    named = re.findall(r"automodule:: tpa_minimal\.(\w+)", (NOTEBOOKS / "api.md").read_text("utf-8"))
    files = {path.stem for path in (ROOT / "tpa_minimal").glob("[a-z]*.py")}
    assert sorted(named) == sorted(files - {"files"})  # how files are written concerns nobody who imports the module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files(page):
    built = {build.target(source, solved) for source in build.sources() for solved in (False, True)}
    for target in links(page):
        path = Path(os.path.normpath(NOTEBOOKS / unquote(urlsplit(target).path)))
        assert path in built or path.is_file(), f"{page.name} links to {target}, which is no file"


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_links_of_a_solved_notebook_lead_to_files(source):
    built = {build.target(other, solved) for other in build.sources() for solved in (False, True)}
    cells = build.compose(source, solved=True).cells
    for target in files("\n".join(cell.source for cell in cells if cell.cell_type == "markdown")):
        path = Path(os.path.normpath(NOTEBOOKS / "solutions" / unquote(urlsplit(target).path)))
        assert path in built or path.is_file(), f"the solved {source.stem} links to {target}, which is no file"


def test_a_copy_in_work_keeps_what_a_student_wrote_and_its_links(tmp_path):
    make = copied(tmp_path)
    make()
    notebook = tmp_path / "work" / "01_attention_and_the_kv_cache.ipynb"
    notebook.write_text("mine", encoding="utf-8")
    new = tmp_path / "notebooks" / "99_new.ipynb"
    new.write_text("ours", encoding="utf-8")
    make()
    assert notebook.read_text("utf-8") == "mine" and (tmp_path / "work" / new.name).exists()
    for page in PAGES:
        if page.name == "api.md":
            continue  # a page of the book alone
        for target in links(page):
            path = Path(os.path.normpath(Path("work") / unquote(urlsplit(target).path)))
            kept = (tmp_path if path.parts[0] == "work" else ROOT) / path
            assert kept.is_file(), f"{page.name} links to {target}, which is not there from work/"


def test_docstrings_are_shown_as_typed():
    lines = ["Says `what`.", "", "    code `as` it is", "", "a    b", "c    d", "", "Plain", "text."]
    book.as_typed(lines)
    assert lines == [
        *("Says ``what``.", "", "::", "", "    code `as` it is", "", "::", "", "    a    b", "    c    d", ""),
        *("Plain", "text.", ""),
    ]


class Page(HTMLParser):
    """What a page of the built site links to, can be linked to by, and shows."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.targets, self.fetched, self.images = {""}, [], [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors.add(found.get("id"))
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "img":
            self.images.append(found)
        if tag in ("script", "link"):
            self.fetched.append(found.get("src") or found.get("href") or "")


@pytest.mark.skipif(os.environ.get("TPA_FULL") != "1", reason="builds the book in half a minute: TPA_FULL=1")
def test_the_built_site_reads_offline_and_every_link_of_it_leads_somewhere(tmp_path):
    command = [Path(sys.executable).with_name("jupyter-book"), "build", NOTEBOOKS, "--path-output", tmp_path]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run([*command, "-W", "--keep-going"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    site = tmp_path / "_build" / "html"
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert {f"{name}.html" for name in contents()} <= {path.relative_to(site).as_posix() for path in pages}
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            assert file.exists(), f"{path.name} links to {target}"
            if file in pages:
                assert unquote(parts.fragment) in pages[file].anchors, f"{path.name} links to {target}"
        assert not [target for target in page.fetched if urlsplit(target).netloc], f"{path.name} needs a network"
        for image in page.images:
            alt = image.get("alt", "")
            assert alt and "_images/" not in alt, f"{path.name}: {image.get('src', '')[:60]} has no alt text"
