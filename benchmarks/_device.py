"""The processes of `benchmarks/gpu.py`: calls queued on a device, each held against the truth first."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import peers
from benchmarks._timing import Timed
from benchmarks._work import Outcome, Work, called, takes
from benchmarks.field import EPSILON, Jaxnorm, Linen, Tokamax, Torch

#: Seconds of work that a sample queues, at least, in so many calls, at least.
SAMPLE, CALLS = 10e-3, 4


# --- the contestants --------------------------------------------------------------------------------------------------


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


class TorchEager(Torch):
    name = "torch"


class TorchCompiled(Torch):
    name = "torch.compile"


class Liger(peers.Peer):
    name, package, norms = "liger", "liger_kernel", ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        from liger_kernel.transformers import functional

        if which == "rms":  # in place, its backward pass would overwrite the cotangent
            return functional.liger_rms_norm(x, scale, EPSILON, 0.0, "llama", False)
        return functional.liger_layer_norm(x, scale, bias, EPSILON)


class Quack(peers.Peer):
    """It has a layer norm too, but no backward pass of it."""

    name, package, norms = "quack", "quack", ("rms",)

    @property
    def version(self) -> str:
        import quack

        return quack.__version__

    def norm(self, which, x, scale):
        import quack

        return quack.rmsnorm(x, scale, eps=EPSILON)

    def add_rms(self, x, scale, residual):
        import quack

        return quack.rmsnorm(x, scale, residual=residual, eps=EPSILON, prenorm=True)


# --- calls that are queued --------------------------------------------------------------------------------------------


class Queued(Timed):
    """Calls that a device works off while Python goes on: a sample queues as many as fill it, and waits once.

    A call is kept as `begin() -> call`: what a backward pass needs from its forward pass is made anew before each
    sample, outside of the time taken, so that contestants do not hold memory all the while.
    """

    kinds: tuple[Callable, ...] = ()

    def __init__(self, platform: str, names: tuple[str, ...]):
        super().__init__()
        self.platform, self.peers, self.missing = platform, {}, {}
        for kind in (kind for kind in self.kinds if kind.name in names):
            try:
                self.peers[kind.name] = kind()
            except Exception as raised:  # not there, or there and not for this machine
                self.missing[kind.name] = f"{type(raised).__name__}: {raised}"

    def present(self) -> tuple[dict[str, str], dict[str, str]]:
        """Versions of those that are here, and why the others are not."""
        return {name: peer.version for name, peer in self.peers.items()}, self.missing

    def queue(self, key: tuple[str, str], begin: Callable) -> None:
        call = begin()
        self.wait(call())
        once = min(self._timed(call, 2) for _ in range(2))
        self.calls[key] = begin, max(CALLS, int(SAMPLE / once) + 1), len(self.batch)

    def sample(self, key: tuple[str, str]) -> tuple[float, float]:
        """Seconds of one norm (and nothing, where CPUs have page faults); NaN where it fails."""
        begin, times, each = self.calls[key]
        try:
            call = begin()
            self.wait(call())
            return self._timed(call, times) / each, 0.0
        except Exception as raised:
            self.fails(raised)
            return float("nan"), 0.0

    def _timed(self, call: Callable, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = call()
        self.wait(result)
        return (time.perf_counter() - start) / times

    def begin(self, work: Work) -> None:
        """The data of a case, and the copies of it."""
        self.clear()
        self.work, self.base = work, work.data()
        self.expected = work.truth(self.base)
        self.batch = [self.arrays(work) for _ in range(work.arrays(self.platform))]
        self.copy(work)

    def able(self, work: Work) -> list[str]:
        return [name for name, peer in self.peers.items() if takes(peer, work.norm)]

    def enter(self, name: str) -> list[float] | str:
        """Make a contestant's calls and hold them against the truth: its errors, or why it is left out."""
        work = self.work
        try:
            calls, got = self.made(self.peers[name], work)
            errors = [work.errors(outcome, self.expected, name.startswith("jaxnorm-") and "composed" not in name)
                      for outcome in got]  # fmt: skip
            for which, begin in calls.items():
                self.queue((name, which), begin)
        except Exception as raised:
            return self.fails(raised)
        return np.max(errors, axis=0).tolist()

    def fails(self, raised: Exception) -> str:
        """A line on it. A device that an illegal access left unusable ends the process: another is started."""
        if os.environ.get("JAXNORM_BENCHMARK_TRACEBACKS"):
            traceback.print_exc()
        if not self.usable():
            print(f"the device is lost to this process after {type(raised).__name__}: {raised}", file=sys.stderr)
            os._exit(1)
        text = " ".join(str(raised).split())
        return f"{type(raised).__name__}: {text[:400]}"

    def read(self, a, times: int) -> list[np.ndarray]:
        """The first and the last tile of an array of x's shape, or what has another shape, as it is."""
        tile = self.work.tile
        parts = [a[:tile], a[-tile:]] if tuple(a.shape) == self.work.shape else [a] * times
        return [self.as_numpy(part) for part in parts]

    def outcomes(self, outs, gradients) -> list[Outcome]:
        read = [[self.read(a, 2) for a in arrays] for arrays in (outs, gradients)]
        return [Outcome(*([two[i] for two in arrays] for arrays in read)) for i in (0, 1)]


