import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_rl.errors import VideoError
from resq_rl.video.parts import Part, check_disjoint, listed, split_parts


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("dog", Part("dog")),
        ("a/b.mp4[3:7]", Part("a/b.mp4", 3, 7)),
        ("a[:7]", Part("a", 0, 7)),
        ("a[3:]", Part("a", 3)),
        ("a[b]", Part("a[b]")),
        ("a[1][2:3]", Part("a[1]", 2, 3)),
    ],
)
def test_parts_are_read_from_text(text: str, part: Part) -> None:
    assert Part.parse(text) == part


@given(st.text("ab/.[]:1", min_size=1), st.integers(0, 50), st.none() | st.integers(1, 50))
def test_text_of_a_part_reads_back(name: str, start: int, length: int | None) -> None:
    part = Part(name, start, None if length is None else start + length)
    if Part.parse(name) == Part(name) or (part.start, part.stop) != (0, None):
        assert Part.parse(str(part)) == part


@pytest.mark.parametrize("text", ["a[5:5]", "a[5:3]", "a[0:0]"])
def test_empty_parts_are_refused(text: str) -> None:
    with pytest.raises(VideoError, match=r"must hold a frame.*Write it as"):
        Part.parse(text)


ranges = st.tuples(st.integers(0, 12), st.none() | st.integers(1, 12))


@given(ranges, ranges)
def test_overlap_agrees_with_sets_of_frames(one: tuple[int, int | None], two: tuple[int, int | None]) -> None:
    sets = [set(range(start, 40 if length is None else start + length)) for start, length in (one, two)]
    parts = [Part("a", start, None if length is None else start + length) for start, length in (one, two)]
    assert parts[0].overlaps(parts[1]) == bool(sets[0] & sets[1])
    assert not parts[0].overlaps(Part("b"))


def test_splits_must_be_disjoint() -> None:
    check_disjoint(split_parts({"train": ["a[:5]", "b"], "test": ["a[5:]"]}, "Reader"), "Reader")
    with pytest.raises(VideoError, match=r"Splits of Reader must be disjoint, got a\[4:\] in test and a\[0:5\] in"):
        check_disjoint(split_parts({"train": ["a[:5]"], "test": ["a[4:]"]}, "Reader"), "Reader")
    with pytest.raises(VideoError, match="got a in train and a in train"):
        check_disjoint(split_parts({"train": ["a", "a"]}, "Reader"), "Reader")


def test_splits_must_be_lists_under_known_names(unchecked_types: None) -> None:
    with pytest.raises(VideoError, match="Unknown split 'val'"):
        split_parts({"val": ["a"]}, "Reader")  # type: ignore[dict-item]  # what is tested
    with pytest.raises(VideoError, match="Split train of Reader must be a list of names, got 'a'"):
        split_parts({"train": "a"}, "Reader")


def test_long_lists_are_shortened() -> None:
    assert listed([]) == "nothing"
    assert listed("cab") == "a, b, c"
    assert listed("abcdef", most=2) == "a, b and 4 more"
