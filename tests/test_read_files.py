"""Small files are read through one door: only regular files, only as much as allowed."""

import os
import subprocess
import sys

import pytest

from simsiam.errors import UsageError
from simsiam.utils.read_files import open_regular, read_bytes, read_text


def test_text_of_a_regular_file_or_of_a_link_to_one_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes('{"é": 1}\r\n'.encode())
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    for name in ("a.json", "link.json"):
        assert read_text(tmp_path / name) == '{"é": 1}\n'
    with open_regular(tmp_path / "a.json") as file:
        assert file.read(1) == b"{"


def test_pipes_devices_sockets_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "zero", "full", "folder"):
        with pytest.raises(UsageError, match="not a regular file"):
            open_regular(tmp_path / name)
        with pytest.raises(UsageError, match="not a regular file"):
            read_bytes(tmp_path / name)


def test_a_refused_pipe_is_not_opened(tmp_path):
    """Its writer would get SIGPIPE."""
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, b"kept")
    with pytest.raises(UsageError, match="a pipe"):
        read_text(tmp_path / "pipe")
    assert os.read(writer, 10) == b"kept"
    os.close(writer)


def test_missing_files_are_errors_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "broken")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "loop")


def test_a_file_beyond_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UsageError, match="5 bytes; at most 4 are allowed"):
        read_bytes(tmp_path / "a", 4)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="too large"):
        read_text(tmp_path / "sparse")


def test_a_file_whose_size_is_unknown_is_bounded_too():
    """Files of the system state 0 bytes and have more."""
    with pytest.raises(UsageError, match="at most 10 are allowed"):
        read_bytes("/proc/self/status", 10)


def test_text_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "a\nb").write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match=r"not a text in UTF-8.* at byte 3") as caught:
        read_text(tmp_path / "a\nb")
    assert "\n" not in str(caught.value)
    assert read_text(tmp_path / "a\nb", errors="replace") == "abc�"


def test_the_door_imports_nothing_that_takes_long():
    code = (
        "import sys, simsiam.utils.read_files;"
        "print(sorted({'numpy', 'torch', 'pydantic', 'PIL'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert answer.stdout.strip() == b"[]"


@pytest.mark.parametrize("read", [lambda file: file.read(), lambda file: file.read(1)])
def test_an_error_in_reading_names_the_file(read, tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    folder = os.open(tmp_path, os.O_RDONLY)  # which cannot be read as a file
    with open_regular(tmp_path / "a") as file:
        os.dup2(folder, file.fileno())
        with pytest.raises(IsADirectoryError) as error:
            read(file)
    os.close(folder)
    assert error.value.filename == str(tmp_path / "a")
