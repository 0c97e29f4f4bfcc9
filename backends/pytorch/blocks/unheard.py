"""What torch says in this thread while it tries something, left unsaid; other threads and loggers are heard as ever."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOISE = r"`isinstance\(treespec, LeafSpec\)` is deprecated"  # torch's own, of its own code


@contextmanager
def unheard(package: str = "torch") -> Iterator[None]:
    """Records of this thread from the package's loggers reach no handler meanwhile; nor does `NOISE`."""
    me = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != me or record.name.partition(".")[0] != package

    handlers, before = _handlers(), list(warnings.filters)
    warnings.filterwarnings("ignore", NOISE, FutureWarning)
    added = [entry for entry in warnings.filters if entry not in before]
    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)
        for entry in added:
            with suppress(ValueError):  # whoever set the filters back meanwhile has taken it away
                warnings.filters.remove(entry)  # type: ignore[attr-defined]


def _handlers() -> list[logging.Handler]:
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    found = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in list(logger.handlers)]
    last = logging.lastResort
    return list(dict.fromkeys([*found, last] if last is not None else found))
