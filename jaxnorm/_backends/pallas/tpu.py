"""The Mosaic TPU backend: layer and RMS norm of rows in Pallas. Every array is read once.

The norm may be that of a residual stream with x added to it: then the stream is written on the way.

A block of rows is in VMEM while its neighbours are on their way; inside it, groups of rows that fit the registers are
done one after the other. Statistics leave and arrive along lanes, (8, R), three of the eight rows in use: a column of
them would be padded to 128 lanes in memory.

Legend: x is (R, D); statistics are (R,), scale and bias (D,). Where E examples have a scale and a bias each, (E, D), x
is seen as (E, R / E, D), or where their rows take turns, as those of heads do, as (R / E, E D). A block is of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..._core.types import Plan
from ..._core.vma import result_without_vma
from ..protocol import Support
from .rows import Job, finalize, rsqrt, xhat_of

Array = jax.Array

WIDEST = 8192  # columns: 128 such rows, arriving and leaving, fit the VMEM of v5e and newer
_LANES = 128
_GROUP = 16  # rows done at once: two float32 tiles, one of 16 bits
_BLOCK = 2**20  # bytes that a block of x takes in float32, where VMEM has backend for that
_COPIES = 24  # of such a block: x, g and y arriving and leaving while others are at work, and what the compiler spills
_SMALLEST_VMEM = 16 * 2**20  # of the generations up to v4; newer ones have more


class _Plan(NamedTuple):
    rows: int  # of a block, a multiple of _LANES or all there are
    limit: int  # bytes of VMEM asked for


def _plan(rows: int, columns: int, more: int = 0, examples: int = 1) -> _Plan:
    """A plan for rows of an example, and for this many arrays more than a norm alone has."""
    vmem, copies = _vmem(), _COPIES + 2 * more
    block = min(_BLOCK, vmem // copies)
    taken = max(_LANES, block // (4 * columns) // _LANES * _LANES)
    if examples > 1:  # each starts a block of its own
        taken = min(taken, -(-rows // _LANES) * _LANES)
    return _Plan(taken, min(vmem, max(_SMALLEST_VMEM, copies * 4 * columns * taken)))


def _vmem() -> int:
    """Bytes of VMEM of the chip that a program is lowered for; of the smallest where that is not known."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except Exception:  # no TPU in sight: the interpreter, or a lowering without a mesh
        return _SMALLEST_VMEM


def measured_here() -> Support:
    """Whether this machine's TPU is one that the kernels were measured on."""
    return Support.no("not yet timed on a TPU")


def is_profitable(columns: int, plan: Plan) -> bool:
    """Whether they would be a default for rows of that length: nobody has measured."""
    return True


def unsupported_reason(shape: tuple[int, int], *dtypes) -> str | None:
    """Why there is no kernel for rows of this shape and these dtypes, or None if there is."""
    rows, columns = shape
    if rows == 0 or columns % _LANES or not 0 < columns <= WIDEST:  # others would be copied, to be padded
        return f"a row is a multiple of {_LANES} columns, up to {WIDEST}, and there is one at least: got {shape}"
    wrong = [str(jnp.dtype(t)) for t in dtypes if jnp.dtype(t) not in (jnp.float32, jnp.bfloat16)]
    return f"arrays are float32 or bfloat16: got {', '.join(wrong)}" if wrong else None


