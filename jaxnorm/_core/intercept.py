"""A hook around every call of a spec's `apply`, for tools that look into a model: what a layer is given and returns.

    def look(call, run):
        y, state = run()
        seen[call.layer] = jnp.mean(y)
        return y, state

    with intercept(look):
        model.apply(variables, x)

The Flax layers call the spec that they are, so one hook sees layers and specs alike. A spec inside of another spec's
`apply` is part of it, and is not seen.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import jax

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Call(NamedTuple):
    """One call of `spec.apply(params, state, x, *operands, **options)`.

    `layer` is the linen or nnx module that the call comes from, None where the spec was applied itself. `options` has
    what was given by keyword: `train`, `mask` and others.
    """

    spec: Any
    layer: Any
    params: Any
    state: Any
    x: Any
    operands: tuple[Any, ...]
    options: dict[str, Any]


Interceptor = Callable[[Call, Callable[[], tuple[Any, Any]]], tuple[Any, Any]]

# Part of the key that every program is cached by, so made before there is one: else all would be compiled once more.
_USER_CONTEXT: Any = jax.make_user_context(None) if hasattr(jax, "make_user_context") else None  # from JAX 0.8 on
CONTEXTS = _USER_CONTEXT is not None

watched: contextvars.ContextVar[Interceptor | None] = contextvars.ContextVar("interceptor", default=None)
_layer: contextvars.ContextVar[Any] = contextvars.ContextVar("layer", default=None)
_keys: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("keys", default=())


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Within the context, the variable has this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def intercept(f: Interceptor) -> Iterator[None]:
    """Within the context, `f(call, run)` stands in place of each call. `run()` makes the call and returns (y, state).

    What `jax.jit` has compiled outside of the context is traced anew in it, and the other way round.
    """
    with setting(watched, f), traced_anew(f):
        yield


def from_layer(layer: Any, apply: F) -> F:
    """`apply` where `watched` is set, whose calls then say that they come from this layer."""
    return cast(F, functools.partial(_from, layer, apply))


def _from(layer, apply, *args, **options):
    with setting(_layer, layer):
        return apply(*args, **options)


def intercepted(apply: F) -> F:
    """A spec's `apply` where `watched` is set."""
    signature = inspect.signature(apply)

    @functools.wraps(apply)
    def call(self, *args, **options):
        f = watched.get()
        assert f is not None
        given = signature.bind(self, *args, **options)
        _, params, state, x, *operands = given.args
        run = functools.partial(alone, apply, *given.args, **given.kwargs)
        return f(Call(self, _layer.get(), params, state, x, tuple(operands), dict(given.kwargs)), run)

    return cast(F, call)


def alone(apply: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A call that no hook sees, such as that of a hook itself."""
    with setting(watched, None):
        return apply(*args, **options)


@contextlib.contextmanager
def traced_anew(key: Any) -> Iterator[None]:
    """Within the context, `jax.jit` uses only what it has compiled in contexts of equal keys."""
    if _USER_CONTEXT is not None:
        keys = (*_keys.get(), key)
        with setting(_keys, keys), _USER_CONTEXT(keys):
            yield
    else:
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()
