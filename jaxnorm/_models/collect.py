"""Measurements of every norm of a model, as a pytree that a compiled step returns: `collect` and `Seen`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.intercept import Call
from .._core.loaded import is_a
from .._core.messages import shown
from .._core.paths import matches, path_of
from .._norms.base import Spec
from .calls import watching
from .measure import FLAT, About, Measured, measured, plan_of

Array = jax.Array


@jax.tree_util.register_pytree_node_class
class Seen:
    """What `collect` measured: small arrays for each call of a norm, in the order of the calls. A pytree.

    Return it from `jax.jit`, `jax.grad` (as `aux`), `jax.lax.scan` (then each array has the axis of the scan) or
    `jax.shard_map` (all devices have the same), and hand it to `jaxnorm.report`.
    """

    def __init__(
        self, abouts: tuple[tuple[str, About], ...] = (), measurements: tuple[Measured, ...] = (),
        left_out: tuple[tuple[str, str], ...] = (),
    ) -> None:  # fmt: skip
        self.abouts = abouts
        self.measurements = measurements
        self.left_out = left_out

    def tree_flatten(self) -> tuple[tuple[tuple[Measured, ...]], Any]:
        return (self.measurements,), (self.abouts, self.left_out)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Seen:
        return cls(static[0], children[0], static[1])

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of each call. A second call of one layer is "path@2"."""
        return tuple(path for path, _ in self.abouts)

    def __repr__(self) -> str:
        return f"Seen({', '.join(self.paths)})"

    def with_gradients(self, grads: Any) -> Seen:
        """These measurements, and the norm of the gradient of each norm's scale. Inside of the step or after it.

        Args:
          grads: gradients as a tree of the parameters' structure: of linen's `variables["params"]`, of
            `nnx.state(model, nnx.Param)`, or of the tree that the specs' parameters are in.

        Raises:
          ValueError: no norm's parameters are in this tree.
        """
        leaves = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]}
        found = [_of_norm(path, what.kind, leaves) for path, what in self.abouts]
        if self.paths and not any(of_norm for of_norm in found):
            raise ValueError(
                f"Seen.with_gradients: no parameters of {shown(list(self.paths))} are in the gradients, whose paths "
                f"are {shown(list(leaves))}. Write seen.with_gradients(grads) with the norms' own."
            )
        new = []
        for m, of_norm in zip(self.measurements, found, strict=True):
            if of_norm and m.train.ndim == 0:
                wide = [jnp.asarray(leaf).astype(jnp.float32) for leaf in of_norm]
                top = jnp.maximum(jnp.stack([jnp.abs(a).max(initial=0.0) for a in wide]).max(), 1e-30)
                norm = top * jnp.sqrt(sum(jnp.square(a / top).sum() for a in wide))
                norm = jnp.where(jnp.isnan(norm), jnp.inf, norm)  # NaN is that of a norm that was given none
                m = m._replace(gradient=norm, gradient_rms=norm / max(sum(a.size for a in wide), 1) ** 0.5)
            new.append(m)
        return Seen(self.abouts, tuple(new), self.left_out)


def _of_norm(path: str, kind: str, leaves: dict[str, Any]) -> list[Any]:
    """The gradient of a norm's scale; of all its parameters but the bias if it has none."""
    path = path.partition("@")[0]
    for start in (f"{path}/", f"{path.removeprefix('params/')}/", f"params/{path}/", *([""] if path == kind else [])):
        inside = {p.removeprefix(start): a for p, a in leaves.items() if p.startswith(start)}
        if "scale" in inside:
            return [inside["scale"]]
        if inside and start:
            return [a for p, a in inside.items() if not p.endswith("bias")] or list(inside.values())
    return []


