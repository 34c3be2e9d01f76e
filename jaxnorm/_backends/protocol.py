"""What a kernel backend is: what it answers about a norm, and the two kernels that it runs.

To add one, write a class with these members in a folder of its own and list it in `registry`. Kernels get plain arrays:
segments, axis names and derivatives stay with XLA, and `only_static` says so. Masks and weights are for those that take
them; others ask `only_plain`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from .._core.dtypes import accumulator, are_static, widest
from .._core.over import Axes
from .._core.types import Reduction
from .call import Call, varying_axes
from .partition import Collectives

Array = jax.Array


class Support(NamedTuple):
    """Whether a backend can do what it was asked about, and the reason: what it is good for, or why it cannot."""

    ok: bool
    reason: str

    @classmethod
    def yes(cls, reason: str = "supported") -> Support:
        return cls(True, reason)

    @classmethod
    def no(cls, reason: str) -> Support:
        if not reason:
            raise ValueError("Support.no: a refusal needs a reason. Write what the backend cannot do.")
        return cls(False, reason)


class Request(NamedTuple):
    """A norm as it is traced, for which a backend is sought."""

    x: Any  # an array or its type
    reduction: Reduction
    dtype: Any  # of the output
    scale: Any = None
    bias: Any = None
    mask: Any = None
    weights: Any = None
    quantize: Any = None  # the format of the output

    @property
    def varying(self) -> frozenset[int]:
        """The axes along which the parameters have more than one value."""
        return varying_axes(self.scale, self.bias)


class KernelBackend(Protocol):
    """Kernels for one platform. `supports` is asked when a norm is traced, `runs` when a program is lowered."""

    @property
    def name(self) -> str:
        """What `implementation=` calls it."""
        ...

    @property
    def platform(self) -> str:
        """As JAX calls it: "cpu", "cuda", "tpu"."""
        ...

    @property
    def merges_shards(self) -> bool:
        """Whether its kernels merge statistics over mesh axes that reduced axes are sharded over; else XLA does."""
        ...

    @property
    def partitions(self) -> bool:
        """Whether jit can split its kernels over devices."""
        ...

    @property
    def fuses_add(self) -> bool:
        """Whether its kernels add x to a residual stream; else XLA adds, and they get the sum."""
        ...

    @property
    def quantizes(self) -> bool:
        """Whether its kernels write quantized outputs: then it has a third one, `quantize`."""
        ...

    @property
    def takes_masks(self) -> bool:
        """Whether its kernels take masks and weights; else they get x with 0 where whole rows are out."""
        ...

    def available(self) -> Support:
        """Whether this installation has it: then `implementation=` may name it."""
        ...

    def active(self) -> Support:
        """Whether it may be a default here: it is available, and was measured to win on a device such as this one."""
        ...

    def supports(self, request: Request) -> Support:
        """Whether it has kernels for this norm, from shapes and dtypes alone."""
        ...

    def runs(self, call: Call, operands: Any, by_default: bool) -> bool:
        """Whether it runs this part of a program on one device: when it is named, or by default if it wins there."""
        ...

    def forward(
        self, call: Call, names: tuple[str, ...], collectives: Collectives, *operands: Any
    ) -> tuple[Array, ...]:
        """y, mean_hi, mean_lo, m2, the counts if there are weights, and the new stream if there is a residual.

        `names` are mesh axes that reduced axes are sharded over.
        """
        ...

    def backward(
        self, call: Call, names: tuple[str, ...], collectives: Collectives, *operands: Any
    ) -> tuple[Array, ...]:
        """dx, and the gradients of scale and bias that are wanted."""
        ...


def only_plain(request: Request) -> Support:
    """What a backend without masks does not do."""
    if request.mask is not None or request.weights is not None:
        return Support.no("masks and weights are XLA's")
    return only_static(request)


def only_static(request: Request) -> Support:
    """What no kernel backend of today does."""
    x, reduction = request.x, request.reduction
    if not are_static(*x.shape):
        return Support.no(f"x has symbolic sizes {x.shape}, as in jax.export")
    if not isinstance(reduction.over, Axes):
        return Support.no("segments have kernels of their own, which only implementation=None runs")
    if reduction.axis_name is not None:
        return Support.no("statistics over an axis name are merged by XLA")
    for p in (request.scale, request.bias):
        if p is not None and widest(p.dtype, accumulator(x)) != accumulator(x):
            return Support.no(f"a parameter of {p.dtype} is wider than the arithmetic for {x.dtype}")
    return Support.yes()
