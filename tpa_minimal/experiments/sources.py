"""Documents from FineWeb-Edu, from local files and from the lessons, and where to go on after each of them.

Each source is a pair: what identifies it, and a function that takes a folder for scraps and a state, None for the
beginning, and yields (text, position, state after it). A position is a whole number below POSITIONS that decides which
side of a split the text is on. Nothing in a data set is ever executed or unpickled.
"""

import codecs
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tpa_minimal.experiments import lessons, options
from tpa_minimal.files import sha256

HUB_REPOSITORY, HUB_CONFIGURATION = "HuggingFaceFW/fineweb-edu", "sample-10BT"
KINDS = re.compile(r"\.(parquet|(?:jsonl|txt)(\.(?:gz|bz2|xz|zst|lz4))?)$", re.IGNORECASE)
SIMILAR_KINDS = re.compile(r"\.(parquet|jsonl|txt)\.(gz|bz2|xz|zst|lz4|zip|7z|rar|lzma|z|lz|sz|br)$", re.IGNORECASE)
POSITIONS = 2**48
LONG, PIECE = 2**17, 2**15  # characters: a document that is longer than LONG becomes several of PIECE
BLOCK = 2**20  # characters or bytes that are read at a time
MOST_BYTES = 3 * 2**27  # of one text in a file; parsed, it is in memory four times
PATIENCE, LONGEST_WAIT = 120.0, 3600.0  # seconds: for an answer of the network; for what may rightly take long

Documents = Iterator[tuple[str, int, object]]


class DataError(ValueError):
    """Data that is unavailable or unusable; the message is one line that names the value and the remedy."""

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # not every file's name is a text


class Interrupted(DataError):
    """A failure that may pass: what was made before it is kept, for the next call to go on from."""


def say(line: str) -> None:
    """Print a line about data."""
    options.say(f"data: {line}")


def short(error: BaseException) -> str:
    """The first line of an error's message, for use within a line of ours."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:159] + "…"


def cut(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, cut before the space that begins a word, which no token reaches over."""
    if len(text) <= most:
        return [text]
    return re.findall(rf"(?s).{{1,{most}}}(?:\Z|(?= \S))|.{{1,{most}}}", text)


def position(text: str) -> int:
    """Where a hash puts this text below POSITIONS: the same everywhere, for ever."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest(), "big")


# ------------------------------------------------------------------------------------------------- the network


def within(seconds: float | None, action: Callable):
    """The action's result or error; TimeoutError after so many seconds, for a request that has no time-out."""
    if seconds is None:
        return action()
    answers = queue.Queue()

    def act():
        try:
            answers.put((action(), None))
        except Exception as error:
            answers.put((None, error))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    for wait in (min(seconds, 10), max(seconds - 10, 0)):
        try:
            result, error = answers.get(timeout=wait)
            break
        except queue.Empty:
            if wait == 10:
                say(f"waiting for the network, at most {seconds:g} s")
        except KeyboardInterrupt:
            thread.join(5)  # what it has open can then be closed before the interpreter ends
            raise
    else:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if error is not None:
        raise error
    return result


def unreachable(address: str, seconds: float) -> str | None:
    """Why an address does not answer well within `seconds`, or None if it does."""
    import requests

    def ask():
        with requests.get(address, timeout=seconds, stream=True) as response:
            return None if response.ok else f"answers {response.status_code}"

    try:
        problem = within(seconds, ask)  # looking up a name has no time-out of its own
    except (TimeoutError, requests.Timeout):
        problem = f"does not answer within {seconds:g} s"
    except Exception:
        problem = "cannot be reached"
    return problem and f"{re.sub(r'^https?://|(?<=[^/])/[^/].*', '', address)} {problem}"


def hub_identity() -> dict:
    """What FineWeb-Edu's documents depend on."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return {
        "source": "fineweb-edu",
        "repository": HUB_REPOSITORY,
        "configuration": HUB_CONFIGURATION,
        "endpoint": endpoint,
    }


def hub_problem(seconds: float) -> str | None:
    """Why FineWeb-Edu cannot be read from the hub, or None if it seems that it can."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    return unreachable(f"{hub_identity()['endpoint']}/api/datasets/{HUB_REPOSITORY}", seconds)


def hub() -> tuple[dict, Callable]:
    """FineWeb-Edu, streamed from the Hugging Face Hub."""

    def opened():
        import datasets

        name = HUB_CONFIGURATION
        return datasets.load_dataset(HUB_REPOSITORY, name=name, split="train", streaming=True, columns=["text"])

    return hub_identity(), functools.partial(_streamed, opened, PATIENCE)


