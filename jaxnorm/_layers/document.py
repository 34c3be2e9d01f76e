"""The docstring of a layer: formula, options and source from the function of its spec, and what Flax's rules add."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from .._core.docstrings import described, joined, listed, sections

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
    "condition": "what scale, shift and gate are made of: (B, K), or (B, T, K) for each token. If condition_features "
    "is None, the modulation itself.",
    "param_names": 'other names for the parameters, such as {"scale": "weight"} or {"scale": "norm/weight"}; a '
    "checkpoint then has these.",
    "cast_params": "cast the parameters to the output's dtype before they are used, and add scale_offset there, as "
    "EasyLM, t5x and MaxText do. Those also round before the scale: see `cast` of RMS norm.",
}


def document(cls: Any, form: Any, module: str) -> None:
    """Give a layer class its docstring: its own text and example, and all that its spec and its function say."""
    function, own = sections(form.spec.function), sections(cls)
    title, _, formula = function[""].partition("\n\n")
    if any(base.__module__.startswith("flax.") and base.__name__ == cls.__name__ for base in cls.__mro__):
        title = f"{title.rstrip('.')}: `{module}.{cls.__name__}`."
    texts = {**described(form.spec.function), **described(form.spec)}
    names = _arguments(cls, form)
    cls.__doc__ = joined({
        **function, "": "\n\n".join(part for part in (title, own[""], formula) if part), "Returns": "",
        "Args": listed(names, {name: _field(name, form, texts) for name in names}), ">>>": own[">>>"],
    })  # fmt: skip


def document_call(form: Any, statistics: str) -> str:
    """The docstring of a layer's `__call__`."""
    texts = {"x": "the input.", **_FIELDS, **described(form.spec.function)}
    what = "in place of a learned one: of the feature shape, or of a shape that broadcasts against x."
    texts |= {name: f"a {name}, {what}" for name in form.params}
    texts |= {name: f"a {name}, in place of a learned one: of its shape." for name in form.whole}
    names = ["x", *form.operands, *["use_running_average"] * bool(form.state), *form.call, *form.params]
    head = f"The normalized x. Updates {statistics} in training." if form.state else "The normalized x."
    return joined({"": head, "Args": listed(names, texts)})


def _arguments(cls: Any, form: Any) -> list[str]:
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "parent", "name")]
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    fields = [field.name for base in bases for field in dataclasses.fields(base)]
    of_linen = [name for name in dict.fromkeys([*fields, *form.fields]) if name not in ("parent", "name")]
    return names if "num_features" in names else of_linen


def _field(name: str, form: Any, texts: dict[str, str]) -> str:
    """What a field of a layer means."""
    if name in _FIELDS:
        return _FIELDS[name]
    if name.endswith("_init"):
        return f"the initializer of {name.removesuffix('_init')}. None is the first value of the spec."
    if name.endswith("_metadata"):
        return f"of the variable {name.removesuffix('_metadata')}."
    if name.startswith("use_"):
        return f"learn a {name.removeprefix('use_')}."
    if name in form.aliases.values():
        first = next(field for field, alias in form.aliases.items() if alias == name)
        return f"the same as {first}, by the name that the function has for it."
    named = {field: option for option, field in form.options.items()}
    return texts.get(named.get(name, name), "")
