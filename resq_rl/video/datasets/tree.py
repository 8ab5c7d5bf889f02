"""Checks that a dataset's folder holds what its reader expects; one error tells what was looked for and found."""

from collections.abc import Iterable
from pathlib import Path, PurePath

from resq_rl.errors import VideoError
from resq_rl.video.parts import listed

__all__ = ["below", "require"]


def below(root: Path, name: str, dataset: str) -> Path:
    """The path of `name` in a dataset's folder.

    Raises:
        VideoError: it leads out of the folder.
    """
    path = PurePath(name)
    if path.is_absolute() or path.drive or ".." in path.parts:
        raise VideoError(
            f"Name {name!r} leads out of the {dataset} dataset at {root}. Names in lists and settings are relative to "
            "that folder, without '..': correct it."
        )
    return root / path


def require(root: Path, dataset: str, wanted: Iterable[str], mend: str) -> None:
    """Check that all `wanted` files and folders, relative to `root`, are there.

    Raises:
        VideoError: some are not. One message says what was looked for, what of it is missing, what lies beside the
            first missing one, and how to mend it.
    """
    names = list(dict.fromkeys(wanted))
    missing = [name for name in names if not below(root, name, dataset).exists()]
    if not missing:
        return
    place = (root / missing[0]).parent
    while not place.is_dir() and place != place.parent:
        place = place.parent
    beside = f"found {listed(path.name for path in place.iterdir())} in {place}"
    if len(missing) == len(names):
        raise VideoError(f"No {dataset} dataset at {root}: looked for {listed(names)}, {beside}. {mend}")
    raise VideoError(
        f"The {dataset} dataset at {root} is incomplete: of {len(names)} files or folders looked for, {len(missing)} "
        f"are missing: {listed(missing)}; {beside}. {mend}"
    )
