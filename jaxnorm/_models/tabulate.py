"""One row for each norm of a model, without running it: `tabulate`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from .._core.intercept import Call
from .._core.loaded import is_a
from .._core.messages import shown
from .._norms.base import Spec
from .._ops.plan import backend_in, plans_made
from .calls import watching
from .measure import reduced_axes
from .table import as_text, print_table, rich_table

_COLUMNS = ("path", "norm", "input", "reduces", "groups", "statistics", "parameters", "backend")


class NormRow(NamedTuple):
    """One norm of a model."""

    path: str
    kind: str
    shape: tuple[int, ...]  # of x
    dtype: str
    reduces: tuple[int, ...] | None  # the axes of x that share a statistic; None where a plan does not say
    groups: int | None  # of channels, or ghost batches
    statistics: dict[str, tuple[int, ...]]  # the shapes of what is kept between calls, by name
    parameters: dict[str, tuple[int, ...]]  # the same of what is learned
    backend: str  # whose kernels this call runs here: see `jaxnorm.backends`


class Table:
    """The norms of a model, in `rows`. `print(table)` shows them."""

    def __init__(self, rows: list[NormRow]) -> None:
        self.rows = rows

    def _table(self) -> tuple[list[str], list[list[str]]]:
        text = lambda shapes: ", ".join(f"{name} {_sizes(shape)}" for name, shape in shapes.items())
        of = lambda row: [
            row.path, row.kind, f"{row.dtype}[{','.join(map(str, row.shape))}]",
            "" if row.reduces is None else ",".join(map(str, row.reduces)),
            "" if row.groups is None else str(row.groups), text(row.statistics), text(row.parameters), row.backend,
        ]  # fmt: skip
        return list(_COLUMNS), [of(row) for row in self.rows]

    def __str__(self) -> str:
        return as_text(*self._table()) if self.rows else "No norm was called: layers and spec.apply are seen."

    def __rich__(self) -> Any:
        return rich_table(*self._table(), [])

    def print(self) -> None:
        """Print it by rich if that is installed, else as plain text."""
        print_table(self)


def tabulate(model: Any, *args: Any, **options: Any) -> Table:
    """A table of the norms that a model calls: kinds, shapes, axes, groups, statistics, parameters, backend.

    Nothing is computed: the model is traced, and each norm is lowered as one device of the default platform has it. The
    backend is the one whose kernels are then in the program.

    Args:
      model: a linen module, an nnx module, or a function.
      args: those of the call: arrays, or `jax.ShapeDtypeStruct`s. For a linen module they may begin with its variables;
        without them, they are made by `init`, of shapes alone.
      options: the keywords of the call.

    Returns:
      A `Table`, whose `rows` are tuples. A norm that is called twice has two.

    Raises:
      TypeError: model is none of these, or a spec itself.

    >>> import jaxnorm as jn, jax.numpy as jnp
    >>> norm = jn.GroupNorm(num_groups=2, implementation="xla")
    >>> print(jn.tabulate(lambda x: norm.apply(norm.init(6)[0], (), x)[0], jnp.ones((4, 5, 6))))
    path         norm       input           reduces  groups  statistics  parameters       backend
    -----------  ---------  --------------  -------  ------  ----------  ---------------  -------
    GroupNorm_0  GroupNorm  float32[4,5,6]  1,2           2              scale 6, bias 6  xla
    """
    if isinstance(model, Spec) or not callable(model):
        raise TypeError(
            f"tabulate: model must be a linen or nnx module or a function, got {shown(model)}. Write "
            "tabulate(norm.apply, params, state, x) for a spec."
        )
    f, module, given = _function(model, args, options)
    arrays, rebuilt = _split((given, options))
    rows: list[tuple[NormRow, Callable[[], str]]] = []

    def watch(path: str, call: Call, run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        rows.append((_row(path or type(call.spec).__name__, call, run), _lowering(call)))
        return run()

    def traced(arrays: Any) -> Any:
        given, options = rebuilt(arrays)
        g, inside = (f, None) if module is None else module(given[0])
        given = given if module is None else given[1:]
        with watching(watch, inside, (*given, *options.values())):
            g(*given, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(traced, arrays)
        return Table([row._replace(backend=backend()) for row, backend in rows])


def _function(model: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """(f, None, its arguments), or of an nnx module (None, what rebuilds it from its state, state and arguments)."""
    if hasattr(model, "init_with_output") and hasattr(model, "scope"):
        if args and isinstance(args[0], Mapping) and "params" in args[0]:
            variables, *rest = args
        else:
            rest = args
            variables = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *args)
        return functools.partial(model.apply, mutable=True), None, (variables, *rest)
    if is_a(model, "flax.nnx") or is_a(model, "flax.nnx", "Pytree"):
        from flax import nnx

        graph, state = nnx.split(model)

        def rebuild(state: Any) -> tuple[Any, Any]:
            again = nnx.merge(graph, state)
            return again, again

        return None, rebuild, (state, *args)
    return model, None, args


def _split(tree: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The arrays of a tree, and what puts others in their place. What is no array, such as train=True, stays."""
    leaves, structure = jax.tree.flatten(tree)
    here = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuilt(arrays: Any) -> Any:
        others = iter(arrays)
        return structure.unflatten([next(others) if a else leaf for a, leaf in zip(here, leaves, strict=True)])

    return [leaf for a, leaf in zip(here, leaves, strict=True) if a], rebuilt


def _row(path: str, call: Call, run: Callable[[], tuple[Any, Any]]) -> NormRow:
    spec, x = call.spec, call.x
    with plans_made() as made:
        jax.eval_shape(run)
    fields = lambda tree: {} if tree is None or tree == () else tree if isinstance(tree, Mapping) else tree._asdict()
    shapes = lambda tree: {name: _without_ones(a.shape) for name, a in fields(tree).items() if a is not None}
    groups = getattr(spec, "num_groups", None)
    if groups is None and (size := getattr(spec, "group_size", None)) is not None:
        groups = spec.features(x.shape)[-1] // size
    if (ghosts := getattr(spec, "virtual_batch_size", None)) is not None:
        groups = -(-x.shape[0] // ghosts)
    reduces = reduced_axes(x.shape, made[0] if made else None)
    of_x = tuple(x.shape), str(x.dtype), reduces, groups
    return NormRow(path, type(spec).__name__, *of_x, shapes(call.state), shapes(call.params), "")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A parameter may come with x's rank."""
    return tuple(n for n in shape if n != 1) or shape[-1:]


def _lowering(call: Call) -> Callable[[], str]:
    """What lowers the call alone, once no one watches, and says whose kernels it has: there it is decided."""
    arrays, rebuilt = _split(((call.params, call.state, call.x, *call.operands), call.options))
    shapes, spec = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays], call.spec

    def alone(arrays: Any) -> Any:
        given, options = rebuilt(arrays)
        return spec.apply(*given, **options)

    def backend() -> str:
        try:
            return backend_in(jax.jit(alone).lower(shapes).as_text())
        except NameError:  # an axis name that is bound outside: statistics over it are merged by XLA
            return "xla"

    return backend


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
