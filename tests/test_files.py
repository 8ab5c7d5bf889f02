"""Result files are whole or not there."""

import os
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
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("x")
        path = write_atomic(tmp_path / "folder" / "file", "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert path.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_that_there_was_keeps_its_permissions(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "file", "before")
    path.chmod(0o640)
    assert write_atomic(path, "after").read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX")), "x")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    path = write_atomic(tmp_path / "file", "before")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
