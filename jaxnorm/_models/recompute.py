"""Statistics of the whole training set, for weights that no longer change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._core.loaded import is_a
from .._core.messages import shown
from .._ops.states import as_stats
from .gathering import Module, Tree
from .outcome import Outcome
from .progress import with_bar
from .recompute_run import SETTLED, Run
from .saved import Saved

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


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
      resume: a file. The state is saved there, and a later call with the same arguments goes on from it: batches that
        were counted are read and skipped. The file is removed when all is done. Of several processes the first one
        writes it, and all read it.
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
    if is_a(apply, "flax.linen"):
        write = 'lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])'
        raise TypeError(f"recompute_stats: apply must be a function, got a linen module. Write {write}.")
    _check(batches, passes, save_every)
    model = _model(variables)
    states: dict[str, Any] = {path: as_stats(node) for path, node in model.states.items()}
    run = Run(apply, model, states, quiet=passes != 1)
    saved = None if resume is None else Saved(Path(resume), (model.arrays, states), states)
    at, done, total = 0, 0, None
    if saved is not None:
        at, done, states, total = saved.load()
    # Norms that do not feed themselves are exact after as many passes as there are norms; a state may be of several.
    layers = sum(stats.var.shape[0] if stats.var.ndim > 1 else 1 for stats in states.values())
    limit = passes or max(20, layers + 1)
    while True:
        title = f"recompute_stats, pass {at + 1}" + ("" if passes is None else f" of {passes}")
        data: Any = batches() if callable(batches) else batches
        length = len(data) if hasattr(data, "__len__") else None
        read = 0
        for read, batch in enumerate(with_bar("recompute_stats", data, title, progress, length), 1):
            if read <= done:
                run.look(states, batch)
                continue
            total, done = run.added(total, states, batch, at == 0), read
            if saved is not None and done % save_every == 0:
                saved.save(at, done, states, total)
        if read < done:
            raise ValueError(
                f"recompute_stats: {resume} is the state of a run over {done} batches or more, and there are {read}. "
                "Write another resume=, or remove the file."
            )
        if total is None:
            raise ValueError(
                f"recompute_stats: pass {at + 1} found no batch. Write a list of batches, such as [x], or a function "
                "that returns a new iterable for each pass."
            )
        states, moved = run.finished(states, total, done)
        at += 1
        if at >= limit or (passes is None and at > 1 and not max(moved.values()) > SETTLED):
            break
        total, done = None, 0
        if saved is not None:
            saved.save(at, done, states, total)
    outcome = run.outcome(states, total, done, at, moved)
    if saved is not None:
        saved.remove()
    return run.result(states, total), outcome


def _model(variables: Any) -> Tree | Module:
    if is_a(variables, "flax.nnx"):
        model: Tree | Module = Module(variables)
    elif (type(variables).__module__ or "").startswith("flax.nnx"):
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
