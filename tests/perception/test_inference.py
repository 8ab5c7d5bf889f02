"""What a float network predicts for a clip under a task that is not recurrent; the others have tests of their own."""

import torch

from resq_rl.perception import Segmentation, clip_inputs, compact_ddrnet, example_inputs, judged_targets, predict_clip
from resq_rl.quantization import as_tuple
from resq_rl.video import GeneratedVideo


def test_single_frames_run_together() -> None:
    clip = GeneratedVideo(size=(32, 48), frames=5).clip("train", 0)
    assert clip.labels is not None
    network, task = compact_ddrnet(), Segmentation()
    done: list[int] = []
    found = predict_clip(lambda inputs: network(*as_tuple(inputs)), task, clip, batch=2, progress=done.append)
    with torch.no_grad():
        expected = [network(frame[None] / 255).argmax(1)[0] for frame in clip.frames]
    assert torch.equal(found.long(), torch.stack(expected))
    assert done == [2, 2, 1]
    assert clip_inputs(network, task, clip) is clip.frames
    assert judged_targets(task, clip.labels) is clip.labels
    example = example_inputs(task, clip)
    assert isinstance(example, torch.Tensor)
    assert torch.equal(example, clip.frames[:1] / 255)
