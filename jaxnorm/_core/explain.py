"""Messages for calls that do not fit a signature: keywords of other libraries, missing arguments, too many arguments.

Python raises a bare TypeError for such a call before the function runs. `explained` replaces it by one that shows the
line to write. `inspect`, `help` and type checkers still see the function's own signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

from .intercept import intercepted, watched
from .messages import shown, to_python

F = TypeVar("F", bound=Callable[..., Any])

# Keywords of other libraries, and what they may be called here: the first that the callable takes is the one to write.
_SAME = {
    "axes": ("axis", "feature_axes"), "axis": ("axes", "feature_axes"), "backend": ("implementation",),
    "beta": ("bias",), "center": ("use_bias",), "channel_axis": ("axis",), "create_offset": ("use_bias",),
    "create_scale": ("use_scale",), "decay": ("momentum",), "decay_rate": ("momentum",),
    "dim": ("axis", "axes", "feature_axes"), "eps": ("epsilon",), "feature_axes": ("axis",),
    "feature_axis": ("axis",), "features": ("num_features",), "gamma": ("scale",), "groups": ("num_groups",),
    "input": ("x",), "is_training": ("train",), "normalized_shape": ("num_features",),
    "num_channels": ("num_features",), "offset": ("bias",), "process_group": ("axis_name",),
    "reduction_axes": ("axis",), "running_mean": ("mean",), "running_var": ("var",), "training": ("train",),
    "use_weight": ("use_scale",), "variance": ("var",), "weight": ("scale",), "where": ("mask",),
}  # fmt: skip
_OPPOSITE = {
    "train": "use_running_average", "training": "use_running_average", "is_training": "use_running_average",
    "use_running_average": "train", "inference": "train", "deterministic": "train",
}  # fmt: skip
_FEATURES = ("num_features", "num_channels", "normalized_shape", "features", "shape", "input_shape")
_AFFINE = ("affine", "elementwise_affine", "channelwise_affine")
_RUNNING = ("track_running_stats", "momentum", "running_mean", "running_var")
_PARAMETERS = ("scale", "bias", "weight", "gamma", "beta", "offset")


def explained(kind: str, defaults: Mapping[str, Any] = MappingProxyType({})) -> Callable[[F], F]:
    """Decorate a "function", a constructor ("spec", "linen", "nnx") or a method ("init", "apply", a layer's "call").

    `defaults` are the values of keywords that f does not declare itself.
    """

    def decorate(f: F) -> F:
        takes = frozenset(inspect.signature(f).parameters)

        @functools.wraps(f)
        def call(*args, **options):
            run = intercepted(f) if kind == "apply" and watched.get() is not None else f
            try:
                if defaults and not options.keys() <= takes:  # f may hand on what it does not know
                    raise TypeError
                return run(*args, **{**defaults, **options})
            except TypeError:
                try:
                    inspect.signature(f).bind(*args, **options)
                except TypeError:
                    message = _explanation(f, kind, args, options)
                    if message is None:
                        raise
                else:
                    raise  # it comes from inside f
            raise TypeError(message)

        return cast(F, call)

    return decorate


def _explanation(f: Callable, kind: str, args: tuple, options: dict[str, Any]) -> str | None:
    parameters = dict(inspect.signature(f).parameters)
    owner = None
    if kind != "function":
        parameters.pop("self", None)
        owner, args = type(args[0]), args[1:]
    name = f.__name__ if owner is None else owner.__name__ + (f".{kind}" if kind in ("init", "apply") else "")
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    usage = _usage(kind, name, positional, args)
    unknown = [k for k in options if k not in parameters]
    if unknown:
        text = " ".join(_unknown(k, options[k], kind, name, owner, list(parameters)) for k in unknown)
        return f"{name}: {text[0].lower()}{text[1:]}"
    if len(args) > len(positional):
        if kind == "spec":
            return f"{name}: takes keywords alone, got {shown(args[0])}. Sizes are given to init. Write {usage}."
        by_position = ", ".join(positional) or "nothing"
        return f"{name}: takes {by_position} by position, got {len(args)} arguments. Write {usage}."
    given = {*positional[: len(args)], *options}
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in given]
    if missing == ["train"]:
        return f"{name}: train is missing. Write train=True in training and train=False at inference."
    if missing:
        return f"{name}: {' and '.join(missing)} missing. Write {usage}."
    return None


def _usage(kind: str, name: str, positional: list[str], args: tuple) -> str:
    """The call as it should be."""
    sizes = [to_python(a) for a in args if _is_size(a)]
    if kind == "spec":
        groups = f"num_groups={sizes.pop(0)}" if name == "GroupNorm" and sizes else ""
        return f"norm = {name}({groups}), and params, state = norm.init({sizes[-1] if sizes else 64})"
    if kind == "init":
        of_x = next((a.shape for a in args if getattr(a, "shape", ())), (64,))
        return f"params, state = norm.init({of_x[-1]}): it takes sizes alone, no key and no data"
    if kind == "apply":
        return "y, state = norm.apply(params, state, x); the state of a norm without running statistics is ()"
    if kind == "nnx":
        return f"{name}({sizes[0] if sizes else 64}, rngs=nnx.Rngs(0))"
    if kind in ("linen", "call"):
        return f"{name}()" if kind == "linen" else f"norm({', '.join(positional)})"
    more = ", axis=-1" if kind == "function" and "scale" in positional else ""
    more = ", train=True" if name == "batch_norm" else more
    return f"{name}({', '.join(positional)}{more})"


def _unknown(given: str, value, kind: str, name: str, owner: type | None, takes: list[str]) -> str:
    """One keyword that is not there, and the line to write."""
    said = f"There is no argument {given}."
    write = lambda new, value: f"{said} Write {new}={given if hasattr(value, 'shape') else shown(value)}."
    if given in ("axis", "axes", "dim") and "feature_axes" in takes and "reduction_axes" in takes:
        return f"{said} Write reduction_axes={shown(value)}, feature_axes={shown(value)}."
    if (same := _first(_SAME.get(given, ()), takes)) is not None:
        return write(same, value)
    call_takes = [] if owner is None else list(inspect.signature(_called(owner)).parameters)
    its_call = "norm.apply(params, state, x, " if kind in ("spec", "init", "apply") else "norm(x, "
    if (opposite := _OPPOSITE.get(given)) in (*takes, *call_takes):
        line = f"{opposite}={not value if isinstance(value, bool) else f'not {given}'}"
        return f"{said} Write {line if opposite in takes else its_call + line + ')'}."
    if given in _FEATURES:
        if kind == "spec":
            return f"{said} Sizes are given to init. Write params, state = norm.init({shown(to_python(value))})."
        return f"{said} Sizes are read off x. Leave it out, and write axis=-1 or another for the axes."
    if given in _AFFINE and "use_scale" in takes:
        return f"{said} Write use_scale={shown(value)}, use_bias={shown(value)}."
    if given in _AFFINE:
        return f"{said} Write scale=None, bias=None for a norm without parameters."
    if given in ("data_format", "channels_first", "channels_last"):
        return f"{said} Write axis=1 for channels first, axis=-1 for channels last."
    if given in _PARAMETERS and "params" in takes:
        return f"{said} Write params=jaxnorm.Affine(scale, bias)."
    if given in ("running_mean", "running_var") and "state" in takes:
        return f"{said} Write state=jaxnorm.RunningStats(running_mean, running_var)."
    if given == "track_running_stats" and "momentum" in takes:
        always = "use_running_average=False" if kind in ("linen", "nnx") else "train=True"
        return (
            f"{said} Running statistics are always there. Write {always}, update_stats=False at the call to normalize "
            "by the batch and leave them."
        )
    if given in _RUNNING:
        return f"{said} This norm has no running statistics. Leave it out."
    if owner is not None and kind in ("apply", "call") and given in inspect.signature(owner.__init__).parameters:
        return f"{said} It is the layer's own. Write {owner.__name__}({given}={shown(value)})."
    if given in call_takes:
        return f"{said} It is the call's. Write {its_call}{given}=...)."
    from difflib import get_close_matches  # imported where a call has failed already

    close = get_close_matches(given, takes, 1)
    return write(close[0], value) if close else f"{said} Write one of {', '.join(takes)}."


def _called(owner: type) -> Callable:
    return getattr(owner, "apply" if hasattr(owner, "options") else "__call__")


def _first(names: Iterable[str], among: list[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _is_size(value) -> bool:
    sizes = to_python(value)
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    return all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
