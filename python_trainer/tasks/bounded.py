"""Calling a verifier on hostile text: in a child process, within bounds of time and memory.

A verifier that simplifies, compares or parses what a policy wrote can be made to run for hours
(`10**10**10` is one C call, which no signal interrupts) or to fill the memory. So it runs in a
process of its own that the kernel stops. Bounds are in seconds of the child's CPU time, not of the
clock: a verdict does not depend on what else the machine does. After a first bound the call is
interrupted, after the second, for what cannot be interrupted, the process is killed; either way
the verdict is 0 and the next call gets a fresh process.

This bounds cost. It is no sandbox: a function that evaluates text as code must not get hostile
text here either. For systems with POSIX signals and resource limits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from ..config import TaskError

INTERRUPT_AFTER = 1.0  # CPU seconds of a call
KILL_AFTER = 2  # CPU seconds of a call, a whole number
MEMORY = 2**30  # bytes of address space
PATIENCE = 50.0  # seconds of the clock, for a child that neither computes nor answers
REPLY = struct.Struct("d")


class Bounded:
    """`function(*args)` as a float, or 0.0 where it raised or exceeded a bound.

    Function and arguments are sent to the child by pickle. May be called from any thread; a process
    forked from this one starts a child of its own.
    """

    def __init__(self, function: Callable[..., float], name: str) -> None:
        """`name` is that of the task, for the error message."""
        self.function = function
        self.name = name
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started the child
        self._end: Callable[[], Any] = lambda: None  # of the child; after the first time, nothing

    def __call__(self, *args: Any) -> float:
        """The verdict.

        Raises:
            TaskError: the child cannot be started, or cannot load the function.
        """
        with self._lock:
            if self._child is None or self._owner != os.getpid():
                self._end()  # a forked process has copies of the pipes
                self._child, self._owner = self._start(), os.getpid()
            verdict = None
            try:
                verdict = self._ask(self._child, args)
            finally:  # also when interrupted: a late reply must not be taken for the next one's
                if verdict is None:
                    self._end()
                    self._child = None
            return verdict or 0.0

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            # -P: this folder's math.py must not take the place of the standard one.
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(sys.path),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        # With this object, or at exit, when a __del__ would find no modules any more.
        self._end = weakref.finalize(self, self._stop, child, os.getpid())
        ready = None
        try:
            ready = self._ask(child, self.function)
        finally:
            if ready is None:
                self._end()
        if ready is None:
            raise TaskError(
                f"task {self.name}: the process of its verifier could not start "
                f"(exit status {child.returncode}; its own message is above)"
            )
        return child

    @staticmethod
    def _ask(child: subprocess.Popen[bytes], question: Any) -> float | None:
        """The child's reply; None when it died or cannot be waited for any longer."""
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(pickle.dumps(question))
            child.stdin.flush()
            waiting = select.poll()
            waiting.register(child.stdout, select.POLLIN)
            if waiting.poll(1000 * PATIENCE):
                reply = child.stdout.read(REPLY.size)
                return REPLY.unpack(reply)[0] if reply else None
        return None

    @staticmethod
    def _stop(child: subprocess.Popen[bytes], owner: int) -> None:
        assert child.stdin is not None and child.stdout is not None
        if owner == os.getpid():
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it did not read
                pipe.close()


class Expired(BaseException):
    """Not an Exception, which the libraries below catch wherever they go."""


def _expire(*_: Any) -> None:
    raise Expired


def _limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def serve() -> None:
    """The child: answer calls until the parent closes the pipe, or a call exceeds a bound."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a verifier prints must not be taken for a reply
    function = pickle.load(requests)
    os.dup2(nowhere, 2)  # from here on, errors are the policy's
    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _expire)
    for asked in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle
        signal.signal(asked, signal.SIG_IGN)
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    verdict = 1.0  # ready
    while True:
        replies.write(REPLY.pack(verdict))
        replies.flush()
        try:
            args = pickle.load(requests)
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + KILL_AFTER)
        verdict = 0.0
        try:
            # Again and again: an interrupt may end up in a finaliser or a bare `except`.
            signal.setitimer(signal.ITIMER_PROF, INTERRUPT_AFTER, INTERRUPT_AFTER / 10)
            verdict = float(function(*args))
            signal.setitimer(signal.ITIMER_PROF, 0)
        except (Expired, MemoryError):
            os._exit(1)  # whatever the call left in caches goes as well
        except Exception:
            signal.setitimer(signal.ITIMER_PROF, 0)


__all__ = ["Bounded"]
