"""Values for calls that do not have them: what a norm in the place of another one needs, given from outside."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from .intercept import setting, traced_anew

passed: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("passed", default={})  # noqa: B039


class _Values:
    """Values as a key: scalars of Python by value, arrays by identity."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        plain = lambda value: value if isinstance(value, (bool, int, float, str)) else id(value)
        self.key = tuple((name, type(value), plain(value)) for name, value in sorted(values.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@contextlib.contextmanager
def passing(**values: Any) -> Iterator[None]:
    """Within the context, layers that surgery has put in the place of others take these values, where they need them.

    The model's code calls its layers as it always did. A norm in their place may need more: `domain=` of
    `DomainBatchNorm`, or `use_running_average=` of a batch norm where a layer norm was.

        with models.passing(domain=domain):
            y = model.apply(variables, x)

    Write it inside of the function that `jax.jit` compiles. Around it, each new array compiles anew.

    Args:
      **values: by the names of the norm's operands.
    """
    now = {**passed.get(), **values}
    with setting(passed, now), traced_anew(_Values(now)):
        yield
