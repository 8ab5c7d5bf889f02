"""Tables of responses kept on disk: the same clip, network, ranges and grid are run once."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from resq_rl.envs.problem import Problem
from resq_rl.envs.table import ResponseTable, check_tabular, respond
from resq_rl.perception import example_inputs
from resq_rl.quantization import FrameCost, as_tuple
from resq_rl.sealed import ContentStore

__all__ = ["fingerprint", "fingerprints", "tabulate"]

log = logging.getLogger(__name__)

FORMAT = "resq_rl table 3"
# By row of the table (frame, age, level); the rest are whole.
_BY_ROW = ("counts", "region_error", "output", "residual", "frame_residual")
_WHOLE = ("texture", "float_error", "bops")
_COST = ("bops", "keyframe", "elementwise")


def tabulate(
    problem: Problem,
    index: int,
    store: ContentStore,
    *,
    longest: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ResponseTable:
    """The table that `resq_rl.envs.respond` gives, from the store where it is known."""
    check_tabular(problem.task)
    key = fingerprint(problem, index, longest)
    known = store.get(key)
    if known is not None:
        try:
            return _table(known)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("The table %s is of another version (%s). It is computed anew.", key, error)
    table = respond(problem, index, longest=longest, progress=progress)
    store.put(key, _kept(table))
    return table


def fingerprint(problem: Problem, index: int, longest: int | None = None) -> str:
    """SHA-256 of all that the table of a clip depends on.

    For the network these are its operators with their integer weights and ranges, and for what lies between them, which
    is code, its float output on the clip's first frame and its predictions on all.
    """
    return next(fingerprints(problem, [index], longest))


def fingerprints(problem: Problem, indices: Iterable[int], longest: int | None = None) -> Iterator[str]:
    """`fingerprint` of several clips; what they share is read once."""
    shared = hashlib.sha256()
    _add(shared.update, _of_network(problem, longest))
    for index in indices:
        own = shared.copy()
        _add(own.update, _of_clip(problem, index))
        yield own.hexdigest()


def _add(update: Callable[[bytes], None], parts: Iterable[bytes]) -> None:
    for part in parts:
        update(len(part).to_bytes(8, "little"))
        update(part)


def _of_network(problem: Problem, longest: int | None) -> Iterator[bytes]:
    model, task = problem.model, problem.task
    about = [FORMAT, torch.__version__, type(task).__qualname__, repr(task), problem.grid, longest, model.groups]
    calls = [(site.name, site.macs) for site in model.sites], [site.operator.geometry for site in model.layers]
    yield repr([*about, model.config, calls, model.ranges]).encode()
    yield _bytes(model.group_of_site)
    for site in model.layers:
        for residual in (False, True):
            yield from map(_bytes, model.integer_weights(site.operator, residual=residual))
        yield b"" if site.operator.bias is None else _bytes(site.operator.bias)


def _of_clip(problem: Problem, index: int) -> Iterator[bytes]:
    model, task, clip = problem.model, problem.task, problem.clips[index]
    inputs = tuple(part.to(model.device) for part in as_tuple(example_inputs(task, clip)))
    yield from map(_bytes, inputs)  # what a recurrent task is given is among them
    raw = model.float_forward(inputs)
    yield from map(_bytes, (task.output(raw, model.frame_size), clip.frames, problem.targets[index]))
    yield from map(_bytes, (problem.teacher[index], problem.error_table))


def _bytes(values: Tensor) -> bytes:
    """Type, shape and values."""
    values = values.detach().cpu().contiguous()
    return f"{values.dtype} {tuple(values.shape)} ".encode() + values.numpy().tobytes()


def _kept(table: ResponseTable) -> dict[str, Any]:
    inside = _inside(table.frames, table.ages)
    tensors = {name: getattr(table, name)[inside] for name in _BY_ROW}
    if not tensors["counts"].is_floating_point():
        tensors["counts"] = tensors["counts"].to(torch.int32)  # pixels of a frame or fewer, without loss
    tensors |= {name: getattr(table, name) for name in _WHOLE}
    tensors |= {f"cost.{name}": getattr(table.cost, name) for name in _COST}
    about = {"frames": table.frames, "ages": table.ages, "state_bytes": table.state_bytes}
    return {**about, "tensors": tensors}


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
    """The rows that lie before the end of the clip."""
    return torch.arange(frames)[:, None] + torch.arange(ages) < frames
