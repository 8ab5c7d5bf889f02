"""What the packages and modules offer: `__all__` is there, sorted and true."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("envs", "experiments", "perception", "policies", "quantization", "video")
FOLDERS = {"resq_rl": ROOT / "resq_rl", "resq_rl.envs": ROOT / "envs", "resq_rl.policies": ROOT / "policies"}


def modules() -> list[str]:
    """The dotted names of all modules, read off the files so that one that fails to import fails one test."""
    names: set[str] = set()
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            names.add(".".join((package, *(part for part in parts if part != "__init__"))))
    return sorted(names)


def rank(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: the order that `make format` brings about."""
    return 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name


@pytest.mark.parametrize("name", PACKAGES)
def test_package_declares_its_names(name: str) -> None:
    package = importlib.import_module(f"resq_rl.{name}")
    assert getattr(package, "__all__", None), f"resq_rl.{name} has no __all__"


@pytest.mark.parametrize("name", modules())
def test_declared_names_are_sorted_and_exist(name: str) -> None:
    module = importlib.import_module(name)
    names = list(getattr(module, "__all__", []))
    assert names == sorted(set(names), key=rank)
    assert [n for n in names if not hasattr(module, n)] == []
