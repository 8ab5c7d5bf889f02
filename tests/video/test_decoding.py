"""Video files become upright pictures of square pixels, at the times of their container, or one error."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from resq_rl.errors import VideoError
from resq_rl.video import VideoFiles, VideoStream
from resq_rl.video.decoding import Clock
from tests.video.conftest import WriteVideo, grey

TURN = Image.Transpose
# Linear part a, b, c, d of the display matrix (x, y) -> (a x + c y, b x + d y), and what Pillow calls the same.
ORIENTATIONS = [
    ((1, 0, 0, 1), None),
    ((-1, 0, 0, 1), TURN.FLIP_LEFT_RIGHT),
    ((-1, 0, 0, -1), TURN.ROTATE_180),
    ((1, 0, 0, -1), TURN.FLIP_TOP_BOTTOM),
    ((0, 1, 1, 0), TURN.TRANSPOSE),
    ((0, 1, -1, 0), TURN.ROTATE_270),
    ((0, -1, -1, 0), TURN.TRANSVERSE),
    ((0, -1, 1, 0), TURN.ROTATE_90),
]
UNEVEN = [0.0, 0.02, 0.12, 0.153, 0.173, 0.273, 0.306, 0.326, 0.426, 0.459]


def greys(frames: list[np.ndarray]) -> list[int]:
    """The number n of each frame of a test video, from its grey 12 n."""
    return [round(float(frame[-1, -1].mean()) / 12) for frame in frames]


@pytest.mark.parametrize(("matrix", "turn"), ORIENTATIONS)
def test_every_orientation_is_set_upright(
    matrix: tuple[int, ...], turn: TURN | None, tmp_path: Path, write_video: WriteVideo
) -> None:
    stored = next(iter(VideoStream(write_video(tmp_path / "plain.mp4", frames=2))))
    found = next(iter(VideoStream(write_video(tmp_path / "turned.mp4", frames=2, matrix=matrix))))
    expected = Image.fromarray(stored) if turn is None else Image.fromarray(stored).transpose(turn)
    assert np.array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("matrix", [(1, 1, -1, 1), (1, 0, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0)])
def test_slanted_videos_are_refused(matrix: tuple[int, ...], tmp_path: Path, write_video: WriteVideo) -> None:
    with pytest.raises(VideoError, match=r"a\.mp4 asks to be shown turned by an angle that is no quarter turn"):
        list(VideoStream(write_video(tmp_path / "a.mp4", frames=2, matrix=matrix)))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 85), (Fraction(2), 128), (Fraction(1, 2), 32)])
def test_pixels_become_square(name: str, aspect: Fraction, width: int, tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / name, frames=2, aspect=aspect)
    frame = next(iter(VideoStream(path)))
    assert frame.shape == (48, width, 3)
    assert frame[4, width // 2 - 4, 0] > 200
    assert frame[4, width // 2 + 4, 0] < 60
    (clip,) = VideoFiles({"test": [path]}, size=(24, 24), fit="crop").clips("test")
    red = clip.frames[0, 0] > 127  # the middle square of the picture: the upper left quarter stays one
    assert [int(red[:, 0].sum()), int(red[0].sum())] == pytest.approx([12, 12], abs=1)


def test_a_turned_video_of_wide_pixels_is_high(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.mp4", frames=2, aspect=Fraction(2), matrix=(0, 1, -1, 0))
    assert next(iter(VideoStream(path))).shape == (128, 48, 3)


def test_absurd_pixels_are_refused(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.mkv", frames=2, aspect=Fraction(1, 40))
    with pytest.raises(VideoError, match=r"a\.mkv declares pixels 0\.025 times as wide as high"):
        list(VideoStream(path))


@pytest.mark.parametrize(("codec", "pixels"), [("qtrle", "argb"), ("png", "rgba"), ("gif", "")])
def test_transparent_videos_lie_on_black(codec: str, pixels: str, tmp_path: Path) -> None:
    layers = np.full((48, 64, 4), (200, 100, 50, 255), np.uint8)
    layers[:24, :, 3] = 0
    path = tmp_path / ("a.gif" if codec == "gif" else "a.mov")
    if codec == "gif":
        Image.fromarray(layers).save(path, save_all=True, append_images=[Image.fromarray(layers[:, ::-1])])
    else:
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            for _ in range(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(layers, format="rgba").reformat(format=pixels)))
            container.mux(stream.encode())
    frame = next(iter(VideoStream(path)))
    assert frame[4, 4].tolist() == [0, 0, 0]
    assert frame[40, 4].tolist() == [200, 100, 50]


def test_a_second_layer_of_transparency_is_refused(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "a.webm", frames=2, codec="libvpx-vp9", pixels="yuva420p")
    with pytest.raises(VideoError, match=r"a\.webm is transparent by a second layer, which is not decoded"):
        list(VideoStream(path))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.mp4", "libx264"), ("live.webm", "libvpx")])
def test_times_are_the_containers(name: str, codec: str, tmp_path: Path, write_video: WriteVideo) -> None:
    live = {"live": "1"} if name.startswith("live") else {}
    path = write_video(tmp_path / name, frames=10, codec=codec, times=UNEVEN, options=live)
    stream = VideoStream(path)
    found = list(stream.timed())
    assert [time for _, time in found] == pytest.approx(UNEVEN, abs=1.5e-3)
    assert greys([frame for frame, _ in found]) == list(range(10))
    assert stream.rate == pytest.approx(9 / UNEVEN[-1], rel=0.06)
    (clip,) = VideoFiles({"test": [path]}).clips("test")
    assert clip.fps == pytest.approx(9 / UNEVEN[-1], rel=0.06)
    parts = list(VideoStream(f"{path}[2:9]", stride=3).timed())
    assert greys([frame for frame, _ in parts]) == [2, 5, 8]
    assert [time for _, time in parts] == pytest.approx([0.0, 0.153, 0.306], abs=1.5e-3)


def test_a_steady_live_webm_tells_its_rate_with_the_first_frame(tmp_path: Path, write_video: WriteVideo) -> None:
    """Its header names 1000 frames per second."""
    path = write_video(
        tmp_path / "a.webm", frames=20, codec="libvpx-vp9", times=[n / 15 for n in range(20)], options={"live": "1"}
    )
    stream = VideoStream(path)
    next(iter(stream))
    assert stream.rate == pytest.approx(15, rel=0.02)


def test_a_clock_goes_on_where_stamps_fail() -> None:
    clock = Clock(10.0)
    times = [clock.time(stamp) for stamp in (5.0, 5.1, None, 5.15, 5.4)]
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert clock.rate == 10.0
    clock = Clock(None)
    assert [clock.time(None) for _ in range(3)] == pytest.approx([0.0, 0.04, 0.08])
    exact = Clock(30000 / 1001)
    for number in range(50):
        exact.time(round(number * 1001 / 30) / 1000)  # stamps in whole milliseconds
    assert exact.rate == 30000 / 1001


def stream_copy(source: Path, target: Path, first: int, keyframe: int) -> Path:
    """Cut a video of 24 frames per second as `ffmpeg -ss -c copy` does: an edit list hides what is before `first`."""
    with av.open(str(source)) as container, av.open(str(target), "w") as cut:
        (video,) = container.streams.video
        copy = cut.add_stream_from_template(video)
        for packet in container.demux(video):
            assert packet.time_base is not None
            if packet.dts is None or packet.pts is None or round(packet.pts * packet.time_base * 24) < keyframe:
                continue
            shift = round(first / 24 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            cut.mux(packet)
    return target


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libx265"])
def test_a_video_cut_by_stream_copy_is_whole(codec: str, tmp_path: Path, write_video: WriteVideo) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=96, codec=codec)
    with av.open(str(whole)) as container:
        packets = [p for p in container.demux(video=0) if p.is_keyframe and p.pts is not None and p.time_base]
        keyframes = [round(float(p.pts * p.time_base) * 24) for p in packets if p.pts is not None and p.time_base]
    key = max(number for number in keyframes if number <= 60)
    cut = stream_copy(whole, tmp_path / "cut.mp4", first=key + 5, keyframe=key)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 96 - key  # declared, more than shown
    frames = list(VideoStream(cut))
    assert len(frames) == 96 - key - 5
    expected = list(VideoStream(whole))[key + 5 :]
    assert all(np.abs(a.astype(int) - b).max() <= 2 for a, b in zip(frames, expected, strict=True))
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(VideoError, match="cut short"):
        list(VideoStream(cut))


def test_frames_that_a_recorder_dropped_are_no_damage(tmp_path: Path, write_video: WriteVideo) -> None:
    """An AVI file declares an empty packet for each of them."""
    times = [n / 1000 * 40 for n in (0, 1, 2, 5, 6, 12, 13, 14, 20, 21)]
    path = write_video(tmp_path / "a.avi", frames=10, codec="mpeg4", times=times)
    found = list(VideoStream(path).timed())
    assert greys([frame for frame, _ in found]) == list(range(10))
    assert [time for _, time in found] == pytest.approx(times, abs=2e-3)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"movi") + 300])
    with pytest.raises(VideoError, match=r"a\.avi is cut short"):
        list(VideoStream(path))


class Bits:
    """Bits of an H.264 stream, in the codes of its standard."""

    def __init__(self) -> None:
        self.text = ""

    def u(self, *fields: tuple[int, int]) -> "Bits":
        self.text += "".join(format(value, f"0{length}b") for length, value in fields)
        return self

    def ue(self, *values: int) -> "Bits":
        for value in values:
            code = format(value + 1, "b")
            self.text += "0" * (len(code) - 1) + code
        return self

    def align(self) -> "Bits":
        self.text += "0" * (-len(self.text) % 8)
        return self

    def unit(self, kind: int) -> bytes:
        """A NAL unit, with its start code and without forbidden sequences of bytes."""
        self.text += "1"
        out, zeros = bytearray(), 0
        for value in int(self.align().text, 2).to_bytes(len(self.text) // 8, "big"):
            if zeros >= 2 and value <= 3:
                out.append(3)
                zeros = 0
            out.append(value)
            zeros = zeros + 1 if value == 0 else 0
        return b"\0\0\0\1" + bytes([3 << 5 | kind]) + bytes(out)


def fields_of_h264(frames: int) -> bytes:
    """A stream of 64x64, each of whose frames is two coded fields of unpacked blocks: grey 20 + 8 n and 4 more."""
    sps = Bits().u((8, 77), (8, 0), (8, 30)).ue(0, 0, 0, 0, 1).u((1, 0)).ue(3, 1).u((1, 0), (1, 0), (1, 1), (1, 0))
    sps.u((1, 1), (4, 0), (1, 1), (32, 1), (32, 50), (1, 1), (4, 0))  # 50 fields per second
    pps = Bits().ue(0, 0).u((2, 0)).ue(0, 0, 0).u((1, 0), (2, 0)).ue(0, 0, 0).u((3, 0))
    stream = sps.unit(7) + pps.unit(8)
    for number in range(frames):
        for bottom in (0, 1):
            field = Bits().ue(0, 7, 0).u((4, 0), (1, 1), (1, bottom))
            if bottom:
                field.u((4, 1), (1, 0))
            else:
                field.ue(number % 2).u((4, 0), (2, 0))
            field.ue(0)
            for _ in range(8):
                field.ue(25).align().u(*[(8, 20 + 8 * number + 4 * bottom)] * 256, *[(8, 128)] * 128)
            stream += field.unit(1 if bottom else 5)
    return stream


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_field_coded_files_are_whole(name: str, tmp_path: Path) -> None:
    """A packet is a field, so the file declares twice as many packets as it has frames, and twice their rate."""
    (tmp_path / "raw.h264").write_bytes(fields_of_h264(20))
    path = tmp_path / name
    with av.open(str(tmp_path / "raw.h264")) as container, av.open(str(path), "w") as target:
        copy = target.add_stream_from_template(container.streams.video[0])
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert len(packets) == 40
        for number, packet in enumerate(packets):
            packet.time_base, packet.duration, packet.stream = Fraction(1, 50), 1, copy
            packet.pts = packet.dts = number
            target.mux(packet)
    (clip,) = VideoFiles({"test": [path]}).clips("test")
    assert (len(clip), clip.size) == (20, (64, 64))
    assert clip.fps == pytest.approx(25.0)
    rows = clip.frames[:, :, :2].float().mean((1, 3))
    luma = (rows * 219 / 255 + 16).round()
    assert (luma - torch.tensor([[20 + 8 * n, 24 + 8 * n] for n in range(20)])).abs().max() <= 1
    assert [time for _, time in VideoStream(path).timed()] == pytest.approx([n / 25 for n in range(20)], abs=1e-3)
    if name != "a.ts":  # a transport stream declares nothing, so that nothing can be missing
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(VideoError, match=r"a\.m.*cut short"):
            list(VideoStream(path))


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_in_the_middle_is_named(codec: str, tmp_path: Path) -> None:
    path, noise = tmp_path / "a.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            pixels = grey(number) ^ noise.integers(0, 64, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 10 : len(content) * 6 // 10] = bytes(len(content) * 6 // 10 - len(content) * 3 // 10)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        list(VideoStream(path))
