"""`blockkit.draw`: a block as a picture that a notebook shows and that is saved to a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .. import api
from ..atomic import write_file
from ..design.architecture import Architecture, Block
from ..display import tagged
from ..errors import BadInput, NotPatchable
from ..graph.graph import Globs, Graph
from ..planner.plan import Plan
from .drawing import draw as boxes
from .mermaid import mermaid
from .svg import page, svg

SUFFIXES = (".svg", ".mmd")


@dataclass(frozen=True)
class Picture:
    """A block, drawn: coloured by what each component can do, the plan's route highlighted.

    Attributes:
        title: what stands above it.
        svg: the text of the SVG file.
        plan: the plan that is shown; None for a block without one.
    """

    title: str
    svg: str = field(repr=False)
    plan: Plan | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return tagged(self, f"{self.title}, {len(self.svg)} characters of SVG")

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Writes the picture; an existing file is replaced only when the new one is complete.

        Args:
            path: ends in `.svg`, or in `.mmd` for a Mermaid flowchart.

        Raises:
            BadInput: another ending, a block without a plan as Mermaid, or a file that cannot be written.
        """
        file = Path(path)
        if file.suffix.lower() not in SUFFIXES:
            raise BadInput(f"{file}: the name must end in {' or '.join(SUFFIXES)}")
        if file.suffix.lower() == ".svg":
            write_file(file, self.svg.encode())
        elif self.plan is None:
            raise BadInput(f"{file}: a Mermaid flowchart shows a plan, and this block has none; save it as .svg")
        else:
            write_file(file, mermaid(self.plan).encode())
        return file


def draw(
    spec: api.Judged,
    strategy: str = "stable",
    only: Globs = (),
    freeze: Globs = (),
    tokens: int | None = None,
    components: api.Components = (),
    block: str | None = None,
) -> Picture:
    """A block as a picture, with the route of the strategy's plan; without a route where there is no plan.

    Args:
        spec: what `load` takes, a `Plan`, or a model in memory.
        strategy, only, freeze, tokens, components: as for `plan`.
        block: which kind of block; by default the first.

    Raises:
        BadInput: the spec cannot be read, an unknown strategy or kind, or too many components for a drawing.
    """
    if isinstance(spec, Plan):
        return _of_plan(spec, "/".join(spec.blocks) or "block")
    graphs = api.distinct_graphs(spec, only, freeze, components)
    title = spec if isinstance(spec, str) else spec.name if isinstance(spec, Architecture) else "block"
    kinds = next((k for k in graphs if block is None or block in k), next(iter(graphs)))
    title = f"{title}: {'/'.join(kinds)}" if len(graphs) > 1 else title
    try:
        return _of_plan(api.plan(spec, strategy, only, freeze, tokens, components, block=block or kinds[0]), title)
    except NotPatchable as no:
        return Picture(title, page(boxes(graphs[kinds]), title, [str(no)]))


def _of_plan(plan: Plan, title: str) -> Picture:
    return Picture(title, svg(plan, title), plan)


def picture_of(value: Plan | Block | Architecture | Graph) -> str | None:
    """What a notebook shows; None, and so the text, for what has no picture: an unfinished block, a huge one."""
    try:
        return draw(value).svg
    except BadInput:
        return None
