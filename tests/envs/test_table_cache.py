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

from resq_rl.envs import ResponseTable, TableCache, respond
from resq_rl.envs import table_cache as module
from resq_rl.envs.table_cache import fingerprint, fingerprints
from resq_rl.quantization import ResQModel
from tests.envs.worlds import World, moving_frames, tiny_network


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

    def counting(model: Any, task: Any, store: Any, index: int, **settings: Any) -> ResponseTable:
        ran.append(index)
        return respond(model, task, store, index, **settings)

    monkeypatch.setattr(module, "respond", counting)
    return ran


def ask(world: World, folder: Path | None, index: int = 0, **settings: Any) -> ResponseTable:
    settings = {"grid": world.grid} | settings
    return TableCache(folder).respond(world.model, world.task, world.store, index, **settings)


@pytest.mark.parametrize("longest", [None, 2, 0])
def test_a_table_is_computed_once_and_comes_back_as_it_was(
    longest: int | None, world: World, tmp_path: Path, computed: list[int]
) -> None:
    expected = respond(world.model, world.task, world.store, 1, grid=world.grid, longest=longest)
    for _ in range(3):
        assert identical(ask(world, tmp_path / "tables", 1, longest=longest), expected)
    assert computed == [1]
    assert len(list((tmp_path / "tables").iterdir())) == 1


def test_without_a_folder_nothing_is_kept(world: World, computed: list[int]) -> None:
    for _ in range(2):
        ask(world, None)
    assert computed == [0, 0]


def name(world: World, grid: tuple[int, int] = (2, 3), longest: int | None = None, index: int = 0) -> str:
    return fingerprint(world.model, world.task, world.store, index, grid, longest)


def with_store(world: World, **changes: Any) -> World:
    return replace(world, store=replace(world.store, **changes))


class Softened(nn.Module):
    """The same operators with the same inputs; only what is done with their outputs differs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) / 2  # type: ignore[no-any-return]


def made(world: World, network: nn.Module) -> ResQModel:
    """A model of another network, calibrated as the world's."""
    model = ResQModel(network, torch.zeros(1, *world.model.frame_shape))
    clips = [moving_frames(6, world.model.frame_size, seed=50 + i, speed=1 + i) for i in range(3)]
    return model.calibrate(clips, interval=3)


def changed(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first = tensors[0].clone()
    first.flatten()[0] += 1
    return (first, *tensors[1:])


def test_the_name_follows_from_all_that_the_table_depends_on(world: World) -> None:
    store = world.store
    clip = store.clips[0]
    names = [
        name(world),
        name(world, grid=(1, 1)),
        name(world, longest=2),
        name(world, index=1),
        name(with_store(world, clips=(replace(clip, frames=changed((clip.frames,))[0]), *store.clips[1:]))),
        name(with_store(world, targets=changed(store.targets))),
        name(with_store(world, teacher=changed(store.teacher))),
        name(with_store(world, error_table=2 * store.error_table)),
        name(replace(world, task=replace(world.task, threshold=0.25))),
        name(replace(world, model=made(world, tiny_network(seed=1)))),
        name(replace(world, model=made(world, Softened()))),
    ]
    assert len(set(names)) == len(names)
    assert name(replace(world, model=made(world, tiny_network()))) == names[0]


def test_names_of_several_clips_are_those_of_each(world: World) -> None:
    several = fingerprints(world.model, world.task, world.store, [2, 0, 1], (2, 3), 2)
    assert list(several) == [name(world, longest=2, index=i) for i in (2, 0, 1)]


def test_the_name_follows_from_weights_and_ranges(world: World) -> None:
    model = world.model
    before = name(world)
    kept = model.ranges
    try:
        table = kept[0].residual["keyframe"]
        model.ranges = [
            replace(kept[0], residual={**kept[0].residual, "keyframe": replace(table, sigma=9.0)}),
            *kept[1:],
        ]
        assert name(world) != before
    finally:
        model.ranges = kept
    bits = model.config.residual_weight_bits
    try:
        model.set_residual_weight_bits(6)
        assert name(world) != before
    finally:
        model.set_residual_weight_bits(bits)
    assert name(world) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
        (lambda content: content[: len(content) // 2], "is damaged"),
        (lambda content: b"", "is damaged"),
        (lambda content: sha256(b"{}").digest() + b"{}", "is of another version"),
    ],
)
def test_a_damaged_file_is_said_and_computed_anew(
    damage: Callable[[bytes], bytes],
    said: str,
    world: World,
    tmp_path: Path,
    computed: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = ask(world, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert identical(ask(world, tmp_path), expected)
    assert said in caplog.text
    assert str(file) in caplog.text
    assert computed == [0, 0]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_the_cache(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    expected = respond(world.model, world.task, world.store, 0, grid=world.grid)
    assert identical(ask(world, tmp_path / "file" / "tables"), expected)
    assert "is not kept" in caplog.text
