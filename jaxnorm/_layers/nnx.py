"""One nnx layer for every spec: its variables, and Flax's rules for them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from .._core.arrays import as_array
from .._core.explain import explained
from .._core.messages import shown, to_python
from . import derive, flax_rules
from .derive import Form
from .document import document

Array = jax.Array
Promote = Callable[..., Any]
_NONE: Mapping[str, Any] = MappingProxyType({})
_KEYWORD, _POSITIONAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


class Layer(nnx.Module):
    """An nnx layer of a spec. `class Name(Layer, of=Spec)` makes one, with the spec's fields as its arguments.

    The arguments of a base class of Flax come first, in Flax's order; those of the spec that it lacks are keyword only.
    """

    form: ClassVar[Any] = None  # a `Form`; None in a layer that finds its own, as `Norm` does
    own_params: ClassVar[tuple[str, ...]] = ()  # the parameters that the base class of Flax has

    def __init_subclass__(cls, of: Any = None, **options):
        if of is not None:
            cls.form = form = of if isinstance(of, Form) else Form(of)
            base = next((b for b in cls.__mro__[1:] if not issubclass(b, Layer) and b is not nnx.Module), None)
            of_flax = inspect.signature(base.__init__).parameters if base and issubclass(base, nnx.Module) else {}
            cls.own_params = tuple(name for name in form.params if f"{name}_init" in of_flax)
            cls.__init__ = _init(_init_signature(form, of_flax))
            cls.__call__ = _call(form)
            if form.state:
                cls.set_view = set_view
            document(cls, form, "flax.nnx")
        super().__init_subclass__(**options)
        own = [*inspect.signature(cls.__init__).parameters.values()][1:]  # that of the metaclass says nothing
        cls.__signature__ = inspect.Signature(own)

    def _build(self, **given):
        """Options and variables, from the arguments of the constructor. Keys are drawn in Flax's order."""
        form, rngs = self.form, given.pop("rngs")
        form.refuse_arrays(self, given)
        form.build(given)
        features = to_python(given["num_features"])
        width = features if isinstance(features, tuple) else (features,)
        if not all(isinstance(n, int) and n >= 0 for n in width):
            name = type(self).__name__
            raise ValueError(
                f"{name}: num_features must be an int >= 0, or several; got {shown(given['num_features'])}. "
                f"Write {name}(64, rngs=nnx.Rngs(0))."
            )
        metadata = {name: given.pop(f"{name}_metadata", _NONE) for name in form.params}
        inits = {name: given.pop(f"{name}_init", None) for name in (*form.params, *form.state)}
        given["param_names"] = flax_rules.hashable(given["param_names"])
        for option, value in given.items():
            setattr(self, option, to_python(value))
        self._make_variables(form, width, rngs, inits, metadata)

    def _make_variables(self, form: Form, width: tuple[int, ...], rngs, inits, metadata) -> None:
        params, state = derive.first_shapes(form.first(self), width)
        for name in form.params:
            variable = nnx.data(None)
            if name in params:
                make, like = form.initial(self, name, inits.get(name), width), params[name]
                variable = nnx.Param(make(rngs.params(), like.shape, like.dtype), **metadata.get(name, _NONE))
            *inside, last = form.path(self, name)
            holder: Any = self
            for part in inside:
                if not hasattr(holder, part):
                    setattr(holder, part, nnx.Module())
                holder = getattr(holder, part)
            setattr(holder, last, variable)
        for name in form.state:
            variable = nnx.data(None)
            if name in state:
                make, like = form.initial(self, name, inits.get(name), width), state[name]
                key = None if inits.get(name) is None else rngs.params()
                variable = nnx.BatchStat(make(key, like.shape, like.dtype))
            setattr(self, name, variable)

    def _form(self) -> Form:
        return self.form

    def _normalized(self, x, given: dict[str, Any]) -> Array:
        form: Form = self._form()
        layer: Any = self
        source = form.source(self)
        train, use = None, given.pop("use_running_average", None)
        if form.state:
            frozen = getattr(source, "frozen", False)
            use = layer.use_running_average if use is None else use
            if use is None and not frozen:
                raise ValueError(
                    f"{type(self).__name__}: use_running_average is neither the layer's nor the call's. Write "
                    "model.train() or model.eval(), nnx.view(model, use_running_average=False), or "
                    "norm(x, use_running_average=False)."
                )
            train = False if frozen else flax_rules.training(use)
        x = as_array(x)
        axes, _ = form.width(self, x.shape)
        params, owned = {}, {}
        for name in form.params:
            own: Any = functools.reduce(getattr, form.path(self, name), self)
            value = given.pop(name, None)
            owned[name] = own is not None, value
            value = value if own is None else own[...]
            params[name] = form.aligned(self, name, value, x.shape, axes, own is not None)
        flax_rules.check_not_both(self, **owned)
        variables = {name: getattr(self, name) for name in form.state}
        stored = {name: variable for name, variable in variables.items() if variable is not None}
        state: Any = form.spec.State(**{name: variable[...] for name, variable in stored.items()}) if stored else ()
        dtype = self._output_dtype(source, x, state, params)
        update = train is not False and given.get("update_stats", True)
        state = flax_rules.state_for(self, "running statistics", state, x, axes) if stored else ()
        y, state = form.apply(self, x, params, state, given, train=train, dtype=dtype)
        if update:
            for name, variable in stored.items():
                new = getattr(state, name).reshape(variable.shape)
                if new.dtype == variable.dtype:
                    variable[...] = new
                else:  # the mean of a complex x, which in `variable[...] = ` would lose its imaginary part
                    variable.set_value(new)
        return y

    def _output_dtype(self, source, x: Array, state: Any, params: dict[str, Any]):
        """What Flax would return for x, the statistics and the parameters; `promote_dtype` sees their dtypes."""
        layer: Any = self
        statistics = tuple(state)[:2]  # as Flax's batch norm has them: without a count
        present = tuple([p for name, p in params.items() if p is not None or name in self.own_params])
        if layer.promote_dtype is dtypes.promote_dtype:
            return flax_rules.output_dtype(source.dtype, self, x, *statistics, *present)

        def output(*args):
            with jax.numpy_dtype_promotion("standard"):
                x, *others = layer.promote_dtype(args, dtype=source.dtype)
            return jnp.zeros((), flax_rules.output_dtype(source.dtype, self, x, *others[len(statistics) :]))

        return jax.eval_shape(output, x, *statistics, *present).dtype


