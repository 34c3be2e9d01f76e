"""Whether a value is of a library that jaxnorm does not need: asked without importing it."""

from __future__ import annotations

import sys
from typing import Any


def is_a(value: Any, module: str, kind: str = "Module") -> bool:
    """Whether a value is of a class of that module. Where there is such a value, its library has been imported."""
    loaded = getattr(sys.modules.get(module), kind, None)
    return isinstance(loaded, type) and isinstance(value, loaded)
