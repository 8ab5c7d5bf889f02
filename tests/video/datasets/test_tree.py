from pathlib import Path

import pytest

from resq_rl.errors import VideoError
from resq_rl.video.datasets.tree import below, require


@pytest.mark.parametrize("name", ["../other", "a/../../other", "/etc/passwd", ".."])
def test_names_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        VideoError, match=r"leads out of the Demo dataset at .*Names in lists and settings are relative"
    ):
        below(tmp_path, name, "Demo")
    with pytest.raises(VideoError, match="leads out of the Demo dataset"):
        require(tmp_path, "Demo", [name], "")


def test_what_is_there_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    require(tmp_path, "Demo", ["a", "a/b"], "")
    assert below(tmp_path, "a/b..c", "Demo") == tmp_path / "a" / "b..c"


def test_one_error_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("x", "y"):
        (root / "a" / name).mkdir(parents=True)
    with pytest.raises(VideoError) as wrong:
        require(tmp_path / "rot", "Demo", ["a", "b"], "Mend.")
    assert str(wrong.value) == f"No Demo dataset at {tmp_path}/rot: looked for a, b, found root in {tmp_path}. Mend."
    with pytest.raises(VideoError) as wrong:
        require(root, "Demo", ["a/x", "a/z", "a/x", "b/c"], "Mend.")
    assert str(wrong.value) == (
        f"The Demo dataset at {root} is incomplete: of 3 files or folders looked for, 2 are missing: a/z, b/c; found "
        f"x, y in {root}/a. Mend."
    )