def _init_signature(form: Form, of_flax: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """The arguments of Flax's layer, if there is one, and then those of the spec that it lacks."""
    keyword = lambda name, **more: inspect.Parameter(name, _KEYWORD, **more)
    first = {
        "self": inspect.Parameter("self", _POSITIONAL),
        "num_features": inspect.Parameter("num_features", _POSITIONAL),
    }
    more = {name: keyword(name, default=default, annotation=kind) for name, (kind, default) in form.fields.items()}
    if "use_running_average" in more:
        more["use_running_average"] = more["use_running_average"].replace(default=False)
    more["promote_dtype"] = keyword("promote_dtype", default=dtypes.promote_dtype, annotation=Promote)
    more["rngs"] = keyword("rngs", annotation=nnx.Rngs)
    for name in form.params:
        more[f"{name}_metadata"] = keyword(f"{name}_metadata", default=_NONE, annotation=Mapping[str, Any])
    parameters = {**first, **of_flax, **{name: p for name, p in more.items() if name not in of_flax}}
    features = int | tuple[int, ...]
    parameters["num_features"] = parameters["num_features"].replace(annotation=features)
    return inspect.Signature([*parameters.values()])


def _init(signature: inspect.Signature):
    """The `__init__` of a layer, with its own signature."""

    def __init__(self, *args, **options):
        given = signature.bind(self, *args, **options)
        given.apply_defaults()
        given.arguments.pop("self")
        self._build(**given.arguments)

    __init__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return explained("nnx")(__init__)


def layer_of(spec: Any, module: str) -> type[Layer]:
    """The layer of a spec, under the spec's name. Its example is the spec's."""
    example = ">>> " + inspect.cleandoc(spec.__doc__).partition(">>> ")[2]
    return types.new_class(
        spec.__name__, (Layer,), {"of": spec}, lambda body: body.update(__module__=module, __doc__=example)
    )


def _call(form: Form):
    """The `__call__` of a layer, with its own signature."""
    positional = ("use_running_average",) if form.state else ("mask",) if "mask" in form.call else ()

    def __call__(self, x, *args, **call) -> Array:
        return self._normalized(x, form.given(positional, args, call))

    __call__.__signature__ = form.call_signature(positional)  # pyright: ignore[reportFunctionMemberAccess]
    __call__.__doc__ = form.call_doc("the running statistics")
    return explained("call")(__call__)


def set_view(self, use_running_average: bool | None = None):
    """Used by `nnx.view`.

    Args:
      use_running_average: normalize by the running statistics.
    """
    if use_running_average is not None:
        layer: Any = self
        layer.use_running_average = use_running_average


class Norm(Layer):
    """Any spec as a layer: `Norm(spec, num_features, rngs=rngs)`.

    The parameters are `nnx.Param`s, named as the fields of the spec's `Params`; the statistics are `nnx.BatchStat`s,
    named as those of its `State`.

    Args:
      spec: the norm, such as `jaxnorm.LayerNorm(epsilon=1e-5)`.
      num_features: the sizes of x along the feature axes, an int or several.
      use_running_average: for a norm with a state: normalize by the running statistics. Here, by `eval()`, or at the
        call.
      param_names: other names for the parameters, such as {"scale": "weight"}.
      cast_params: cast the parameters to the output's dtype before they are used.
      promote_dtype: Flax's function that says what dtype the output has.
      rngs: for initializers.

    >>> import jaxnorm as jn, numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> norm = jnnx.Norm(jn.LayerNorm(use_bias=False), 2, rngs=nnx.Rngs(0))
    >>> norm(np.array([[1., 3.], [5., 5.]], "f")).round(3).tolist(), norm.scale.shape, norm.bias
    ([[-1.0, 1.0], [0.0, 0.0]], (2,), None)
    """

    def __init__(
        self, spec: Any, num_features: int | tuple[int, ...], *, use_running_average: bool | None = False,
        param_names: Mapping[str, str] | None = None, cast_params: bool = False,
        promote_dtype: Promote = dtypes.promote_dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        form, self.spec, self.num_features = derive.wrapped(type(spec)), spec, to_python(num_features)
        self.use_running_average, self.promote_dtype = use_running_average, promote_dtype
        self.param_names, self.cast_params = flax_rules.hashable(param_names), cast_params
        spec.init(num_features)  # checks the features
        features = self.num_features
        self._make_variables(form, features if isinstance(features, tuple) else (features,), rngs, {}, {})

    def _form(self) -> Form:
        return derive.wrapped(type(self.spec))

    def __call__(self, x, *args, **call) -> Array:
        """The normalized x. Takes what `spec.apply` takes after x, and use_running_average in place of train."""
        form = self._form()
        positional = ("use_running_average",) if form.state else ("mask",) if "mask" in form.call else ()
        return self._normalized(x, form.given(positional, args, call))

    set_view = set_view
