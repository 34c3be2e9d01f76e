"""Docstrings by their sections, so that an option is described once and shown wherever it is taken."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

_HEADINGS = ("Args", "Returns", "Raises", "Warns", "Source")


def sections(thing: Any) -> dict[str, str]:
    """The parts of a docstring by their headings. What comes before them is under "", the example under ">>>"."""
    doc, prompt, example = inspect.cleandoc(thing if isinstance(thing, str) else thing.__doc__ or "").partition(">>> ")
    parts = re.split(rf"^({'|'.join(_HEADINGS)}): *\n?", doc, flags=re.M)
    found = {"": parts[0].strip(), **{k: v.strip("\n") for k, v in zip(parts[1::2], parts[2::2], strict=True)}}
    return {**found, ">>>": prompt + example} if prompt else found


def joined(parts: dict[str, str]) -> str:
    """A docstring of these sections, in the usual order."""
    head = lambda name: f"{name}: {parts[name]}" if name == "Source" else f"{name}:\n{parts[name]}"
    texts = [parts.get("", ""), *(head(name) for name in _HEADINGS if parts.get(name)), parts.get(">>>", "")]
    return "\n\n".join(text for text in texts if text) + "\n"


def described(thing: Any) -> dict[str, str]:
    """What a docstring says of each argument."""
    found = re.findall(r"^  (\w+): (.*?)(?=^  \w+: |\Z)", sections(thing).get("Args", ""), re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


def listed(names: Iterable[str], texts: dict[str, str]) -> str:
    """The lines of an `Args:` section, for those of the names that have a text."""
    wrap = lambda line: textwrap.wrap(
        line, 118, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    return "\n".join("\n".join(wrap(f"  {name}: {texts[name]}")) for name in names if name in texts)
