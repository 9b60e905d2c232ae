"""Files that are written whole or not at all, and JSON that is read with suspicion."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


class FileError(ValueError):
    """A file that cannot be what it should be; the message names it and says what is wrong."""


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make a file beside `path`, and give it that name once it is complete and on disk.

    Raises what `write` raises, and OSError, with whatever stood at `path` as it was.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def regular(path: str | os.PathLike) -> Path:
    """The path. Raises OSError for a folder, and for a pipe or a device, of which reading may never end."""
    if (path := Path(path)).exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    return path


def sha256(file: str | os.PathLike) -> str:
    """The sum of a file's content."""
    digest = hashlib.sha256()
    with open(regular(file), "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_folder(folder: str | os.PathLike) -> None:
    """Make a folder if need be. Raises OSError unless files can be made in it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike, limit: int = 2**26) -> object:
    """The value of a JSON file of at most `limit` bytes.

    Raises FileError for what is larger, not UTF-8, not JSON, or nested too deep, and OSError if it cannot be read.
    """
    size = regular(path).stat().st_size
    if size > limit:
        raise FileError(f"{path}: has {size:,} bytes where at most {limit:,} make sense")
    return _parsed(Path(path).read_bytes(), str(path))


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The objects of a file with one JSON object a line, oldest first; none if there is no such file.

    A last line without its end, as a killed process leaves it, is left out. Raises FileError for any other line that is
    not an object.
    """
    path = Path(path)
    lines = regular(path).read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        row = _parsed(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise FileError(f"{path}, line {number}: is not an object but {str(row)[:40]!r}")
        rows.append(row)
    return rows


def _parsed(text: bytes, where: str) -> object:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(f"{where}: is not JSON ({str(error)[:120]})") from error
