"""Result files are whole or not there."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resq_rl.errors import ResultsError
from resq_rl.files import write_atomic


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond `size` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", ["text: ä\n", b"\x00\xff"])
def test_it_writes_text_and_bytes_into_new_folders(content: str | bytes, tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "a" / "b" / "file", content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "results.json", "before")
    with files_of_at_most(1000), pytest.raises(ResultsError, match=r"Cannot write .*results\.json: .*Free some space"):
        write_atomic(path, b"x" * 100_000)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"], "no part of it is left behind"


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ResultsError, match=r"Cannot write .*taken/file: .*choose a writable folder"):
        write_atomic(tmp_path / "taken" / "file", "x")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that even root cannot write on Linux")
def test_a_read_only_folder_is_named() -> None:
    with pytest.raises(ResultsError, match=r"Cannot write /proc/resq_rl/file"):
        write_atomic(Path("/proc/resq_rl/file"), "x")
