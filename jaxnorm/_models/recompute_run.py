"""The programs of `recompute_stats`, and what it knows of the norms."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.messages import shown
from .._core.types import Moments, RunningStats
from .._ops.moments import merge
from .._ops.policy import EMA, Cumulative
from .._ops.running import update_state
from .._ops.states import as_given
from .gathering import Apply, Known, Module, StateThatGathers, Tree, counts_updates, gathering, nothing_seen, policy_of
from .outcome import Outcome, Row
from .saved import doubled, host

Array = jax.Array
SETTLED = 2e-6  # of a deviation, or of a mean: rounding moves statistics by less


class Run:
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

    def look(self, states: dict[str, RunningStats], batch: Any) -> None:
        """Find the norms, by a batch that was counted before."""
        if not self.known:
            jax.eval_shape(functools.partial(self._step, True), self.model.arrays, states, batch)

    def added(self, total: Any, states: dict[str, RunningStats], batch: Any, by_batch: bool) -> Any:
        seen = self.step(by_batch, self.model.arrays, states, batch)
        if total is None:
            total = jax.tree.map(lambda a: np.zeros(a.shape, doubled(a)), seen)
        with _wide():
            return {path: _added(total[path], new) for path, new in seen.items()}

    def finished(self, states: dict[str, RunningStats], total: Any, batches: int) -> Any:
        """The statistics that the moments make, and by how many deviations they differ from those before."""
        new, moved = dict(self.old), dict.fromkeys(self.old, 0.0)
        with _wide():
            for path, known in self.known.items():
                if known.reason is None:
                    policy = policy_of(known.spec)
                    options: Any = {name: getattr(policy, name) for name in ("unbiased", "min_count", "skip_nonfinite")}
                    exact = EMA(momentum=0.0, **options) if policy.momentum is not None else Cumulative(**options)
                    counts = policy.debias and not counts_updates(known.spec)
                    given = (self.old[path], states[path], total[path], float(batches))
                    new[path], apart = _finished(exact, counts, *given)
                    moved[path] = float(apart)
        return new, moved

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
            why = f"{most if least == most else f'{least} to {most}'} elements in {batches} batch{'es' * (batches > 1)}"
            why += f", {since[path]:.2g} deviations from the old"
            if passes > 1 and moved[path] > SETTLED:
                why += f"; pass {passes} still moved it by {moved[path]:.2g}"
            finite = np.isfinite(host(states[path].mean)) & np.isfinite(host(states[path].var))
            why += "" if finite.all() else f"; {(~finite).sum()} of {finite.size} channels are not finite"
            rows.append(Row(path, name, why))
        rows += [Row(path, "statistics", "of no norm of jaxnorm", False) for path in self.model.unknown]
        return Outcome("recompute_stats", rows)


@jax.jit
def _added(total: Moments, seen: Moments) -> Moments:
    """In float64, so that any number of batches adds up."""
    return merge(total, jax.tree.map(lambda a: a.astype(doubled(a)), seen))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finished(
    policy: EMA | Cumulative,
    counts_batches: bool,
    old: RunningStats,
    before: RunningStats,
    total: Moments,
    batches: Any,
) -> tuple[RunningStats, Array]:
    """The statistics by this policy, which forgets all that was, and how far they moved."""
    first = old
    if policy.momentum is None:
        first = old._replace(count=jnp.zeros_like(old.var) if old.count is None else jnp.zeros_like(old.count))
    new = update_state(first, total, running=policy)
    if old.count is None:
        new = new._replace(count=None)
    elif policy.momentum is None:
        new = new._replace(count=jnp.where(new.count > 0, new.count, old.count))
    elif counts_batches:
        new = new._replace(count=jnp.where(total.count > 0, batches, old.count).astype(old.count.dtype))
    return new, _moved(before, new)


def _moved(old: RunningStats, new: RunningStats) -> Array:
    """The largest difference of a mean or a deviation, in deviations. What rounding may move is none."""
    std, before = jnp.sqrt(new.var), jnp.sqrt(old.var)
    apart = jnp.maximum(jnp.abs(new.mean - old.mean).astype(std.dtype), jnp.abs(std - before))
    noise = jnp.abs(new.mean).astype(std.dtype) * SETTLED
    return jnp.max(jnp.where(apart > noise, apart / (std + noise), jnp.zeros_like(apart)), initial=0.0)


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