def collect(
    f: Callable[..., Any], *, axis_name: str | tuple[str, ...] | None = None,
    activations: Mapping[str, str] | None = None, on: bool = True,
) -> Callable[..., tuple[Any, Seen]]:  # fmt: skip
    """f, which also returns measurements of every norm that it calls: `out, seen = collect(f)(*args)`.

    Pure: it may stand inside of `jax.jit`, `jax.grad`, `jax.vmap`, `jax.shard_map` and a scan. It reads the input and
    the output of each norm once. Compile the step twice, with it and without (`on=False`), and run the first every n
    steps: the others cost nothing.

    Norms that f calls inside of a transformation of its own (`jax.checkpoint`, `nn.scan`, `nnx.jit`) cannot hand out
    what was measured. They are left out, and the report says so. `collect` may stand inside of the transformation
    instead. Functions such as `jaxnorm.layer_norm` are not seen; specs and layers are.

    Args:
      f: what applies the model: an nnx module or its method, `functools.partial(model.apply, mutable=["batch_stats"])`
        of a linen model, or a function that calls `spec.apply`.
      axis_name: inside of `jax.shard_map` or `jax.pmap`: the mapped axes over which the batch is divided. Measurements
        are merged over them, with one small all-reduce for each norm. Under plain `jit` leave it None.
      activations: for patterns of paths, the activation that follows the norm: "tanh" or "sigmoid". The `activation=`
        of a norm is known.
      on: False measures nothing: the program is that of f, and `Seen` is empty.

    Returns:
      A function of f's arguments that returns (f's output, `Seen`).

    Raises:
      TypeError: f is no function, or a linen module or a spec itself.
      ValueError: an activation that is none of these; inside of `jax.shard_map` without axis_name.

    >>> import jax, jaxnorm as jn, jax.numpy as jnp
    >>> from jaxnorm import models
    >>> norm = jn.BatchNorm(momentum=0.9)
    >>> apply = lambda params, state, x: norm.apply(params, state, x, train=True)
    >>> (y, state), seen = jax.jit(models.collect(apply))(*norm.init(3), jnp.ones((8, 3)))
    >>> jn.report(seen).findings[0].fault
    'small batch'
    """
    _check(f)
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    for pattern, name in (activations or {}).items():
        if name not in FLAT:
            raise ValueError(
                f"collect: the activation of {pattern!r} must be one of {list(FLAT)}, got {shown(name)}. Write "
                f'activations={{"{pattern}": "tanh"}}, or leave it out.'
            )

    if not on:
        return lambda *args, **options: (f(*args, **options), Seen())

    def observed(*args: Any, **options: Any) -> tuple[Any, Seen]:
        _check_mapped(axis_name)
        abouts: list[tuple[str, About]] = []
        measurements: list[Measured] = []
        left_out: dict[str, str] = {}
        known: dict[Any, Any] = {}
        outside = _trace()

        def watch(path: str, call: Call, run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
            if _trace() != outside:
                left_out[path] = (
                    "it is called inside of a transformation, such as jax.checkpoint, scan or jit, which does not "
                    "return what is measured. Write collect inside of it"
                )
                return run()
            out, state = run()
            if 0 in jnp.shape(call.x) or jnp.iscomplexobj(call.x):
                left_out[path] = f"its input {shown(call.x)} is {'empty' if 0 in jnp.shape(call.x) else 'complex'}"
                return out, state
            path = path or type(call.spec).__name__  # of a norm that is the whole model
            follows = next((name for pattern, name in (activations or {}).items() if matches(pattern, path)), None)
            number = sum(p.partition("@")[0] == path for p, _ in abouts)
            what, values = measured(call, out, plan_of(call, run, known), follows, names)
            abouts.append((f"{path}@{number + 1}" if number else path, what))
            measurements.append(values)
            return out, state

        with watching(watch, _module(f, args), (*args, *options.values())):
            out = f(*args, **options)
        return out, Seen(tuple(abouts), tuple(measurements), tuple(left_out.items()))

    return observed


def _check(f: Any) -> None:
    if isinstance(f, Spec):
        raise TypeError(f"collect: f must be a function, got the spec {type(f).__name__}. Write collect(norm.apply).")
    if hasattr(f, "init_with_output") and hasattr(f, "scope"):
        raise TypeError(
            f"collect: f must be a function of the variables, got the linen module {type(f).__name__}. Write "
            'collect(functools.partial(model.apply, mutable=["batch_stats"])).'
        )
    if not callable(f):
        raise TypeError(f"collect: f must be a function or an nnx module, got {shown(f)}. Write collect(model).")


def _check_mapped(axis_name: Any) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    if axis_name is None and not mesh.empty and mesh.manual_axes:
        raise ValueError(
            f"collect: this is inside of jax.shard_map over {tuple(mesh.manual_axes)}, where each device would measure "
            f"its own part. Write collect(f, axis_name={mesh.manual_axes[0]!r}) with the axes that divide the batch, "
            "or axis_name=() if none does."
        )


def _module(f: Any, args: tuple[Any, ...]) -> Any:
    """The nnx module that is called: f, the owner of the method f, or the first one among the arguments."""
    for candidate in (f, getattr(f, "__self__", None), getattr(f, "func", None), *args):
        if is_a(candidate, "flax.nnx"):
            return candidate
    return None


def _trace() -> Any:
    """What JAX traces at the moment: a value that is measured in another trace could not leave it."""
    from jax import core as older
    from jax.extend import core

    state: Any = getattr(core, "get_opaque_trace_state", None) or older.get_opaque_trace_state
    return state(**({"convention": "flax"} if "convention" in inspect.signature(state).parameters else {}))


def on_host(seen: Seen) -> list[tuple[str, About, Measured]]:
    """The calls, in NumPy. A call in a scan is one for each step: "path/0", "path/1"."""
    found = []
    host: Any = np.asarray
    for (path, what), m in zip(seen.abouts, jax.device_get(seen.measurements), strict=True):
        lead = np.shape(m.train)
        for at in np.ndindex(*lead):
            name = "/".join([path, *map(str, at)])
            found.append((name, what, Measured(*(host(a)[at] if lead else host(a) for a in m))))
    return found
