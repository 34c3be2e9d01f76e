"""torch's process of `benchmarks/gpu.py`: eager, compiled, and the kernels that others wrote for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import ClassVar

import numpy as np

from benchmarks import peers
from benchmarks._queued import Queued
from benchmarks._work import Outcome, Work, called
from benchmarks.field import EPSILON, Torch


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


class TorchDevice(Queued):
    # a process that is a daemon may start no others, as the compiler would
    environment: ClassVar = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
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
        self.batch = []
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

        self.wait(None)  # until what other streams made is there
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

        def replay(reads=batch):  # what it reads must stay: the graph holds no more than its address
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
