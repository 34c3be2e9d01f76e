"""One linen layer for every spec: its variables, and Flax's rules for them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from .._core.arrays import as_array
from .._core.explain import explained
from . import derive, flax_rules
from .derive import Form
from .document import document

Array = jax.Array


class Layer(nn.Module):
    """A linen layer of a spec. `class Name(Layer, of=Spec)` makes one, with the spec's fields as its own.

    The fields of a base class of Flax come first, in Flax's order; those of the spec that it lacks are keyword only.
    """

    form: ClassVar[Any] = None  # a `Form`; None in a layer that finds its own, as `Norm` does

    def __init_subclass__(cls, of: Any = None, **options):
        if of is not None:
            cls.form = form = of if isinstance(of, Form) else Form(of)
            known = {f.name for base in cls.__mro__ if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
            added = {name: field for name, field in form.fields.items() if name not in known}
            cls.__annotations__ = {**inspect.get_annotations(cls), **{k: v[0] for k, v in added.items()}}
            for name, (_, default) in added.items():
                setattr(cls, name, dataclasses.field(default=default, kw_only=True))
            cls.__call__ = _call(form)
            document(cls, form, "flax.linen")
            options.setdefault("kw_only", not known - {"parent", "name"})
        super().__init_subclass__(**options)
        cls.__init__ = explained("linen")(cls.__init__)

    def __post_init__(self):
        if self.form is not None:
            self.form.refuse_arrays(self, {name: getattr(self, name) for name in self.form.fields})
        layer: Any = self
        object.__setattr__(self, "param_names", flax_rules.hashable(getattr(layer, "param_names", None)))
        super().__post_init__()

    @nn.nowrap
    def _form(self) -> Form:
        return self.form

    @nn.nowrap
    def _normalized(self, x, given: dict[str, Any]) -> Array:
        form: Form = self._form()
        layer: Any = self
        source, initializing = form.source(self), self.is_initializing()
        use_running_average = given.pop("use_running_average", None)
        x = as_array(x)
        axes, width = form.width(self, x.shape)
        shapes, kept = derive.first_shapes(form.first(self), width)
        train: Any = None
        if kept:
            frozen = getattr(source, "frozen", False)
            if not (frozen and use_running_average is None and layer.use_running_average is None):
                use_running_average = nn.merge_param(
                    "use_running_average", layer.use_running_average, use_running_average
                )
            train = False if frozen else flax_rules.training(use_running_average)
        stored = {name: self._statistic(name, form, like, width) for name, like in kept.items()}
        state: Any = form.spec.State(**{name: v.value for name, v in stored.items()}) if stored else ()
        state = flax_rules.state_for(self, "batch_stats", state, x, axes) if stored else ()
        call = {name: value for name, value in given.items() if name not in form.params}
        replaced = {name: given.get(name) for name in form.params}
        flax_rules.check_not_both(self, **{name: (name in shapes, value) for name, value in replaced.items()})
        params = {}
        for name, value in replaced.items():
            if name in shapes:
                make = form.initial(self, name, getattr(self, f"{name}_init", None), width)
                value = self._learned(form.path(self, name), make, shapes[name].shape, shapes[name].dtype)
            params[name] = form.aligned(self, name, value, x.shape, axes, name in shapes)
        dtype = flax_rules.output_dtype(source.dtype, self, x, *params.values())
        if "update_stats" in call:
            call["update_stats"] = call["update_stats"] and not initializing
        with _quietly() if initializing else contextlib.nullcontext():
            y, state = form.apply(self, x, params, state, call, train=train, dtype=dtype, initializing=initializing)
        if train is not False and not initializing and given.get("update_stats", True):
            for name, variable in stored.items():
                variable.value = getattr(state, name).reshape(variable.value.shape)
        return y

    @nn.nowrap
    def _learned(self, path: tuple[str, ...], make, *like) -> Array:
        if len(path) == 1:
            return self.param(path[0], make, *like)
        scope: Any = self.scope
        for name in path[:-1]:
            scope = scope.push(name, reuse=True)
        return scope.param(path[-1], make, *like)

    @nn.nowrap
    def _statistic(self, name: str, form: Form, like, width) -> nn.Variable:
        layer: Any = self
        dtype = like.dtype
        if name != "count" and not getattr(layer, "force_float32_reductions", True):
            dtype = layer.param_dtype
        own = getattr(layer, f"{name}_init", None)
        make = form.initial(self, name, own, width)
        key = lambda: None if own is None else self.make_rng("params")
        return self.variable("batch_stats", name, lambda: make(key(), like.shape, dtype))


def layer_of(spec: Any, module: str) -> type[Layer]:
    """The layer of a spec, under the spec's name. Its example is the spec's."""
    example = ">>> " + inspect.cleandoc(spec.__doc__).partition(">>> ")[2]
    return types.new_class(
        spec.__name__, (Layer,), {"of": spec}, lambda body: body.update(__module__=module, __doc__=example)
    )


def _call(form: Form):
    """The `__call__` of a layer, with its own signature."""
    positional = ("use_running_average",) if form.state else ()

    def __call__(self, x, *args, **call) -> Array:
        return self._normalized(x, form.given(positional, args, call))

    __call__.__signature__ = form.call_signature(positional)  # pyright: ignore[reportFunctionMemberAccess]
    __call__.__doc__ = form.call_doc("`batch_stats`")
    return nn.compact(explained("call")(__call__))


@contextlib.contextmanager
def _quietly():
    """An example to initialize with may be a single element, which needs no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has one element per ", UserWarning)
        yield


class Norm(Layer):
    """Any spec as a layer: `Norm(spec)`.

    The parameters are the fields of the spec's `Params`, the variables of `batch_stats` those of its `State`.

    Args:
      spec: the norm, such as `jaxnorm.LayerNorm(epsilon=1e-5)`.
      use_running_average: for a norm with a state: normalize by `batch_stats`. Here or at the call.
      param_names: other names for the parameters, such as {"scale": "weight"}.
      cast_params: cast the parameters to the output's dtype before they are used.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x = np.array([[1., 3.], [5., 5.]], "f")
    >>> y, variables = jnn.Norm(jn.LayerNorm(use_bias=False)).init_with_output(jax.random.key(0), x)
    >>> y.round(3).tolist(), sorted(variables["params"])
    ([[-1.0, 1.0], [0.0, 0.0]], ['scale'])
    """

    spec: Any
    use_running_average: bool | None = None
    param_names: Mapping[str, str] | None = None
    cast_params: bool = False

    @nn.nowrap
    def _form(self) -> Form:
        return derive.wrapped(type(self.spec))

    @nn.compact
    def __call__(self, x, *args, **call) -> Array:
        """The normalized x. Takes what `spec.apply` takes after x, and use_running_average in place of train."""
        form = self._form()
        return self._normalized(x, form.given(("use_running_average",) if form.state else (), args, call))