def _streamed(open_dataset: Callable, patience: float | None, scraps: Path, state: dict | None) -> Documents:
    """The texts of an iterable data set of the library `datasets`, which tries again and knows where it stopped.

    What was opened is closed and collected here: leaving the interpreter before that can abort it.
    """
    import datasets

    number, rows, dataset = 0, iter(()), None
    usual, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, scraps  # there may be no home folder
    try:
        dataset = within(patience, open_dataset)
        if state is not None:
            dataset.load_state_dict(state)
        rows = iter(dataset)
        wait = LONGEST_WAIT if patience and state else patience  # going back may take reading all that was before
        while row := within(wait, functools.partial(next, rows, None)):
            number, wait, text = number + 1, patience, row["text"]
            pieces = cut(text, PIECE) if text and len(text) > LONG else [text]
            for last, piece in enumerate(pieces, 1 - len(pieces)):
                if piece and piece.strip():
                    yield piece, position(piece), None if last else dataset.state_dict()
    except DataError:
        raise
    except Exception as error:  # which HTTP library is beneath, and so its errors, differs between versions
        remedy = "call again later, and it goes on from there, or use --data lessons"
        raise Interrupted(f"reading failed after {number} documents: {short(error)}; {remedy}") from error
    finally:
        datasets.config.HF_DATASETS_CACHE = usual
        with contextlib.suppress(ValueError, AttributeError):  # a thread that did not come back is executing it
            rows.close()
        del rows, dataset
        gc.collect()


# ----------------------------------------------------------------------------------------------- the lessons


def from_lessons(seed: int) -> tuple[dict, Callable]:
    """The built-in lessons of a seed."""

    def documents(scraps: Path, state: int | None) -> Documents:
        # A hash of the text would put the same names on both sides, so the lessons choose theirs by the names.
        stream = itertools.islice(lessons.documents(seed), state or 0, None)
        for number, (text, held_out) in enumerate(stream, (state or 0) + 1):
            yield text, 0 if held_out else POSITIONS - 1, number

    return {"source": "lessons", "version": lessons.VERSION, "seed": seed}, documents


# ------------------------------------------------------------------------------------------------- local files


def local(source: str | Path) -> tuple[dict, Callable]:
    """A file or a folder of files, known by their names and contents."""
    path = Path(source)
    try:
        if not str(source) or not path.exists():
            known = "auto, fineweb-edu or lessons"
            raise DataError(f"data source {str(source)!r} is no file or folder; give a path that exists, or {known}")
        found = _found(path)
        if (size := sum(file.stat().st_size for file in found)) > 10**9:
            say(f"reading {size / 1e9:,.1f} GB in {path} once, to know them again")
        sums = [[str(file.relative_to(path)), sha256(file)] for file in found]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {short(error)}; check its permissions") from error

    def opened():
        # Read by `_rows`: the library's own builders hold a whole row group, chunk or line, so that half a kilobyte of
        # parquet can take 5 GB; they read dates out of texts, and do not say which line is wrong.
        import datasets

        return datasets.IterableDataset.from_generator(_rows, gen_kwargs={"paths": [str(file) for file in found]})

    return {"source": os.path.realpath(path), "files": sums}, functools.partial(_streamed, opened, None)


def _found(path: Path) -> list[Path]:
    found, seen = [path], set()
    if path.is_dir():
        found = []

        def refuse(error):
            raise error

        for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:  # a link to what has been or is being read
                folders.clear()
            else:
                found += [Path(folder, name) for name in names if KINDS.search(name) or SIMILAR_KINDS.search(name)]
            seen.add(real)
    remedy = "give .parquet, or .jsonl or .txt, which may be compressed as .gz, .bz2, .xz, .zst or .lz4"
    for file in found:
        if not KINDS.search(file.name):
            raise DataError(f"{file} is no file that can be read; {remedy}")
        if not file.is_file():
            raise DataError(f"{file} is no regular file; remove it, or give the path of the file itself")
    if not found:
        raise DataError(f"{path} does not hold a file that can be read; {remedy}")
    return sorted(found)


def _rows(paths: list[str]) -> Iterator[dict[str, str]]:
    """Texts of a few BLOCKs at most: what is longer comes in several."""
    for path in map(Path, paths):
        kind = KINDS.search(path.name)[1].lower()
        try:
            for text in {"p": _parquet_texts, "j": _json_texts, "t": _plain_texts}[kind[0]](path):
                yield {"text": text}
        except DataError:
            raise
        except UnicodeDecodeError as error:
            wrong = f"{error.object[error.start]:#x}"
            raise DataError(f"{path} is not UTF-8 text (it holds the byte {wrong}); save it as UTF-8") from error
        except Exception as error:  # of pyarrow, or of any decompressor
            kept = Interrupted if getattr(error, "errno", None) else DataError
            raise kept(f"{path} cannot be read: {short(error)}; mend or remove it, or check the disk") from error