def forward(job: Job, dtype, x: Array, scale, bias, residual: Array | None = None, interpret: Any = False):
    """y of x (R, D), and the statistics mean_hi, mean_lo and m2 (R,) in float32. Scale and bias are (D,) in float32, or
    (E, D) for `job.examples`.

    With a residual (R, D) they are those of x + residual, rounded to its dtype, which is returned after them.
    """
    arriving = [x] if residual is None else [x, residual]
    sums, see = residual is not None, _View(x, job)
    plan = _plan(see.rows, see.columns, 2 * sums, see.examples)
    given = [see.params(p) for p in (scale, bias) if p is not None]

    def kernel(*refs):
        (x_ref, *residual_ref), refs = refs[: 1 + sums], refs[1 + sums :]
        parameters, (y_ref, stats_ref, *new_ref, stats) = refs[: len(given)], refs[len(given) :]
        held = iter(parameters)
        scale_ref = None if scale is None else next(held)
        bias_ref = None if bias is None else next(held)

        def group(i, _):
            at = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
            x = x_ref[at, :].astype(jnp.float32)
            for old, new in zip(residual_ref, new_ref, strict=True):
                stream = (x + old[at, :].astype(jnp.float32)).astype(new.dtype)
                new[at, :] = stream
                x = stream.astype(jnp.float32)
            mean_hi, mean_lo, m2 = _statistics(job, x)
            y = xhat_of(x, mean_hi, mean_lo, rsqrt(job, m2))
            y = y.astype(dtype).astype(jnp.float32) if job.cast_before_scale else y
            y = y if scale_ref is None else y * scale_ref[...]
            y = y if bias_ref is None else y + bias_ref[...]
            y_ref[at, :] = y.astype(dtype)
            lane = lax.broadcasted_iota(jnp.int32, (_GROUP, _LANES), 1)
            stats[at, :] = jnp.where(lane == 0, mean_hi, jnp.where(lane == 1, mean_lo, m2))
            return ()

        lax.fori_loop(0, plan.rows // _GROUP, group, ())
        for k in range(plan.rows // _LANES):
            lanes = slice(k * _LANES, (k + 1) * _LANES)
            stats_ref[:, lanes] = stats[lanes, :].T[:8]

    new = [result_without_vma(see.shape, a.dtype) for a in arriving[1:]]
    statistics = result_without_vma((*see.lead, 8, see.rows), jnp.float32)
    y, statistics, *new = pl.pallas_call(
        kernel,
        grid=see.grid(plan),
        in_specs=[*[see.block(plan)] * len(arriving), *[see.shared(1)] * len(given)],
        out_specs=[see.block(plan), see.along_lanes(plan), *[see.block(plan)] * len(new)],
        out_shape=[result_without_vma(see.shape, dtype), statistics, *new],
        scratch_shapes=[pltpu.VMEM((plan.rows, _LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(see.grid(plan)), vmem_limit_bytes=plan.limit
        ),
        interpret=interpret,
        name="norm_forward",
    )(*map(see.array, arriving), *given)
    flat = lambda a: a.reshape(x.shape)
    return flat(y), *(see.flat(statistics[..., k, :]) for k in range(3)), *map(flat, new)


def _statistics(job: Job, x: Array) -> tuple[Array, Array, Array]:
    """The corrected two-pass algorithm, as the XLA backend has it, over the rows of a group."""
    over = lambda a: jnp.sum(a, axis=1, keepdims=True)
    if not job.centered:
        zero = jnp.zeros((x.shape[0], 1), jnp.float32)
        return finalize(job, zero, zero, [over(jnp.square(x * prescale)) for prescale in job.prescales])
    mean_hi = over(x) * (1.0 / job.columns)
    mean_lo = over(x - mean_hi) * (1.0 / job.columns)
    return finalize(job, mean_hi, mean_lo, [over(jnp.square((x - mean_hi) * prescale)) for prescale in job.prescales])


def backward(
    job: Job, grad_shapes: tuple[bool, bool], x, mean_hi, mean_lo, m2, scale, g, g_stream=None, interpret: Any = False
):
    """dx (R, D) in x's dtype, and those gradients of scale and bias that are wanted, (D,) or (E, D) in float32.

    dx = r (h - mean(h) - xhat mean(h xhat)) + g_stream, h = g scale. The sums for scale and bias stay in VMEM from
    block to block.
    """
    arriving = [x, g] if g_stream is None else [x, g, g_stream]
    n, see = len(arriving), _View(x, job)
    rows, columns = see.rows, see.columns
    plan = _plan(rows, columns, n - 2, see.examples)
    statistics = jnp.stack([see.by_example(a) for a in (mean_hi, mean_lo, m2, *[jnp.zeros_like(m2)] * 5)], -2)
    given = [] if scale is None else [see.params(scale)]
    count = sum(grad_shapes)

    def kernel(*refs):
        (x_ref, g_ref, *stream_ref), (stats_ref, *refs) = refs[:n], refs[n:]
        scale_ref, refs = (refs[0], refs[1:]) if given else (None, refs)
        dx_ref, sums_refs, (stats,) = refs[0], refs[1 : 1 + count], refs[1 + count :]
        block = pl.program_id(len(see.lead))
        for k in range(plan.rows // _LANES):
            lanes = slice(k * _LANES, (k + 1) * _LANES)
            stats[lanes, :] = jnp.concatenate([stats_ref[:, lanes]] * (_LANES // 8)).T

        @pl.when(block == 0)
        def _():
            for ref in sums_refs:
                ref[...] = jnp.zeros_like(ref)

        def group(i, sums):
            at = pl.ds(pl.multiple_of(i * _GROUP, _GROUP), _GROUP)
            mean_hi, mean_lo, m2 = (stats[at, k : k + 1] for k in range(3))
            r = rsqrt(job, m2)
            g = g_ref[at, :].astype(jnp.float32)
            xhat = xhat_of(x_ref[at, :].astype(jnp.float32), mean_hi, mean_lo, r)
            h = g if scale_ref is None else g * scale_ref[...]
            mean = lambda a: jnp.sum(a, axis=1, keepdims=True) * (1.0 / columns)
            d = h - xhat * mean(h * xhat)
            dx = r * (d - mean(h) if job.centered else d)
            for ref in stream_ref:
                dx = dx + ref[at, :].astype(jnp.float32)
            dx_ref[at, :] = dx.astype(dx_ref.dtype)
            terms = [g * xhat] * grad_shapes[0] + [g] * grad_shapes[1]
            if rows % plan.rows:  # what lies beyond the last row is anything
                row = block * plan.rows + i * _GROUP + lax.broadcasted_iota(jnp.int32, (_GROUP, 1), 0)
                terms = [jnp.where(row < rows, term, 0.0) for term in terms]
            for ref, term in zip(sums_refs, terms, strict=True):
                ref[...] += term[:8] + term[8:]
            return sums

        lax.fori_loop(0, plan.rows // _GROUP, group, ())

    eighths = result_without_vma((*see.lead, 8, columns), jnp.float32)
    dx, *sums = pl.pallas_call(
        kernel,
        grid=see.grid(plan),
        in_specs=[*[see.block(plan)] * n, see.along_lanes(plan), *[see.shared(1)] * len(given)],
        out_specs=[see.block(plan), *[see.shared(8)] * count],
        out_shape=[result_without_vma(see.shape, x.dtype), *[eighths] * count],
        scratch_shapes=[pltpu.VMEM((plan.rows, _LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*("parallel" for _ in see.lead), "arbitrary"), vmem_limit_bytes=plan.limit
        ),
        interpret=interpret,
        name="norm_backward",
    )(*map(see.array, arriving), statistics, *given)
    return dx.reshape(x.shape), *(s.sum(-2) for s in sums)


class _View:
    """Rows of one example, or of several with parameters of their own: then the examples are a leading axis of the grid
    and of arrays, or where they take turns, neighbouring columns."""

    def __init__(self, x: Array, job: Job):
        self.examples, self.rows, self.columns = job.examples, x.shape[0] // job.examples, x.shape[1]
        self.lead, self.in_turn = () if job.examples == 1 else (job.examples,), job.in_turn
        self.shape = (*self.lead, self.rows, self.columns)
        if self.in_turn:
            self.shape = (self.rows, self.examples * self.columns)

    def array(self, a: Array) -> Array:
        return a.reshape(self.shape) if self.lead else a

    def by_example(self, a: Array) -> Array:
        """Statistics (R,) as (E, R / E)."""
        return a.reshape(self.rows, self.examples).T if self.in_turn else a.reshape(*self.lead, self.rows)

    def flat(self, a: Array) -> Array:
        """The same, back."""
        return (a.T if self.in_turn else a).reshape(-1)

    def params(self, p: Array) -> Array:
        return p.reshape(*self.lead, 1, self.columns)

    def grid(self, plan: _Plan) -> tuple[int, ...]:
        return *self.lead, pl.cdiv(self.rows, plan.rows)

    def _spec(self, block: tuple[int, int], at) -> pl.BlockSpec:
        if not self.lead:
            return pl.BlockSpec(block, at)
        return pl.BlockSpec((None, *block), lambda example, i: (example, *at(i)))

    def block(self, plan: _Plan) -> pl.BlockSpec:
        if self.in_turn:
            return pl.BlockSpec((plan.rows, self.columns), lambda example, i: (i, example))
        return self._spec((plan.rows, self.columns), lambda i: (i, 0))

    def shared(self, size: int) -> pl.BlockSpec:
        """What all blocks of an example share: so many rows."""
        return self._spec((size, self.columns), lambda i: (0, 0))

    def along_lanes(self, plan: _Plan) -> pl.BlockSpec:
        return self._spec((8, plan.rows), lambda i: (0, i))
