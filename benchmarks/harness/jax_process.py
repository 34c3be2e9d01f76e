"""The process of the JAX libraries. On a GPU the forward and the backward pass are programs of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness.case import Case, Data, Outcome
from benchmarks.harness.contest import Contest
from benchmarks.harness.timing import THREADS


class JaxContest(Contest):
    # GPU memory is shared with other processes: allocate as needed, and at most this share
    environment: ClassVar = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}

    def about(self) -> dict:
        import jaxnorm as jn

        try:
            device = jax.devices()[0]
        except Exception as raised:  # JAX raises several types on a machine without a GPU
            return {"error": f"{type(raised).__name__} {raised}".strip()}
        if (device.platform == "gpu") != (self.mode == "gpu"):
            return {"error": f"JAX found only {device.platform} devices"}
        backends = {name: [backend.active, backend.reason] for name, backend in jn.backends().items()}
        return {"device": device.device_kind, "backends": backends}

    def usable(self) -> bool:
        try:
            return bool((jnp.zeros(8) + 1).sum() == 8)
        except Exception:
            return False

    def wait(self, result) -> None:
        jax.block_until_ready(result)

    def block(self, result):
        return jax.block_until_ready(result)

    def as_numpy(self, a) -> np.ndarray:
        return np.asarray(a)

    def arrays(self, case: Case, base: Data) -> Data:
        spread = lambda a: jnp.tile(a, (case.tiles, *[1] * (a.ndim - 1))) if a.ndim > 1 else jnp.array(a)
        return jax.tree.map(spread, base)

    def check(self, name: str, cases: list[Case]) -> list[list[float] | str]:
        """A backend against the truth on small arrays, several compiled at a time: errors, or why there are none."""

        def one(case: Case):
            try:
                base = case.data()
                program = jax.jit(partial(both, self.peers[name].call(case.norm)))
                got = Outcome(*jax.tree.map(np.asarray, program(jax.tree.map(jnp.array, base))))
                return case.errors(Outcome(*map(list, got)), case.truth(base), True)
            except Exception as raised:
                return self.fails(raised)

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, cases))

    def copies(self, case: Case) -> None:
        if self.mode == "cpu":
            for name, call in numpy_copies([np.asarray(batch[0].args[0]) for batch in self.batches]).items():
                self.add((name, "copy"), lambda call=call: call)
            return
        program = jax.jit(one_after_another(jnp.copy))
        xs = [(data.args[0],) for data in self.batches[0]]
        self.add(("copy by jax", "copy"), lambda: partial(program, xs), len(xs))

    def programs(self, peer, case: Case) -> tuple[dict[str, Callable], list[Outcome]]:
        call, back, batches = peer.call(case.norm), lambda a: a, self.batches
        if peer.channels_first and len(case.shape) == 4:
            back = lambda a: jnp.moveaxis(a, 1, -1) if a.ndim == 4 else a
            first = lambda a: jnp.array(jnp.moveaxis(a, -1, 1)) if a.ndim == 4 else a
            batches = jax.block_until_ready(jax.tree.map(first, batches))
        seen = lambda outs, gradients: self.outcomes(*jax.tree.map(back, (list(outs), list(gradients))))
        if self.mode == "cpu":
            size, *_, last = map(len, batches[0][0])
            forward = jax.jit(call)
            if not size:  # no gradients are asked for
                short = [(*data.args, *data.consts) for (data,) in batches]
                ready = self.alternating(lambda arrays: forward(*arrays), short)
                return {"forward": lambda: ready}, seen(forward(*short[0]), ())
            together = jax.jit(lambda *flat: flat_both(call, size, last, *flat))
            flat = [(*data.cotangents, *data.args, *data.consts) for (data,) in batches]
            short = [arrays[size:] for arrays in flat]
            ready = {"forward": self.alternating(lambda arrays: forward(*arrays), short),
                     "forward+backward": self.alternating(lambda arrays: together(*arrays), flat)}  # fmt: skip
            outs, gradients = together(*flat[0])
            got = seen(forward(*short[0]), gradients) + seen(outs, gradients)
            return {which: partial(lambda call: call, call) for which, call in ready.items()}, got
        apart = Apart(call, batches[0][0])
        inputs = [(data.args, data.consts) for data in batches[0]]
        with ThreadPoolExecutor(3) as pool:
            compiled = lambda f, batch: pool.submit(jax.jit(one_after_another(f)).lower(batch).compile)
            jobs = [
                compiled(apart.forward, inputs),
                compiled(apart.backward, [apart.example] * len(inputs)),
                compiled(partial(both, call), [(data,) for data in batches[0]]),
            ]
            forward, backward, together = (job.result() for job in jobs)

        def backwards() -> Callable:
            ready = [
                (data.cotangents, *apart.kept(outs, data.args, data.consts), fresh)
                for data, (outs, fresh) in zip(batches[0], forward(inputs), strict=True)
            ]
            return partial(backward, ready)

        whole = [(data,) for data in batches[0]]
        calls = {
            "forward": lambda: partial(forward, inputs),
            "backward": backwards,
            "forward+backward": lambda: partial(together, whole),
        }
        return calls, seen(forward(inputs)[0][0], backwards()()[0]) + seen(*together(whole)[0])


class KernelContest(JaxContest):
    """One backend of kernels, in a process of its own: only that process can be harmed by what it breaks."""

    environment: ClassVar = JaxContest.environment | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.25"}


def both(call: Callable, data: Data):
    outs, pull = jax.vjp(lambda *a: call(*a, *data.consts), *data.args)
    return outs, pull(tuple(data.cotangents))


def flat_both(call: Callable, cotangents: int, consts: int, *flat):
    """The same of arrays in a row, which takes less time to dispatch."""
    args = flat[cotangents : len(flat) - consts]
    return both(call, Data(list(flat[:cotangents]), list(args), list(flat[len(flat) - consts :])))


def one_after_another(f: Callable) -> Callable:
    """f of each of several tuples of arguments in one program. Barriers keep XLA from fusing or reordering them."""

    def run(batch):
        results = []
        for arguments in batch:
            if results:
                arguments, results[-1] = lax.optimization_barrier((arguments, results[-1]))
            results.append(f(*arguments))
        return results

    return run


class Apart:
    """The forward pass of a norm in training and its backward pass, as two programs.

    The first returns the outputs and the residuals of `jax.vjp`. A residual that equals an input or an output is not
    returned, because a program would write it once more: that array is passed on instead.
    """

    def __init__(self, call: Callable, example: Data):
        cotangents, args, consts = example
        self._whole = lambda args, consts: jax.vjp(lambda *a: call(*a, *consts), *args)
        outs, pull = jax.jit(self._whole)(args, consts)
        leaves, self._tree = jax.tree.flatten(pull)
        known = [*outs, *args, *consts]
        self._shapes = [leaf.shape for leaf in leaves]
        self._source = [next((i for i, k in enumerate(known) if _same(k, leaf)), None) for leaf in leaves]
        self._used = sorted({i for i in self._source if i is not None})
        self._fresh = [i for i, source in enumerate(self._source) if source is None]
        example = (cotangents, *self.kept(outs, args, consts), [leaves[i] for i in self._fresh])
        self.example = jax.eval_shape(lambda *a: a, *example)

    def kept(self, outs, args, consts) -> tuple[list]:
        """The inputs and outputs that the backward pass reads."""
        known = [*outs, *args, *consts]
        return ([known[i] for i in self._used],)

    def forward(self, args, consts):
        outs, pull = self._whole(args, consts)
        leaves = jax.tree.leaves(pull)
        return outs, [leaves[i] for i in self._fresh]

    def backward(self, cotangents, kept, fresh):
        fresh = iter(fresh)
        leaves = [
            next(fresh) if source is None else kept[self._used.index(source)].reshape(shape)
            for source, shape in zip(self._source, self._shapes, strict=True)
        ]
        return jax.tree.unflatten(self._tree, leaves)(tuple(cotangents))


def _same(a, b) -> bool:
    return a.size == b.size and a.dtype == b.dtype and bool(jnp.array_equal(a.ravel(), b.ravel()))


def numpy_copies(xs: list[np.ndarray]) -> dict[str, Callable]:
    """Copies of the bytes of xs, in turn, into existing buffers: by one thread, and by one for each core."""
    sources = [x.reshape(-1).view(np.uint8).copy() for x in xs]
    whole = [(np.ones_like(source), source) for source in sources]
    split = [list(zip(*(np.array_split(a, THREADS) for a in pair), strict=True)) for pair in whole]
    pairs, parts = itertools.cycle(whole), itertools.cycle(split)
    pool = ThreadPoolExecutor(max(1, THREADS - 1))

    def threaded() -> None:
        first, *others = next(parts)
        started = [pool.submit(np.copyto, *part) for part in others]
        np.copyto(*first)
        for copy in started:
            copy.result()

    copies = {"copy by numpy, 1 thread": lambda: np.copyto(*next(pairs))}
    return copies | ({f"copy by numpy, {THREADS} threads": threaded} if THREADS > 1 else {})
