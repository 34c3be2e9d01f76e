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


def wildcards(pattern: str) -> list[str]:
    """The wildcards of a pattern, in order."""
    return _WILDCARD.findall(pattern)


def renamed(pattern: str, name: str, path: str) -> str | None:
    """The path by another name: what the pattern's wildcards stand for in the place of those of `name`.

    None where the path does not fit. Of several ways to fit, the first wildcards stand for as little as possible.

    >>> renamed("layers/*/attn/**", "block_*/attention/**", "layers/3/attn/query/kernel")
    'block_3/attention/query/kernel'
    """
    found = _regex(pattern, "(").fullmatch(path)
    parts = iter([part or "" for part in found.groups()] if found else ())
    return _WILDCARD.sub(lambda _: next(parts), name) if found else None


_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?)")


@functools.lru_cache
def _regex(pattern: str, group: str = "(?:") -> re.Pattern[str]:
    parts = _WILDCARD.split(pattern)
    meaning = {"**/": f"{group}(?:.*?/)?)", "**": f"{group}.*?)", "*": f"{group}[^/]*?)", "?": f"{group}[^/])"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
