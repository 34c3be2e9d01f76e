"""Statistics of the whole training set, for weights that no longer change."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.messages import shown
from .._core.types import Moments, RunningStats
from .._ops.moments import merge
from .._ops.policy import EMA, Cumulative
from .._ops.running import update_state
from .._ops.states import as_given, as_stats
from .gathering import Apply, Known, Module, StateThatGathers, Tree, counts_updates, gathering, nothing_seen, policy_of
from .outcome import Outcome, Row
from .progress import with_bar
from .saved import Saved, doubled, host

Array = jax.Array
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
_SETTLED = 1e-6  # of a deviation: rounding moves statistics by less


def recompute_stats(
    apply: Callable[[Any, Any], Any],
    variables: Any,
    batches: Batches,
    *,
    passes: int | None = None,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: bool | None = None,
) -> tuple[Any, Outcome]:
    """Replace running statistics by the exact ones of a whole data set, for fixed weights.

        mean = sum(w x) / sum(w);   var = sum(w |x - mean|**2) / sum(w)

    over all elements of all batches together: with the variance between batches, and whatever the sizes of the batches.
    x is what a norm is given at inference. That depends on the statistics of the norms before it, so the data are read
    several times. In the first pass norms normalize by the statistics of each batch, in each further one by the
    recomputed ones of the pass before. After d passes the norms with fewer than d others before them are exact. The
    passes end when one changes nothing: one more than the model has norms in depth. That is the default, because only
    these statistics are those of inference, and do not depend on how the data are cut into batches.

    `passes=1` reads the data once. Each layer's input is then that of training, by the statistics of its batch, as in
    torch's `update_bn`. It costs one pass of training and is close where batches are large.

    For averaged weights (SWA, EMA), whose statistics no training step has seen, put the average in `variables`.

    Args:
      apply: a function of (variables, batch), such as calls the model on one batch. It must return the new states, as
        norms return them, anywhere in its result; an nnx module may return anything. It is traced by `jax.jit`. Norms
        are switched by this function, whatever `train` says. Let dropout and noise be off, as at inference.
      variables: linen variables, for which apply is `lambda v, x: model.apply(v, x, mutable=["batch_stats"])`; an nnx
        module; or any tree that holds the states of specs. Sharded as they may be.
      batches: a list or another iterable, or a function that returns one, which is iterated once for each pass. A batch
        is any tree of arrays, also global arrays over devices and processes. Sizes may differ.
      passes: how often to read the data. None is until a pass changes nothing.
      resume: a file. The state is saved there, and a later call with the same arguments goes on from it. The file is
        removed when all is done. Of several processes the first one writes, and all must be able to read.
      save_every: after how many batches to save.
      progress: show a bar, by rich or tqdm. None: where one is installed and standard error is a terminal.

    Returns:
      The new variables, as they were but for the statistics; of an nnx module the state of its statistics alone, for
      `nnx.update(model, state)`. And an `Outcome` with a row for each state. Nothing is changed in place. A variance is
      unbiased where the spec says so. A count of elements is that of all elements, a count of updates with zero_debias
      that of batches; the counts that the schedules of `batch_renorm` and `rep_batch_norm` read stay.

    Raises:
      TypeError: batches that can be read once alone, for more than one pass; states that apply does not return.
      ValueError: no batch, no state, or no norm that is called; a resume file of other variables.

    Used for SWA, for EMA of weights, and wherever statistics by a moving average are too few, too noisy or too old.

    Source: Wu, Johnson, "Rethinking 'Batch' in BatchNorm" (2021), arXiv:2105.07576; Izmailov, Podoprikhin, Garipov,
    Vetrov, Wilson, "Averaging Weights Leads to Wider Optima" (2018), arXiv:1803.05407.

    >>> import jaxnorm as jn, numpy as np
    >>> from jaxnorm import models
    >>> norm, batches = jn.BatchNorm(), [np.array([[1.], [3.]], "f"), np.array([[8.]], "f")]
    >>> params, state = norm.init(1)
    >>> state, outcome = models.recompute_stats(lambda state, x: norm.apply(params, state, x), state, batches)
    >>> state.mean.tolist(), round(float(state.var[0]), 4)
    ([4.0], 8.6667)
    >>> print(outcome)
    recompute_stats: 1 changed, 0 left alone
      path  what      why
    + ""    BatchNorm 3 elements in 2 batches, 1.4 deviations from the old
    """
    _check(batches, passes, save_every)
    model = _model(variables)
    states: dict[str, Any] = {path: as_stats(node) for path, node in model.states.items()}
    run = _Run(apply, model, states, quiet=passes != 1)
    saved = None if resume is None else Saved(Path(resume), model.arrays, states)
    at, done, total = 0, 0, None
    if saved is not None:
        at, done, states, total = saved.load()
    limit = passes or 10 + 2 * sum(s.var.shape[0] if s.var.ndim > 1 else 1 for s in states.values())
    while True:
        title = f"recompute_stats, pass {at + 1}" + ("" if passes is None else f" of {passes}")
        data: Any = batches() if callable(batches) else batches
        stream = itertools.islice(data, done, None)
        length = len(data) if isinstance(data, Sized) else None
        for batch in with_bar("recompute_stats", stream, title, progress, length, done):
            total, done = run.added(total, states, batch, at == 0), done + 1
            if saved is not None and done % save_every == 0:
                saved.save(at, done, states, total)
        if total is None:
            raise ValueError(
                f"recompute_stats: pass {at + 1} found no batch. Write a list of batches, such as [x], or a function "
                "that returns a new iterable for each pass."
            )
        states, moved = run.finished(states, total, done)
        at += 1
        if at >= limit or (passes is None and at > 1 and not max(map(float, moved.values())) > _SETTLED):
            break
        total, done = None, 0
        if saved is not None:
            saved.save(at, done, states, total)
    outcome = run.outcome(states, total, done, at, moved)
    if saved is not None:
        saved.remove()
    return run.result(states, total), outcome


def _model(variables: Any) -> Tree | Module:
    kind = type(variables).__module__ or ""
    if any(c.__module__.startswith("flax.nnx") and c.__name__ == "Module" for c in type(variables).__mro__):
        model: Tree | Module = Module(variables)
    elif kind.startswith("flax.nnx"):
        raise TypeError(
            f"recompute_stats: variables must be the nnx module itself, got {shown(variables)}. Write "
            "recompute_stats(apply, nnx.merge(graphdef, state), batches)."
        )
    else:
        model = Tree(variables)
    if not model.states:
        raise ValueError(
            "recompute_stats: variables hold no running statistics of a norm. Write variables with batch_stats, an nnx "
            "module with batch norms, or a tree with the states of specs."
        )
    return model


def _check(batches: Any, passes: Any, save_every: Any) -> None:
    for name, value in {"passes": passes, "save_every": save_every}.items():
        if (name, value) != ("passes", None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"recompute_stats: {name} must be an int >= 1, got {shown(value)}. Write {name}=1.")
    if not callable(batches) and (hasattr(batches, "shape") or isinstance(batches, (Mapping, str))):
        raise TypeError(f"recompute_stats: batches must be several, got {shown(batches)}. Write [batch] for one.")
    if not callable(batches) and not isinstance(batches, Iterable):
        raise TypeError(f"recompute_stats: batches must be iterable, got {shown(batches)}. Write a list of batches.")
    if passes != 1 and isinstance(batches, Iterator):
        raise TypeError(
            f"recompute_stats: batches is a {type(batches).__name__}, which can be read once, and each pass reads it. "
            "Write batches=lambda: load(), a function that returns a new one, or passes=1."
        )


class _Run:
    """The programs of one call, and what is known of the norms."""

    def __init__(self, apply: Apply, model: Tree | Module, old: dict[str, RunningStats], quiet: bool):
        if not callable(apply):
            raise TypeError(
                f"recompute_stats: apply must be a function of (variables, batch), got {shown(apply)}. Write "
                'lambda variables, x: model.apply(variables, x, mutable=["batch_stats"]).'
            )
        self.apply, self.model, self.old, self.quiet = apply, model, old, quiet
        self.known: dict[str, Known] = {}
        self.step = jax.jit(self._step, static_argnums=0)
        self.finish, self.merged = jax.jit(self._finish), jax.jit(_merged)

    def _step(self, by_batch: bool, arrays: Any, states: dict[str, RunningStats], batch: Any) -> dict[str, Moments]:
        try:
            with gathering(by_batch, self.known, self.quiet):
                seen = self.model.call(self.apply, arrays, states, batch)
        except TypeError as error:
            if StateThatGathers.__name__ in str(error):
                error.add_note("recompute_stats: states are for specs. Write norm.apply(params, state, x) in apply.")
            raise
        if not self.known:
            raise ValueError(
                "recompute_stats: apply called no norm of jaxnorm whose state is in variables. Write apply so that it "
                "calls the model with its first argument, and specs by norm.apply(params, state, x)."
            )
        if lost := sorted(self.known.keys() - seen.keys()):
            raise TypeError(
                f"recompute_stats: apply did not return the new state of {', '.join(lost)}. Write "
                'model.apply(variables, x, mutable=["batch_stats"]), or return the state that norm.apply returns.'
            )
        return {path: seen.get(path, nothing_seen(stats)) for path, stats in states.items()}

    def added(self, total: Any, states: dict[str, RunningStats], batch: Any, by_batch: bool) -> Any:
        seen = self.step(by_batch, self.model.arrays, states, batch)
        if total is None:
            total = jax.tree.map(lambda a: np.zeros(a.shape, doubled(a)), seen)
        with _wide():
            return self.merged(total, seen)

    def finished(self, states: dict[str, RunningStats], total: Any, batches: int) -> Any:
        """The statistics that the moments make, and by how many deviations they differ from those before."""
        with _wide():
            return self.finish(states, total, float(batches))

    def _finish(self, before: dict[str, RunningStats], total: dict[str, Moments], batches: Any) -> Any:
        states = {path: self._state(path, old, total[path], batches) for path, old in self.old.items()}
        return states, {path: _moved(before[path], new) for path, new in states.items()}

    def _state(self, path: str, old: RunningStats, total: Moments, batches: Any) -> RunningStats:
        known = self.known.get(path)
        if known is None or known.reason is not None:
            return old
        policy = policy_of(known.spec)
        options: dict[str, Any] = {name: getattr(policy, name) for name in ("unbiased", "min_count", "skip_nonfinite")}
        if old.count is None:
            return update_state(old, total, running=EMA(momentum=0.0, **options))
        if policy.momentum is None:
            empty = old._replace(count=jnp.zeros_like(old.count))
            new = update_state(empty, total, running=Cumulative(**options))
            return new._replace(count=jnp.where(new.count > 0, new.count, old.count))
        new = update_state(old, total, running=EMA(momentum=0.0, **options))
        updates = jnp.where(total.count > 0, batches, old.count.astype(jnp.float64)).astype(old.count.dtype)
        return new._replace(count=updates) if policy.debias and not counts_updates(known.spec) else new

    def reason(self, path: str, total: dict[str, Moments]) -> str | None:
        """Why a state is left alone; None where it is not."""
        known = self.known.get(path)
        if known is None:
            return "no norm of jaxnorm was called there"
        if known.reason is not None:
            return known.reason
        most, least = host(total[path].count).max(initial=0.0), policy_of(known.spec).min_count
        if most == 0:
            return "no element counted"
        return None if least is None or most >= least else f"{most:.10g} elements are fewer than min_count={least:g}"

    def result(self, states: dict[str, RunningStats], total: dict[str, Moments]) -> Any:
        new = {}
        for path, node in self.model.states.items():
            new[path] = node
            if self.reason(path, total) is None:
                new[path] = as_given(node, jax.tree.map(_placed, states[path], self.old[path]))
        return self.model.result(new)

    def outcome(
        self, states: dict[str, RunningStats], total: dict[str, Moments], batches: int, passes: int, moved: Any
    ) -> Outcome:
        _, since = self.finished(self.old, total, batches)
        rows = []
        for path in self.model.states:
            name = type(self.known[path].spec).__name__ if path in self.known else "statistics"
            if (reason := self.reason(path, total)) is not None:
                rows.append(Row(path, name, reason, False))
                continue
            counts = host(total[path].count)
            least, most = f"{counts.min():.10g}", f"{counts.max():.10g}"
            why = f"{most if least == most else f'{least} to {most}'} elements in {batches} batches"
            why += f", {float(since[path]):.2g} deviations from the old"
            if passes > 1 and float(moved[path]) > _SETTLED:
                why += f"; pass {passes} still moved it by {float(moved[path]):.2g}"
            finite = np.isfinite(host(states[path].mean)) & np.isfinite(host(states[path].var))
            why += "" if finite.all() else f"; {(~finite).sum()} of {finite.size} channels are not finite"
            rows.append(Row(path, name, why))
        rows += [Row(path, "statistics", "of no norm of jaxnorm", False) for path in self.model.unknown]
        return Outcome("recompute_stats", rows)


def _merged(total: dict[str, Moments], seen: dict[str, Moments]) -> dict[str, Moments]:
    """In float64, so that any number of batches adds up."""
    return {path: merge(total[path], jax.tree.map(lambda a: a.astype(doubled(a)), new)) for path, new in seen.items()}


def _moved(old: RunningStats, new: RunningStats) -> Array:
    """The largest difference of a mean or a deviation, in deviations. What is rounded away is none."""
    std, before = jnp.sqrt(new.var), jnp.sqrt(old.var)
    unit = std + jnp.abs(new.mean) * _SETTLED
    apart = jnp.maximum(jnp.abs(new.mean - old.mean), jnp.abs(std - before)).astype(unit.dtype)
    return jnp.max(jnp.where(apart > 0, apart / unit, jnp.zeros_like(apart)), initial=0.0)


def _wide() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    experimental: Any = importlib.import_module("jax.experimental")  # of jax 0.7
    return experimental.enable_x64()


def _placed(new: Array, old: Any) -> Array:
    """Where the old array is. One that is bound to no device stays so."""
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(new, old.sharding)
    return jnp.asarray(host(new))
