"""Build the 90-minute lecture from notebooks/slides.md and the built notebooks' own figures, cells and outputs.

    python notebooks/slides.py              write _build/slides/lecture.html, and lecture.pdf where Chromium is found
    python notebooks/slides.py FOLDER       write them there

`# Part` begins a part and `## Message` a slide. Between prose, `{figure 03: words}` stands for the figure of notebook
03 whose alt text has these words, `{code 03: words}` for the code cell that has them, and `{output 03: words}` for
the output of a cell that has them. `> **3 min.** ...` are the speaker's notes. The page is one file and loads nothing.
"""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from build import NOTEBOOKS, ROOT
from docutils.utils.math.latex2mathml import tex2mathml
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

SOURCE = NOTEBOOKS / "slides.md"
PICK = re.compile(r"^\{(figure|code|output) (\d\d): (.+)\}$", re.MULTILINE)
PLACE = re.compile(r"<!--\{(figure|code|output) (\d\d): (.+)\}-->")
NOTES = re.compile(r"^> \*\*(\d+) min\.\*\* (.+(?:\n> .*)*)", re.MULTILINE)
IMAGE = re.compile(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"[^>]*>')
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome", "microsoft-edge",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")  # fmt: skip


@dataclass
class Slide:
    """One slide: the part of the lecture, its message, its Markdown, the minutes, and what the speaker says."""

    part: str
    message: str
    text: str
    minutes: int
    notes: str
    picks: list[tuple[str, str, str]] = field(default_factory=list)  # (kind, number of the notebook, words)


def slides(source: str) -> list[Slide]:
    """The slides of a source, in order; raises ValueError for one without notes or minutes."""
    found, part = [], ""
    for piece in re.split(r"^(?=#{1,2} )", source, flags=re.MULTILINE)[1:]:
        heading, _, text = piece.partition("\n")
        if heading.startswith("# "):
            part = heading[2:]
            continue
        notes = NOTES.search(text)
        if not notes:
            raise ValueError(f"the slide {heading[3:]!r} has no notes: end it with `> **2 min.** what you say`")
        said = re.sub(r"\n> ?", "\n", notes[2])
        text = NOTES.sub("", text).strip()
        found.append(Slide(part, heading[3:], text, int(notes[1]), said, PICK.findall(text)))
    return found


def pick(kind: str, number: str, words: str) -> str:
    """The HTML of the one figure, code cell or output that has these words; raises ValueError unless it is one."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    found = []
    for cell in cells:
        if kind == "code" and words in "".join(cell["source"]):
            code = highlight("".join(cell["source"]), PythonLexer(), HtmlFormatter(cssclass="code"))
            found.append(code)
        for output in cell["outputs"] if kind != "code" else []:
            data = {name: "".join(text) for name, text in output.get("data", {}).items()}
            shown, plain = data.get("text/html", ""), data.get("text/plain", "".join(output.get("text", "")))
            if kind == "figure":
                found += [image[0] for image in IMAGE.finditer(shown) if words in html.unescape(image[1])]
            elif words in plain and not IMAGE.search(shown):
                found.append(f'<div class="output">{shown}</div>' if shown else f"<pre>{html.escape(plain)}</pre>")
    if len(found) != 1:
        raise ValueError(f"{{{kind} {number}: {words}}}: {len(found)} of {path.name} have these words; it must be one")
    return found[0]


def rendered(markdown: str) -> str:
    """Markdown as HTML, formulas as MathML, pictures of the repository as part of it."""

    def mathml(tex: str, options: dict) -> str:
        return tex2mathml(tex, as_block=options["display_mode"])

    parser = MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin, renderer=mathml)
    text = parser.render(PICK.sub(lambda match: f"<!--{match[0]}-->", markdown))
    text = PLACE.sub(lambda match: pick(*match.groups()), text)  # picked HTML has blank lines, which end Markdown's

    def embedded(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((NOTEBOOKS / match[1]).read_bytes()).decode()}"'

    return re.sub(r'src="(images/[^"]+)"', embedded, text)


def page(deck: list[Slide]) -> str:
    """The whole lecture as one HTML page."""
    sections, begin = [], 0
    for number, slide in enumerate(deck, 1):
        end = begin + slide.minutes
        sections.append(
            f'<section id="{number}" aria-label="Slide {number} of {len(deck)}"><div class="slide">'
            f'<h1>{rendered(slide.message)[3:-5]}</h1><div class="body">{rendered(slide.text)}</div>'
            f"<footer><span>{html.escape(slide.part)}</span><span>{number}</span></footer></div>"
            f"<aside><b>Minutes {begin} to {end}.</b> {rendered(slide.notes)}</aside></section>"
        )
        begin = end
    template = (NOTEBOOKS / "slides.html").read_text(encoding="utf-8")
    colours = HtmlFormatter(cssclass="code").get_style_defs(".code")
    for name, text in (("colours", colours), ("sections", "\n".join(sections))):
        template = template.replace(f"<!--{name}-->", text)
    return template


def chromium(lecture: Path, *options: str) -> subprocess.CompletedProcess | None:
    """Open a page without a window in a Chromium of this machine; None if it has none."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *options, lecture.resolve().as_uri()]
    return browser and subprocess.run(command, capture_output=True, text=True, timeout=300)


def main(folder: Path = ROOT / "_build" / "slides") -> int:
    deck = slides(SOURCE.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    lecture = folder / "lecture.html"
    lecture.write_text(page(deck), encoding="utf-8")
    print(f"{lecture}: {len(deck)} slides, {sum(slide.minutes for slide in deck)} minutes")
    pdf = lecture.with_suffix(".pdf").resolve()
    if chromium(lecture, "--no-pdf-header-footer", f"--print-to-pdf={pdf}") is None:
        print("no PDF, since no Chromium or Chrome was found here: print the page from a browser")
        return 0
    print(pdf if pdf.exists() else "no PDF, since Chromium could not write it: print the page from a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
