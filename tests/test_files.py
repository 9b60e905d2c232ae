"""Files appear whole or not at all; damaged JSON is one error that names the file."""

import os

import pytest

from tpa_minimal.files import FileError, check_folder, read_json, read_json_lines, write_json, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    assert read_json(path) == {"x": 1}

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert read_json(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b'"\xff"', b"[" * 100_000, b"nonsense"], ids=range(5))
def test_damaged_json_is_named(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match="a.json: is not JSON"):
        read_json(path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b" " * 100)
    with pytest.raises(FileError, match="100 bytes where at most 99"):
        read_json(path, limit=99)


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for read in (read_json, read_json_lines):
        for path in (tmp_path / "pipe.json", tmp_path, "/dev/zero"):
            with pytest.raises(OSError, match="is no regular file"):
                read(path)


def test_a_folder_is_made_or_refused(tmp_path):
    check_folder(tmp_path / "new/one")
    assert list((tmp_path / "new/one").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/folder", tmp_path / ("a" * 300)):
        with pytest.raises(OSError):
            check_folder(folder)


def test_json_lines_leave_out_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": 3')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n5\n')
    with pytest.raises(FileError, match="line 2: is not an object"):
        read_json_lines(path)
    path.write_bytes(b'{"a": \n{"a": 2}\n')
    with pytest.raises(FileError, match="line 1: is not JSON"):
        read_json_lines(path)
