"""Damaged files for every reader: `python tests/fuzz/run.py [COUNT] [SEED]`.

A finding is an exception that is no `BlockkitError`, more than five seconds, or more than two GB.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from readers import READERS

from blockkit.errors import BlockkitError

SECONDS = 5.0
BYTES = 2 << 30


@dataclass
class Found:
    """What a run found: by reader how many were refused and accepted; the faults; the slowest input."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)  # by the clock, which says nothing on a busy machine
    slowest: tuple[float, str] = (0.0, "")


def fuzz(count: int, seed: int, folder: Path, only: str | None = None) -> Found:
    """Reads `count` damaged files, each given by the seed and its number alone."""
    found, names = Found(), [only] if only else list(READERS)
    for number in range(count):
        name = names[number % len(names)]
        one(name, seed, number, folder, found)
    return found


def one(name: str, seed: int, number: int, folder: Path, found: Found) -> None:
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    reader = READERS[name]
    reader.make(place, random.Random(f"{seed}/{name}/{number}"))
    start, outcome = time.perf_counter(), "accepted"
    try:
        reader.read(place)
    except BlockkitError as error:
        outcome = "refused"
        str(error).encode("utf-8", "surrogatepass")
        if len(str(error)) > 20_000:
            found.faults.append(f"{name} {seed} {number}: a message of {len(str(error))} characters")
    except KeyboardInterrupt:
        raise
    except BaseException:
        outcome = "fault"
        found.faults.append(f"{name} {seed} {number}: {traceback.format_exc(limit=-4)}")
    seconds = time.perf_counter() - start
    found.outcomes[name, outcome] += 1
    found.slowest = max(found.slowest, (seconds, f"{name} {seed} {number}"))
    if seconds > SECONDS:
        found.slow.append(f"{name} {seed} {number}: {seconds:.1f} s")


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long or too much memory with an exception, as far as Python gets to raise it."""

    def late(number: int, frame: Any) -> None:
        raise TimeoutError("too slow")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc").exists() else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("count", nargs="?", type=int, default=200_000)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--only", choices=list(READERS))
    parser.add_argument("--case", type=int, help="only this number, its files kept")
    words = parser.parse_args()
    os.environ.setdefault("RUST_BACKTRACE", "0")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch, bounded():
        if words.case is not None:
            found = Found()
            one(words.only, words.seed, words.case, Path(scratch), found)
            kept = shutil.copytree(Path(scratch) / "case", tempfile.mkdtemp(), dirs_exist_ok=True)
            print(f"files in {kept}")
        else:
            found = fuzz(words.count, words.seed, Path(scratch), words.only)
    for (name, outcome), times in sorted(found.outcomes.items()):
        print(f"{name:12} {outcome:9} {times:>9,}")
    print(f"slowest: {found.slowest[0]:.2f} s ({found.slowest[1]}); {len(found.faults)} faults")
    print("\n".join([*found.faults, *found.slow][:20]))
    sys.exit(bool(found.faults or found.slow))


if __name__ == "__main__":
    main()
