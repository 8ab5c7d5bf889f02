"""Damage to files, drawn from a generator, and what a reader may make of it."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np

from resq_rl.errors import ResqError

# What a number or a name in a text may turn into.
TOKENS = [
    b"NaN",
    b"-1",
    b"0",
    b"1e999",
    b"99999999999999999999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"\xff\xfe",
    b"\x00",
    b"true",
]
HANG_SECONDS = 20


class HangError(BaseException):
    """A reader took too long."""


@dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
        name: of the kind.
        originals: contents that can be read.
        read: turns a content into what it means, or raises.
        guarded: a content that was changed must be refused or mean the same as its original.
    """

    name: str
    originals: tuple[bytes, ...]
    read: Callable[[bytes], object]
    guarded: bool = False


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """The content with a few of its bits, bytes, slices or tokens changed."""
    data = bytearray(content)
    for _ in range(int(generator.choice(np.array([1, 1, 1, 2, 4, 16])))):
        size = max(len(data), 1)
        # Half of all damage is near the start, where headers are.
        place = int(generator.integers(size if generator.uniform() < 0.5 else min(size, 400)))
        length = int(generator.integers(1, 1 + min(64, size)))
        match int(generator.integers(8)):
            case 0 if data:
                data[place] ^= 1 << int(generator.integers(8))
            case 1 if data:
                data[place] = int(generator.integers(256))
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                data[place:place] = generator.bytes(length)
            case 5:
                del data[place:]
            case 6:
                data[place : place + length] = bytes(length)
            case _:
                token = TOKENS[int(generator.integers(len(TOKENS)))]
                data[place : place + int(generator.integers(4))] = token
    return bytes(data)


@contextmanager
def no_hang() -> Iterator[None]:
    """Raise `HangError` after 20 seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"no answer after {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(what: str, read: Callable[[], object]) -> tuple[str, object]:
    """Whether an input was read or refused, and as what; anything else fails, naming the input."""
    try:
        with no_hang():
            return "read", read()
    except ResqError as error:
        return "refused" if str(error).strip() else "refused without a message", None
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def survey(reader: Reader, cases: int, same: Callable[[object, object], bool]) -> Counter[str]:
    """Read damaged contents, seed by seed: how many were read and refused."""
    counts: Counter[str] = Counter()
    expected = [reader.read(content) for content in reader.originals]
    for seed in range(cases):
        generator = np.random.default_rng(seed)
        index = int(generator.integers(len(reader.originals)))
        content = mutated(reader.originals[index], generator)
        end, value = outcome(f"{reader.name}, seed {seed}", lambda content=content: reader.read(content))  # type: ignore[misc]
        if end == "read" and reader.guarded:
            assert same(value, expected[index]), f"{reader.name}, seed {seed}: silently wrong"
        counts[end] += 1
    return counts
