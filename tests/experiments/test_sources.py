"""Documents out of files of every kind and out of the hub, in bounded memory and bounded time."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pytest
from helpers import SHARED
from pyarrow import parquet

from tpa_minimal.experiments import lessons, sources
from tpa_minimal.experiments.sources import DataError

TEXTS = [f"Story {n}: naïve café, 東京 🙂.\n\nLine two of {n}." for n in range(9)]


def texts(source, scraps: Path) -> list[str]:
    """All texts of a local source."""
    _, documents = sources.local(source)
    return [text for text, _, _ in documents(scraps, None)]


def json_lines(some: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in some).encode()


# ------------------------------------------------------------------------------------------------ kinds of files


@pytest.mark.parametrize(
    "suffix, compress", [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".XZ", lzma.compress)]
)
def test_compressed_files_give_what_plain_ones_give(tmp_path, suffix, compress):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(b"\xef\xbb\xbf" + json_lines(TEXTS)))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(lessons.END_OF_TEXT.join(TEXTS).encode()))
    assert texts(tmp_path, tmp_path) == TEXTS * 2
    assert texts(tmp_path / f"a.jsonl{suffix}", tmp_path) == TEXTS


def test_zstandard_is_read_or_the_missing_package_named(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS)))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(lessons.END_OF_TEXT.join(TEXTS).encode()))
    assert texts(tmp_path, tmp_path) == TEXTS * 2


def test_a_compression_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from fsspec import compression

    monkeypatch.delitem(compression.compr, "zstd", raising=False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setattr("fsspec.utils.infer_compression", lambda name: "zstd")
    with pytest.raises(DataError, match="a.jsonl.zst: decompressing it needs the package zstandard; install it"):
        texts(tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_type_of_text_column_is_read(tmp_path, kind):
    column = pyarrow.array([*TEXTS[:4], None, "", *TEXTS[4:]])
    try:
        column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    except (AttributeError, NotImplementedError):
        pytest.skip(f"pyarrow {pyarrow.__version__} does not make a {kind}")
    parquet.write_table(pyarrow.table({"id": range(11), "text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path, tmp_path) == TEXTS


def test_a_file_s_name_may_be_anything(tmp_path):
    for name in ("a*[b]::c$.jsonl", "umläut é.jsonl", "line\nbreak.jsonl"):
        (tmp_path / name).write_bytes(json_lines(TEXTS))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))).write_bytes(json_lines(TEXTS))
    assert texts(tmp_path, tmp_path) == TEXTS * 4


def test_texts_that_look_like_dates_and_numbers_stay_texts(tmp_path):
    some = ["2024-01-01", "12", "2024-01-01T00:00:00Z", "null"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(some) + b'{"text": "more", "n": {"other": [1, "two"]}}\n')
    assert texts(tmp_path, tmp_path) == [*some, "more"]


# ------------------------------------------------------------------------------------------------ folders


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_bytes(json_lines(TEXTS[:5]))
    (tmp_path / "mine" / "b.jsonl").write_bytes(json_lines(TEXTS[5:]))
    (tmp_path / "mine" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "round").symlink_to(tmp_path / "mine")
    assert texts(tmp_path / "mine", tmp_path) == TEXTS


def test_what_cannot_be_read_in_a_folder_is_named(tmp_path):
    (tmp_path / "fine.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "notes.md").write_text("no data")
    for name, make, message in (
        ("dead.jsonl", lambda path: path.symlink_to(tmp_path / "nowhere"), "dead.jsonl is no regular file"),
        ("pipe.txt", os.mkfifo, "pipe.txt is no regular file"),
        ("more.jsonl.zip", Path.touch, "more.jsonl.zip is no file that can be read; give .parquet, or"),
        ("more.parquet.gz", Path.touch, "more.parquet.gz is no file that can be read"),
    ):
        make(tmp_path / name)
        with pytest.raises(DataError, match=message):
            sources.local(tmp_path)
        (tmp_path / name).unlink()
    assert texts(tmp_path, tmp_path) == TEXTS


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_refused_by_name(tmp_path):
    (tmp_path / "fine.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match="closed cannot be read: .*Permission denied.*; check its permissions"):
        sources.local(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "fine.jsonl").write_bytes(json_lines(TEXTS))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match="closed cannot be read: .*Permission denied.*; check its permissions"):
        sources.local(tmp_path)


def test_files_are_known_by_their_content(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one thing")
    before, stat = sources.local(file)[0], file.stat()
    file.write_text("another's")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and sources.local(file)[0] != before
    file.write_text("one thing")
    assert sources.local(file)[0] == before


# ------------------------------------------------------------------------------------------------ what is wrong


def spoiled(folder: Path) -> dict[str, str]:
    """Files with something wrong, and what is said about each."""
    bad = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), folder / "latin.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, folder / "twice.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "none.parquet")
    parquet.write_table(pyarrow.table({"text": [{"text": "a"}]}), folder / "nested.parquet")
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS) * 50)[:-20])
    (folder / "wrong.txt.gz").write_bytes(b"no gzip at all")
    (folder / "wrong.txt.xz").write_bytes(b"no xz at all")
    (folder / "wide.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    (folder / "deep.jsonl").write_bytes(b'{"text": "a"}\n' + b'{"text":' * 100_000)
    (folder / "digits.jsonl").write_bytes(b'{"text": "a", "n": ' + b"1" * 5000 + b"}")
    return {
        "latin.parquet": "is not UTF-8 text .it holds the byte 0xe9.; save it as UTF-8",
        "twice.parquet": "has 2 columns text, only text, text; rename",
        "none.parquet": "has no column text, only body; rename",
        "nested.parquet": "its column text holds struct<text: string>, not text; write it as strings",
        "short.jsonl.gz": "short.jsonl.gz cannot be read: Compressed file ended",
        "wrong.txt.gz": "wrong.txt.gz cannot be read: Not a gzipped file",
        "wrong.txt.xz": "wrong.txt.xz cannot be read: Input format not supported",
        "wide.jsonl": "is not UTF-8 text .it holds the byte 0xff.",
        "deep.jsonl": "deep.jsonl, line 2: not a JSON object",
        "digits.jsonl": "digits.jsonl, line 1: not a JSON object",
    }


def test_an_empty_table_is_no_damage_and_a_list_is_no_text(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "full.parquet")
    assert texts(tmp_path, tmp_path) == TEXTS
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "lists.parquet")
    with pytest.raises(DataError, match="its column text holds list.*, not text"):
        texts(tmp_path, tmp_path)


def test_a_number_without_end_in_the_header_of_a_page_is_refused_at_once(tmp_path):
    """Read to its end, 20 million bits take minutes."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x" * 40] * 100_000})
    parquet.write_table(table, path, compression=None, use_dictionary=False, data_page_size=10**9)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\x15" + b"\xff" * 3_000_000 + content[3_000_005:])
    start = time.monotonic()
    with pytest.raises(DataError, match="header of a page is damaged"):
        texts(path, tmp_path / "scraps")
    assert time.monotonic() - start < 20


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    for name, message in spoiled(tmp_path).items():
        with pytest.raises(DataError, match=message) as error:
            texts(tmp_path / name, tmp_path)
        assert "\n" not in str(error.value) and name in str(error.value)


