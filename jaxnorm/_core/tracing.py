"""Whether a program of `as_program` is being traced, and what leaves it: warnings, and values that a trace lacks.

Both are for every call, and a trace is for many.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Outside(Exception):
    """The trace has come to something that is done outside of it."""


class _Trace(threading.local):
    runs = False  # a program is being traced
    hides_values = False  # ... and some of its arguments have values, which the trace does not see


_trace = _Trace()


@contextmanager
def in_program(hides_values: bool) -> Iterator[None]:
    """The trace of a program, which may hide values that some of its arguments have."""
    before = _trace.runs, _trace.hides_values
    _trace.runs, _trace.hides_values = True, hides_values
    try:
        yield
    finally:
        _trace.runs, _trace.hides_values = before


def leave_to_warn() -> None:
    """Leave the program that is being traced, if one is: a warning comes at every call, and not once for a trace."""
    if _trace.runs:
        raise Outside


def leave_for_values() -> None:
    """Leave the program that is being traced, if there are values to see outside of it."""
    if _trace.hides_values:
        raise Outside


def values_are_hidden() -> bool:
    return _trace.hides_values
