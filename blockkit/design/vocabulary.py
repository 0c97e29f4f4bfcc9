"""The components that a spec may use: the kit's own, those a user hands over, and composites that it defines.

    components:
      gated_tail:
        settings: {hidden: d_ff, activation: silu}     # with defaults; without one (`hidden:`) it must be given
        input: z
        nodes:
          norm: {component: rms_norm, input: z}
          inner: {component: gated_mlp, input: norm, hidden: $hidden, activation: $activation}
        output: inner

A composite is used like any other component, `{component: gated_tail, input: v, hidden: 64}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args, get_type_hints

from ..errors import BadInput
from ..graph.graph import nearest
from .components import COMPONENTS, Component
from .components.composite import Composite
from .documents import Place, check_keys, mapping, plain, strings

OWN = "; a component of your own comes from a Python file: --components FILE.py (in Python components=[...])"
MOST_PARTS = 100_000  # components that all composites of a spec may unfold into
DEEPEST = 40  # composites inside composites
_SETTING = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Definition:
    """A composite as it is written; `nodes` are documents, with `$setting` where a setting goes."""

    name: str
    place: Place
    settings: Mapping[str, Any]
    inputs: tuple[str, ...]
    nodes: Mapping[str, Any]
    output: str


@dataclass
class Vocabulary:
    """Kinds of components by name, and how many components the composites have unfolded into so far."""

    kinds: Mapping[str, type[Component]]
    composites: Mapping[str, Definition] = field(default_factory=dict)
    parts: int = 0

    @staticmethod
    def of(components: Iterable[Any] = (), document: Any = None, place: Place | None = None) -> Vocabulary:
        """The kit's components, the classes in `components`, and the composites of a spec's `components` section.

        Raises:
            BadInput: one of them is not what it should be, or takes a name that is in use.
        """
        kinds = dict(COMPONENTS)
        for cls in components:
            _require_component(cls)
            if kinds.get(cls.kind, cls) is not cls:
                raise BadInput(f"{cls.__name__}: there is a component {cls.kind!r} already; give it another kind")
            kinds[cls.kind] = cls
        defined = {}
        if document is not None and place is not None:
            for name, value in mapping(document, place).items():
                defined[str(name)] = _definition(str(name), value, place.at(str(name), value), kinds)
        _require_no_circle(defined)
        return Vocabulary(kinds, defined)

    def component(self, document: Any, place: Place, depth: int = 0) -> Component:
        """The component that a node of a block describes.

        Raises:
            BadInput: an unknown kind, or settings that it does not have.
        """
        settings = dict(mapping(document, place))
        kind = settings.pop("component", None)
        if isinstance(kind, str) and kind in self.composites:
            return self._composite(self.composites[kind], settings, place, depth)
        if not isinstance(kind, str) or kind not in self.kinds:
            known = [*self.kinds, *self.composites]
            meant = nearest(kind, known) if isinstance(kind, str) else ""
            raise BadInput(
                f"{place}: unknown component {plain(kind)!r:.80}; allowed are {', '.join(known)}{meant}{OWN}"
            )
        cls = self.kinds[kind]
        check_keys(cls, settings, place, hidden=("name",))
        return validated(cls, settings, place)

    def _composite(self, made: Definition, settings: dict[str, Any], place: Place, depth: int) -> Composite:
        inputs = _inputs_given(made, settings, place)
        for key in settings:
            if key not in made.settings:
                known = ", ".join(made.settings) or "none"
                raise BadInput(f"{place.at(str(key), None)}: unknown key {key!r}; settings of {made.name} are {known}")
        values = {**made.settings, **plain(settings)}
        if missing := [k for k, v in values.items() if v is None and k not in settings]:
            raise BadInput(f"{place}: {made.name} has no default for {', '.join(missing)}; give a value")
        self.parts += len(made.nodes)
        if self.parts > MOST_PARTS or depth == DEEPEST:
            what = (
                f"nested deeper than {DEEPEST}" if depth == DEEPEST else f"more than {MOST_PARTS} components together"
            )
            raise BadInput(f"{place}: the composites are {what}")
        where, nodes = made.place.at("nodes", made.nodes), {}
        for name, value in made.nodes.items():
            at = where.at(str(name), value)
            try:
                nodes[str(name)] = self.component(_filled(value, values, at), at, depth + 1)
            except BadInput as error:
                raise (error if depth else BadInput(f"{error} (used at {place})")) from None
        return Composite(inputs, made.name, plain(settings), nodes, made.inputs, made.output)


def _require_component(cls: Any) -> None:
    shown = getattr(cls, "__name__", repr(cls))
    if not isinstance(cls, type) or not issubclass(cls, Component):
        raise BadInput(f"{shown} is not a component; hand over subclasses of blockkit.Component or blockkit.Operation")
    if not cls.kind:
        raise BadInput(f"{shown} needs a name for specs, as kind = {shown.lower()!r}")
    frozen = "__dataclass_fields__" in vars(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not frozen or not {"input", "inputs"} & cls.__dataclass_fields__.keys():  # type: ignore[attr-defined]
        raise BadInput(f"{shown} must be a frozen dataclass (@dataclass(frozen=True)) with a field `input` or `inputs`")


def _definition(name: str, document: Any, place: Place, kinds: Mapping[str, Any]) -> Definition:
    top = mapping(document, place)
    allowed = ("settings", "input", "inputs", "nodes", "output")
    for key in top:
        if key not in allowed:
            raise BadInput(f"{place.at(str(key), None)}: unknown key {key!r}; a composite has {', '.join(allowed)}")
    if name in kinds:
        raise BadInput(f"{place}: there is a component {name!r} already; choose another name")
    for key in ("nodes", "output"):
        if key not in top:
            raise BadInput(f"{place}: a composite needs `{key}`")
    if ("input" in top) == ("inputs" in top):
        raise BadInput(f"{place}: give either `input` (a name) or `inputs` (a list of names)")
    inputs = [str(top["input"])] if "input" in top else strings(top["inputs"], place.at("inputs", top["inputs"]))
    nodes = mapping(top["nodes"], place.at("nodes", top["nodes"]))
    output = str(top["output"])
    if output not in nodes or not inputs or len({*inputs, *nodes}) < len(inputs) + len(nodes):
        raise BadInput(f"{place}: the output {output!r} must be one of its nodes, and all names must differ")
    at = place.at("settings", top.get("settings"))
    settings = plain(mapping(top.get("settings") or {}, at))
    return Definition(name, place, settings, tuple(inputs), nodes, output)


def _require_no_circle(defined: Mapping[str, Definition]) -> None:
    """No composite is made of itself."""
    done: set[str] = set()
    for start in defined:
        trail: list[str] = [start]
        waiting = [_used(defined, start)]
        while waiting:
            following = next((n for n in waiting[-1] if n not in done), None)
            if following is None:
                done.add(trail.pop())
                waiting.pop()
            elif following in trail:
                circle = " -> ".join([*trail[trail.index(following) :], following])
                raise BadInput(f"{defined[following].place}: the composites form a circle: {circle}")
            else:
                trail.append(following)
                waiting.append(_used(defined, following))


def _used(defined: Mapping[str, Definition], name: str) -> list[str]:
    kinds = [v.get("component") for v in defined[name].nodes.values() if isinstance(v, Mapping)]
    return [k for k in kinds if isinstance(k, str) and k in defined]


def _inputs_given(made: Definition, settings: dict[str, Any], place: Place) -> tuple[str, ...]:
    key = "input" if len(made.inputs) == 1 else "inputs"
    if key not in settings:
        raise BadInput(f"{place}: {key!r} is missing; {made.name} reads {', '.join(made.inputs)}")
    value = settings.pop(key)
    if key == "input" and isinstance(value, str):
        return (str(value),)
    names = strings(value, place.at(key, value))
    if key == "input" or len(names) != len(made.inputs):
        raise BadInput(f"{place}: {made.name} reads {', '.join(made.inputs)}; got {value!r:.60} for {key!r}")
    return tuple(names)


def _filled(value: Any, settings: Mapping[str, Any], place: Place) -> Any:
    """A document with the settings put in: `$hidden` by the value itself, `2*$hidden` by its text."""
    if isinstance(value, Mapping):
        return {k: _filled(v, settings, place) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, settings, place) for v in value]
    if not isinstance(value, str):
        return value
    for name in _SETTING.findall(value):
        if name not in settings:
            known = ", ".join(f"${s}" for s in settings) or "none"
            raise BadInput(f"{place}: there is no setting ${name}; there are {known}")
    if whole := _SETTING.fullmatch(value):
        return settings[whole[1]]

    def text(match: re.Match[str]) -> str:
        found = str(settings[match[1]])
        if not re.fullmatch(r"\w+", found):
            raise BadInput(
                f"{place}: {value!r} cannot take {found!r}; only a number or a name can stand in an expression"
            )
        return found

    return _SETTING.sub(text, value)


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@cache
def _kinds(cls: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each field takes."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(cls).items()}


def validated(cls: Any, settings: Any, place: Place) -> Any:
    """Builds a dataclass from plain values, types checked and converted.

    Raises:
        BadInput: an unknown or missing key, or a value of a wrong type.
    """
    from pydantic import ValidationError

    check_keys(cls, mapping(settings, place), place)
    for key, value in settings.items():
        if isinstance(value, bool) and bool not in _kinds(cls)[key]:
            raise BadInput(f"{place.at(key, None)}: {key} must be something else than true or false")
    try:
        return _adapter(cls).validate_python(plain(settings))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("int", "str", "float")))
        at = place.at(str(first["loc"][0]), None) if first["loc"] else place
        raise BadInput(f"{at}: {key or 'value'}: {first['msg']} (got {first['input']!r})") from None
