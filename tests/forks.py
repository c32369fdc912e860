"""Copies of the process that runs the tests."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def fork_to(act: Callable[[], Any]) -> int:
    """Id of a copy of this process that does nothing else; it exits with what `act` returns.

    Whatever `act` raises ends it, too: back in pytest it would run the other tests once more.
    """
    child = os.fork()
    if child == 0:
        # A signal that raises inside of coverage's tracer leaves its lock taken, for ever.
        sys.settrace(None)
        try:
            os._exit(act() or 0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)  # `act` may have closed its own
        finally:
            os._exit(99)
    return child
