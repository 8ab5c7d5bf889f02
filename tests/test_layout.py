"""The folders envs, policies and configs are packages of resq_rl, whether linked or built."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

LINKED = ("configs", "envs", "policies")
PLAIN = ("hydra_plugins", "resq_rl")  # imported by the names of their folders

# Imports everything from the unpacked wheel and from nowhere else, then prints the files it came from.
RUN_WHEEL = """
import importlib, os, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import resq_rl, resq_rl.configs, resq_rl.envs, resq_rl.experiments.cli.app, resq_rl.policies
for name in sorted(sys.modules):
    module = sys.modules[name]
    if name.split(".")[0] == "resq_rl":
        print(getattr(module, "__file__", None) or list(module.__path__)[0])
"""


def tracked_files(root: Path) -> list[Path]:
    """The files of the checkout that git tracks or would track; skips the test where there is no git."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        pytest.skip("no git checkout: the list of tracked files is not to be had")
    command = [git, "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (root / name).exists()]


def build_wheel(root: Path, files: list[Path], folder: Path, links: bool) -> Path:
    """Build a wheel from a copy of the tracked files, so that nothing else gets in or is left behind."""
    source = folder / "source"
    for file in files:
        if (root / file).is_symlink() and not links:
            continue
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / file, source / file, follow_symlinks=False)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={folder}", str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.parametrize("name", LINKED)
def test_link_resolves_to_the_folder_at_the_root(name: str, root: Path) -> None:
    link = root / "resq_rl" / name
    if not link.is_symlink():
        pytest.skip(f"{link} is no link: this checkout or file system has none")
    assert link.readlink() == Path("..") / name
    assert link.resolve() == root / name


def test_every_package_folder_is_listed(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent for top in (*PLAIN, *LINKED) for file in (root / top).rglob("__init__.py")}
    relative = {folder.relative_to(root) for folder in folders}
    names = {".".join(p.parts if p.parts[0] in PLAIN else ("resq_rl", *p.parts)) for p in relative}
    assert names == set(settings["packages"])


@pytest.fixture(scope="module")
def unpacked(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the wheels hold that are built with and without the links."""
    folders = []
    for links in (True, False):
        folder = tmp_path_factory.mktemp("wheel")
        with zipfile.ZipFile(build_wheel(root, tracked_files(root), folder, links)) as archive:
            archive.extractall(folder / "unpacked")
        folders.append(folder / "unpacked")
    return folders[0], folders[1]


def test_wheels_hold_every_package_file_with_and_without_links(unpacked: tuple[Path, Path], root: Path) -> None:
    expected = {
        file.as_posix() if file.parts[0] in PLAIN else f"resq_rl/{file.as_posix()}": (root / file).read_bytes()
        for file in tracked_files(root)
        if file.parts[0] in (*PLAIN, *LINKED) and not (root / file).is_symlink()
    }
    for folder in unpacked:
        files = [file for file in folder.rglob("*") if file.is_file() and ".dist-info/" not in file.as_posix()]
        assert {file.relative_to(folder).as_posix(): file.read_bytes() for file in files} == expected


def test_a_wheel_runs_alone(unpacked: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN_WHEEL, str(unpacked[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    origins = [Path(line) for line in done.stdout.splitlines()]
    assert [origin for origin in origins if not origin.is_relative_to(unpacked[0])] == []