# ------------------------------------------------------------------------------------------------ bounded memory

MEASURE = r"""
import re, sys
from tpa_minimal.experiments import sources
_, documents = sources.local(sys.argv[1])
stream = documents(sys.argv[1] + ".scraps", None)
letters = longest = 0
for text, _, _ in stream:
    letters, longest = letters + len(text), max(longest, len(text))
    if letters > float(sys.argv[2]):
        break
stream.close()
peak = re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())
print(letters, longest, int(peak[1]) // 1024)
"""


def measured(path: Path, most: float) -> tuple[int, int, int]:
    """Letters read until there are `most`, letters of the longest document, and the most memory used, in MB."""
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, path, str(most)], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    letters, longest, memory = map(int, child.stdout.split())
    return letters, longest, memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells its memory there")
def test_a_kilobyte_of_parquet_that_decodes_to_gigabytes(tmp_path):
    word = pyarrow.array(["word " * 200_000])
    column = pyarrow.chunked_array([pyarrow.DictionaryArray.from_arrays([0] * 400, word).cast(pyarrow.string())] * 2)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=10**6)
    del column
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    letters, longest, memory = measured(tmp_path / "a.parquet", 20e6)
    assert letters > 20e6 and longest <= sources.PIECE and memory < 1000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells its memory there")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_one_text_of_many_megabytes(tmp_path, name):
    """TPA_FULL=1 takes the full 300 MB."""
    size = 300_000_000 if os.environ.get("TPA_FULL") else 60_000_000
    text = "word and " * (size // 9)
    if name == "a.parquet":
        parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(json_lines([text]) if name == "a.jsonl" else text.encode())
    letters, longest, memory = measured(tmp_path / name, float("inf"))
    assert letters == len(text) and longest <= sources.LONG and memory < (2000 if size > 10**8 else 1000)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 40,
        b"",
        b"\x15\x00\x15\x01\x15\x01\x00",  # sizes of -1
        b"\x15\x00\x18\x01\x01\x15\x02\x00",  # a text for a size
        b"\x1c" * 5000,  # structures in structures
        b"\x15\x00\x15\x02\x15" + b"\xff" * 400 + b"\x00\x00",  # a number of 2,800 bits
        b"\x19\x00",
    ],
)
def test_a_damaged_header_of_a_page_is_one_line(tmp_path, header):
    """Each at the first page of a file whose footer is whole; an empty one means that the file says it is elsewhere."""
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["word " * 2000 + str(i) for i in range(9)]}), file, compression="none")
    column = parquet.ParquetFile(file).metadata.row_group(0).column(0)
    with open(file, "r+b") as opened:
        opened.seek(column.dictionary_page_offset)
        opened.write(header or b"\x00" * 9)
    with pytest.raises(DataError, match=r"a.parquet cannot be read: the header of a page is damaged; mend or remove"):
        texts(file, tmp_path)