def _parquet_texts(path: Path) -> Iterator[str]:
    from pyarrow import DictionaryType, parquet

    with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as opened:
        names = opened.schema_arrow.names
        if names.count("text") != 1:
            problem = f"{names.count('text') or 'no'} column{'s' * ('text' in names)} text, only {', '.join(names)}"
            raise DataError(f"{path} has {problem:.120}; rename the one that holds the texts")
        kind = opened.schema_arrow.field("text").type
        held = kind.value_type if isinstance(kind, DictionaryType) else kind
        if str(held) not in ("string", "large_string", "string_view"):
            raise DataError(f"{path}: its column text holds {kind}, not text; write it as strings")
        largest = 1
        for group in map(opened.metadata.row_group, range(opened.num_row_groups)):
            for column in map(group.column, range(group.num_columns if group.num_rows else 0)):
                if column.path_in_schema.split(".")[0] == "text":
                    largest = max(largest, *_page_sizes(path, column))
        if largest > MOST_BYTES:  # a page is in memory as a whole, whatever is read of it
            raise DataError(f"{path} holds a page of {largest:,} bytes; divide its texts, or write smaller pages")
        # As many texts as 64 MiB hold, were each as long as a page: a few kilobytes can decode to gigabytes.
        most = min(max(1, 2**26 // largest), 2**16)
        for batch in opened.iter_batches(batch_size=most, columns=["text"], use_threads=False):
            for value in () if batch.column(0).null_count == len(batch) else batch.column(0):  # or millions of none
                buffer = memoryview(getattr(value, "value", value).as_buffer() or b"")
                yield from codecs.iterdecode((buffer[i : i + BLOCK] for i in range(0, len(buffer), BLOCK)), "utf-8")


def _page_sizes(path: Path, column) -> Iterator[int]:
    """Bytes of a column chunk's pages, decompressed, by their headers, which pyarrow does not show."""
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    with open(path, "rb") as file:
        file.seek(start)
        while file.tell() < start + column.total_compressed_size:
            try:
                header = _thrift(file, 12)  # PageHeader: 2 and 3 are the sizes before and after compression
                size, stored = header[2], header[3]
                if not 0 <= min(size, stored) <= max(size, stored) < 2**31:
                    raise ValueError(f"sizes of {size} and {stored} bytes")
            except (LookupError, ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path} cannot be read: the header of a page is damaged; mend or remove it") from error
            yield size
            file.seek(stored, os.SEEK_CUR)


def _thrift(file: BinaryIO, kind: int) -> dict[int, object] | int | None:
    """A value in Thrift's compact protocol, of the kinds in a page's header: a structure, a whole number, or passed."""

    def number() -> int:
        value = 0
        for shift in range(0, 70, 7):  # the seven lower bits of each byte; the eighth says that another follows
            byte = file.read(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        return value

    if kind in (4, 5, 6):  # zigzag: 0, -1, 1, -2, ...
        value = number()
        return value >> 1 ^ -(value & 1)
    if kind == 12:
        fields, name = {}, 0
        while head := file.read(1)[0]:
            name = name + (head >> 4) if head >> 4 else _thrift(file, 4)
            fields[name] = _thrift(file, head & 15)
        return fields
    if kind not in (1, 2, 3, 7, 8):
        raise ValueError("the header of a page holds a list")
    file.seek({1: 0, 2: 0, 3: 1, 7: 8}[kind] if kind != 8 else number(), os.SEEK_CUR)
    return None


def _json_texts(path: Path) -> Iterator[str]:
    with _opened(path) as lines:
        for number in itertools.count(1):
            if not (line := lines.readline(MOST_BYTES + 1)):
                return
            # One character outside ASCII makes all take four bytes in memory.
            plain = line.isascii() and b"\\u" not in line
            if len(line) > (MOST_BYTES if plain else MOST_BYTES // 6):
                raise DataError(f"{path}, line {number}: has {len(line):,} bytes or more; divide its text")
            if not line.strip():
                continue
            line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise DataError(
                    f'{path}, line {number}: not a JSON object with a string "text"; mend it or leave it out'
                )
            yield from (text[i : i + BLOCK] for i in range(0, len(text), BLOCK))


def _plain_texts(path: Path) -> Iterator[str]:
    """A text file's documents: divided by <|endoftext|> where that occurs, else at blank lines every 2,000 letters."""
    kept, held, divided = len(lessons.END_OF_TEXT), "", False
    with _opened(path) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig")
        while not divided and (block := lines.read(BLOCK)):
            divided, held = lessons.END_OF_TEXT in held + block, block[-kept:]
    held, parts, length = "", [], 0
    with _opened(path) as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig")
        while divided and (block := lines.read(BLOCK // 16)):
            *ended, held = (held + block).split(lessons.END_OF_TEXT)
            yield from ended
            if len(held) > BLOCK:
                yield held[:-kept]
                held = held[-kept:]
        while not divided and (line := lines.readline(BLOCK)):
            if length > BLOCK or (length >= 2000 and not line.strip()):
                yield "".join(parts)
                parts, length = [], 0
            parts.append(line)
            length += len(line)
    yield held + "".join(parts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, decompressed as its name says."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    how = infer_compression(path.name)
    if how not in compr and KINDS.search(path.name)[2]:
        package = "zstandard" if path.suffix.lower() == ".zst" else path.suffix[1:]
        raise DataError(f"{path}: decompressing it needs the package {package}; install it, or decompress the file")
    with open(path, "rb") as raw:
        yield io.BufferedReader(compr[how](raw, mode="r")) if how else raw
