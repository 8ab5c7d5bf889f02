import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from resq_rl.errors import SettingsError, VideoError
from resq_rl.video.clip import IGNORE
from resq_rl.video.images import (
    check_count,
    check_size,
    image_paths,
    map_labels,
    natural_key,
    read_frame,
    read_labels,
    resize_frame,
    resize_labels,
)
from tests.video.conftest import WriteImage

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)


def test_frames_are_taken_in_natural_order(tmp_path: Path, write_image: WriteImage) -> None:
    names = ["f10.PNG", "f2.png", "f1.jpg", "f02.png", "a.webp", "b.bmp", "é3.jpeg"]
    for name in [*names, ".hidden.png"]:
        write_image(tmp_path / name, GREY)
    (tmp_path / "notes.txt").write_text("no image")
    found = [path.name for path in image_paths(tmp_path)]
    assert found == ["a.webp", "b.bmp", "f1.jpg", "f02.png", "f2.png", "f10.PNG", "é3.jpeg"]


@given(st.lists(st.integers(0, 2000), unique=True), st.integers(1, 4))
def test_numbers_sort_as_numbers(numbers: list[int], digits: int) -> None:
    paths = [Path(f"seq-{number:0{digits}d}_x.png") for number in numbers]
    assert sorted(paths, key=natural_key) == [Path(f"seq-{n:0{digits}d}_x.png") for n in sorted(numbers)]


def test_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(VideoError, match=r"No image in .*looked for \.png, .*found clip.mp4"):
        image_paths(tmp_path)
    with pytest.raises(VideoError, match=r"No folder of frames at .*dogs: found clip.mp4 in"):
        image_paths(tmp_path / "dogs")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_frames_of_every_mode_become_rgb(tmp_path: Path, write_image: WriteImage, mode: str) -> None:
    image = read_frame(write_image(tmp_path / "a.png", GREY, mode if mode != "P" else "L"))
    assert image.mode == "RGB"
    assert np.array_equal(np.array(image), np.repeat(GREY[..., None], 3, axis=2))


def test_frames_of_more_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(VideoError, match=r"deep\.png must have 8 bits per channel, got mode I.*Convert"):
        read_frame(tmp_path / "deep.png")
    with pytest.raises(VideoError, match=r"Label .*deep\.png must be an 8-bit grey or palette image, got mode I"):
        read_labels(tmp_path / "deep.png")


