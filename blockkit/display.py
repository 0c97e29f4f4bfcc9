"""How objects show themselves: a short `repr`, an HTML table, and pictures that rooms further up know how to draw.

Plain text only. What draws and plots stands in a room above and is registered when a picture is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import singledispatch
from html import escape
from typing import Any

LONGEST = 160  # characters of a short repr's text
MOST_ROWS = 200  # of a table in a notebook


def short(self: object) -> str:
    """`<Verdict: patchable, ...>`: the type, and the first line of what `print` shows. For `__repr__`."""
    return tagged(self, str(self).partition("\n")[0])


def tagged(value: object, text: str) -> str:
    """`<Type: text>`, the middle of a long text left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return f"<{type(value).__name__}: {text}>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], notes: Iterable[str] = ()) -> str:
    """An HTML table of plain values, the notes below it. Every text is escaped.

    Args:
        rows: each as long as `head`; of more than `MOST_ROWS` the number of the others is said.
    """
    listed = list(rows)
    cells = "".join(_row("td", row) for row in listed[:MOST_ROWS])
    if len(listed) > MOST_ROWS:
        cells += f'<tr><td colspan="{len(head)}">and {len(listed) - MOST_ROWS} more</td></tr>'
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    top = f'<caption style="text-align:left;caption-side:top">{escape(caption)}</caption>'
    body = f"<table>{top}<thead>{_row('th', head)}</thead><tbody>{cells}</tbody></table>" if listed else ""
    return f"<div>{body or f'<div>{escape(caption)}</div>'}{below}</div>"


def _row(tag: str, row: Sequence[Any]) -> str:
    return "<tr>" + "".join(f'<{tag} style="text-align:left">{escape(str(c))}</{tag}>' for c in row) + "</tr>"


def picture(value: object) -> str | None:
    """The value drawn, as the text of an SVG file; None where it cannot be drawn."""
    _register()
    return drawer(value)


def figure(value: object) -> Any:
    """The value plotted, as a `matplotlib.figure.Figure`.

    Raises:
        MissingDependency: `matplotlib` is not installed.
    """
    _register()
    return plotter(value)


@singledispatch
def drawer(value: object) -> str | None:
    """How `picture` draws; types that have a picture are registered here."""
    return None


@singledispatch
def plotter(value: object) -> Any:
    """How `figure` plots; types that have a plot are registered here."""
    raise TypeError(f"there is no plot of a {type(value).__name__}")


def when_asked(register: Callable[[], None]) -> None:
    """What is called once, before the first picture or plot: a room above registers then, and is loaded no sooner."""
    _waiting.append(register)


_waiting: list[Callable[[], None]] = []


def _register() -> None:
    while _waiting:
        _waiting.pop()()
