"""What surrounds a step changes nothing, and compiled code gets only what it can read."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resq_rl.errors import NetworkError, PolicyError
from resq_rl.quantization import LevelField, QuantizationConfig, ResQModel, ThresholdField
from resq_rl.quantization.kernels import PLAIN, Choice, Kernels, library, native
from resq_rl.quantization.kernels.library import ARGUMENTS, MAY_LACK
from tests.quantization.networks import SmallNet, byte_clips, everywhere, perturb_statistics, video

SIZE = (12, 16)


@pytest.fixture(scope="module")
def fast() -> Any:
    if native() is PLAIN:
        pytest.skip("no C compiler on this machine")
    return native()


@contextmanager
def default_type() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def coarse_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stream(config: QuantizationConfig, compiled: bool) -> list[Tensor]:
    """Outputs and references of a stream of a network with all kinds of layers."""
    torch.manual_seed(0)
    network = perturb_statistics(SmallNet().float())
    model = ResQModel(network, torch.zeros(1, 3, *SIZE, dtype=torch.float32), config)
    model = (model.compile() if compiled else model).calibrate(byte_clips(1, 4, 3, SIZE))
    state, found = model.new_state(1), list(model.float_forward(torch.full((1, 3, *SIZE), 0.5, dtype=torch.float32)))
    for t, frame in enumerate(video(4, 3, SIZE)):
        output, _ = model.step(
            frame[None].float(), state, everywhere(1, t == 0), LevelField.constant(1, 1, len(model.groups))
        )
        found += output
    return [*found, *state.inputs, *state.outputs]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), coarse_products], ids=["autocast", "coarse_products"]
)
def test_precision_around_a_model_has_no_effect(around: Callable[[], Any], compiled: bool) -> None:
    config = QuantizationConfig(levels=(0, 12), key_activation_bits=12, weight_rounding="nearest")
    wanted = stream(config, compiled)
    with around():
        found = stream(config, compiled)
    assert all(a.dtype == torch.float32 for a in found)
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_default_type_of_double_precision_has_no_effect(compiled: bool) -> None:
    torch.manual_seed(0)
    network, frames, clips = perturb_statistics(SmallNet()), video(3, 3, SIZE), byte_clips(1, 4, 3, SIZE)
    found = []
    for around in (nullcontext, default_type):
        with around():
            model = ResQModel(network, torch.zeros(1, 3, *SIZE, dtype=torch.float32))
            model = (model.compile() if compiled else model).calibrate(clips)
            state, field = model.new_state(1), ThresholdField.constant(0.4, 1, len(model.groups))
            for t, frame in enumerate(frames):
                output, cost = model.step(frame[None], state, everywhere(1, t == 0), field)
                found += [*(o.clone() for o in output), cost.bops]
            state = model.new_state(1)
            for t, frame in enumerate(frames):
                output, cost = model.unrolled_step(frame[None], state, everywhere(1, t == 0), field)
                found += [*(o.detach().clone() for o in output), cost.bops]
    half = len(found) // 2
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def test_compiled_steps_do_not_depend_on_the_default_type(fast: Kernels) -> None:
    x, reference = torch.randn(2, 2, 8, 5, 6)
    steps, index = torch.rand(4, 3), torch.randint(3, (2, 5, 6))
    wanted = fast.encode(x, reference, Choice(steps, index))
    with default_type():
        found = fast.encode(x, reference, Choice(steps, index))
    assert all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_run_on_the_plain_kernels(dtype: torch.dtype, fast: Kernels) -> None:
    x, reference = torch.randn(2, 2, 8, 5, 6).to(dtype)
    choice = Choice(torch.rand(4, 3), torch.randint(3, (2, 5, 6)))
    for a, b in zip(PLAIN.encode(x, reference, choice), fast.encode(x, reference, choice), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(PLAIN.encode_keyframe(x, 0.1, -9.0, 9.0), fast.encode_keyframe(x, 0.1, -9.0, 9.0), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(PLAIN.highest(x), fast.highest(x))


def arguments(name: str) -> dict[str, Any]:
    """Arguments of a compiled function, for tensors of four numbers."""
    kinds: dict[str, Any] = {"int64_t": 1, "float": 1.0, "double": 1.0, "const struct arguments_fit *": None}
    kinds |= dict.fromkeys(("int64_t *", "const int64_t *"), torch.zeros(4, dtype=torch.int64))
    kinds |= dict.fromkeys(("uint8_t *", "const uint8_t *"), torch.zeros(4, dtype=torch.uint8))
    kinds |= dict.fromkeys(("double *", "const double *"), torch.zeros(4, dtype=torch.float64))
    kinds |= {"const int32_t *": torch.zeros(4, dtype=torch.int32)}
    return {field: kinds.get(kind, torch.zeros(4)) for field, kind in ARGUMENTS[name].items()}


@pytest.mark.parametrize("name", list(ARGUMENTS))
def test_compiled_functions_refuse_what_they_cannot_read(name: str, fast: Any) -> None:
    owner = fast if hasattr(fast, f"_{name}") else fast.skipping
    function, right = getattr(owner, f"_{name}"), arguments(name)
    for field, value in right.items():
        if not isinstance(value, Tensor):
            continue
        for wrong in (value.half(), value.to("meta"), torch.zeros(4, 2, dtype=value.dtype)[:, 0], None, 3):
            if wrong is None and field in MAY_LACK.get(name, ()):
                continue
            with pytest.raises(NetworkError, match=f"{name} reads {field}"):
                function(**right | {field: wrong})
    first = next(iter(right))
    with pytest.raises(NetworkError, match=f"{name} takes"):
        function(**{field: value for field, value in right.items() if field != first})
    with pytest.raises(NetworkError, match=f"{name} takes"):
        function(**right, more=1)


def test_a_state_of_another_model_is_refused(fast: Kernels) -> None:
    torch.manual_seed(0)
    model = ResQModel(perturb_statistics(SmallNet()), torch.zeros(1, 3, *SIZE)).calibrate(byte_clips(1, 4, 3, SIZE))
    state = model.new_state(1)
    decision = LevelField.constant(1, 1, len(model.groups))
    model.step(torch.rand(1, 3, *SIZE), state, everywhere(1, True), decision)
    for wrong in (state.inputs[0].double(), state.inputs[0][:, :, :4]):
        other = copy.deepcopy(state)
        other.inputs[0] = wrong
        with pytest.raises(PolicyError, match=r"state .* another model"):
            model.step(torch.rand(1, 3, *SIZE), other, everywhere(1, False), decision)


# The compiled library ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(fast: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the compiled library, holding one, as in a process that has loaded none yet; compiled quickly."""
    monkeypatch.setattr(library, "_FLAGS", [flag.replace("-O3", "-O0") for flag in library._FLAGS])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    assert native() is not PLAIN
    native.cache_clear()
    yield tmp_path / "resq_rl"
    native.cache_clear()


@pytest.mark.parametrize("change", ["file", "folder", "link", "owner", "damage"])
def test_a_library_that_others_may_have_written_is_not_loaded(
    change: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (loaded,) = cache.iterdir()
    cache = cache.parent / "second" / "resq_rl"  # a path that this process has not loaded
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    file = cache / loaded.name
    file.write_bytes(b"not what was compiled")
    if change in ("file", "folder"):
        (file if change == "file" else cache).chmod(0o777)
    elif change == "link":
        file.rename(cache.parent / "elsewhere.so")
        file.symlink_to(cache.parent / "elsewhere.so")
    elif change == "owner":
        monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert native() is not PLAIN
    assert [path.name for path in cache.iterdir()] == [file.name]
    mended = file.read_bytes() != b"not what was compiled" and not file.is_symlink()
    assert mended == (change in ("file", "link", "damage"))


def test_a_failed_build_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = cache.iterdir()
    file.unlink()
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    compiler = cache.parent / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor last; do :; done\nexit 1\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert native() is PLAIN
    assert [*cache.iterdir(), *temporary.iterdir()] == []
