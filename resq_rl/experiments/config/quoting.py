"""Overrides that Hydra's grammar can read, whatever the text of a setting is: NAME="TEXT"."""

import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

__all__ = ["assignment", "readable"]

OPENING, CLOSING = "[{", "]}"


def assignment(name: str, text: object) -> str:
    """The override that sets `name` to a text, with quotes where Hydra would not read it, or would change it, without.

    For a command line, a shell needs its own quotes around the whole (`shlex.quote`).
    """
    plain = _read(f"{name}={text}")
    same = plain is not None and plain.value() == str(text) and "${" not in str(text)
    return f"{name}={text if same else _quoted(str(text))}"


def readable(override: str, *, several: bool = False) -> str | None:
    """An override that Hydra cannot read, with quotes around the texts in it, alone or within lists and mappings.

    Args:
        several: commas outside of lists separate values of a sweep.

    Returns:
        None where quotes do not help, as with a mistake in the name.
    """
    name, equals, raw = override.partition("=")
    values = _split(raw) if several else [raw]
    found = f"{name}{equals}{','.join(map(_with_quotes, values))}"
    return None if _read(found, several=several) is None else found


def _quoted(text: str) -> str:
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)  # backslashes count only before a quote
    return '"' + re.sub(r"(\\+)$", r"\1\1", text).replace("${", "\\${") + '"'


def _read(override: str, *, several: bool = False) -> Override | None:
    """What Hydra reads, unless that is several values; None where it can read nothing."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return None
    return parsed if several or not parsed.is_sweep_override() else None


def _with_quotes(raw: str) -> str:
    """The value with quotes around each text in it that cannot be read without."""
    raw = raw.strip()
    if raw.startswith("[") and raw.endswith("]"):
        return f"[{','.join(map(_with_quotes, _split(raw[1:-1])))}]"
    if raw.startswith("{") and raw.endswith("}"):
        pairs = (item.partition(":") for item in _split(raw[1:-1]))
        return "{" + ",".join(f"{key.strip()}:{_with_quotes(value)}" for key, _, value in pairs) + "}"
    return raw if _read(f"x={raw}") is not None else _quoted(raw)


def _split(text: str) -> list[str]:
    """The parts between commas that are outside of brackets and quotes."""
    return list(_parts(text)) if text.strip() else []


def _parts(text: str) -> Iterator[str]:
    depth, start, quote = 0, 0, ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[i - 1] != "\\" else quote
        elif character in "\"'" and not text[start:i].strip(" [{"):  # within a text it is an apostrophe
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]