# --- JAX --------------------------------------------------------------------------------------------------------------


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


# --- torch ------------------------------------------------------------------------------------------------------------


class TorchDevice(Queued):
    kinds = (TorchEager, TorchCompiled, Liger, Quack)

    def __init__(self, platform: str, names: tuple[str, ...]):
        super().__init__(platform, names)
        self.device = "cuda" if platform == "gpu" else "cpu"

    def about(self) -> dict:
        if not self.peers:
            return {}
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            self.missing |= dict.fromkeys(self.peers, f"torch {torch.__version__} finds no GPU")
            self.peers.clear()
        if self.device == "cpu":
            torch.set_num_threads(1)
        with suppress(ImportError, AttributeError):  # a backward pass that is run again may not take its inputs' memory
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False
        return {"torch": torch.__version__}

    def usable(self) -> bool:
        import torch

        try:
            return float((torch.zeros(8, device=self.device) + 1).sum()) == 8
        except Exception:
            return False

    def clear(self) -> None:
        self.batch = None
        super().clear()
        if self.peers and self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def wait(self, result) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def as_numpy(self, a) -> np.ndarray:
        a = a.detach()
        return a.float().cpu().numpy().astype(str(a.dtype).removeprefix("torch."))

    def arrays(self, work: Work) -> tuple:
        """In x's dtype, parameters too, but those of batch norm, which torch has in float32. Images are NCHW in
        channels_last, which is NHWC in memory."""
        import torch

        def spread(a: np.ndarray):
            dtype = a.dtype.name if work.norm == "batch" else work.dtype
            a = torch.from_numpy(a.astype(np.float32)).to(self.device, getattr(torch, dtype))
            a = a.repeat(work.tiles, *[1] * (a.ndim - 1)) if a.ndim == len(work.shape) else a
            return a.permute(0, 3, 1, 2) if a.ndim == 4 else a

        cotangents, args, consts = ([spread(a) for a in arrays] for arrays in self.base)
        return cotangents, [a.requires_grad_() for a in args], consts

    def copy(self, work: Work) -> None:
        import torch

        xs = [args[0].detach() for _, args, _ in self.batch]
        pairs = [(torch.empty_like(x), x) for x in xs]
        with self.stream():
            call = self.queued(lambda pairs: [to.copy_(x) for to, x in pairs], pairs)
        self.queue(("copy by torch", "copy"), lambda: call)

    def stream(self):
        """A graph is captured on another stream than the default one: on that which its autograd nodes were made on."""
        import torch

        return torch.cuda.stream(torch.cuda.Stream()) if self.device == "cuda" else nullcontext()

    def queued(self, run: Callable, batch: list) -> Callable:
        """What is small goes into a CUDA graph: Python would take longer than the device."""
        import torch

        if self.device == "cpu" or len(batch) == 1:
            return partial(run, batch)
        stream = torch.cuda.current_stream()
        for _ in range(3):
            run(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run(batch)

        def replay():
            graph.replay()
            return results

        return replay

    def made(self, peer, work: Work) -> tuple[dict[str, Callable], list[Outcome]]:
        import torch
        from torch.nn import functional

        call = called(peer, work.norm, functional.silu)
        if isinstance(peer, TorchCompiled):
            torch._dynamo.reset()
            call = torch.compile(call, dynamic=False)
        forward = lambda batch: [call(*args, *consts) for _, args, consts in batch]
        gradients = lambda outs, cotangents, args, **keep: torch.autograd.grad(outs, args, cotangents, **keep)

        def backward(batch):
            return [gradients(outs, g, args, retain_graph=True) for outs, (g, args, _) in batch]

        def together(batch):
            both = lambda outs, cotangents, args: (outs, gradients(outs, cotangents, args))
            return [both(call(*args, *consts), g, args) for g, args, consts in batch]

        calls = {
            "forward": lambda: self.queued(forward, self.batch),
            "backward": lambda: self.queued(backward, list(zip(forward(self.batch), self.batch, strict=True))),
            "forward+backward": lambda: self.queued(together, self.batch),
        }
        if len(self.batch) > 1:  # captured once, and small enough to stay
            with self.stream():
                calls = {which: (lambda ready: lambda: ready)(begin()) for which, begin in calls.items()}
        outs, grads, whole = (begin()()[0] for begin in calls.values())
        self.wait(None)
        return calls, self.seen(outs, grads) + self.seen(*whole)

    def seen(self, outs, gradients) -> list[Outcome]:
        rows = lambda a: a.permute(0, 2, 3, 1) if a.ndim == 4 else a
        return self.outcomes([rows(a) for a in outs], [rows(a) for a in gradients])
