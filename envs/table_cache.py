"""Tables of responses kept on disk: the same clip, network, ranges and grid are run once."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq_rl.envs.clips import ClipStore
from resq_rl.envs.table import ResponseTable, check_tabular, respond
from resq_rl.errors import ResultsError
from resq_rl.files import write_atomic
from resq_rl.perception import Task, example_inputs
from resq_rl.quantization import FrameCost, ResQModel, as_tuple
from resq_rl.sealed import DamagedError, pack, unpack

__all__ = ["TableCache", "fingerprint", "fingerprints"]

log = logging.getLogger(__name__)

FORMAT = "resq_rl table 3"
# By row of the table (frame, age, level); the rest are whole.
_BY_ROW = ("counts", "region_error", "output", "residual", "frame_residual")
_WHOLE = ("texture", "float_error", "bops")
_COST = ("bops", "keyframe", "elementwise")


class TableCache:
    """A folder of tables, one file each, named by what it was computed from.

    A file begins with the SHA-256 of its content; one that is damaged is computed anew. Nothing is ever deleted.

    Args:
        folder: made when the first table is written; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def respond(
        self,
        model: ResQModel,
        task: Task,
        store: ClipStore,
        index: int,
        *,
        grid: tuple[int, int] = (6, 10),
        longest: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> ResponseTable:
        """What `resq_rl.envs.respond` gives, from the folder where it is known."""
        check_tabular(task)
        if self.folder is None:
            return respond(model, task, store, index, grid=grid, longest=longest, progress=progress)
        path = self.folder / f"{fingerprint(model, task, store, index, grid, longest)}.table"
        known = _read(path)
        if known is not None:
            return known
        table = respond(model, task, store, index, grid=grid, longest=longest, progress=progress)
        try:
            write_atomic(path, _packed(table))
        except ResultsError as error:
            log.warning("A table of responses is not kept. %s", error)
        return table


def fingerprint(
    model: ResQModel, task: Task, store: ClipStore, index: int, grid: tuple[int, int], longest: int | None
) -> str:
    """SHA-256 of all that a table depends on.

    Of the network that is its operators with their integer weights and ranges, and for what lies between them, which is
    code, its float output on the clip's first frame and its predictions on all.
    """
    return next(fingerprints(model, task, store, [index], grid, longest))


def fingerprints(
    model: ResQModel,
    task: Task,
    store: ClipStore,
    indices: Iterable[int],
    grid: tuple[int, int],
    longest: int | None = None,
) -> Iterator[str]:
    """`fingerprint` of several clips, for which what they share is read once."""
    shared = hashlib.sha256()
    _add(shared, _of_network(model, task, grid, longest))
    for index in indices:
        own = shared.copy()
        _add(own, _of_clip(model, task, store, index))
        yield own.hexdigest()


def _add(digest: "hashlib._Hash", parts: Iterable[bytes]) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _of_network(model: ResQModel, task: Task, grid: tuple[int, int], longest: int | None) -> Iterator[bytes]:
    about = [FORMAT, torch.__version__, type(task).__qualname__, repr(task), grid, longest, model.groups]
    yield repr([*about, model.config, [site.operator.geometry for site in model.sites], model.ranges]).encode()
    yield _bytes(model.group_of_site)
    for site in model.sites:
        for residual in (False, True):
            yield from map(_bytes, model.integer_weights(site.operator, residual=residual))
        yield b"" if site.operator.bias is None else _bytes(site.operator.bias)


def _of_clip(model: ResQModel, task: Task, store: ClipStore, index: int) -> Iterator[bytes]:
    clip = store.clips[index]
    inputs = tuple(part.to(model.device) for part in as_tuple(example_inputs(task, clip)))
    yield from map(_bytes, inputs)  # what a recurrent task is given is among them
    raw = model.float_forward(inputs)
    yield from map(_bytes, (task.output(raw, model.frame_size), clip.frames, store.targets[index]))
    yield from map(_bytes, (store.teacher[index], store.error_table))


def _bytes(values: Tensor) -> bytes:
    """Type, shape and values."""
    values = values.detach().cpu().contiguous()
    return f"{values.dtype} {tuple(values.shape)} ".encode() + values.numpy().tobytes()


def _packed(table: ResponseTable) -> bytes:
    inside = _inside(table.frames, table.ages)
    tensors = {name: getattr(table, name)[inside] for name in _BY_ROW}
    if not tensors["counts"].is_floating_point():
        tensors["counts"] = tensors["counts"].to(torch.int32)  # pixels of a frame or fewer, without loss
    tensors |= {name: getattr(table, name) for name in _WHOLE}
    tensors |= {f"cost.{name}": getattr(table.cost, name) for name in _COST}
    about = {"frames": table.frames, "ages": table.ages, "state_bytes": table.state_bytes}
    return pack({**about, "tensors": tensors})


def _read(path: Path) -> ResponseTable | None:
    """The table in a file; None where there is none, or only a damaged one."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("Cannot read %s: %s. The table is computed anew.", path, error.strerror or error)
        return None
    try:
        return _table(unpack(whole))
    except (DamagedError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s). The table is computed anew.", path, error)
        return None


def _table(state: Mapping[str, Any]) -> ResponseTable:
    frames, ages, tensors = state["frames"], state["ages"], state["tensors"]
    inside, parts = _inside(frames, ages), {}
    for name in _BY_ROW:
        rows = tensors[name] if tensors[name].is_floating_point() else tensors[name].long()
        empty = 0 if name == "counts" else torch.nan
        parts[name] = torch.full((frames, ages, *rows.shape[1:]), empty, dtype=rows.dtype)
        parts[name][inside] = rows
    parts |= {name: tensors[name] for name in _WHOLE}
    cost = FrameCost(*(tensors[f"cost.{name}"] for name in _COST))
    return ResponseTable(**parts, cost=cost, state_bytes=state["state_bytes"])


def _inside(frames: int, ages: int) -> Tensor:
    """Which rows lie before the end of the clip."""
    return torch.arange(frames)[:, None] + torch.arange(ages) < frames
