"""What a patch changes, layer by layer, as a plot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..atomic import write_file
from ..errors import BadInput
from ..extras import require
from ..patch.patch import Patch
from .generation import PLOTS


def patch_figure(patch: Patch) -> Any:
    """Norm, and rank of the matrices, of every change over the layers, a colour for each parameter.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        MissingDependency: `matplotlib` is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    rows = patch.table().rows
    above, below = (made := Figure(figsize=(8, 6), layout="constrained")).subplots(2, 1, sharex=True)
    for name in dict.fromkeys(row.parameter for row in rows):
        mine = [row for row in rows if row.parameter == name]
        where = [-1 if row.layer is None else row.layer for row in mine]  # left of the first layer
        above.plot(where, [row.norm or None for row in mine], marker="o", label=name)
        if any(row.rank for row in mine):
            below.plot(where, [row.rank for row in mine], marker="o", label=name)
    above.set_yscale("log")
    above.set_ylabel("Frobenius norm of the change")
    above.set_title(patch.validity)
    above.legend()
    below.set_ylabel("rank")
    below.set_xlabel("layer (-1: outside the layers)" if any(r.layer is None for r in rows) else "layer")
    return made


def write_patch_plot(patch: Patch, file: Path) -> None:
    """The plot as a .png, .svg or .pdf file.

    Raises:
        BadInput: another ending, or a file that cannot be written.
        MissingDependency: `matplotlib` is not installed.
    """
    if file.suffix.lower() not in PLOTS:
        raise BadInput(f"{file}: the name must end in {', '.join(PLOTS[:-1])} or {PLOTS[-1]}")
    out = io.BytesIO()
    patch_figure(patch).savefig(out, format=file.suffix.lower()[1:])
    write_file(file, out.getvalue())
