"""JSON from anywhere, read within bounds: of size, depth, digits and number of values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .errors import BadInput

MOST_BYTES = 32 << 20
MOST_VALUES = 3_000_000
MOST_DIGITS = 100
DEEPEST = 100
_LONG = re.compile(rf"\d{{{MOST_DIGITS + 1}}}")


class NotJson(BadInput):
    """The text is not JSON at all, and may be something else."""


def parse_json(text: str, source: str, finite: bool = True, most: int = MOST_BYTES) -> Any:
    """The value of a JSON text.

    Args:
        source: what the text is, for messages.
        finite: whether NaN, Infinity and numbers too large for a float are refused.
        most: characters that it may have.

    Raises:
        NotJson: it is malformed (with line and column).
        BadInput: it gives a key twice, or is beyond the bounds.
    """
    if len(text) > most:
        raise BadInput(f"{source}: larger than {most >> 20} MiB")
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_int=_whole if _LONG.search(text) else None)
    except json.JSONDecodeError as error:
        raise NotJson(f"{source}, line {error.lineno}, column {error.colno}: malformed JSON: {error.msg}") from None
    except BadInput as error:
        raise BadInput(f"{source}: malformed JSON: {error}") from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply (at most {DEEPEST} levels)") from None
    _require_bounded(found, source, finite)
    return found


def read_json(file: Path, finite: bool = True, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds; see `parse_json`.

    Raises:
        BadInput: the file cannot be read, holds something else, or is beyond the bounds.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(most + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"cannot read {file}: it is not text (UTF-8)") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {str(file)!r:.300}: {getattr(error, 'strerror', None) or error}") from None
    found = parse_json(text, str(file), finite, most)
    if not isinstance(found, dict):
        raise BadInput(f"{file} must hold a JSON object, not {type(found).__name__}")
    return found


def _require_bounded(document: Any, source: str, finite: bool) -> None:
    """Refuses a document level by level; JSON has no aliases, so each value is met once."""
    level, depth, count = [document], 0, 0
    while level:
        count += len(level)
        if count > MOST_VALUES:
            raise BadInput(f"{source}: more than {MOST_VALUES:,} values")
        if finite and (wrong := next((v for v in level if type(v) is float and not math.isfinite(v)), None)):
            raise BadInput(f"{source}: {wrong} is not a finite number")
        inner = [v.values() if type(v) is dict else v for v in level if type(v) in (dict, list)]
        depth += bool(inner)
        if depth > DEEPEST:
            raise BadInput(f"{source}: nested too deeply (at most {DEEPEST} levels)")
        if count + sum(map(len, inner)) > MOST_VALUES:
            raise BadInput(f"{source}: more than {MOST_VALUES:,} values")
        level = [v for values in inner for v in values]


def _whole(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > MOST_DIGITS:
        raise BadInput(f"a number of {count:,} digits (at most {MOST_DIGITS})")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, every key of which is given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise BadInput(f"the key {twice!r:.100} is given twice in one object")
    return found
