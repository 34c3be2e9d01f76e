"""JAX's process of `benchmarks/gpu.py`: the forward and the backward pass of a norm as programs of their own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks._queued import Queued
from benchmarks._work import Outcome, Work, called
from benchmarks.field import EPSILON, Jaxnorm, Linen, Tokamax


class Ours(Jaxnorm):
    @property
    def version(self) -> str:  # of this tree, which need not be installed
        import jaxnorm as jn

        return jn.__version__


class Room(Ours):
    """jaxnorm in one of its rooms, by name."""

    def __init__(self, room: str):
        super().__init__()
        self.name, self.implementation = f"jaxnorm-{room}", room

    def add_rms(self, x, scale, residual):
        import jaxnorm as jn

        return jn.add_rms_norm(x, residual, scale, epsilon=EPSILON, implementation=self.implementation)

    def gated_rms(self, x, gate, scale):
        import jaxnorm as jn

        return (jn.gated_rms_norm(x, gate, scale, epsilon=EPSILON, implementation=self.implementation),)


class Composed(Ours):
    """What `add_rms_norm` and `gated_rms_norm` replace: jaxnorm's RMS norm, and jnp before or after it."""

    name, norms = "jaxnorm-composed", ("add_rms", "gated_rms")


class JaxDevice(Queued):
    # of the memory, which others want too, no more at once than this, and only as it is needed
    environment: ClassVar = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
    kinds = (Linen, Tokamax, Composed)

    def __init__(self, platform: str, names: tuple[str, ...]):
        super().__init__(platform, names)
        self.peers = {name: Room(name.removeprefix("jaxnorm-")) for name in names if _is_room(name)} | self.peers

    def about(self) -> dict:
        import jaxlib

        import jaxnorm as jn

        try:
            device = jax.devices()[0]
        except Exception as raised:  # JAX has several for a machine without a GPU
            return {"error": f"{type(raised).__name__} {raised}".strip()}
        if device.platform != self.platform:
            return {"error": f"JAX found {device.platform} devices alone"}
        rooms = {room: [backend.active, backend.reason] for room, backend in jn.backends().items()}
        return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": device.device_kind, "rooms": rooms}

    def usable(self) -> bool:
        try:
            return bool((jnp.zeros(8) + 1).sum() == 8)
        except Exception:
            return False

    def wait(self, result) -> None:
        jax.block_until_ready(result)

    def as_numpy(self, a) -> np.ndarray:
        return np.asarray(a)

    def arrays(self, work: Work) -> tuple:
        spread = lambda a: jnp.tile(a, (work.tiles, *[1] * (a.ndim - 1))) if a.ndim == len(work.shape) else jnp.array(a)
        return tuple([spread(a) for a in arrays] for arrays in self.base)

    def check(self, name: str, works: list[Work]) -> list[list[float] | str]:
        """A room against the truth on small arrays, compiled several at a time."""

        def one(work: Work):
            try:
                base = work.data()
                program = jax.jit(partial(both, called(self.peers[name], work.norm, jax.nn.silu)))
                outs, gradients = program(*([jnp.array(a) for a in arrays] for arrays in base))
                got = Outcome([np.asarray(a) for a in outs], [np.asarray(a) for a in gradients])
                return work.errors(got, work.truth(base), True)
            except Exception as raised:
                return self.fails(raised)

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, works))

    def copy(self, work: Work) -> None:
        program = jax.jit(in_turn_on_device(lambda x: jnp.copy(x)))
        xs = [(args[0],) for _, args, _ in self.batch]
        self.queue(("copy by jax", "copy"), lambda: partial(program, xs))

    def made(self, peer, work: Work) -> tuple[dict[str, Callable], list[Outcome]]:
        call = called(peer, work.norm, jax.nn.silu)
        apart = Apart(call, self.batch[0])
        inputs = [(args, consts) for _, args, consts in self.batch]
        with ThreadPoolExecutor(3) as pool:
            compiled = lambda f, batch: pool.submit(jax.jit(in_turn_on_device(f)).lower(batch).compile)
            programs = [
                compiled(apart.forward, inputs),
                compiled(apart.backward, [apart.example] * len(inputs)),
                compiled(partial(both, call), self.batch),
            ]
            forward, backward, together = (program.result() for program in programs)

        def backwards() -> Callable:
            ready = [
                (g, *apart.kept(outs, args, consts), fresh)
                for (g, args, consts), (outs, fresh) in zip(self.batch, forward(inputs), strict=True)
            ]
            return partial(backward, ready)

        calls = {
            "forward": lambda: partial(forward, inputs),
            "backward": backwards,
            "forward+backward": lambda: partial(together, self.batch),
        }
        outs, _ = forward(inputs)[0]
        gradients = backwards()()[0]
        return calls, self.outcomes(outs, gradients) + self.outcomes(*together(self.batch)[0])


def _is_room(name: str) -> bool:
    return name.startswith("jaxnorm-") and name != Composed.name


class RoomDevice(JaxDevice):
    """A room of kernels alone: what it breaks is its own."""

    environment: ClassVar = JaxDevice.environment | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.25"}


def both(call: Callable, cotangents, args, consts):
    outs, pull = jax.vjp(lambda *a: call(*a, *consts), *args)
    return outs, pull(tuple(cotangents))


def in_turn_on_device(f: Callable) -> Callable:
    """f of each of several tuples of arguments in one program, none begun before the last is done, so none is fused."""

    def run(batch):
        results = []
        for arguments in batch:
            if results:
                arguments, results[-1] = lax.optimization_barrier((arguments, results[-1]))
            results.append(f(*arguments))
        return results

    return run


class Apart:
    """A norm's forward pass in training and its backward pass, as two programs.

    The first returns the outputs and what the second needs. What that is, `jax.vjp` says; of it, what has an input's
    or an output's values is passed on as that array: returned from the program, it would be written once more.
    """

    def __init__(self, call: Callable, example: tuple):
        cotangents, args, consts = example
        self._whole = lambda args, consts: jax.vjp(lambda *a: call(*a, *consts), *args)
        outs, pull = jax.jit(self._whole)(args, consts)
        leaves, self._tree = jax.tree.flatten(pull)
        known = [*outs, *args, *consts]
        self._shapes = [leaf.shape for leaf in leaves]
        self._source = [next((i for i, k in enumerate(known) if _same(k, leaf)), None) for leaf in leaves]
        self._fresh = [i for i, source in enumerate(self._source) if source is None]
        example = (cotangents, *self.kept(outs, args, consts), [leaves[i] for i in self._fresh])
        self.example = jax.eval_shape(lambda *a: a, *example)

    def kept(self, outs, args, consts) -> tuple[list]:
        """Of the arrays known, those that the backward pass reads."""
        known = [*outs, *args, *consts]
        return ([known[i] for i in sorted({i for i in self._source if i is not None})],)

    def forward(self, args, consts):
        outs, pull = self._whole(args, consts)
        leaves = jax.tree.leaves(pull)
        return outs, [leaves[i] for i in self._fresh]

    def backward(self, cotangents, kept, fresh):
        place = {i: n for n, i in enumerate(sorted({i for i in self._source if i is not None}))}
        found = iter(fresh)
        leaves = [
            next(found) if source is None else kept[place[source]].reshape(shape)
            for source, shape in zip(self._source, self._shapes, strict=True)
        ]
        return jax.tree.unflatten(self._tree, leaves)(tuple(cotangents))


def _same(a, b) -> bool:
    return a.size == b.size and a.dtype == b.dtype and bool(jnp.array_equal(a.ravel(), b.ravel()))
