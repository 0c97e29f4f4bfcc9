"""Components of a user's own, from a Python file."""

from __future__ import annotations

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from ..errors import BadInput
from .components import Component


def components_from(path: Path) -> tuple[type[Component], ...]:
    """The component classes that a Python file defines; the file is run.

    Raises:
        BadInput: the file cannot be run (with the line), or defines none.
    """
    if not path.is_file() or path.suffix != ".py":
        raise BadInput(f"{path} is no Python file; give a .py file that defines components")
    name = f"blockkit_components_of_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path} cannot be read as Python")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise BadInput(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        frames, own = traceback.extract_tb(error.__traceback__), path.resolve()
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == own]
        where = f", line {lines[-1]}" if lines else ""
        raise BadInput(f"{path}{where}: {type(error).__name__}: {error}") from None
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Component)]
    listed = tuple(dict.fromkeys(c for c in found if c.__module__ == name and c.kind))
    if not listed:
        raise BadInput(f"{path} defines no component: no subclass of blockkit.Component or Operation with a `kind`")
    return listed
