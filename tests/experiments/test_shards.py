"""From documents to shards: the split, interruptions, locks, leftovers, and what is refused at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tpa_minimal.experiments import data, shards, sources


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no network and no gpt2."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPA_CACHE", str(folder))
    monkeypatch.setattr(sources, "unreachable", lambda address, seconds: "nothing can be reached")
    return folder


def prepare(path: Path, tokens: int = 100_000) -> data.TokenData:
    return data.prepare(path, tokens, tokenizer="lessons", progress=False)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(found: data.TokenData, split: str) -> list[str]:
    ids, eot = getattr(found, split), found.tokenizer.eot_token
    assert ids[-1] == eot
    return found.tokenizer.decode(ids.tolist()).split(data.END_OF_TEXT)[:-1]


def share(found: data.TokenData) -> float:
    return len(found.val) / (len(found.train) + len(found.val))


# ------------------------------------------------------------------------------------------------ the split


def above(share: float, count: int) -> list[str]:
    """Texts whose hash is above this share."""
    texts = (f"Story {n} " + "and so on " * 20 for n in range(10**6))
    chosen = (text for text in texts if sources.position(text) >= share * sources.POSITIONS)
    return [next(chosen) for _ in range(count)]


def below(share: float, count: int) -> list[str]:
    texts = (f"Tale {n} " + "and so on " * 20 for n in range(10**6))
    chosen = (text for text in texts if sources.position(text) < share * sources.POSITIONS)
    return [next(chosen) for _ in range(count)]


def test_two_copies_of_a_document_are_on_one_side(tmp_path):
    texts = above(0.08, 12)
    texts.append(min(texts, key=sources.position))
    found = prepare(write(tmp_path / "a.jsonl", texts))
    train, val = documents(found, "train"), documents(found, "val")
    assert not set(train) & set(val) and Counter(train + val) == Counter(texts) and 0 < share(found) < 0.2


def test_documents_that_all_hash_to_one_side_are_still_divided(tmp_path):
    for name, texts in {"low": below(0.08, 2), "high": above(0.9, 2), "many": below(0.05, 30)}.items():
        found = prepare(write(tmp_path / f"{name}.jsonl", texts))
        train, val = documents(found, "train"), documents(found, "val")
        assert not set(train) & set(val) and Counter(train + val) == Counter(texts) and 0 < share(found) <= 0.5


def test_a_giant_among_small_ones_does_not_become_the_validation_split(tmp_path):
    giant = " ".join(f"word{n}" for n in range(200_000))
    for order in ([giant, "A small text."], ["A small text.", giant]):
        found = prepare(write(tmp_path / "a.jsonl", order), 300_000)
        assert len(found.train) + len(found.val) == 300_000 and 0.02 <= share(found) <= 0.25
        pieces = documents(found, "train") + documents(found, "val")
        whole = [piece for piece in pieces if len(piece) > sources.PIECE // 2]
        assert max(map(len, pieces)) <= sources.PIECE and len(whole) > 10
        assert all(piece in giant for piece in pieces if piece != "A small text.")


def test_one_long_document_is_cut_in_two_and_one_short_one_is_refused(tmp_path):
    text = " ".join(f"word{n}" for n in range(2000))
    found = prepare(write(tmp_path / "a.jsonl", [text]))
    [train], [val] = documents(found, "train"), documents(found, "val")
    assert text.startswith(train) and text.endswith(val) and 0 < len(text) - len(train + val) < 10
    assert 0.07 < share(found) < 0.09
    with pytest.raises(data.DataError, match="^1 different documents with text in 100,000 tokens are too few"):
        prepare(write(tmp_path / "b.jsonl", ["The same."] * 9))
    with pytest.raises(data.DataError, match="^1 different documents"):
        prepare(write(tmp_path / "c.jsonl", [text, text]))  # a half would stand in both splits


@pytest.mark.parametrize("seed", range(20))
def test_no_text_is_on_both_sides_and_the_share_is_sensible(seed):
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 60))
    rows = np.zeros(n, dtype=shards.ROW)
    rows["position"] = draw.integers(0, sources.POSITIONS, n)[draw.integers(0, n, n)]  # with copies
    rows["length"] = 1 + (draw.pareto(0.7, n) * 20).clip(0, 10**6)
    if len(np.unique(rows["position"])) < 2:
        return
    lengths, held_out = shards._held_out(rows.copy())
    assert lengths.sum() == rows["length"].sum() and 0 < lengths[held_out].sum() < lengths.sum()
    if len(lengths) == n:
        assert not set(rows["position"][held_out]) & set(rows["position"][~held_out])
    else:
        assert len(lengths) == n + 1 and held_out.sum() == 1
    if (copies := np.unique(rows["position"], return_counts=True)[1]).max() == 1 and rows["length"].max() >= 1000:
        assert 0.02 <= lengths[held_out].sum() / lengths.sum() <= 0.25, copies


# ------------------------------------------------------------------------------------------------ interruptions

RUN = """
import sys
from tpa_minimal.experiments import data, shards
shards.SAVE_EVERY = 0.02
data.prepare(sys.argv[1], int(sys.argv[2]), tokenizer="lessons", progress=False)
"""


def child(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("kind", ["lessons", "files"])
def test_what_was_interrupted_goes_on_and_gives_the_same_shards(cache, tmp_path, monkeypatch, capsys, kind, end):
    source, tokens = "lessons", 1_000_000
    if kind == "files":
        texts = [f"Story {n} " + f"and so on, {n} times, " * (n % 50) for n in range(7_000)]
        (tmp_path / "mine").mkdir()
        for part in range(4):
            write(tmp_path / "mine" / f"{part}.jsonl", texts[part::4])
        source = tmp_path / "mine"
    process = child(source, tokens)
    wait_for(lambda: list(cache.glob(".making-*/state.json")), process)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 134)
    [state] = cache.glob(".making-*/state.json")
    held = json.loads(state.read_text())["tokens"]
    assert 0 < held < tokens and not list(cache.glob("*/train.bin"))
    resumed = data.prepare(source, tokens, tokenizer="lessons", progress=False)
    assert f"going on at {held:,} tokens" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == [resumed.folder.name]  # nothing is left beside it
    monkeypatch.setenv("TPA_CACHE", str(tmp_path / "other"))
    fresh = data.prepare(source, tokens, tokenizer="lessons", progress=False)
    assert "going on" not in capsys.readouterr().out
    assert fresh.meta["checksum"] == resumed.meta["checksum"] and sum(fresh.meta["tokens"].values()) == tokens


def failing(after: int | None, asked: list):
    """A source of 2,000 documents that fails once it has given `after` of them."""

    def stream(scraps, state):
        asked.append(state)
        for number in range(state or 0, 2000):
            if number == after:
                raise sources.Interrupted("the line is dead; call again")
            text = f"Document {number} " + "and so on " * (number % 7)
            yield text, sources.position(text), number + 1

    return {"source": "made", "files": []}, stream


def test_a_source_that_fails_at_document_700_goes_on_there(cache, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "local", lambda source: failing(700, asked))
    with pytest.raises(data.DataError, match="the line is dead"):
        prepare("made")
    [state] = cache.glob(".making-*/state.json")
    for name in ("ids.bin", "documents.bin"):  # a killed process may have written more than its last state says
        with open(state.with_name(name), "ab") as file:
            file.write(b"more" * 9)
    monkeypatch.setattr(sources, "local", lambda source: failing(None, asked))
    found = prepare("made")
    assert asked == [None, 700] and sum(found.meta["documents"].values()) == 2000
    monkeypatch.setenv("TPA_CACHE", str(tmp_path / "other"))
    assert prepare("made").meta["checksum"] == found.meta["checksum"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda work: (work / "state.json").write_text("[" * 100_000),
        lambda work: (work / "state.json").write_text("5"),
        lambda work: (work / "state.json").write_text('{"tokens": "many"}'),
        lambda work: os.truncate(work / "ids.bin", 10),
        lambda work: os.truncate(work / "documents.bin", 12 * 5 + 1),
        lambda work: (work / "documents.bin").unlink(),
    ],
)
def test_a_damaged_beginning_is_begun_again(cache, monkeypatch, spoil):
    asked = []
    monkeypatch.setattr(sources, "local", lambda source: failing(700, asked))
    with pytest.raises(data.DataError):
        prepare("made")
    spoil(next(cache.glob(".making-*/state.json")).parent)
    monkeypatch.setattr(sources, "local", lambda source: failing(None, asked))
    assert sum(prepare("made").meta["documents"].values()) == 2000 and asked == [None, None]


def test_a_full_disk_says_so_and_the_next_call_goes_on(cache, monkeypatch, capsys):
    class FullDisk:
        def __init__(self, file):
            self.file, self.left = file, 20_000

        def write(self, content):
            self.left -= len(content)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def opened(path, mode="r"):
        return FullDisk(open(path, mode)) if Path(path).name == "ids.bin" else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "open", opened, raising=False)
        with pytest.raises(data.DataError, match="No space left on device; make room, or set TPA_CACHE elsewhere"):
            data.prepare("lessons", 50_000, progress=False)
    assert not list(cache.glob("*/train.bin"))
    found = data.prepare("lessons", 50_000, progress=False)
    assert "going on at" in capsys.readouterr().out and sum(found.meta["tokens"].values()) == 50_000


@pytest.mark.parametrize("tokens", [10**14, 10**29, 10**400])
def test_more_than_the_disk_can_hold_is_refused_at_once(cache, tokens):
    with pytest.raises(data.DataError, match=f"^tokens={tokens}: takes [0-9,]+ MB of disk, and .* MB free; ask for"):
        data.prepare("lessons", tokens, progress=False)
    assert list(cache.iterdir()) == []


# ------------------------------------------------------------------------------------------------ several at once


def test_the_second_waits_for_the_first_and_takes_what_it_made(cache, monkeypatch, capsys):
    asked, gate, found = [], threading.Event(), []

    def local(source):
        identity, stream = failing(None, asked)

        def slow(scraps, state):
            gate.wait(30)
            yield from stream(scraps, state)

        return identity, slow

    monkeypatch.setattr(sources, "local", local)
    threads = [threading.Thread(target=lambda: found.append(prepare("made"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline, out = time.monotonic() + 30, ""
    while "waiting for another process" not in out and time.monotonic() < deadline:
        out += capsys.readouterr().out
        time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join()
    assert "waiting for another process that prepares the same data" in out
    assert len(found) == 2 and len(asked) == 1 and found[0].meta == found[1].meta


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signal")
def test_a_killed_process_holds_no_lock(cache):
    process = child("lessons", 1_000_000)
    wait_for(lambda: list(cache.glob(".making-*/state.json")), process)
    process.kill()
    process.communicate()
    started = time.monotonic()
    with shards._locked(next(cache.glob(".making-*/state.json")).parent):
        assert time.monotonic() - started < 1


def test_what_was_begun_is_cleared_a_week_later_and_only_what_is_our_own(cache):
    week = 7 * 24 * 3600
    for name, age in ((shards._own("old"), week + 9), (shards._own("new"), week - 60), (".making-99-x", 9 * week)):
        (cache / name).mkdir(parents=True)
        for path in (cache / name / "ids.bin", cache / f"{name}.lock"):
            path.write_bytes(b"12")
            os.utime(path, (time.time() - age,) * 2)
        os.utime(cache / name, (time.time() - age,) * 2)
    (cache / ".making-x").write_text("a stray file")
    data.prepare("lessons", 2_000, progress=False)
    left = {path.name for path in cache.iterdir() if path.name.startswith(".making")}
    new = shards._own("new")
    assert left == {new, f"{new}.lock", ".making-99-x", ".making-99-x.lock", ".making-x"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_shared_cache_is_readable_for_others(cache):
    mask = os.umask(0o022)
    try:
        found = data.prepare("lessons", 2_000, progress=False)
    finally:
        os.umask(mask)
    assert found.folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in found.folder.iterdir()} == {0o644}
