"""The way from documents to batches, against the loopback hub and the genuine vocabulary where those are at hand."""

import functools
import hashlib
import http.server
import importlib.util
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED

from tpa_minimal.experiments import data, lessons, sources

EXCERPT = SHARED / "hub" / "fineweb-edu" / "sample" / "10BT" / "000_00000.parquet"
VOCABULARY = SHARED / "tiktoken"

needs_hub = pytest.mark.skipif(not EXCERPT.exists(), reason="no loopback hub beside the project; set TPA_SHARED")
needs_gpt2 = pytest.mark.skipif(not VOCABULARY.exists(), reason="no genuine gpt2 vocabulary; set TPA_SHARED")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no network beyond this machine."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPA_CACHE", str(folder))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    data.load_tokenizer.cache_clear()


@pytest.fixture
def no_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "no-vocabulary"))
    monkeypatch.setattr(sources, "unreachable", lambda address, seconds: f"{address.split('/')[2]} cannot be reached")
    data.load_tokenizer.cache_clear()
    yield
    data.load_tokenizer.cache_clear()


class Hub:
    """The loopback hub; of its answers with data the first `whole` arrive, and the next `cuts` break off half way."""

    def __init__(self, fail_every: int):
        spec = importlib.util.spec_from_file_location("hub", SHARED / "hub" / "hub.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.server, self.address = module.serve(
            str(SHARED / "hub" / "fineweb-edu"), sources.HUB_REPOSITORY, fail_every=fail_every
        )
        self.statuses, self.bytes_sent, self.whole, self.cuts = Counter(), 0, 0, 0
        hub = self

        class Handler(self.server.RequestHandlerClass):
            def send(self, code, body=b"", **headers):
                hub.statuses[code] += 1
                if code == 206:
                    hub.bytes_sent += len(body)
                    if hub.whole > 0:
                        hub.whole -= 1
                    elif hub.cuts > 0:
                        hub.cuts -= 1
                        return self.cut(body)
                super().send(code, body, **headers)

            def cut(self, body):
                """Promise the whole body, send half of it, and hang up."""
                self.send_response(206)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        self.server.RequestHandlerClass = Handler

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch):
    """Starts hubs; the last one started is the one that HF_ENDPOINT names."""
    hubs = []

    def start(fail_every=0):
        import datasets

        hubs.append(Hub(fail_every))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].address)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hubs[-1].address)  # read when it was imported
        for name in ("STREAMING_READ_RETRY_INTERVAL", "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"):
            monkeypatch.setattr(datasets.config, name, 0, raising=False)
        return hubs[-1]

    yield start
    for one in hubs:
        one.stop()


@functools.cache
def excerpt_texts() -> list[str]:
    from pyarrow import parquet

    return parquet.read_table(EXCERPT)["text"].to_pylist()


