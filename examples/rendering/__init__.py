"""What the pages of the handbook do not say by hand: macros that pages call as `{{ laws() }}` while they are built.

Tables that follow from the code are made from the code (`laws`, `components`, `commands`), so they cannot drift; what
was measured comes from the files of `handbook/data` (`results`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from .commands import commands
from .components import components, model_types
from .errors import errors
from .laws import laws
from .measured import overview, results


def define_env(env: Any) -> None:
    """Hands the macros over; called by mkdocs-macros."""
    data = Path(env.project_dir) / "handbook" / "data"
    for macro in (commands, components, errors, laws, model_types):
        env.macro(macro)
    env.macro(partial(results, data), "results")
    env.macro(partial(overview, data), "overview")