def test_a_text_that_would_take_too_much_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 6000)
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a" * 9000, "b" * 9000]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet holds a page of 18,\d+ bytes; divide its texts"):
        texts(tmp_path / "b.parquet", tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a"] * 600 + ["b" * 9000] + ["c"] * 600}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet holds a page of (9|1)\d*,\d+ bytes; divide its texts"):
        texts(tmp_path / "c.parquet", tmp_path)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["fine", "a" * 5900]))
    assert len(texts(tmp_path / "a.jsonl", tmp_path)) == 2
    for some in (["fine", "a" * 6000], ["fine", "a" * 1000 + "é"]):
        (tmp_path / "a.jsonl").write_bytes(json_lines(some))
        with pytest.raises(DataError, match=r"a.jsonl, line 2: has [\d,]+ bytes or more; divide its text"):
            texts(tmp_path / "a.jsonl", tmp_path)


def test_long_texts_come_in_pieces_that_join_to_the_whole(tmp_path):
    text = "".join(f"word{n}{' ' if n % 3 else '  '}" for n in range(400_000)) + "x" * 200_000
    for name, content in (("a.jsonl", json_lines([text])), ("b.txt", text.encode())):
        (tmp_path / name).write_bytes(content)
        pieces = texts(tmp_path / name, tmp_path)
        assert "".join(pieces) == text and len(pieces) > 50 and max(map(len, pieces)) <= sources.LONG
    (tmp_path / "c.txt").write_bytes((text + lessons.END_OF_TEXT).encode() * 2)
    assert "".join(texts(tmp_path / "c.txt", tmp_path)) == text * 2


