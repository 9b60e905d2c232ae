"""The lecture: 90 minutes, one message a slide, everything from the notebooks, nothing from a network."""

import base64
import html
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import slides  # noqa: E402

DECK = slides.slides(slides.SOURCE.read_text(encoding="utf-8"))
PLAN = re.search(
    r"\*\*A 90-minute lecture\*\*.*?\n\n", (ROOT / "notebooks" / "README.md").read_text("utf-8"), re.DOTALL
)
# Put at the end of the page: which slides have something that leaves their room, as the page's title.
OVERFLOW = """<script>
const out = [];
slides.forEach((slide, i) => {
  show(i);
  const room = slide.querySelector(".slide").getBoundingClientRect();
  const top = slide.querySelector("h1").getBoundingClientRect().bottom;
  const bottom = slide.querySelector("footer").getBoundingClientRect().top;
  for (const part of slide.querySelectorAll("h1, .body *")) {
    const box = part.getBoundingClientRect(), above = part.closest("h1") ? room.top : top;
    if (box.left < room.left - 1 || box.right > room.right + 1 || box.top < above - 1 || box.bottom > bottom + 1)
      out.push(i + 1);
  }
});
document.title = "overflow: " + [...new Set(out)].join(" ");
</script></body>"""


class Page(HTMLParser):
    """What the page loads, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.images, self.messages = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [found[name] for name in ("src", "href", "srcset", "data") if found.get(name)]
        self.images += [found] if tag == "img" else []
        self.messages += tag == "h1"


@pytest.fixture(scope="module")
def page():
    return slides.page(DECK)


def notebook_text(number):
    (path,) = slides.NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    for cell in cells:
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("text", "")), "".join(output.get("data", {}).get("text/plain", ""))]
    return "\n".join(texts)


def test_about_thirty_slides_of_ninety_minutes_each_with_one_message():
    assert 28 <= len(DECK) <= 34 and sum(slide.minutes for slide in DECK) == 90
    assert all(1 <= slide.minutes <= 5 and len(slide.notes) > 60 for slide in DECK)
    assert len({slide.message for slide in DECK}) == len(DECK) and all(len(slide.message) < 80 for slide in DECK)
    assert all(len(slide.picks) <= 1 for slide in DECK)


def test_the_parts_are_those_of_the_guides_plan():
    ends, total = [], 0
    for part in dict.fromkeys(slide.part for slide in DECK):
        total += sum(slide.minutes for slide in DECK if slide.part == part)
        ends.append(total)
    planned = re.findall(r"^\| (\d+)–(\d+) \|", PLAN[0], re.MULTILINE)
    assert [int(end) for _, end in planned] == ends and [int(begin) for begin, _ in planned] == [0, *ends[:-1]]


def test_most_slides_show_what_a_notebook_computed_and_the_animations_move(page):
    assert sum(bool(slide.picks) for slide in DECK) > 0.8 * len(DECK)
    pictures = [base64.b64decode(image["src"].partition(",")[2]) for image in Page(page).images]
    assert sum(b"acTL" in picture for picture in pictures) >= 4  # the chunk that makes a PNG move


def test_the_page_loads_nothing_and_every_picture_has_alt_text(page):
    found = Page(page)
    assert found.messages == len(DECK)
    assert all(target.startswith("data:image/png;base64,") for target in found.loaded)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(|<link|<iframe", page)
    assert found.images and all(len(image.get("alt", "")) > 30 for image in found.images)


@pytest.mark.parametrize("slide", DECK, ids=lambda slide: slide.message)
def test_numbers_on_a_slide_are_numbers_of_its_notebook(slide):
    said = re.sub(
        r"Theorem 3\.1|Equation 3\.1|[Nn]otebook \d\d",
        "",
        slides.PICK.sub("", slide.message + slide.text + slide.notes),
    )
    known = "".join(notebook_text(number) for _, number, _ in slide.picks)
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", html.unescape(said)):
        assert len(number) == 1 or number.rstrip(",") in known or number == "70", number


def test_words_that_name_no_figure_or_two_are_an_error():
    for kind, words in (("figure", "no such figure"), ("figure", "e"), ("code", "no such cell")):
        with pytest.raises(ValueError, match="it must be one"):
            slides.pick(kind, "02", words)
    with pytest.raises(ValueError, match="has no notes"):
        slides.slides("# Part\n\n## Message\n\ntext\n")


def test_no_slide_overflows_and_the_pdf_has_a_page_for_each(page, tmp_path, capsys):
    lecture = tmp_path / "page.html"
    lecture.write_text(page.replace("</body>", OVERFLOW), encoding="utf-8")
    shown = slides.chromium(lecture, "--window-size=1280,720", "--virtual-time-budget=5000", "--dump-dom")
    if shown is None:
        pytest.skip("no Chromium or Chrome on this machine")
    assert re.search(r"<title>(.*?)</title>", shown.stdout)[1] == "overflow: "
    assert slides.main(tmp_path / "built") == 0
    pdf = (tmp_path / "built" / "lecture.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == len(DECK)
    assert f"{len(DECK)} slides, 90 minutes" in capsys.readouterr().out


def test_without_a_chromium_the_page_is_made_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slides.shutil, "which", lambda name: None)
    assert slides.main(tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["lecture.html"]
    assert "no PDF" in capsys.readouterr().out
