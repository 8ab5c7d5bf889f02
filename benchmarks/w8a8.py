"""What 8 bits of weights and activations lose, every frame a keyframe: `python benchmarks/w8a8.py [EXPERIMENT ...]`.

Experiments are those of `configs/experiment`; each is calibrated on its own training clips, and measured on its test
clips by agreement with the float network. Real networks and videos are read from RESQ_RL_SHARED.

Beside our estimators of ranges stand post-training quantization of PyTorch (PT2E with the quantizer for x86, of
torchao) and of ONNX Runtime, calibrated on the same frames, where they are installed:
`pip install --no-deps torchao onnxscript onnx_ir ml_dtypes sympy`, and the extra `onnx`.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resq_rl.experiments.config.composition import load_settings
from resq_rl.experiments.study.study import read_clips
from resq_rl.perception import Pose, Segmentation, Task, class_iou, clip_inputs, example_inputs
from resq_rl.quantization import Inputs, LevelField, RangeEstimator, ResQModel, as_tuple, to_float
from resq_rl.quantization.specification.inputs import float_frames

EXPERIMENTS = ("pose_davis", "selfie_davis", "selfie_carphone", "demo")
ESTIMATORS: tuple[RangeEstimator, ...] = ("least_squares", "percentile", "min_max")
MOST_CLIPS, BATCH = 8, 10
FRAMES = 24  # of each calibration clip

Frames = tuple[Tensor, ...]  # one frame, with the network's further inputs
Network = Callable[..., Any]
Peer = Callable[[nn.Module, list[Frames]], Network]


def keyframes(model: ResQModel, *inputs: Tensor) -> object:
    """The network's output with every frame a keyframe."""
    count = len(inputs[0])
    field, refresh = LevelField.constant(0, count, len(model.groups)), torch.ones(count, dtype=torch.bool)
    return model.step(inputs, model.new_state(count), refresh, field)[0]


def pt2e(network: nn.Module, frames: list[Frames]) -> Network:
    """PyTorch's own quantization, simulated in float."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(network, frames[0]).module(), quantizer)
    for inputs in frames:
        prepared(*inputs)
    quantized = convert_pt2e(prepared)
    return lambda *inputs: quantized(*inputs)


def onnx_runtime(method: str) -> Peer:
    """ONNX Runtime's own quantization, simulated in float, with a method of calibration."""

    def quantize(network: nn.Module, frames: list[Frames]) -> Network:
        import onnxruntime
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        folder = Path(tempfile.mkdtemp())
        torch.onnx.export(network, frames[0], folder / "float.onnx", dynamo=True, verbose=False)
        quant_pre_process(folder / "float.onnx", folder / "ready.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1

        def session(name: str) -> Any:
            return onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])

        names = [given.name for given in session("ready.onnx").get_inputs()]

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = iter(frames)

            def get_next(self) -> dict[str, Any] | None:
                inputs = next(self.left, None)
                return None if inputs is None else {name: x.numpy() for name, x in zip(names, inputs, strict=True)}

        quantize_static(
            folder / "ready.onnx",
            folder / "int8.onnx",
            Reader(),
            op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul"],  # far better than every operator
            activation_type=QuantType.QUInt8,
            per_channel=True,
            extra_options={"CalibMaxIntermediateOutputs": 16},  # kept in memory
            calibrate_method=CalibrationMethod[method],
        )
        quantized = session("int8.onnx")

        def run(*inputs: Tensor) -> Any:
            outputs = quantized.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
            tensors = [torch.from_numpy(y) for y in outputs]
            return tensors[0] if len(tensors) == 1 else tensors

        return run

    return quantize


PEERS: dict[str, Peer] = {
    "PT2E, x86": pt2e,
    "ONNX Runtime, min-max": onnx_runtime("MinMax"),
    "ONNX Runtime, percentile": onnx_runtime("Percentile"),
}


def agreement(model: ResQModel, task: Task, clips: list[Inputs], run: Network, batch: int = BATCH) -> str:
    """How far predictions at 8 bits are from those in float, in the words of the task."""
    found, wanted = [], []
    for clip in clips:
        for frames in zip(*(part.split(batch) for part in as_tuple(clip)), strict=True):
            inputs, size = tuple(map(to_float, frames)), model.frame_size
            found.append(task.predict(task.output(run(*inputs), size)))
            wanted.append(task.predict(task.output(model.float_forward(inputs), size)))
    own, teacher = torch.cat(found), torch.cat(wanted)
    if isinstance(task, Pose):
        pixels = float((own[..., :2] - teacher[..., :2]).norm(dim=2).mean())
        near = replace(task, share=0.05)
        share = float(near.accuracy(near.counts(own, near.target(teacher)).sum(0)))
        return f"{pixels:.1f} px, {share:.2f} within 0.05 of the box"
    if isinstance(task, Segmentation):
        confusion = task.counts(own, task.target(teacher)).sum(0)
        ious = class_iou(confusion)
        return f"IoU {float(ious[1]):.3f}" if len(ious) == 2 else f"mean IoU {float(task.accuracy(confusion)):.3f}"
    return f"accuracy {float(task.accuracy(task.counts(own, task.target(teacher)).sum(0))):.3f}"


def row(experiment: str) -> str:
    """A row of the table: an experiment, and its agreement by estimator of ranges and peer."""
    settings = load_settings("compare", [f"+experiment={experiment}"])
    task = settings.task.build()
    clips = read_clips(settings.video.build(), ["train", "test"])
    few = clips["train"][: settings.quantization.calibration_clips]
    cells = [experiment]
    for estimator in ESTIMATORS:
        config = replace(settings.quantization.config(), range_estimator=estimator)
        model = ResQModel(settings.model.build(), example_inputs(task, clips["train"][0]), config).compile()
        calibration = [clip_inputs(model.float_forward, task, clip) for clip in few]
        model.calibrate(calibration)
        test = [clip_inputs(model.float_forward, task, clip) for clip in clips["test"][:MOST_CLIPS]]
        cells.append(agreement(model, task, test, partial(keyframes, model)))
    frames = [frame for clip in calibration for frame in float_frames(clip, FRAMES, torch.device("cpu"))]
    for name, quantize in PEERS.items():
        try:
            peer = quantize(settings.model.build(), frames)
        except ImportError as error:
            cells.append(f"{error.name} is not installed")
            continue
        except Exception as error:  # of a peer, whatever it is
            print(f"{experiment}, {name}: {error!r}", file=sys.stderr)
            cells.append(type(error).__name__)
            continue
        cells.append(agreement(model, task, test, peer, batch=1))
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def main() -> None:
    """Print a row for each experiment."""
    torch.set_num_threads(1)
    print(f"| experiment | {' | '.join((*ESTIMATORS, *PEERS))} |")
    print("| --- " * (1 + len(ESTIMATORS) + len(PEERS)) + "|")
    for experiment in sys.argv[1:] or EXPERIMENTS:
        print(row(experiment), flush=True)


if __name__ == "__main__":
    main()
