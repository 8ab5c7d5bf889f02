"""Damaged files end in success or in one clear error; what is guarded by a checksum is never silently wrong.

`make test ARGS="-m slow tests/fuzz -s"` reads a thousand of each kind; RESQ_RL_FUZZ_CASES sets another number.
"""

import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.envs import ActionScheme, Problem, table_cache
from resq_rl.envs.table import ResponseTable, respond
from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import Point
from resq_rl.experiments.tracking.outbox import JOURNAL, Operation, Outbox, read_journal
from resq_rl.experiments.tracking.store import Store
from resq_rl.perception import load_network, load_weights, save_weights
from resq_rl.policies import LearnedPolicy
from resq_rl.quantization import load_model, save_model
from resq_rl.sealed import Checkpoints, ContentStore, pack, unpack
from resq_rl.video import VideoFiles
from resq_rl.video.images import read_frame, read_labels
from tests.envs import problems
from tests.envs.problems import TinyNet, moving_frames, tiny_network
from tests.fuzz.mutations import Reader, survey

Make = Callable[[Path, Problem], Reader]

FEW, MANY = 40, int(os.environ.get("RESQ_RL_FUZZ_CASES", "1000"))


def same(one: object, other: object) -> bool:
    """Whether two values are equal, through dataclasses, mappings and tensors."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)))
    if dataclasses.is_dataclass(one) and dataclasses.is_dataclass(other):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def through(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of contents from a reader of files."""

    def of_content(content: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return of_content


def frames_of(count: int) -> list[np.ndarray]:
    return [frame.permute(1, 2, 0).numpy() for frame in moving_frames(count, (32, 48))]


def encoded(name: str, codec: str, pixels: str) -> bytes:
    target = io.BytesIO()
    target.name = name
    with av.open(target, "w", format=Path(name).suffix[1:]) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        for frame in frames_of(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def videos(folder: Path, problem: Problem) -> Reader:
    contents = (encoded("a.mp4", "mpeg4", "yuv420p"), encoded("a.avi", "mjpeg", "yuvj420p"))
    return Reader("video files", contents, through(folder / "a.mp4", lambda p: VideoFiles({"test": [p]}).clips("test")))


def images(folder: Path, problem: Problem) -> Reader:
    contents = []
    for kind in ("png", "jpeg", "bmp", "webp"):
        target = io.BytesIO()
        Image.fromarray(frames_of(1)[0]).save(target, kind)
        contents.append(target.getvalue())
    return Reader("images", tuple(contents), through(folder / "a.png", lambda p: np.array(read_frame(p)).tolist()))


def labels(folder: Path, problem: Problem) -> Reader:
    target = io.BytesIO()
    Image.fromarray(frames_of(1)[0][..., 0] % 3).save(target, "png")
    return Reader("labels", (target.getvalue(),), through(folder / "a.png", lambda p: read_labels(p).tolist()))


def weights(folder: Path, problem: Problem) -> Reader:
    content = save_weights(tiny_network(), folder / "a.safetensors", {"architecture": "TinyNet"}).read_bytes()

    def read(path: Path) -> object:
        network = TinyNet()
        load_weights(network, path)
        return dict(network.state_dict())

    return Reader("weights", (content,), through(folder / "a.safetensors", read), guarded=True)


def programs(folder: Path, problem: Problem) -> Reader:
    torch.export.save(torch.export.export(tiny_network(), (torch.rand(1, 3, 32, 48),)), folder / "a.pt2")
    content = (folder / "a.pt2").read_bytes()

    def read(path: Path) -> object:
        network = load_network(path)
        return {"weights": dict(network.state_dict()), "output": network(torch.ones(1, 3, 32, 48))}

    return Reader("exported programs", (content,), through(folder / "a.pt2", read), guarded=True)


def policy(scheme: ActionScheme) -> LearnedPolicy:
    generator = torch.Generator().manual_seed(0)
    sizes = [(6, scheme.observation_size), (len(scheme.nvec), 6)]
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    return LearnedPolicy(tuple(drawn), tuple(torch.zeros(len(w)) for w in drawn), scheme, 0.3, (0.1, 1.0))


def policy_files(name: str) -> Make:
    def make(folder: Path, problem: Problem) -> Reader:
        policy(problems.scheme(problem, "region_thresholds", "region")).save(folder)
        content = (folder / name).read_bytes()
        return Reader(name, (content,), through(folder / name, lambda p: LearnedPolicy.load(p.parent)), guarded=True)

    return make


def model_files(name: str) -> Make:
    def make(folder: Path, problem: Problem) -> Reader:
        save_model(problem.model, folder)
        content = (folder / name).read_bytes()

        def read(path: Path) -> object:
            model = load_model(path.parent, tiny_network())
            weights = [model.integer_weights(o, residual=part)[0] for o in model.operators for part in (False, True)]
            return {"ranges": model.ranges, "groups": model.groups, "weights": weights}

        return Reader(name, (content,), through(folder / name, read), guarded=True)

    return make


def tables(folder: Path, problem: Problem) -> Reader:
    content = pack(table_cache._kept(respond(problem, 0)))

    def read(path: Path) -> ResponseTable:
        known = ContentStore(path.parent).get(path.stem)
        return expected if known is None else table_cache._table(known)  # None is computed anew

    path = folder / "a.sealed"
    expected = table_cache._table(unpack(content))
    return Reader("response tables", (content,), through(path, read), guarded=True)


def checkpoints(folder: Path, problem: Problem) -> Reader:
    state = {"numbers": [1, 2.5, None], "parts": {"a": torch.arange(5), "b": torch.rand(3, 4)}}
    path = folder / "00000001.checkpoint"
    return Reader("checkpoints", (pack(state),), through(path, lambda p: Checkpoints(p.parent).load()), guarded=True)


def journals(folder: Path, problem: Problem) -> Reader:
    outbox = Outbox(Store("here", "tests"), folder)
    outbox.add(Operation("start", "local", {"parent": None, "name": "a", "tags": {}, "time": 1}))
    for step in range(20):
        outbox.add(Operation("metrics", "local", {"values": [("loss", 0.5, 7, step)]}))
    content = (folder / JOURNAL).read_bytes()
    return Reader("journals", (content,), through(folder / JOURNAL, lambda p: len(read_journal(p))))


def comparisons(folder: Path, problem: Problem) -> Reader:
    point = Point(0.5, (0.4, 0.6), 0.2, None, 1.0, 0.0, 100, {"tau": 0.3})
    made = Comparison("task", "video", "test", 1, 2, "mean IoU", 0.9, "product", 1e9, 10, 1.0, {"ppo": [point]}, {})
    path = folder / "comparison.json"
    return Reader("comparisons", (made.to_json().encode(),), through(path, Comparison.read))


KINDS: dict[str, Make] = {
    "videos": videos,
    "images": images,
    "labels": labels,
    "weights": weights,
    "programs": programs,
    "policy_weights": policy_files("policy.safetensors"),
    "policy_settings": policy_files("policy.json"),
    "model_weights": model_files("model.safetensors"),
    "model_settings": model_files("model.json"),
    "tables": tables,
    "checkpoints": checkpoints,
    "journals": journals,
    "comparisons": comparisons,
}


def read_damaged(kind: str, cases: int, folder: Path, problem: Problem) -> None:
    reader = KINDS[kind](folder, problem)
    counts = survey(reader, cases, same)
    print(f"{reader.name}: {cases} damaged, {counts['read']} read, {counts['refused']} refused, 0 others")
    assert counts["read"] + counts["refused"] == cases


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unchecked_types")
def test_damaged_files_are_read_or_refused(kind: str, tmp_path: Path, problem: Problem) -> None:
    read_damaged(kind, 8 if kind == "programs" else FEW, tmp_path, problem)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("unchecked_types")
def test_a_thousand_damaged_files_are_read_or_refused(kind: str, tmp_path: Path, problem: Problem) -> None:
    read_damaged(kind, MANY, tmp_path, problem)
