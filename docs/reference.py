"""The pages of the API reference, from the docstrings: one for each norm, and one for each group of other names.

`build.py` writes them when the site is built. A public name that no page takes is an error.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jaxnorm as jn
from jaxnorm import linen, nnx
from jaxnorm._core.docstrings import described, sections

# The names that belong to no norm, or to several, by page. A face's names stand on the page of the face.
PAGES = {
    "Specs and configuration": [
        "Norm", "Affine", "make", "as_dict", "catalogue", "presets", "deep_norm_alpha", "deep_norm_beta",
    ],
    "Statistics": ["Moments", "moments", "merge", "merge_across", "normalize", "modulation"],
    "Running statistics": [
        "RunningStats", "WindowStats", "EMA", "Cumulative", "Devices", "Ramp", "update_state", "sync_state",
        "as_affine",
    ],
    "Quantized outputs": ["Quantized", "Fp8", "Int8", "MxFp8", "NvFp4"],
    "Backends and reports": ["Backend", "backends", "report", "tabulate"],
}  # fmt: skip
INDEX = """# API reference

Every public name, once. A norm has one page: its function, its spec, and its layers for linen and nnx.

```{{toctree}}
:caption: Beside the norms
:maxdepth: 1

{groups}
```

```{{toctree}}
:caption: Norms
:maxdepth: 1

{norms}
```
"""


def pages() -> dict[str, str]:
    """The Markdown of each page, by its file name without ".md"."""
    left = {(module.__name__, name) for module in (jn, linen, nnx, *faces()) for name in public(module)}
    written, norms, groups = {}, [], []

    def add(title: str, names: Iterable[tuple[str, str]], head: str = "") -> str:
        names = [*names]
        left.difference_update(names)
        file = title.removeprefix("jaxnorm.").lower().replace(" ", "-")
        written[file] = "\n\n".join([f"# {title}", head, *(entry(*name) for name in names)])
        return file

    for spec in sorted(jn.catalogue().values(), key=lambda spec: spec.function.__name__):
        function, layer = spec.function.__name__, spec.__name__
        names = [("jaxnorm", function), ("jaxnorm", layer), ("jaxnorm.linen", layer), ("jaxnorm.nnx", layer)]
        norms.append(add(function, names))
    for title, names in PAGES.items():
        groups.append(add(title, [("jaxnorm", name) for name in names]))
    for face in faces():
        groups.append(add(face.__name__, ((face.__name__, name) for name in public(face)), inspect.getdoc(face) or ""))
    layers = [(module.__name__, name) for module in (linen, nnx) for name in public(module)]
    groups.append(add("Layers of any spec and weight", [name for name in layers if name in left]))
    if left:
        names = ", ".join(sorted(".".join(name) for name in left))
        raise LookupError(f"no page of the reference has {names}: name each in PAGES of docs/reference.py")
    written["index"] = INDEX.format(groups="\n".join(groups), norms="\n".join(norms))
    return written


def faces() -> list[Any]:
    """The public modules beside those of norms and layers: `jaxnorm.weights` and others."""
    files = (path.stem for path in Path(jn.__file__).parent.glob("[a-z]*.py"))
    return [importlib.import_module(f"jaxnorm.{name}") for name in sorted({*files} - {"linen", "nnx", "demo"})]


def public(module: Any) -> list[str]:
    """The names of a module that are ours: no modules, none that it shows of Flax, none that `jaxnorm` has itself."""
    of_jaxnorm = () if module is jn else [thing for name, thing in vars(jn).items() if name in jn.__all__]
    own = lambda thing: callable(thing) and str(getattr(thing, "__module__", "")).startswith("jaxnorm")
    new = lambda thing: not any(thing is other for other in of_jaxnorm)
    return sorted(name for name, thing in vars(module).items() if name[0] != "_" and own(thing) and new(thing))


def entry(module: str, name: str) -> str:
    """A function or a class with its methods, as a directive of MyST."""
    thing = getattr(importlib.import_module(module), name)
    if not inspect.isclass(thing):
        return directive("function", name, thing, module)
    methods = [
        directive("method", each, method)
        for each, method in vars(thing).items()
        if each[0] != "_" and inspect.isfunction(method) and method.__doc__
    ]
    return directive("class", name, thing, module, "\n\n".join(methods))


def directive(kind: str, name: str, thing: Any, module: str = "", inside: str = "") -> str:
    fence = "`" * (6 if kind == "method" else 8)
    option = f":module: {module}\n" if module else ""
    return f"{fence}{{py:{kind}}} {name}{signature(thing)}\n{option}\n{body(thing)}\n\n{inside}\n{fence}"


def signature(thing: Any) -> str:
    """Names and defaults alone: what they are is said under each name."""
    try:
        of = inspect.signature(thing)
    except (TypeError, ValueError):
        return "()"
    shown = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else Shown(p.default))
        for p in of.parameters.values()
        if p.name not in ("self", "parent", "name")
    ]
    return str(of.replace(parameters=shown, return_annotation=of.empty))


class Shown:
    """A default, by its name where its repr is none that one writes."""

    def __init__(self, value: Any):
        self.text = getattr(value, "__name__", None) or repr(value)
        if "<" in self.text or len(self.text) > 60:
            self.text = "..."

    def __repr__(self) -> str:
        return self.text


def body(thing: Any) -> str:
    """A docstring in MyST: its arguments and errors become fields, its example a block."""
    parts = sections(thing)
    fields = [f":param {name}: {text}" for name, text in described(thing).items()]
    if parts.get("Returns"):
        fields.append(f":returns: {' '.join(parts['Returns'].split())}")
    for kind in ("Raises", "Warns"):
        items = re.findall(r"^  (\w+): (.*?)(?=^  \w+: |\Z)", parts.get(kind, ""), re.M | re.S)
        fields += [f":raises {error}: {' '.join(text.split())}" for error, text in items]
    source = f"Source: {' '.join(parts['Source'].split())}" if parts.get("Source") else ""
    example = f"```pycon\n{parts['>>>'].strip()}\n```" if ">>>" in parts else ""
    texts = [parts.get("", ""), "\n".join(fields), source, example]
    return "\n\n".join(text for text in texts if text)


def write(folder: Path) -> None:
    folder.mkdir()
    for name, text in pages().items():
        (folder / f"{name}.md").write_text(text + "\n")
