"""The process of the torch libraries: eager, compiled, and kernels that others wrote for torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import ClassVar

import numpy as np

from benchmarks.harness.case import Case, Data, Outcome
from benchmarks.harness.contest import Contest
from benchmarks.harness.timing import THREADS


class TorchContest(Contest):
    """Idle threads sleep. A process that is a daemon may not start others, so inductor compiles in this one."""

    environment: ClassVar = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

    def __init__(self, mode: str, names: tuple[str, ...]):
        super().__init__(mode, names)
        self.device = "cuda" if mode == "gpu" else "cpu"
        self.torch = sys.modules.get("torch")  # imported by the peers, if it is there

    def about(self) -> dict:
        if not self.peers:
            return {}
        if self.device == "cuda" and not self.torch.cuda.is_available():
            self.missing |= dict.fromkeys(self.peers, f"torch {self.torch.__version__} finds no GPU")
            self.peers.clear()
        if self.device == "cpu":
            self.torch.set_num_threads(THREADS if self.mode == "cpu" else 1)
        with suppress(ImportError, AttributeError):  # a backward pass that runs again may not reuse its inputs' memory
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False
        return {"torch": self.torch.__version__}

    def usable(self) -> bool:
        try:
            return float((self.torch.zeros(8, device=self.device) + 1).sum()) == 8
        except Exception:
            return False

    def clear(self) -> None:
        super().clear()
        if self.peers and self.device == "cuda":
            self.torch.cuda.empty_cache()

    def wait(self, result) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def as_numpy(self, a) -> np.ndarray:
        a = a.detach()
        return a.float().cpu().numpy().astype(str(a.dtype).removeprefix("torch."))

    def arrays(self, case: Case, base: Data) -> Data:
        """Parameters are float32 on a CPU, and for batch norm; else they have x's dtype. Images are NCHW in
        channels_last, which is NHWC in memory."""

        def spread(a: np.ndarray):
            own = a.ndim > 1 or self.mode == "cpu" or case.norm == "batch"
            dtype = getattr(self.torch, a.dtype.name if own else case.dtype)
            a = self.torch.from_numpy(a.astype(np.float32)).to(self.device, dtype)
            a = a.repeat(case.tiles, *[1] * (a.ndim - 1)) if a.ndim > 1 else a.clone()
            return a.permute(0, 3, 1, 2) if a.ndim == 4 else a

        cotangents, args, consts = ([spread(a) for a in arrays] for arrays in base)
        return Data(cotangents, [a.requires_grad_() for a in args], consts)

    def copies(self, case: Case) -> None:
        if not self.peers:
            return
        batches = [[data.args[0].detach() for data in batch] for batch in self.batches]
        batches = [[(self.torch.empty_like(x), x) for x in batch] for batch in batches]
        with self.stream():
            call = self.queued(lambda pairs: [to.copy_(x) for to, x in pairs], batches)
        name = "copy by torch" if self.mode != "cpu" else f"copy by {next(iter(self.peers))}"
        self.add((name, "copy"), lambda: call, len(batches[0]))

    def stream(self):
        """CUDA graphs are captured on the stream where their autograd nodes were made, which is not the default one."""
        self.wait(None)  # until the arrays made on other streams are there
        return self.torch.cuda.stream(self.torch.cuda.Stream()) if self.device == "cuda" else nullcontext()

    def queued(self, run: Callable, batches: list) -> Callable:
        """Several small arrays become a CUDA graph, because Python would take longer than the device."""
        if self.device == "cpu" or len(batches[0]) == 1:
            return self.alternating(run, batches)
        (batch,) = batches
        for _ in range(3):
            run(batch)
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, stream=self.torch.cuda.current_stream()):
            results = run(batch)

        def replay(reads=batch):  # keeps the inputs alive: the graph holds only their addresses
            graph.replay()
            return results

        return replay

    def programs(self, peer, case: Case) -> tuple[dict[str, Callable], list[Outcome]]:
        call = peer.call(case.norm)
        gradients = lambda outs, data, **keep: self.torch.autograd.grad(outs, data.args, data.cotangents, **keep)
        forward = lambda batch: [call(*data.args, *data.consts) for data in batch]
        again = partial(gradients, retain_graph=True)

        def together(batch):
            outs = ((call(*data.args, *data.consts), data) for data in batch)
            return [(out, gradients(out, data)) for out, data in outs]

        def backward() -> Callable:
            ready = [list(zip(forward(batch), batch, strict=True)) for batch in self.batches]
            return self.queued(lambda batch: [again(outs, data) for outs, data in batch], ready)

        calls = {
            "forward": lambda: self.queued(forward, self.batches),
            "backward": backward,
            "forward+backward": lambda: self.queued(together, self.batches),
        }
        if self.mode == "cpu":
            del calls["backward"]
            calls["forward"] = lambda: self.queued(self.torch.no_grad()(forward), self.batches)
        if self.mode == "cpu" or len(self.batches[0]) > 1:  # made once; the arrays are few or small
            with self.stream():
                calls = {which: (lambda ready: lambda: ready)(begin()) for which, begin in calls.items()}
        (outs, grads), *_ = calls["forward+backward"]()()
        forth = calls["forward"]()()[0]
        back = calls["backward"]()()[0] if "backward" in calls else grads
        self.wait(None)
        return calls, self.seen(forth, back) + self.seen(outs, grads)

    def seen(self, outs, gradients) -> list[Outcome]:
        last = lambda a: a.permute(0, 2, 3, 1) if a.ndim == 4 else a
        return self.outcomes([last(a) for a in outs], [last(a) for a in gradients])


class SpinningContest(TorchContest):
    """Idle threads spin for some milliseconds, the default of OpenMP: slow if the cores are not free."""

    environment: ClassVar = {}
    rest = 0.02
