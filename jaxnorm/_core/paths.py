"""Paths in trees of parameters: keys joined by "/", and patterns over them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax


def path_of(keys: tuple[Any, ...]) -> str:
    """The keys of a path, joined by "/". The value inside of an nnx variable has the path of the variable."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys]
    if names and isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return "/".join(names)


def matches(pattern: str, path: str) -> bool:
    """Whether a path fits a pattern: `*` is any part of one key, `?` one letter of it, `**` any number of keys."""
    return _regex(pattern).fullmatch(path) is not None


@functools.lru_cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
