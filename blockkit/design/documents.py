"""Documents people write, YAML or JSON: read with the place of everything, and checked key by key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..graph.graph import nearest
from ..graph.sizes import Size
from ..json_reader import DEEPEST, MOST_BYTES, MOST_VALUES, NotJson, parse_json

MOST_YAML_BYTES = 4 << 20  # YAML takes a hundred times longer to read than JSON
MOST_YAML_VALUES = 100_000
LONGEST_LINE = 200_000
_BRACKETS = re.compile(r"[\[\]{}]")
MOST_INTEGER = 10**18
_USE_JSON = "that takes minutes to read; write it as JSON"


@dataclass(frozen=True)
class Place:
    """Where in a document something stands, for messages: `file, line 3, column 5, blocks.main`."""

    source: str
    keys: tuple[str, ...] = ()
    node: Any = None
    mark: tuple[int, ...] | None = None

    def at(self, key: str, node: Any) -> Place:
        lines = getattr(self.node, "lc", None)
        mark = lines.data.get(key) if lines is not None and lines.data else None
        return Place(self.source, (*self.keys, key), node, mark)

    def __str__(self) -> str:
        parts = [self.source]
        if self.mark:
            parts.append(f"line {self.mark[0] + 1}, column {self.mark[1] + 1}")
        if self.keys:
            parts.append(".".join(f"{k if k.isprintable() else ascii(k):.80}" for k in self.keys))
        return ", ".join(parts)


def placed(error: BadInput, place: Place, *sections: Place) -> BadInput:
    """The error with the place of what is to blame, if one of the sections lists it; else with `place`.

    A name inside a component (`mlp.up_proj`) stands where the component (`mlp`) does.
    """
    name = error.at
    while name:
        for section in sections:
            if isinstance(section.node, Mapping) and name in section.node:
                return BadInput(f"{section.at(name, section.node[name])}: {error}", at=error.at)
        name = name.rpartition(".")[0]
    return BadInput(f"{place}: {error}", at=error.at)


def read_document(path: Path, finite: bool = True) -> tuple[Any, Place]:
    """The parsed YAML or JSON of a file; with numbers that are not finite, or too large, only if not `finite`.

    Raises:
        BadInput: the file is missing, too large, or malformed (with line and column).
    """
    if not path.is_file():
        raise BadInput(f"{path} is not an ordinary file" if path.exists() else f"no such file: {path}")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8); a spec is a YAML or JSON file") from None
    return parse_document(text, str(path), finite)


def parse_document(text: str, source: str, finite: bool = True) -> tuple[Any, Place]:
    """Parses YAML (of which JSON is a part); see `read_document`."""
    if len(text) > MOST_BYTES:
        raise BadInput(f"{source} is larger than {MOST_BYTES >> 20} MiB; a spec is a small text file")
    try:
        found = _parsed_json(text, source) if text.lstrip().startswith("{") else None
        found = found if found is not None else _parsed_yaml(text, source)
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply for a spec") from None
    return _bounded(found, source, finite), Place(source, (), found)


def _parsed_json(text: str, source: str) -> Any:
    """None where the text is not JSON and may still be YAML in braces."""
    try:
        return parse_json(text, source, finite=False)
    except NotJson:
        if source.endswith(".json"):
            raise
        return None


def _parsed_yaml(text: str, source: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.composer import Composer
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MOST_YAML_BYTES:
        raise BadInput(f"{source} is larger than {MOST_YAML_BYTES >> 20} MiB of YAML; {_USE_JSON}")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise BadInput(f"{source}, line {number}: longer than {LONGEST_LINE:,} characters; {_USE_JSON}")

    depth = 0
    for bracket in _BRACKETS.findall(text):  # the scanner's time grows with the square of the depth
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        if depth > 2 * DEEPEST:  # some may stand in texts and comments
            raise BadInput(f"{source}: nested too deeply for a spec (at most {DEEPEST} levels)")

    class Counting(Composer):
        """Ends the reading of a file that would take minutes."""

        count = 0

        def compose_node(self, parent: Any, index: int) -> Any:
            self.count += 1
            if self.count > MOST_YAML_VALUES:
                line = self.parser.peek_event().start_mark.line + 1
                raise BadInput(f"{source}, line {line}: more than {MOST_YAML_VALUES:,} values of YAML; {_USE_JSON}")
            return super().compose_node(parent, index)

    reader = YAML(typ="rt", pure=True)
    reader.Composer = Counting
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{source}{where}: malformed YAML: {error.problem or error.context}") from None
    except (
        YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        NotImplementedError,
    ) as error:
        said = " ".join(str(error).partition(";")[0].split())  # also what its readers of dates and tags let through
        raise BadInput(
            f"{source}: malformed YAML: a value does not fit its type ({said or type(error).__name__})"
        ) from None


def _bounded(document: Any, source: str, finite: bool) -> Any:
    """The document, unless its aliases unfold into too much, or it is nested too deeply, or in itself."""
    sizes: dict[int, tuple[int, int]] = {}  # of containers, aliases unfolded: how many values, how many levels
    trail: dict[int, None] = {}
    stack: list[tuple[Any, bool]] = [(document, False)]
    while stack:
        value, left = stack.pop()
        inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else None
        if finite and isinstance(value, int | float) and not -MOST_INTEGER <= value <= MOST_INTEGER:
            raise BadInput(f"{_place_of(value, document, source)}: {_wrong_number(value)}")
        if inner is None or (id(value) in sizes and not left):
            continue
        if len(inner) + len(stack) + len(sizes) > MOST_VALUES:
            raise BadInput(f"{source}: more than {MOST_VALUES:,} values; a spec is a small file")
        if left:
            parts = [sizes.get(id(v), (1, 0)) for v in inner]
            sizes[id(value)] = 1 + sum(n for n, _ in parts), 1 + max((h for _, h in parts), default=0)
            trail.popitem()
            if sizes[id(value)][1] > DEEPEST:
                raise BadInput(f"{source}: nested too deeply for a spec (at most {DEEPEST} levels)")
            continue
        if id(value) in trail:
            raise BadInput(f"{source}: an alias stands inside what it stands for")
        trail[id(value)] = None
        stack.append((value, True))
        stack.extend((v, False) for v in inner)
    if sizes.get(id(document), (1, 0))[0] > MOST_VALUES:
        raise BadInput(f"{source}: its aliases unfold into more than {MOST_VALUES:,} values; a spec is a small file")
    return document


def _wrong_number(value: int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    return f"a number is too large; at most {MOST_INTEGER:.0e} is allowed"


def _place_of(wanted: Any, document: Any, source: str) -> Place:
    """Where a value stands that is not allowed to."""
    stack = [Place(source, (), document)]
    while stack:
        place = stack.pop()
        if place.node is wanted:
            return place
        if isinstance(place.node, Mapping):
            stack.extend(place.at(str(k), v) for k, v in place.node.items())
        elif isinstance(place.node, list):
            stack.extend(place.at(str(i), v) for i, v in enumerate(place.node))
    return Place(source)


def mapping(value: Any, place: Place) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{place}: expected a mapping (key: value), got {shown(value)}")
    if len({str(k) for k in value}) < len(value):
        raise BadInput(f"{place}: two keys are written alike, as 1 and '1'; give every key once")
    return value


def strings(value: Any, place: Place) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadInput(f"{place}: expected a list of names or globs, got {shown(value)}")
    return [str(v) for v in value]


def name_at(value: Any, place: Place) -> str:
    """A name of one thing in the document."""
    if not isinstance(value, str):
        raise BadInput(f"{place}: expected a name, got {shown(value)}")
    return str(value)


def shown(value: Any) -> str:
    """A value for messages, in plain words and short."""
    if value is None:
        return "nothing"
    kind = {dict: "a mapping", list: "a list", str: "the text", bool: "", int: "", float: ""}
    simple = plain(value)
    return f"{kind.get(type(simple), '')} {simple!r:.60}".strip()


def check_keys(cls: Any, settings: Mapping[str, Any], place: Place, hidden: tuple[str, ...] = ()) -> None:
    """Refuses keys that are no fields of the dataclass `cls`, and names those that are missing."""
    allowed = [f.name for f in fields(cls) if f.name not in hidden]
    for key in settings:
        if key not in allowed:
            at = place.at(str(key), None)
            raise BadInput(f"{at}: unknown key {key!r}; allowed are {', '.join(allowed)}{nearest(str(key), allowed)}")
    for f in fields(cls):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name in allowed and f.name not in settings:
            raise BadInput(f"{place}: {f.name!r} is missing; allowed are {', '.join(allowed)}")


def plain(value: Any) -> Any:
    """Plain dicts, lists and scalars, without the reader's own types."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def size_at(value: Any, place: Place) -> Size:
    try:
        return Size.of(value)
    except BadInput as error:
        raise BadInput(f"{place}: {error}") from None
