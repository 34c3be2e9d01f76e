"""The docstring of a layer: formula, options and source from the function of its spec, and what Flax's rules add."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from typing import Any

_FIELDS = {
    "num_features": "the sizes of x along the feature axes, an int or several.",
    "dtype": "of the output. None is what x and the parameters promote to, as in Flax.",
    "param_dtype": "of the parameters.",
    "reduction_axes": "the axes normalized over.",
    "feature_axes": "the axes whose sizes the parameters have.",
    "use_fast_variance": "accepted, and without effect: the variance is always accurate.",
    "force_float32_reductions": "says what dtype running statistics have, if there are any. Reductions are in float32 "
    "or wider whatever it says.",
    "use_running_average": "normalize by the running statistics, and leave them. Here or at the call. A bool, or a "
    "traced bool at the call.",
    "promote_dtype": "Flax's function that says what dtype the output has. Statistics are those of x as it came.",
    "rngs": "for initializers.",
    "param_names": 'other names for the parameters, such as {"scale": "weight"}; a checkpoint then has these.',
    "cast_params": "cast the parameters to the output's dtype before they are used, and add scale_offset there, as "
    "EasyLM, t5x and MaxText do. Those also round before the scale: see `cast` of RMS norm.",
}


def document(cls: Any, form: Any, module: str) -> None:
    """Give a layer class its docstring: its own text and doctest, and all that its spec's function says."""
    function, own = _sections(form.spec.function), inspect.cleandoc(cls.__doc__ or "")
    text, prompt, example = own.partition(">>> ")
    title, _, formula = function[""].partition("\n\n")
    of_flax = next(
        (b for b in cls.__mro__[1:] if b.__module__.startswith("flax.") and b.__name__ == cls.__name__), None
    )
    if of_flax is not None:
        title = f"{title.rstrip('.')}: `{module}.{cls.__name__}`."
    described = [_entry(name, _field(name, form, function)) for name in _signature(cls, form)]
    parts = [title, text.strip(), formula, "Args:\n" + "\n".join(described)]
    parts += [f"{name}:\n{function[name]}" for name in ("Raises", "Warns") if name in function]
    parts += [f"Source: {function['Source']}"] if "Source" in function else []
    cls.__doc__ = "\n\n".join(part for part in [*parts, prompt + example] if part) + "\n"


def document_call(form: Any, statistics: str) -> str:
    """The docstring of a layer's `__call__`."""
    function = _sections(form.spec.function)
    described = [_entry("x", _of_function("x", function) or "the input.")]
    described += [_entry(name, _of_function(name, function)) for name in form.operands]
    if form.state:
        described.append(_entry("use_running_average", _FIELDS["use_running_average"]))
    described += [_entry(name, _of_function(name, function)) for name in form.call]
    what = "in place of a learned one: of the feature shape, or of a shape that broadcasts against x."
    described += [_entry(name, f"a {name}, {what}") for name in form.params]
    head = f"The normalized x. Updates {statistics} in training." if form.state else "The normalized x."
    return "\n".join([head, "", "Args:", *described, ""])


def _signature(cls: Any, form: Any) -> list[str]:
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "parent", "name")]
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    fields = [field.name for base in bases for field in dataclasses.fields(base)]
    of_linen = [*dict.fromkeys(name for name in (*fields, *form.fields) if name not in ("parent", "name"))]
    return names if "num_features" in names else of_linen


def _field(name: str, form: Any, function: dict[str, str]) -> str:
    """What a field of a layer means."""
    if name in _FIELDS:
        return _FIELDS[name]
    for of, what in (("_init", "the initializer of {}. None is the first value of the spec."), ("_metadata", "of the "
                     "variable {}.")):  # fmt: skip
        if name.endswith(of):
            return what.format(name.removesuffix(of))
    if name.startswith("use_"):
        return f"learn a {name.removeprefix('use_')}."
    named = {field: option for option, field in form.options.items()}
    if name in form.aliases.values():
        first = next(field for field, alias in form.aliases.items() if alias == name)
        return f"the same as {first}, by the name that the function has for it."
    return _of_function(named.get(name, name), function) or _of_function(name, _sections(form.spec))


def _of_function(name: str, function: dict[str, str]) -> str:
    """What the function of a spec says of an argument."""
    found = re.search(rf"^  {name}: (.*?)(?=^  \w+: |\Z)", function.get("Args", ""), re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def _sections(function: Any) -> dict[str, str]:
    """The parts of a docstring by their headings; what comes before them is under ""."""
    doc = (inspect.getdoc(function) or "").partition(">>> ")[0]
    parts = re.split(r"^(Args|Returns|Raises|Warns|Source):\s*?\n?", doc, flags=re.M)
    return {"": parts[0].strip(), **{k: v.strip("\n") for k, v in zip(parts[1::2], parts[2::2], strict=True)}}


def _entry(name: str, text: str) -> str:
    return "\n".join(textwrap.wrap(f"  {name}: {text}", 118, initial_indent="", subsequent_indent="    "))