def test_cutting_changes_no_token():
    from tpa_minimal.experiments.data import load_tokenizer

    tokenizer = load_tokenizer("lessons")
    text = "".join(one for one, _ in (next(lessons.documents(seed)) for seed in range(60)))
    draw = random.Random(0)
    text += "".join(draw.choice(["a", "1", "'", ".", "é", "\n", "\t", " b", " b", " b", "  "]) for _ in range(20_000))
    whole = tokenizer.encode_ordinary(text)
    for most in (50, 97, 1000):
        pieces = sources.cut(text, most)
        assert "".join(pieces) == text and max(map(len, pieces)) <= most
        assert [token for piece in pieces for token in tokenizer.encode_ordinary(piece)] == whole
    assert sources.cut("a" * 10, 4) == ["aaaa", "aaaa", "aa"] and sources.cut(" " * 9, 4) == [" " * 4, " " * 4, " "]


# ------------------------------------------------------------------------------------------------ the hub

CHILD = """
import itertools, pathlib, sys, tempfile
from tpa_minimal.experiments import sources
_, documents = sources.hub()
stream = documents(pathlib.Path(tempfile.mkdtemp()), None)
taken = list(itertools.islice(stream, 40))
stream.close()
if sys.argv[1:]:
    again = documents(pathlib.Path(tempfile.mkdtemp()), taken[24][2])
    assert next(again)[0] == taken[25][0]
    again.close()
print(len(taken))
"""


@pytest.fixture
def address():
    """A hub that answers every third request for data with a 503."""
    if not (SHARED / "hub").exists():
        pytest.skip("no loopback hub beside the project; set TPA_SHARED")
    folder, name = SHARED / "hub" / "fineweb-edu", sources.HUB_REPOSITORY
    command = [sys.executable, SHARED / "hub" / "hub.py", folder, name, "--fail-every", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        yield server.stdout.readline().strip()
        server.terminate()


def test_leaving_after_part_of_a_stream_exits_with_0(address, tmp_path):
    """TPA_FULL=1 tries fifty times."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
    for number in range(50 if os.environ.get("TPA_FULL") else 2):
        command = [sys.executable, "-c", CHILD, *["resume"][number % 2 :]]
        child = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert (child.returncode, child.stdout.strip()) == (0, "40"), child.stderr
        assert "Traceback" not in child.stderr and "ignored" not in child.stderr


class Rows:
    """A data set of three rows, of which one takes its time or fails."""

    def __init__(self, act):
        self.act, self.place = act, 0

    def load_state_dict(self, state):
        self.place = state

    def state_dict(self):
        return self.place

    def __iter__(self):
        for number in range(self.place, 3):
            if number == 1:
                self.act()
            self.place = number + 1
            yield {"text": f"text {number}"}


def test_a_source_that_keeps_us_waiting_is_given_up_on(tmp_path):
    over = threading.Event()
    stream = sources._streamed(lambda: Rows(lambda: over.wait(30)), 0.3, tmp_path, None)
    assert next(stream)[0] == "text 0"
    started = time.monotonic()
    with pytest.raises(
        sources.Interrupted, match="^reading failed after 1 documents: no answer within 0.3 s; call again"
    ):
        next(stream)
    assert time.monotonic() - started < 10
    over.set()


def test_a_source_that_fails_says_so_and_goes_on_where_it_was(tmp_path):
    def fail():
        raise RuntimeError("the line is dead")

    stream = sources._streamed(lambda: Rows(fail), None, tmp_path, None)
    state = next(stream)[2]
    with pytest.raises(
        sources.Interrupted, match="after 1 documents: the line is dead; call again later.*--data lessons$"
    ):
        next(stream)
    assert [text for text, _, _ in sources._streamed(lambda: Rows(int), None, tmp_path, state)] == ["text 1", "text 2"]


def test_what_is_waited_for_is_said(monkeypatch, capsys):
    assert sources.within(None, lambda: 1) == sources.within(5, lambda: 1) == 1
    with pytest.raises(KeyError):
        sources.within(5, lambda: {}[1])
    monkeypatch.setattr(sources.queue.Queue, "get", lambda self, timeout: (_ for _ in ()).throw(sources.queue.Empty))
    with pytest.raises(TimeoutError, match="no answer within 60 s"):
        sources.within(60, lambda: 1)
    assert "waiting for the network, at most 60 s" in capsys.readouterr().out
