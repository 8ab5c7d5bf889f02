import pytest
import torch

from resq_rl.perception.training_batches import FrameSampler, zoomed
from resq_rl.video import IGNORE, Clip


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """64 frames of 24x32 pixels in squares of 4, whose classes show in their grey level."""
    classes = torch.randint(5, (64, 6, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    return (classes.float() / 10)[:, None].expand(-1, 3, -1, -1).contiguous(), classes


@pytest.mark.parametrize("zoom", [0.5, 1.6, 3.0])
def test_frames_and_labels_zoom_together(zoom: float) -> None:
    images, classes = scene()
    seen, labels = zoomed(images, classes, (zoom, zoom), torch.Generator().manual_seed(0))
    known = labels != IGNORE
    agree = (seen[:, 0] * 10 - labels).abs()[known] < 0.5
    assert agree.float().mean() > (0.6 if zoom < 1 else 0.8)  # squares mix at their borders
    assert float(known.float().mean()) == pytest.approx(min(zoom, 1) ** 2, abs=0.02)
    changes = (labels[..., 1:] != labels[..., :-1]) & known[..., 1:] & known[..., :-1]
    inside = known[..., 1:].sum()
    before = (classes[..., 1:] != classes[..., :-1]).float().mean()
    assert float(changes.sum() / inside) == pytest.approx(float(before) / zoom, rel=0.15)


def test_every_place_of_the_frame_is_seen() -> None:
    place = torch.arange(24 * 32).view(1, 24, 32).expand(64, -1, -1)
    _, seen = zoomed(torch.zeros(64, 3, 24, 32), place + 256, (2.0, 2.0), torch.Generator().manual_seed(0))
    rows, columns = (seen - 256) // 32, (seen - 256) % 32
    assert {int(rows.min()), int(rows.max())} == {0, 23}
    assert {int(columns.min()), int(columns.max())} == {0, 31}


def test_a_sampler_zooms_alike_each_time_and_not_at_all_by_default() -> None:
    images, classes = scene()
    clip = Clip((images * 255).byte(), classes.byte(), 1.0, "squares", "test")
    plain, still = (FrameSampler([clip], 4, 0, False, zoom=zoom).draw(3) for zoom in ((1.0, 1.0), (1.0, 1.0)))
    assert torch.equal(plain[0], still[0])
    first, second = (FrameSampler([clip], 4, 0, False, zoom=(0.5, 2.0)).draw(3) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], plain[1])


@pytest.mark.parametrize("zoom", [0.6, 1.7])
def test_points_zoom_with_the_frame(zoom: float) -> None:
    images, points = torch.zeros(32, 3, 48, 64), torch.zeros(32, 2, 3)
    for number in range(32):
        spots = torch.randint(4, 44, (2, 2))  # x, y
        points[number, :, :2], points[number, :, 2] = spots, 1.0
        for x, y in spots.tolist():
            images[number, :, y - 1 : y + 2, x - 1 : x + 2] = 1
    seen, moved = zoomed(images, points, (zoom, zoom), torch.Generator().manual_seed(0))
    counted = 0
    for frame, spots in zip(seen, moved, strict=True):
        for x, y, counts in spots.tolist():
            assert (0 <= x + 0.5 <= 64 and 0 <= y + 0.5 <= 48) == bool(counts)
            if counts and 1 < x < 62 and 1 < y < 46:
                counted += 1
                assert frame[0, round(y), round(x)] > 0.5
    assert counted > 20
    assert int(moved[..., 2].sum()) == 64 or zoom > 1