def documents_of(tokens: np.ndarray, eot: int) -> list[tuple[int, ...]]:
    """The documents in a split, without the <|endoftext|> that ends each."""
    assert tokens[-1] == eot
    ends = np.flatnonzero(tokens == eot)
    return [tuple(part[part != eot].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


# ------------------------------------------------------------------------------------------------ FineWeb-Edu


@needs_hub
@needs_gpt2
def test_fineweb_edu_arrives_whole_over_a_failing_connection(hub, gpt2, capsys):
    served = hub(fail_every=3)
    served.cuts = 1
    found = data.prepare("fineweb-edu", 1_000_000, progress=False)
    assert served.statuses[503] >= 1 and served.cuts == 0
    # Everything the excerpt holds, by another way: 217,746 tokens and one <|endoftext|> for each of 142 documents.
    encode = found.tokenizer.encode_ordinary
    expected = Counter(tuple(encode(text)) for text in excerpt_texts())
    held = documents_of(found.train, 50256) + documents_of(found.val, 50256)
    assert Counter(held) == expected and len(found.train) + len(found.val) == 217_746 + 142
    assert found.meta["documents"] == {"train": 130, "val": 12}
    assert (found.source, found.vocab_size, found.tokenizer.name) == ("fineweb-edu", 50304, "gpt2")
    assert "holds 217,888 tokens, fewer than the 1,000,000 asked for" in capsys.readouterr().out


@needs_hub
@needs_gpt2
def test_what_was_downloaded_is_not_downloaded_again(hub, gpt2, cache, capsys):
    served = hub()
    found = data.prepare("fineweb-edu", 20_000, progress=False)
    assert len(found.train) + len(found.val) == 20_000
    before = left_in(cache)
    served.stop()
    again = data.prepare("fineweb-edu", 20_000, progress=False)  # and now without a hub
    assert again.meta == found.meta and np.array_equal(again.train, found.train) and left_in(cache) == before
    assert "from the cache" in capsys.readouterr().out
    assert data.prepare("auto", 20_000, progress=False).source == "fineweb-edu"


@needs_hub
@needs_gpt2
def test_auto_takes_fineweb_edu_where_it_can(hub, gpt2):
    hub()
    assert data.prepare("auto", 20_000, progress=False).source == "fineweb-edu"


@needs_gpt2
def test_real_text_with_the_small_tokenizer(hub, gpt2, capsys):
    hub()
    found = data.prepare("fineweb-edu", 20_000, tokenizer="lessons", progress=False)
    assert (found.source, found.vocab_size, found.tokenizer.name) == ("fineweb-edu", 1024, "lessons")
    assert "of the lessons tokenizer\n" in capsys.readouterr().out
    again = data.prepare("auto", 20_000, tokenizer="lessons", progress=False)
    assert again.folder == found.folder
    texts = found.tokenizer.decode(found.train.tolist()).split(data.END_OF_TEXT)
    assert len(texts) > 2 and texts[0] in set(excerpt_texts())


def test_a_tokenizer_that_does_not_exist_is_refused(cache):
    with pytest.raises(data.DataError, match="tokenizer='gpt3': does not exist; choose one of gpt2, lessons"):
        data.prepare("lessons", 20_000, tokenizer="gpt3", progress=False)


@needs_gpt2
def test_the_gpt2_tokenizer_is_the_genuine_one(gpt2):
    tokenizer = data.load_tokenizer("gpt2")
    assert tokenizer.encode_ordinary("Hello world, tensors!") == [15496, 995, 11, 11192, 669, 0]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)


# --------------------------------------------------------------------------------------------- without a network


def test_auto_decides_within_5_seconds_when_looking_up_names_hangs(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    over = threading.Event()

    def hang(*_, **__):
        over.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    started = time.monotonic()
    source, why = data._choose(20_000, "gpt2")
    assert time.monotonic() - started < 4
    over.set()
    assert source == "lessons" and "huggingface.co does not answer within 2.5 s" in why


def test_auto_says_in_one_line_that_it_uses_the_lessons_and_why(monkeypatch, capsys):
    started = time.monotonic()
    found = data.prepare("auto", 5_000, progress=False)
    assert time.monotonic() - started < 5
    lines = capsys.readouterr().out.splitlines()
    assert found.source == "lessons" and len(lines) == 1
    assert "the built-in lessons" in lines[0] and "not FineWeb-Edu, since 127.0.0.1:9 cannot be reached" in lines[0]


def test_offline_mode_is_respected(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)  # any attempt to connect would fail loudly
    assert data.prepare("auto", 5_000, progress=False).source == "lessons"
    assert "since HF_HUB_OFFLINE is set" in capsys.readouterr().out
    with pytest.raises(data.DataError, match="HF_HUB_OFFLINE is set; connect to the network, or use --data lessons"):
        data.prepare("fineweb-edu", 5_000, progress=False)


def test_fineweb_edu_without_a_network_fails_in_one_line_with_the_remedy(cache):
    with pytest.raises(data.DataError, match="cannot be reached.*--data lessons") as error:
        data.prepare("fineweb-edu", 5_000, progress=False)
    assert "\n" not in str(error.value) and left_in(cache) == []


def test_a_hub_without_the_data_set_counts_as_none(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert "answers 501" in sources.hub_problem(seconds=5)
    server.shutdown()
    server.server_close()


def test_gpt2_without_a_network_fails_in_one_line_with_the_remedy(no_gpt2):
    with pytest.raises(data.DataError, match="gpt2 tokenizer is unavailable.*TIKTOKEN_CACHE_DIR.*--data lessons$"):
        data.load_tokenizer("gpt2")
    with pytest.raises(data.DataError, match='\'gpt3\' does not exist; choose "gpt2" or "lessons"'):
        data.load_tokenizer("gpt3")


# ------------------------------------------------------------------------------------------------ shards


def test_a_request_is_kept_and_reused(cache):
    first = data.prepare("lessons", 20_000, progress=False)
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
    again = data.prepare("lessons", 20_000, progress=False)
    assert again.meta == first.meta and again.folder == first.folder
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == stamps
    assert sorted(path.name for path in first.folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert json.loads((first.folder / "meta.json").read_text())["tokens"] == {
        "train": len(first.train),
        "val": len(first.val),
    }
    assert len(first.train) + len(first.val) == 20_000 and first.train.dtype == np.uint16
    others = [data.prepare("lessons", 20_001, progress=False), data.prepare("lessons", 20_000, seed=1, progress=False)]
    assert len({other.meta["checksum"] for other in (first, *others)}) == 3


def test_the_lessons_in_the_shards_are_the_lessons(cache):
    found = data.prepare("lessons", 20_000, progress=False)
    decode = found.tokenizer.decode
    for split, side in (("train", False), ("val", True)):
        held = [decode(list(ids)) for ids in documents_of(getattr(found, split), 1023)]
        expected = (text for text, held_out in lessons.documents(0) if held_out == side)
        pairs = list(zip(held, expected))
        assert all(text == right for text, right in pairs[:-1]) and pairs[-1][1].startswith(pairs[-1][0])
        assert len(pairs) == found.meta["documents"][split] > 10


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("train.bin", lambda path: os.truncate(path, 1000), r"train.bin holds 1000 bytes where \d+ tokens were"),
        ("val.bin", lambda path: path.unlink(), r"val.bin holds 0 bytes where \d+ tokens were"),
        ("val.bin", lambda path: path.write_bytes(path.read_bytes()[:-2] + b"\0\0"), r"val.bin has SHA-256 .* where"),
        ("meta.json", lambda path: path.write_text("{"), "meta.json cannot be read"),
        ("meta.json", lambda path: path.write_text("[]"), "meta.json cannot be read"),
        (
            "meta.json",
            lambda path: path.write_text(path.read_text().replace("vocab_size", "size")),
            "meta.json cannot be read",
        ),
    ],
)
def test_a_damaged_shard_is_refused_with_the_remedy(cache, name, spoil, message):
    found = data.prepare("lessons", 5_000, progress=False)
    spoil(found.folder / name)
    with pytest.raises(data.DataError, match=message) as error:
        data.prepare("lessons", 5_000, progress=False)
    assert f"delete the folder {found.folder}" in str(error.value) and "\n" not in str(error.value)


def rewrite(folder: Path, **changes) -> None:
    """Change the sidecar; a change of "request" is one within it."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["request"] |= changes.pop("request", {})
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def spoil_a_token(folder: Path) -> None:
    """A token beyond the vocabulary, with a sum to match."""
    ids = np.fromfile(folder / "val.bin", dtype=np.uint16)
    ids[0] = 60_000
    ids.tofile(folder / "val.bin")
    meta = json.loads((folder / "meta.json").read_text())
    rewrite(folder, sha256=meta["sha256"] | {"val": hashlib.sha256(ids).hexdigest()})


def empty_the_validation_split(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "val.bin").write_bytes(b"")
    none = {"val": 0}, hashlib.sha256(b"").hexdigest()
    rewrite(folder, tokens=meta["tokens"] | none[0], documents=meta["documents"] | none[0], sha256=meta["sha256"])


@pytest.mark.parametrize(
    "lie, message",
    [
        (lambda folder: rewrite(folder, vocab_size=64), "vocab_size 64 is not that of the tokenizer lessons"),
        (lambda folder: rewrite(folder, vocab_size=2**40), "vocab_size 1099511627776 is not that of"),
        (lambda folder: rewrite(folder, vocab_size=[]), r"vocab_size \[\] is not that of"),
        (lambda folder: rewrite(folder, tokenizer="gpt2"), "it contradicts itself"),
        (lambda folder: rewrite(folder, tokenizer="x", request={"tokenizer": "x"}), "it contradicts itself"),
        (lambda folder: rewrite(folder, source=5), "it contradicts itself"),
        (lambda folder: rewrite(folder, tokens={"train": True, "val": 1}), "where True tokens were written"),
        (lambda folder: rewrite(folder, tokens={"train": 10**30, "val": 1}), "where 1000000000000000"),
        (lambda folder: rewrite(folder, documents={"train": 1, "val": 1}), "not hold documents of the tokenizer"),
        (lambda folder: rewrite(folder, sha256={"train": 5, "val": 5}), "has SHA-256 .* where 5… was written"),
        (lambda folder: rewrite(folder, request={"seed": 3}), "is of another request"),
        (lambda folder: (folder / "meta.json").write_text('{"tokens":' * 100_000), "meta.json cannot be read"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe{"), "meta.json cannot be read"),
        (spoil_a_token, "val.bin does not hold documents of the tokenizer lessons"),
        (empty_the_validation_split, "val.bin holds 0 bytes where 0 tokens were written"),
    ],
)
def test_a_sidecar_that_lies_is_refused(cache, lie, message):
    found = data.prepare("lessons", 5_000, progress=False)
    lie(found.folder)
    with pytest.raises(data.DataError, match=message) as error:
        data.prepare("lessons", 5_000, progress=False)
    assert "delete the folder" in str(error.value) and "\n" not in str(error.value)


def test_shards_of_another_tokenizer_are_refused(cache, gpt2):
    """A sidecar that consistently calls the lessons' tokens gpt2's."""
    found = data.prepare("lessons", 5_000, progress=False)
    if data._gpt2_cached():
        rewrite(found.folder, tokenizer="gpt2", vocab_size=50304, request={"tokenizer": "gpt2"})
        with pytest.raises(data.DataError, match="does not hold documents of the tokenizer gpt2"):
            data.load(found.folder)


def test_without_a_home_folder_the_remedy_is_said(monkeypatch):
    monkeypatch.delenv("TPA_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does where no home is known
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: "~/.cache/tpa-minimal")
    with pytest.raises(data.DataError, match="there is no home folder; set TPA_CACHE to a folder"):
        data.prepare("lessons", 5_000, progress=False)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TPA_CACHE", str(tmp_path / "file"))
    with pytest.raises(data.DataError, match="^writing .* failed: .*; make room, or set TPA_CACHE elsewhere$"):
        data.prepare("lessons", 5_000, progress=False)


def test_the_usual_cache_is_the_system_s(monkeypatch):
    import platformdirs

    monkeypatch.delenv("TPA_CACHE")
    assert data.cache_folder() == Path(platformdirs.user_cache_dir("tpa-minimal", appauthor=False))
    monkeypatch.setenv("TPA_CACHE", "~/mine")
    assert data.cache_folder() == Path.home() / "mine"


@needs_gpt2
def test_auto_goes_on_with_the_lessons_where_the_vocabulary_cannot_be_kept(hub, tmp_path, monkeypatch, capsys):
    import tiktoken

    def refuse(name):
        raise PermissionError(13, "Permission denied", str(tmp_path / "closed"))

    hub()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "closed"))
    reach = sources.unreachable
    monkeypatch.setattr(
        sources, "unreachable", lambda address, seconds: None if "openai" in address else reach(address, seconds)
    )
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    data.load_tokenizer.cache_clear()
    assert data.prepare("auto", 5_000, progress=False).source == "lessons"
    line = "not FineWeb-Edu, since the gpt2 tokenizer is unavailable: [Errno 13] Permission denied"
    assert line in capsys.readouterr().out
    with pytest.raises(data.DataError, match="gpt2 tokenizer is unavailable: .*Permission denied.*TIKTOKEN_CACHE_DIR"):
        data.load_tokenizer("gpt2")


@needs_gpt2
def test_a_vocabulary_that_is_cut_short_counts_as_none(tmp_path, monkeypatch):
    for file in VOCABULARY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert data._gpt2_cached()
    (tmp_path / file.name).write_bytes(b"cut short")
    assert not data._gpt2_cached()


@pytest.mark.parametrize("name", ["lessons", pytest.param("gpt2", marks=needs_gpt2)])
def test_spaces_and_runs_of_one_letter_are_encoded(tmp_path, gpt2, name):
    odd = ["a" + " " * 1_100_000 + "b", "x" * 400_000, "\n" * 200_000 + "end", " " * 1_100_000, "a few words " * 9]
    started = time.monotonic()
    found = data.prepare(write(tmp_path, "odd.jsonl", odd), 10**7, tokenizer=name, progress=False)
    assert time.monotonic() - started < 50
    text = found.tokenizer.decode(found.train.tolist()) + found.tokenizer.decode(found.val.tolist())
    assert text.count("x") >= 400_000 and text.count("a few words") == 9


def test_printing_never_fails(monkeypatch):
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="iso-8859-2"))
    sources.say("one ± and caf\udce9")
    assert raw.getvalue() == b"data: one \\xb1 and caf\\udce9\n"
    assert str(data.DataError("caf\udce9")) == "caf\\udce9"


def test_builders_of_the_same_thing_do_not_disturb_each_other(cache):
    found, gate = [], threading.Barrier(3)

    def build():
        gate.wait()
        found.append(data.prepare("lessons", 30_000, progress=False))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len({one.meta["checksum"] for one in found}) == 1
    assert [path.name for path in cache.iterdir()] == [found[0].folder.name]


@pytest.mark.parametrize("tokens", [0, -5, 999, 1.5e6, True, "many"])
def test_a_senseless_number_of_tokens_is_refused(tokens):
    with pytest.raises(data.DataError, match=re.escape(f"tokens={tokens!r}: must be a whole number, 1000 or more")):
        data.prepare("lessons", tokens)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_senseless_seed_is_refused(seed):
    with pytest.raises(data.DataError, match=f"seed={seed!r}: must be a whole number"):
        data.prepare("lessons", 5_000, seed=seed)


# ------------------------------------------------------------------------------------------------ local files


def write(folder: Path, name: str, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        parquet.write_table(table, path, row_group_size=7)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n\n" for text in texts), encoding="utf-8")
    else:
        path.write_text("<|endoftext|>".join(texts), encoding="utf-8-sig")
    return path


STORIES = [f"Story {n}: naïve café, 東京 🙂.\n\nLine two of {n}. " + "word " * n for n in range(40)]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt"])
def test_a_local_file_gives_its_documents(tmp_path, no_gpt2, capsys, name):
    found = data.prepare(write(tmp_path / "mine", name, STORIES), 100_000, progress=False)
    held = documents_of(found.train, 1023) + documents_of(found.val, 1023)
    assert sorted(found.tokenizer.decode(list(ids)) for ids in held) == sorted(STORIES)
    out = capsys.readouterr().out
    assert "tokens of the lessons tokenizer; no gpt2 tokenizer, since" in out and "fewer than the 100,000" in out


@needs_gpt2
def test_a_local_folder_is_read_whole_with_gpt2_where_it_can_be_had(tmp_path, gpt2):
    folder = tmp_path / "mine"
    write(folder / "b", "x.jsonl", STORIES[:15])
    write(folder, "y.txt", STORIES[15:30])
    write(folder, "z.parquet", STORIES[30:])
    write(folder, "notes.md", ["not read"])
    found = data.prepare(str(folder), 100_000, progress=False)
    held = documents_of(found.train, 50256) + documents_of(found.val, 50256)
    assert sorted(found.tokenizer.decode(list(ids)) for ids in held) == sorted(STORIES)
    write(folder, "y.txt", STORIES[15:29])  # a changed file is another request
    assert data.prepare(str(folder), 100_000, progress=False).folder != found.folder


def test_a_plain_text_is_divided_at_blank_lines(tmp_path, no_gpt2):
    paragraphs = [f"Paragraph {n}. " + "It goes on and on. " * 30 + "\n" for n in range(50)]
    (tmp_path / "book.txt").write_text("\n".join(paragraphs))
    found = data.prepare(tmp_path / "book.txt", 100_000, progress=False)
    assert sum(found.meta["documents"].values()) == 13  # four paragraphs pass 2,000 letters
    held = documents_of(found.train, 1023) + documents_of(found.val, 1023)
    held = [found.tokenizer.decode(list(ids)) for ids in held]
    assert sum(text.count("Paragraph") for text in held) == 50
    assert all(text.lstrip().startswith("Paragraph") for text in held)


def test_the_split_is_by_the_text_alone(tmp_path, no_gpt2):
    stories = [f"Story {n}" for n in range(600)]
    sides = []
    for order in (stories, stories[::-1], stories[100:]):
        found = data.prepare(write(tmp_path, "s.jsonl", order), 100_000, progress=False)
        val = {found.tokenizer.decode(list(ids)) for ids in documents_of(found.val, 1023)}
        train = {found.tokenizer.decode(list(ids)) for ids in documents_of(found.train, 1023)}
        assert not val & train and val | train == set(order)
        sides.append(val)
    assert sides[0] == sides[1] and sides[2] == sides[0] & set(stories[100:])
    assert 0.04 < len(sides[0]) / 600 < 0.12


def test_a_few_documents_still_give_both_splits(tmp_path, no_gpt2):
    for n in range(2, 7):
        found = data.prepare(write(tmp_path, f"{n}.jsonl", STORIES[:n]), 100_000, progress=False)
        held = [documents_of(found.train, 1023), documents_of(found.val, 1023)]
        assert len(held[0]) + len(held[1]) == n and found.meta["documents"] == {
            "train": len(held[0]),
            "val": len(held[1]),
        }
        texts = sorted(found.tokenizer.decode(list(ids)) for ids in held[0] + held[1])
        assert texts == sorted(STORIES[:n])


def test_wrong_files_are_refused_in_one_line(tmp_path, no_gpt2, cache):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "cut.jsonl").write_text('{"text": "fi')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "none.txt").write_text(" \n\n ")
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing.txt": "missing.txt' is no file or folder; give a path that exists, or auto, fineweb-edu or lessons",
        "other.parquet": "has no column text, only body, id; rename",
        "numbers.parquet": "its column text holds int64, not text; write it as strings",
        "deep.jsonl": "deep.jsonl, line 1: not a JSON object",
        "torn.parquet": "torn.parquet cannot be read: Parquet magic bytes not found",
        "bad.jsonl": 'bad.jsonl, line 2: not a JSON object with a string "text"; mend it or leave it out',
        "cut.jsonl": "cut.jsonl, line 1: not a JSON object",
        "latin.txt": "latin.txt is not UTF-8 text .it holds the byte 0xe9.; save it as UTF-8",
        "one.txt": "1 different documents with text in 5,000 tokens are too few to split",
        "none.txt": "0 different documents with text in 5,000 tokens are too few to split",
        "page.html": "page.html is no file that can be read; give .parquet, or .jsonl or .txt",
        "empty": "empty does not hold a file",
    }.items():
        with pytest.raises(data.DataError, match=message) as error:
            data.prepare(tmp_path / name, 5_000, progress=False)
        assert "\n" not in str(error.value)
    assert left_in(cache) == []


# ------------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def token_data(tmp_path_factory) -> data.TokenData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data.prepare("lessons", 20_000, progress=False)


def test_batch_depends_on_its_arguments_alone(token_data):
    arguments = ("train", 7, 4, 32, 3)
    first = token_data.batch(*arguments)
    np.random.seed(1)
    torch.manual_seed(1)
    token_data.batch("train", 8, 4, 32, 3)
    again = data.load(token_data.folder).batch(*arguments)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for other in (("train", 8, 4, 32, 3), ("train", 7, 4, 32, 4)):
        assert not torch.equal(token_data.batch(*other)[0], first[0])
    # The very windows, whatever the versions of Python and NumPy: a resumed run goes on where it stopped.
    assert first[0][:, 0].tolist() == [677, 115, 275, 423]


def test_targets_are_the_inputs_moved_on_by_one_within_the_split(token_data):
    for split in ("train", "val"):
        tokens = torch.from_numpy(getattr(token_data, split).astype(np.int64))
        windows = tokens.unfold(0, 33, 1)
        inputs, targets = token_data.batch(split, 0, 16, 32, 0)
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape == (16, 32)
        for x, y in zip(inputs, targets):
            match = (windows[:, :32] == x).all(1).nonzero()[:, 0]
            assert any(torch.equal(windows[start, 1:], y) for start in match)


def test_random_windows_reach_both_ends_and_no_further(token_data):
    val = token_data.val[:40]
    small = data.TokenData(token_data.folder, "small", token_data.tokenizer, 1024, val, val, {})
    inputs, targets = small.batch("val", 0, 400, 36, 0)
    starts = {tuple(row.tolist()) for row in torch.cat([inputs[:, :1], targets], 1)}
    assert starts == {tuple(val[s : s + 37].tolist()) for s in range(4)}
    inputs, targets = small.batch("val", 0, 2, 39, 0)  # a single window is there
    assert inputs[0].tolist() == val[:39].tolist() and targets[1].tolist() == val[1:].tolist()


@pytest.mark.parametrize(
    "read", [lambda d, n: d.batch("val", 0, 2, n, 0), lambda d, n: list(d.validation_batches(2, n, 1))]
)
def test_a_split_shorter_than_a_window_is_refused(token_data, read):
    n = len(token_data.val)
    read(token_data, n - 1)
    with pytest.raises(
        data.DataError, match=f"sequences of {n} tokens do not fit: split val of lessons holds {n} tokens"
    ):
        read(token_data, n)


def test_an_unknown_split_is_refused(token_data):
    with pytest.raises(data.DataError, match="split 'test' does not exist"):
        token_data.batch("test", 0, 1, 8, 0)


def test_validation_batches_are_the_same_windows_side_by_side(token_data):
    batches = list(token_data.validation_batches(3, 50, 10**6))
    inputs, targets = (torch.cat(parts).flatten() for parts in zip(*batches))
    count = (len(token_data.val) - 1) // 50 * 50
    assert np.array_equal(inputs, token_data.val[:count]) and np.array_equal(targets, token_data.val[1 : count + 1])
    assert all(x.shape == (3, 50) for x, _ in batches[:-1])
    few = list(token_data.validation_batches(3, 50, 2))
    assert len(few) == 2 and all(torch.equal(x, y) for x, y in zip(itertools.chain(*few), itertools.chain(*batches)))


def test_import_stays_light():
    script = (
        "import sys, tpa_minimal.experiments.data\n"
        "print(*{'datasets', 'tiktoken', 'matplotlib', 'pyarrow', 'huggingface_hub', 'requests'} & sys.modules.keys())"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr


# ------------------------------------------------------------------------------------------------ recall


def oracle(tokenizer, changed=False):
    """A model that reads the text: it knows what each keeper has, and otherwise predicts nothing."""

    def model(tokens):
        logits = torch.zeros(*tokens.shape, tokenizer.n_vocab)
        for row, ids in zip(logits, tokens.tolist()):
            told = tokenizer.decode(ids[1:]).split("\nQuestion:")[0]
            has = dict(re.findall(r"(\w+) has( an? \w+ \w+\.)", told))
            for end in range(1, len(ids)):
                last = re.search(r"Answer: (\w+) has(.*)$", tokenizer.decode(ids[1 : end + 1]))
                if last and has[last[1]].startswith(last[2]) and has[last[1]] != last[2]:
                    row[end, tokenizer.encode_ordinary(has[last[1]][len(last[2]) :])[0]] = 50
        return logits

    return model


@pytest.mark.parametrize("name", ["lessons", pytest.param("gpt2", marks=needs_gpt2)])
def test_recall_scores_a_reader_1_and_a_guesser_about_chance(name, gpt2):
    tokenizer = data.load_tokenizer(name)
    probe = data.recall_probe(tokenizer, 6, distance=30, n_facts=3)
    assert data.score_recall(oracle(tokenizer), probe) == (1.0, 1.0, pytest.approx(1 / 3))
    assert data.score_recall(oracle(tokenizer), probe, batch_size=5) == (1.0, 1.0, pytest.approx(1 / 3))
    many = data.recall_probe(data.load_tokenizer("lessons"), 400, distance=10, n_facts=4)
    guess = data.score_recall(lambda tokens: torch.randn(*tokens.shape, 1024), many, batch_size=400)
    assert guess.exact == 0 and abs(guess.choice - guess.chance) < 0.07  # 3 standard deviations of 400 guesses


def test_a_model_that_always_takes_the_last_fact_is_no_better_than_chance():
    tokenizer = data.load_tokenizer("lessons")
    probe = data.recall_probe(tokenizer, 300, distance=0, n_facts=4)
    share = (probe.correct == 3).float().mean().item()
    assert abs(share - 0.25) < 0.08


def test_a_recall_probe_keeps_its_distance_and_its_names(gpt2):
    tokenizer = data.load_tokenizer("lessons")
    encode = tokenizer.encode_ordinary
    for distance in (0, 25, 90):
        probe = data.recall_probe(tokenizer, 20, distance=distance, n_facts=5, seed=2)
        assert len(probe) == 20 and probe.tokens.shape[:2] == (20, 5)
        for n, text in enumerate(probe.texts):
            told, asked = text.split("\nQuestion: ")
            person, answer = re.search(r"Answer: (\w+) has (.*)$", asked).groups()
            statement = f"{person} has {answer}"
            assert told.count(statement) == 1 and len(re.findall(r"\w+ has an? \w+ \w+\.", told)) == 5
            between = len(encode(told.split(statement)[1]))
            if probe.correct[n] == 4:  # otherwise the other facts alone may be longer
                assert distance <= between < distance + 20
            assert between >= distance
            row = probe.tokens[n, probe.correct[n]].tolist()
            assert row[0] == tokenizer.eot_token
            assert tokenizer.decode(row[1:]).replace("<|endoftext|>", "") == text
            start, length = probe.answer_start[n], probe.answer_length[n, probe.correct[n]]
            assert tokenizer.decode(row[start : start + length]) == " " + answer
    again, other = (data.recall_probe(tokenizer, 20, distance=90, n_facts=5, seed=seed) for seed in (2, 3))
    assert torch.equal(again.tokens, probe.tokens) and again.texts == probe.texts != other.texts


@pytest.mark.parametrize("wrong", [{"n_probes": 0}, {"distance": -1}, {"n_facts": 1}, {"n_facts": 13}])
def test_a_senseless_probe_is_refused(wrong):
    with pytest.raises(data.DataError, match=re.escape(f"{[*wrong][0]}={[*wrong.values()][0]}")):
        data.recall_probe(data.load_tokenizer("lessons"), **wrong)
