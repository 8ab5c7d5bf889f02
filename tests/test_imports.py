"""What an import brings along, and that what is imported is declared."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

TRACKING = ("hydra", "mlflow", "omegaconf")
LEARNING = ("stable_baselines3",)
PLOTTING = ("matplotlib",)
SCIENCE = ("pandas", "scipy")


# What must not be imported along, by module, from the lowest layer up: each allows what those before it do, and more.
LEAN = {
    "resq_rl": (*TRACKING, *LEARNING, *PLOTTING, *SCIENCE, "torch"),
    "resq_rl.quantization": TRACKING + LEARNING + PLOTTING + SCIENCE,
    "resq_rl.video": TRACKING + LEARNING + PLOTTING + SCIENCE,
    "resq_rl.perception": TRACKING + LEARNING + SCIENCE,
    "resq_rl.envs": TRACKING + LEARNING + SCIENCE,
    "resq_rl.policies": (*TRACKING, "scipy"),
}


def test_imports_are_lean(root: Path) -> None:
    code = "import importlib, sys\n"
    code += f"for module, unwanted in {LEAN!r}.items():\n"
    code += "    importlib.import_module(module)\n"
    code += "    assert not set(unwanted) & set(sys.modules), (module, set(unwanted) & set(sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported_by(folders: list[Path]) -> set[str]:
    """The top-level names that the Python files of `folders` import from outside this package."""
    names: set[str] = set()
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"hydra_plugins", "resq_rl"}


def normalised(requirement: str) -> str:
    """The distribution that a requirement names, as registries compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def test_declared_dependencies_are_those_that_are_imported(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {normalised(line) for line in settings["project"]["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    imported = imported_by([root / name for name in ("resq_rl", "envs", "policies", "configs")])
    used = {name: {normalised(d) for d in providers.get(name, [name])} for name in imported}
    undeclared = sorted(name for name, distributions in used.items() if not distributions & declared)
    assert undeclared == [], "imported, but not in pyproject.toml"
    unused = sorted(declared - set().union(*used.values()))
    assert unused == [], "in pyproject.toml, but never imported"


def test_tested_set_pins_every_declared_dependency(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in settings["optional-dependencies"].values() for line in lines]
    declared = {normalised(line) for line in settings["dependencies"] + extras}
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in pins)
    assert declared - {normalised(line) for line in pins} - {"resq-rl"} == set()
