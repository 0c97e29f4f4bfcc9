"""What notebooks show of objects from rooms below that do not know how to draw; registered when first asked for."""

from __future__ import annotations

from ..design.architecture import Architecture, Block
from ..display import drawer, plotter
from ..graph.graph import Graph
from ..patch.patch import Patch
from ..planner.plan import Plan
from .patch_plot import patch_figure
from .picture import picture_of


def register() -> None:
    """Makes `_repr_svg_` of plans, blocks and architectures draw them, and `Patch.plot` plot."""
    for kind in (Plan, Block, Architecture, Graph):
        drawer.register(kind, picture_of)
    plotter.register(Patch, patch_figure)
