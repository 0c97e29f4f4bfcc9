# ruff: noqa: E501  (tables of cases)
"""Structure-aware damage: of documents, of the text they become, and of bytes."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

EVIL: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**7, 2**31, 2**53, 2**63, 10**30, 10**200, 0.5, -0.0, 1e-320, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "x", "0x", "é", "\ud800", "\x1b[31m", "a\nb", "../../etc", "x" * 3000, "*",
    "~nobody", "= 1 / 0", "{}", [], {}, [[]], [None], [1, 2], [1e9, -1], ["a"] * 50, {"": None}, {"a": {"b": []}},
)  # fmt: skip
YAML_EVIL = (
    "!!int ''", "!!int 0x", "!!int '0x'", "!!int ''", "!!float x", "!!bool x", "!!binary '%'", "!!timestamp 2020-99-99",
    "2020-99-99", "2001-12-14t21:59:43.10-25:00", '"\\U99999999"', '"\\xZZ"', "0o9", "0b2", "1__2", "1:99:99", ".inf", "-.nan", "&a [*a]",
    "*missing", "!!set {a, a}", "!!omap [a]", "!!pairs [a]", "!!python/object:os.system {}", "<<", "{<<: 1}", "? [a]",
    "|9", ">-", "%TAG", "---", "...", "\t", "\x00", "\ufeff", "!<tag:x> 1", "1e400", "-", "9" * 5000, "[" * 200, "{a: " * 120,
)  # fmt: skip


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document of dicts and lists."""
    found, stack = [], [document]
    while stack:
        node = stack.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    return found


def damaged_document(document: Any, rng: random.Random) -> Any:
    """The document with a few of its values replaced, moved, doubled, renamed or taken away."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        spots = places(document)
        if not spots:
            return rng.choice(EVIL)
        node, key = rng.choice(spots)
        match rng.randrange(7):
            case 0 | 1 | 2:
                node[key] = copy.deepcopy(rng.choice(EVIL))
            case 3:
                del node[key]
            case 4:
                other, place = rng.choice(spots)
                if place in other if isinstance(other, dict) else place < len(other):
                    node[key] = copy.deepcopy(other[place])
            case 5:
                if isinstance(node, dict):
                    node[str(rng.choice(EVIL))[:2000]] = node.pop(key)
                else:
                    node.insert(key, copy.deepcopy(node[key]))
            case 6:
                value = node[key]
                if isinstance(value, bool | dict | list | None):
                    node[key] = [value]
                elif isinstance(value, str):
                    node[key] = value + rng.choice(("", ".", " ", "\x00", "x" * 200, value))
                elif math.isfinite(value):
                    node[key] = rng.choice(
                        (value + 1, value - 1, -value, value * 2, float(value) if value < 2**63 else 0, str(value)[:50])
                    )
    return document


def damaged_text(text: str, rng: random.Random) -> str:
    """The text with a piece cut out, doubled, or put where it does not belong; rarely nested without end."""
    if rng.random() < 0.85:
        return text
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    b = min(b, a + rng.choice((1, 3, 40)))
    piece = rng.choice(
        ("", text[a:b] * 2, "[" * 2000, "9" * 5000, "1e999", "NaN", ",", "}", '"', "\\u0000", "\ud83d", "{}")
    )
    return text[:a] + piece + text[b:]


def damaged_yaml(text: str, rng: random.Random) -> str:
    """YAML with scalars replaced by what its readers disagree about, and lines moved, doubled or indented."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(lines))
        line = lines[i]
        match rng.randrange(6):
            case 0 | 1:
                head, colon, _ = line.partition(":")
                lines[i] = f"{head}: {rng.choice(YAML_EVIL)}" if colon else rng.choice(YAML_EVIL)
            case 2:
                lines.insert(rng.randrange(len(lines)), line)
            case 3:
                lines[i] = (
                    " " * rng.randrange(5) + line.lstrip()
                    if rng.random() < 0.5
                    else line[rng.randrange(len(line) + 1) :]
                )
            case 4:
                words = line.split(" ")
                words[rng.randrange(len(words))] = (
                    rng.choice(YAML_EVIL) if rng.random() < 0.7 else str(rng.choice(EVIL))
                )
                lines[i] = " ".join(words)
            case 5:
                del lines[i]
                lines = lines or [""]
    return damaged_text("\n".join(lines), rng)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some flipped, set to extremes, cut off or doubled."""
    if not content or rng.random() < 0.6:
        return content
    found = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        i = rng.randrange(len(found))
        match rng.randrange(4):
            case 0:
                found[i] ^= 1 << rng.randrange(8)
            case 1:
                found[i : i + 8] = rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
            case 2:
                del found[i:]
                found = found or bytearray(b"\0")
            case 3:
                found[i:i] = found[i : i + 16]
    return bytes(found)


def as_json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=True)