def damaged(path: Path, kind: str) -> Path:
    """A file that holds no whole image."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)
    whole = path.read_bytes()
    content = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2], "garbled": whole[:60] + b"?" * 900}
    path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
@pytest.mark.parametrize("kind", ["empty", "text", "cut"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, kind: str) -> None:
    path = damaged(tmp_path / f"a.{suffix}", kind)
    with pytest.raises(VideoError, match=rf"Cannot decode frame {re.escape(str(path))} \(\d+ bytes\).*copy"):
        read_frame(path)


def test_garbled_and_giant_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="Cannot decode frame"):
        read_frame(damaged(tmp_path / "a.png", "garbled"))
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(VideoError, match=r"Cannot decode frame .*bomb\.png"):
        read_frame(tmp_path / "bomb.png")


def test_missing_label_says_what_lies_beside_it(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "00001.png", GREY)
    with pytest.raises(VideoError, match=r"Missing label .*00002\.png: found 00001\.png in"):
        read_labels(tmp_path / "00002.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
def test_label_values_survive_every_mode(tmp_path: Path, write_image: WriteImage, mode: str) -> None:
    assert np.array_equal(read_labels(write_image(tmp_path / "a.png", GREY, mode)), GREY)


def test_one_bit_labels_are_black_and_white(tmp_path: Path, write_image: WriteImage) -> None:
    values = np.array([[0, 255], [255, 0]])
    assert np.array_equal(read_labels(write_image(tmp_path / "a.png", values, "1")), values)


def test_coloured_labels_are_refused(tmp_path: Path, write_image: WriteImage) -> None:
    path = write_image(tmp_path / "a.png", np.stack([GREY, GREY, GREY + 1], axis=-1))
    with pytest.raises(VideoError, match=r"got mode RGB with channels that differ.*Convert"):
        read_labels(path)


def test_label_values_are_mapped_or_named() -> None:
    values = np.array([[0, 3], [255, 0]], dtype=np.uint8)
    assert np.array_equal(map_labels(values, {0: 0, 3: 1, 255: IGNORE}, Path("a")), [[0, 1], [255, 0]])
    with pytest.raises(VideoError, match=r"Label a holds values outside the classes: 255, where 0, 3 are known"):
        map_labels(values, {0: 0, 3: 1}, Path("a"))


def checkerboard(side: int) -> np.ndarray:
    return np.asarray(np.indices((side, side)).sum(axis=0) % 2 * 255, dtype=np.uint8)


def test_reduced_frames_are_antialiased() -> None:
    fine = Image.fromarray(checkerboard(64)).convert("RGB")
    assert np.abs(resize_frame(fine, (8, 8)).astype(int) - 127).max() <= 2


def test_frames_without_a_size_are_left_alone() -> None:
    image = Image.fromarray(GREY).convert("RGB")
    assert np.array_equal(resize_frame(image, None)[..., 0], GREY)
    assert resize_labels(GREY, None) is GREY


@given(top=st.integers(-9, 9), left=st.integers(-9, 9), height=st.integers(1, 14), width=st.integers(1, 14))
def test_whole_pixel_boxes_are_slices_of_the_padded_frame(top: int, left: int, height: int, width: int) -> None:
    box = (float(left), float(top), float(left + width), float(top + height))
    rows, columns = np.arange(top, top + height), np.arange(left, left + width)
    repeated = GREY[rows.clip(0, 5)[:, None], columns.clip(0, 7)[None, :]]
    frame = resize_frame(Image.fromarray(GREY).convert("RGB"), (height, width), box)
    assert np.array_equal(frame[..., 0], repeated)
    outside = ((rows < 0) | (rows > 5))[:, None] | ((columns < 0) | (columns > 7))[None, :]
    assert np.array_equal(resize_labels(GREY, (height, width), box), np.where(outside, IGNORE, repeated))


def between_pixels(length: int, source: int) -> np.ndarray:
    """Whether each of `length` pixels has its centre exactly between two of the source: either is nearest."""
    return np.array([(2 * pixel + 1) * source % (2 * length) == 0 for pixel in range(length)])


@given(st.integers(1, 40), st.integers(1, 40))
def test_nearest_labels_agree_with_another_library(height: int, width: int) -> None:
    image = np.array(Image.fromarray(GREY).resize((width, height), Image.Resampling.NEAREST))
    either = between_pixels(height, 6)[:, None] | between_pixels(width, 8)[None, :]
    assert not ((resize_labels(GREY, (height, width)) != image) & ~either).any()


def test_frames_and_labels_stay_aligned() -> None:
    """A bright square on black: after any crop and scale its pixels are the labelled ones, edges aside."""
    labels = np.zeros((60, 80), dtype=np.uint8)
    labels[20:40, 30:60] = 1
    image = Image.fromarray(labels * 255).convert("RGB")
    for box in [(0.0, 0.0, 80.0, 60.0), (10.3, 5.7, 70.9, 51.2), (-20.5, -3.3, 60.1, 70.0)]:
        frame, label = resize_frame(image, (45, 45), box)[..., 0], resize_labels(labels, (45, 45), box)
        assert ((frame > 127) != (label == 1))[label != IGNORE].mean() < 0.01


def test_sizes_and_counts_are_checked() -> None:
    assert check_size([4, 5], "R") == (4, 5)
    assert check_size(None, "R") is None
    for size in [(4,), (4, 0), (1, 2, 3)]:
        with pytest.raises(SettingsError, match="Setting size of R must be a height and a width in pixels"):
            check_size(size, "R")
    check_count(None, "frames", "R")
    with pytest.raises(SettingsError, match="Setting frames of R must be 1 or more, got 0"):
        check_count(0, "frames", "R")


BLACK_HALF = np.dstack([np.full((4, 6, 3), (200, 120, 40)), np.full((4, 6), 255)]).astype(np.uint8)
BLACK_HALF[:2, :, 3] = 0
BLACK_HALF[2, :, 3] = 51


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L"])
def test_hidden_colours_are_not_seen(tmp_path: Path, suffix: str, mode: str) -> None:
    """Transparent pixels lie on black, in proportion to their opacity."""
    channels = {"RGBA": [0, 1, 2, 3], "LA": [0, 3], "RGB": [0, 1, 2], "L": [0]}[mode]
    values = BLACK_HALF[..., channels]
    image = Image.fromarray(values[..., 0] if mode == "L" else values)
    image.save(tmp_path / f"a.{suffix}", lossless=True, exact=True)
    found = np.asarray(read_frame(tmp_path / f"a.{suffix}")).astype(int)
    opacity = BLACK_HALF[..., 3:] / 255 if "A" in mode else 1.0
    colour = BLACK_HALF[..., :3] if "RGB" in mode else BLACK_HALF[..., :1].repeat(3, 2)
    assert np.abs(found - colour * opacity).max() <= 1


def png(depth: int, colour: int, rows: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG file written by hand, of any depth and kind."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = ["".join(format(int(value), f"0{depth}b") for value in row.ravel()) for row in rows]
    packed = [int(line + "0" * (-len(line) % 8), 2).to_bytes((len(line) + 7) // 8, "big") for line in bits]
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    return content + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in packed))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_grey_of_every_depth_is_hidden(tmp_path: Path, depth: int) -> None:
    top = 2**depth - 1
    rows = np.array([[0, 1, top], [top, 1, 0]])
    (tmp_path / "a.png").write_bytes(png(depth, 0, rows, tRNS=struct.pack(">H", top)))
    found = np.asarray(read_frame(tmp_path / "a.png"))[..., 0]
    expected = np.where(rows == top, 0, rows * (255 // top))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_palettes_are_hidden(tmp_path: Path, depth: int) -> None:
    content = png(depth, 3, np.array([[0, 1, 1, 0]]), PLTE=bytes([10, 20, 30, 40, 50, 60]), tRNS=bytes([255, 51]))
    (tmp_path / "a.png").write_bytes(content)
    found = np.asarray(read_frame(tmp_path / "a.png"))[0].tolist()
    assert found == [[10, 20, 30], [8, 10, 12], [8, 10, 12], [10, 20, 30]]


def test_colours_of_16_bits_are_reduced_and_their_transparency_kept_or_refused(tmp_path: Path) -> None:
    rows = np.array([[[0x1234, 0x8000, 0xFFFF, 0xFFFF], [0x1234, 0x8000, 0xFFFF, 0x3333]]])
    (tmp_path / "a.png").write_bytes(png(16, 6, rows))
    found = np.asarray(read_frame(tmp_path / "a.png")).astype(int)
    assert np.abs(found - rows[..., :3] / 257 * rows[..., 3:] / 65535).max() <= 1
    (tmp_path / "b.png").write_bytes(png(16, 2, rows[..., :3], tRNS=struct.pack(">HHH", 1, 2, 3)))
    with pytest.raises(VideoError, match=r"b\.png has 16 bits per channel and a transparent colour"):
        read_frame(tmp_path / "b.png")


def test_printing_colours_are_converted(tmp_path: Path) -> None:
    values = np.array([[[0, 255, 255, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 0]]] * 8, np.uint8).repeat(8, 1)
    Image.fromarray(values, "CMYK").save(tmp_path / "a.jpg", quality=100)
    found = np.asarray(read_frame(tmp_path / "a.jpg"))[4, 4::8].astype(int)
    assert np.abs(found - [[255, 0, 0], [0, 255, 255], [0, 0, 0], [255, 255, 255]]).max() < 12


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animations_are_refused_and_other_pictures_beside_the_first_are_not(tmp_path: Path, suffix: str) -> None:
    images = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    images[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=images[1:], duration=50)
    with pytest.raises(VideoError, match=rf"frame .*a\.{suffix} is an animation of 2 pictures\. Split it"):
        read_frame(tmp_path / f"a.{suffix}")
    with pytest.raises(VideoError, match=r"label .* is an animation"):
        read_labels(tmp_path / f"a.{suffix}")
    images[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=images[1:])
    assert np.abs(np.asarray(read_frame(tmp_path / "a.jpg")).astype(int) - 10).max() <= 2


def test_labels_hide_nothing_under_transparency(tmp_path: Path) -> None:
    values = np.dstack([GREY] * 3 + [np.where(GREY == 0, 0, 255)]).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_labels(tmp_path / "a.png"), GREY)
    values[2, 3, 3] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(VideoError, match=r"a\.png hides values other than 0 under 1 transparent pixels"):
        read_labels(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_followed_where_wanted(tmp_path: Path, suffix: str, orientation: int) -> None:
    """As Pillow does; 0 and 9 are no orientations."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8], pixels[8:, 16:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, quality=95, lossless=True)
    with Image.open(path) as image:
        stored, upright = np.asarray(image.convert("RGB")), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(np.asarray(read_frame(path)), stored)
    assert np.array_equal(np.asarray(read_frame(path, upright=True)), upright)
    assert upright.shape == ((32, 16, 3) if 5 <= orientation <= 8 else (16, 32, 3))


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    for content in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(5)):
        Image.fromarray(GREY).save(tmp_path / "a.jpg", exif=content)
        assert read_frame(tmp_path / "a.jpg", upright=True).size == (8, 6)


def test_declared_proportions_of_pixels_are_refused(tmp_path: Path) -> None:
    """A PNG of a video of wide pixels, as ffmpeg writes it."""
    rows = np.arange(12).reshape(2, 6)
    for aspect, refused in (((4, 3), True), ((1, 1), False), ((0, 1), False)):
        (tmp_path / "a.png").write_bytes(png(8, 0, rows, pHYs=struct.pack(">IIB", *aspect, 0)))
        if refused:
            with pytest.raises(VideoError, match=r"a\.png declares pixels that are not square \(4:3\)"):
                read_frame(tmp_path / "a.png", upright=True)
        else:
            assert read_frame(tmp_path / "a.png", upright=True).size == (6, 2)
        assert read_frame(tmp_path / "a.png").size == (6, 2)
    (tmp_path / "a.png").write_bytes(png(8, 0, rows, pHYs=struct.pack(">IIB", 2000, 3000, 1)))  # of print, per metre
    assert read_frame(tmp_path / "a.png", upright=True).size == (6, 2)
