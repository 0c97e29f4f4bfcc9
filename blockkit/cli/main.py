"""Where the command line begins: small, so that hardly anything runs before interruptions are caught.

The first SIGINT or SIGTERM unwinds as Ctrl-C does, and every temporary file is removed on the way; a second one
removes them itself and ends at once. Both give status 130.
"""

import os
import signal
import sys

from .interrupted import Interrupted

INTERRUPTED = 130
FAULT = 70  # EX_SOFTWARE of sysexits.h
DEBUG = "BLOCKKIT_DEBUG"  # set to anything, shows the traceback of a fault
MESSAGE = "error: interrupted; nothing was left half-written\n"
_asked: list[int] = []  # the signals that have come


def main() -> None:
    """Runs a command; every failure ends in one message and its exit status."""
    try:
        _listen()
        from .commands import run

        run()
    except SystemExit:
        raise
    except BaseException as error:
        if _asked:  # what was interrupted may have turned that into another error
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # all is done but the interpreter's own end
        if _asked or isinstance(error, KeyboardInterrupt | Interrupted):
            _end(MESSAGE, INTERRUPTED)
        _end(_fault(error), FAULT)


def _listen() -> None:
    _asked.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            try:
                signal.signal(number, _interrupt)
            except ValueError:  # not the main thread
                return


def _interrupt(number: int, frame: object) -> None:
    _asked.append(number)
    if len(_asked) == 1:
        raise KeyboardInterrupt
    if (atomic := sys.modules.get("blockkit.atomic")) is not None and hasattr(atomic, "abandon"):
        atomic.abandon()
    os.write(2, MESSAGE.encode())
    os._exit(INTERRUPTED)


def _fault(error: BaseException) -> str:
    """What is said of an exception that nothing foresaw."""
    import traceback

    if os.environ.get(DEBUG):
        traceback.print_exc()
    from ..errors import blamed
    from .output import printable

    said = printable(blamed(error), 4000)
    return (
        f"error: {said}\nblockkit did not foresee this: the fault is its own, whatever it was given. "
        f"Please report the command and this message; {DEBUG}=1 shows the traceback\n"
    )


def _end(message: str, status: int) -> None:
    sys.stderr.write(message)
    sys.exit(status)
