"""What scripts write into the README: whatever stands between two markers."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def between(text: str, start: str, end: str) -> str:
    """What stands between two markers."""
    return _parts(text, start, end)[1].strip()


def write(start: str, end: str, made: str) -> None:
    """Puts something else between two markers of the README."""
    before, _, after = _parts(README.read_text(encoding="utf-8"), start, end)
    README.write_text(f"{before}{start}\n\n{made}\n\n{end}{after}", encoding="utf-8")


def require(start: str, end: str) -> None:
    """Refuses a README without the markers: before long work, not after it."""
    _parts(README.read_text(encoding="utf-8"), start, end)


def _parts(text: str, start: str, end: str) -> tuple[str, str, str]:
    before, found, rest = text.partition(start)
    inside, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{README} has no {start} ... {end}")
    return before, inside, after
