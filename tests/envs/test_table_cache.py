"""Tables kept on disk against tables computed anew."""

from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resq_rl.envs import Problem, ResponseTable, respond, tabulate
from resq_rl.envs import table_cache as module
from resq_rl.envs.table_cache import fingerprint, fingerprints
from resq_rl.perception import Segmentation
from resq_rl.quantization import ResQModel
from resq_rl.sealed import ContentStore
from tests.envs.problems import CLASSES, SIZE, moving_frames, tiny_network


def identical(mine: ResponseTable, expected: ResponseTable) -> bool:
    def values(table: ResponseTable) -> list[Any]:
        own = [getattr(table, f.name) for f in fields(table) if f.name != "cost"]
        return [*own, table.cost.bops, table.cost.keyframe, table.cost.elementwise]

    for a, b in zip(values(mine), values(expected), strict=True):
        if isinstance(a, int):
            assert a == b
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a.numpy(), b.numpy())
    return True


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the clips that were really run."""
    ran: list[int] = []

    def counting(problem: Problem, index: int, **settings: Any) -> ResponseTable:
        ran.append(index)
        return respond(problem, index, **settings)

    monkeypatch.setattr(module, "respond", counting)
    return ran


def ask(problem: Problem, folder: Path | None, index: int = 0, **settings: Any) -> ResponseTable:
    return tabulate(problem, index, ContentStore(folder), **settings)


@pytest.mark.parametrize("longest", [None, 2, 0])
def test_a_table_is_computed_once_and_comes_back_as_it_was(
    longest: int | None, problem: Problem, tmp_path: Path, computed: list[int]
) -> None:
    expected = respond(problem, 1, longest=longest)
    for _ in range(3):
        assert identical(ask(problem, tmp_path / "tables", 1, longest=longest), expected)
    assert computed == [1]
    assert len(list((tmp_path / "tables").iterdir())) == 1


def test_without_a_folder_nothing_is_kept(problem: Problem, computed: list[int]) -> None:
    for _ in range(2):
        ask(problem, None)
    assert computed == [0, 0]


class Softened(nn.Module):
    """The same operators with the same inputs; only what is done with their outputs differs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) / 2  # type: ignore[no-any-return]


def made(problem: Problem, network: nn.Module) -> ResQModel:
    """A model of another network, calibrated as the problem's."""
    model = ResQModel(network, torch.zeros(1, 3, *problem.model.frame_size))
    clips = [moving_frames(6, problem.model.frame_size, seed=50 + i, speed=1 + i) for i in range(3)]
    return model.calibrate(clips, interval=3)


def changed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first = tensors[0].clone()
    first.flatten()[0] += 1
    return (first, *tensors[1:])


def test_the_name_follows_from_all_that_the_table_depends_on(problem: Problem) -> None:
    clip = problem.clips[0]
    names = [
        fingerprint(problem, 0),
        fingerprint(replace(problem, grid=(1, 1)), 0),
        fingerprint(problem, 0, 2),
        fingerprint(problem, 1),
        fingerprint(replace(problem, clips=(replace(clip, frames=changed((clip.frames,))[0]), *problem.clips[1:])), 0),
        fingerprint(replace(problem, targets=changed(problem.targets)), 0),
        fingerprint(replace(problem, teacher=changed(problem.teacher)), 0),
        fingerprint(replace(problem, error_table=2 * problem.error_table), 0),
        fingerprint(replace(problem, task=Segmentation(CLASSES, label_size=SIZE)), 0),
        fingerprint(replace(problem, model=made(problem, tiny_network(seed=1))), 0),
        fingerprint(replace(problem, model=made(problem, Softened())), 0),
    ]
    assert len(set(names)) == len(names)
    assert fingerprint(replace(problem, model=made(problem, tiny_network())), 0) == names[0]


def test_names_of_several_clips_are_those_of_each(problem: Problem) -> None:
    several = fingerprints(problem, [2, 0, 1], 2)
    assert list(several) == [fingerprint(problem, i, 2) for i in (2, 0, 1)]


def test_the_name_follows_from_weights_and_ranges(problem: Problem) -> None:
    model = problem.model
    before = fingerprint(problem, 0)
    kept = model.ranges
    try:
        table = kept[0].residual["keyframe"]
        model.ranges = [
            replace(kept[0], residual={**kept[0].residual, "keyframe": replace(table, sigma=9.0)}),
            *kept[1:],
        ]
        assert fingerprint(problem, 0) != before
    finally:
        model.ranges = kept
    bits = model.config.residual_weight_bits
    try:
        model.set_residual_weight_bits(6)
        assert fingerprint(problem, 0) != before
    finally:
        model.set_residual_weight_bits(bits)
    assert fingerprint(problem, 0) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "cannot be used"),
        (lambda content: content[: len(content) // 2], "cannot be used"),
        (lambda content: b"", "cannot be used"),
        (lambda content: sha256(b"{}").digest() + b"{}", "cannot be used"),
    ],
)
def test_a_damaged_file_is_said_and_computed_anew(
    damage: Callable[[bytes], bytes],
    said: str,
    problem: Problem,
    tmp_path: Path,
    computed: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = ask(problem, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert identical(ask(problem, tmp_path), expected)
    assert said in caplog.text
    assert str(file) in caplog.text
    assert computed == [0, 0]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    problem: Problem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    expected = respond(problem, 0)
    assert identical(ask(problem, tmp_path / "file" / "tables"), expected)
    assert "is not kept" in caplog.text
