"""The Mosaic GPU backend: layer and RMS norm of rows in Pallas, for Hopper and newer. Every array is read once.

The norm may be that of a residual stream with x added to it: then the stream is written on the way.

A team of 128 threads (a warpgroup) takes a row: its copy to shared memory is under way while the rows before it are at
work, its sums are made in registers, and it goes back to memory once. A block of teams stays on its multiprocessor and
walks over the rows, so that scale and bias, or the sums for their gradients, stay in registers all the while.

Legend: x is (R, D); a row lies as (4, D / 4), a quarter for each warp; statistics are (R,), scale and bias (D,). Where
E examples have a scale and a bias each, (E, D), a block walks over the rows of one example.
"""

from __future__ import annotations

import functools
import inspect
import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..._core.types import Plan
from ..._core.vma import result_without_vma
from ..protocol import Support
from .rows import Job, finalize, rsqrt, xhat_of

Array = jax.Array

WIDEST = 8192  # columns: beyond, the sums for scale and bias need more registers than a thread has
_WARPS = 4
_THREADS = 32 * _WARPS  # of a team
_LEAST_BYTES = 4 if jax.__version_info__ >= (0, 12) else 2  # that Mosaic lets a thread move from and to memory
_BLOCKS = 132  # one block on each multiprocessor of an H100 or H200
_IN_FLIGHT = 64 * 1024  # bytes on their way to a multiprocessor, which hide the latency of its memory
_BARRIERS = 32  # that Mosaic has for one array
_SHARED = 224 * 1024  # bytes of shared memory that a block may have for rows; 3 KiB are for what is small
# Layouts are given where they matter; to infer them took jax 0.11 two seconds a kernel. Sums are of a warp, which needs
# no scratch memory of the compiler's.
_PARAMS = plgpu.CompilerParams(reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane)


class _Plan(NamedTuple):
    """How a kernel is cut."""

    blocks: int  # of an example
    teams: int  # of a block
    stages: int  # rows of a team that are at work or on their way
    vector: int  # neighbouring elements that a thread takes

    @property
    def columns(self) -> int:
        """What a warp takes at once."""
        return 32 * self.vector


def _plan(rows: int, columns: int, bytes_of_a_row: int, fixed: int = 0, examples: int = 1) -> _Plan:
    """A plan for rows that each bring this many bytes, with `fixed` bytes of shared memory besides."""
    teams = 8 if columns <= 1024 else 4 if columns <= 4096 else 2  # as registers allow
    stages = lambda teams: max(2, min(_BARRIERS // teams, 1 + _IN_FLIGHT // (teams * bytes_of_a_row)))
    while teams > 1 and teams * stages(teams) * bytes_of_a_row + fixed > _SHARED:
        teams //= 2
    vector = next(v for v in (4, 2, 1) if columns % (_THREADS * v) == 0)  # of 16 bytes at most in float32
    most = min(_blocks(), -(-rows // (examples * teams)))
    return _Plan(_least_work(rows // examples, teams, examples, most), teams, stages(teams), vector)


@functools.lru_cache
def _least_work(rows: int, teams: int, examples: int, most: int) -> int:
    """Blocks of an example. All blocks run in waves, one on each multiprocessor, and a wave takes a row to start."""
    waves = lambda blocks: -(-examples * blocks // _blocks())
    time = lambda blocks: waves(blocks) * (1 + -(-rows // (blocks * teams)))
    return most if examples == 1 else min(range(1, most + 1), key=time)


def _device() -> Any:
    """This machine's first GPU, or None."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:  # there is none
        return None


@functools.cache
def _blocks() -> int:
    """The multiprocessors of this machine's GPU; without one, of the GPU that a program is likely compiled for."""
    return getattr(_device(), "core_count", _BLOCKS)


@functools.cache
def measured_here() -> Support:
    """Whether this machine's GPU is one that the kernels were measured on, and they compile and run on it."""
    if (device := _device()) is None:
        return Support.no("JAX has no NVIDIA GPU on this machine")
    if (capability := getattr(device, "compute_capability", "unknown")) != "9.0":
        return Support.no(f"measured on Hopper, compute capability 9.0, and this GPU has {capability}")

    def tried() -> Support:
        job = Job(_THREADS, 1e-6, centered=True, cast_before_scale=False, prescale=1.0)
        try:
            x = jax.device_put(np.arange(_THREADS, dtype=np.float32)[None], device)
            y = np.asarray(jax.jit(lambda x: forward(job, jnp.float32, x, None, None)[0])(x))
        except Exception as error:  # of the compiler, of the driver, of a JAX with another Pallas
            return Support.no(f"on this machine they fail: {type(error).__name__}: {error}")
        x = np.arange(_THREADS) - (_THREADS - 1) / 2
        return Support(bool(np.allclose(y[0], x / x.std(), atol=1e-5)), "on this machine they compute something else")

    with ThreadPoolExecutor(1) as thread:  # which has none of the meshes and settings that the caller may be under
        return thread.submit(tried).result()


def unsupported_reason(shape: tuple[int, int], *dtypes) -> str | None:
    """Why there is no kernel for rows of this shape and these dtypes, or None if there is."""
    rows, columns = shape
    if rows == 0 or columns % _THREADS or not 0 < columns <= WIDEST:
        return f"a row is a multiple of {_THREADS} columns, up to {WIDEST}, and there is one at least: got {shape}"
    if _LEAST_BYTES > 2 and columns % (2 * _THREADS) and any(jnp.dtype(t).itemsize == 2 for t in dtypes):
        return f"a row in 16 bits is a multiple of {2 * _THREADS} columns since jax 0.12: got {shape}"
    wrong = [str(jnp.dtype(t)) for t in dtypes if jnp.dtype(t) not in (jnp.float32, jnp.bfloat16, jnp.float16)]
    return f"arrays are float32, bfloat16 or float16: got {', '.join(wrong)}" if wrong else None


def _takes_index() -> bool:
    """Whether `plgpu.load` must be given an index: before jax 0.11 the reference could not be indexed itself."""
    index = inspect.signature(plgpu.load).parameters.get("idx")  # gone since jax 0.12
    return index is not None and index.default is inspect.Parameter.empty


_TAKES_INDEX = _takes_index()


def _load(ref, index, **how) -> Array:
    return plgpu.load(ref, index, **how) if _TAKES_INDEX else plgpu.load(ref.at[index], **how)


def is_profitable(columns: int, plan: Plan) -> bool:
    """Whether they beat XLA for rows of that length, as `python -m benchmarks.gpu` measures: the rule of the default.

    A team is slow with a few elements for each thread. XLA puts an activation or a gate into its own kernel.
    """
    return columns >= (640 if plan.reduction.centered else 512) and not plan.within


class _Team:
    """What one team does and knows inside a kernel: its rows, as they arrive, and sums over them."""

    def __init__(self, job: Job, plan: _Plan, rows: int, columns: int, arrays, rings, arrived, partial, interpret):
        self.plan, self.columns, self.interpret = plan, columns, interpret
        self._arrays, self._rings, self._arrived, self._partial = arrays, rings, arrived, partial
        self.block, self.team = lax.axis_index("block"), lax.axis_index("team")
        self.example = None if job.examples == 1 else self.block // plan.blocks
        start = self.block if self.example is None else lax.rem(self.block, plan.blocks)
        self._first, self._step = start * plan.teams + self.team, plan.blocks * plan.teams
        self.rows = (rows // job.examples - self._first + self._step - 1) // self._step
        if self.example is not None and job.in_turn:
            self._first, self._step = self._first * job.examples + self.example, self._step * job.examples
        elif self.example is not None:
            self._first += self.example * (rows // job.examples)
        self.chunks = [
            slice(c * plan.columns, (c + 1) * plan.columns) for c in range(columns // (_WARPS * plan.columns))
        ]
        # A warp takes a quarter of the row, its lanes neighbouring vectors of it.
        self._layout = plgpu.Layout.TILED(
            plgpu.Tiling(((_WARPS, plan.columns), (plan.vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )

    def row(self, i):
        return self._first + i * self._step

    def each_row(self, body, carry):
        """carry = body(i, carry) for every row of this team, the i-th of which has arrived when body is called."""
        for i in range(self.plan.stages - 1):
            pl.when(i < self.rows)(functools.partial(self._fetch, i))

        def step(i, carry):
            for barrier in self._arrived:
                plgpu.barrier_wait(barrier.at[self._slot(i)])
            return body(i, carry)

        return lax.fori_loop(0, self.rows, step, carry)

    def fetch_after(self, i):
        """Start the copy of a later row, to where the row before the i-th was: once no warp reads that any longer."""
        ahead = i + self.plan.stages - 1
        pl.when(ahead < self.rows)(lambda: self._fetch(ahead))

    def _slot(self, i):
        return self.team * self.plan.stages + lax.rem(i, self.plan.stages)

    def _fetch(self, i):
        for array, ring, arrived in zip(self._arrays, self._rings, self._arrived, strict=True):
            plgpu.copy_gmem_to_smem(
                array.at[self.row(i)], ring.at[self._slot(i)], arrived.at[self._slot(i)],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )  # fmt: skip

    def arrived(self, ring: int, i):
        """The i-th row in float32, by chunks. Each call reads it again, because registers cost more than reading."""
        return lambda chunk: self.shared(self._rings[ring].at[self._slot(i)], chunk).astype(jnp.float32)

    def shared(self, ref, chunk: slice):
        index = (slice(None), chunk)
        return ref[index] if self.interpret else _load(ref, index, layout=self._layout)

    def of_memory(self, ref, chunk: slice):
        """A part of a scale or bias, that of this team's example."""
        ref = ref if self.example is None else ref.at[self.example]
        index = (slice(None), chunk)
        return ref[index] if self.interpret else _load(ref, index, layout=self._layout, optimized=False)

    def zeros(self):
        zeros = jnp.zeros((_WARPS, self.plan.columns), jnp.float32)
        return zeros if self.interpret else plgpu.layout_cast(zeros, self._layout)

    def sum(self, which: int, i, parts) -> Array:
        """The sum over a row; `which` tells the sums of one row apart. All warps have come by when it returns."""
        slot = 2 * which + lax.rem(i, 2)  # the sum of the row before may still be read
        self._partial[self.team, slot] = jnp.sum(functools.reduce(operator.add, parts), axis=1)
        plgpu.commit_smem()
        a, b, c, d = (self._partial[self.team, slot, warp] for warp in range(_WARPS))
        return (a + b) + (c + d)


def forward(job: Job, dtype, x: Array, scale, bias, residual: Array | None = None, interpret: Any = None):
    """y of x (R, D), and the statistics mean_hi, mean_lo and m2 (R,) in float32. Scale and bias are (D,) in float32, or
    (E, D) for `job.examples`.

    With a residual (R, D) they are those of x + residual, rounded to its dtype, which is returned after them.
    """
    rows, columns = x.shape
    arriving = [x] if residual is None else [x, residual]
    sums = residual is not None
    plan = _plan(rows, columns, columns * sum(a.dtype.itemsize for a in arriving), examples=job.examples)
    given = [p for p in (scale, bias) if p is not None]

    def stream(x, residual=None):
        """What is normalized, by chunks. Each call recomputes it from what arrived."""
        return x if residual is None else lambda c: (x(c) + residual(c)).astype(arriving[1].dtype).astype(jnp.float32)

    def kernel(*refs):
        arrays, refs = refs[: 1 + sums], refs[1 + sums :]
        parameters, refs = refs[: len(given)], refs[len(given) :]
        y_ref, mean_hi_ref, mean_lo_ref, m2_ref, *refs = refs
        new_refs, refs = refs[:sums], refs[sums:]
        rings, partial, arrived = refs[: 1 + sums], refs[1 + sums], refs[2 + sums :]
        team = _Team(job, plan, rows, columns, arrays, rings, arrived, partial, interpret)
        held = iter([[team.of_memory(ref, chunk) for chunk in team.chunks] for ref in parameters])
        scales = None if scale is None else next(held)
        biases = None if bias is None else next(held)

        def one(i, _):
            x = stream(*(team.arrived(ring, i) for ring in range(len(arriving))))
            if job.centered:
                mean_hi = team.sum(0, i, [x(c) for c in team.chunks]) * (1.0 / columns)
                mean_lo = team.sum(1, i, [x(c) - mean_hi for c in team.chunks]) * (1.0 / columns)
            else:
                mean_hi = mean_lo = jnp.float32(0.0)
            squares = [
                team.sum(2 + k, i, [jnp.square((x(c) - mean_hi) * prescale) for c in team.chunks])
                for k, prescale in enumerate(job.prescales)
            ]
            team.fetch_after(i)
            mean_hi, mean_lo, m2 = finalize(job, mean_hi, mean_lo, squares)
            r = rsqrt(job, m2)
            for k, c in enumerate(team.chunks):
                y = xhat_of(x(c), mean_hi, mean_lo, r)
                y = y.astype(dtype).astype(jnp.float32) if job.cast_before_scale else y
                y = y if scales is None else y * scales[k]
                y = y if biases is None else y + biases[k]
                y_ref[team.row(i), :, c] = y.astype(dtype)
                for new_ref in new_refs:
                    new_ref[team.row(i), :, c] = x(c).astype(new_ref.dtype)
            mean_hi_ref[team.row(i)], mean_lo_ref[team.row(i)], m2_ref[team.row(i)] = mean_hi, mean_lo, m2
            return ()

        team.each_row(one, ())

    shape = _quartered(x).shape
    results = [result_without_vma(shape, dtype), *[result_without_vma((rows,), jnp.float32)] * 3]
    results += [result_without_vma(shape, a.dtype) for a in arriving[1:]]
    run = _kernel(kernel, job, plan, arriving, 2 + len(job.prescales), interpret, results)
    y, mean_hi, mean_lo, m2, *new = run(*map(_quartered, arriving), *map(_quartered, given))
    return y.reshape(x.shape), mean_hi, mean_lo, m2, *(a.reshape(x.shape) for a in new)


def backward(
    job: Job, grad_shapes: tuple[bool, bool], x, mean_hi, mean_lo, m2, scale, g, g_stream=None, interpret: Any = None
):
    """dx (R, D) in x's dtype, and those gradients of scale and bias that are wanted, (D,) or (E, D) in float32.

    dx = r (h - mean(h) - xhat mean(h xhat)) + g_stream, h = g scale. Blocks leave their sums for scale and bias in a
    row each.
    """
    rows, columns = x.shape
    arriving = [x, g] if g_stream is None else [x, g, g_stream]
    n = len(arriving)
    plan = _plan(rows, columns, columns * sum(a.dtype.itemsize for a in arriving), columns * 4, job.examples)
    given = [] if scale is None else [_quartered(scale)]
    count = sum(grad_shapes)

    def kernel(*refs):
        arrays, (mean_hi_ref, mean_lo_ref, m2_ref, *refs) = refs[:n], refs[n:]
        scale_ref, refs = (refs[0], refs[1:]) if given else (None, refs)
        dx_ref, (sums_refs, refs) = refs[0], (refs[1 : 1 + count], refs[1 + count :])
        rings, partial, arrived, (together, shared) = refs[:n], refs[n], refs[n + 1 : -2], refs[-2:]
        team = _Team(job, plan, rows, columns, arrays, rings, arrived, partial, interpret)
        if given:

            @pl.when(team.team == 0)
            def _():
                for c in team.chunks:
                    shared[:, c] = team.of_memory(scale_ref, c)

            _all_teams(together)

        def statistics(i):
            row = team.row(jnp.minimum(i, team.rows - 1))
            return mean_hi_ref[row], mean_lo_ref[row], m2_ref[row]

        def one(i, carry):
            (mean_hi, mean_lo, m2), sums = carry
            following = statistics(i + 1)  # under way while this row is at work
            r = rsqrt(job, m2)
            x, g, *g_stream = (team.arrived(ring, i) for ring in range(n))
            xhat = lambda c: xhat_of(x(c), mean_hi, mean_lo, r)
            h = lambda c: g(c) * team.shared(shared, c) if given else g(c)
            hx = team.sum(0, i, [h(c) * xhat(c) for c in team.chunks]) * (1.0 / columns)
            h_mean = team.sum(1, i, [h(c) for c in team.chunks]) * (1.0 / columns) if job.centered else 0.0
            team.fetch_after(i)
            for c in team.chunks:
                dx = r * (h(c) - h_mean - xhat(c) * hx)
                for other in g_stream:
                    dx = dx + other(c)
                dx_ref[team.row(i), :, c] = dx.astype(dx_ref.dtype)
            terms = [lambda c: g(c) * xhat(c)] * grad_shapes[0] + [g] * grad_shapes[1]
            sums = [
                [total + term(c) for total, c in zip(totals, team.chunks, strict=True)]
                for totals, term in zip(sums, terms, strict=True)
            ]
            return following, sums

        zero = jnp.float32(0.0)
        first = lax.cond(team.rows > 0, lambda: statistics(0), lambda: (zero, zero, zero))
        _, sums = team.each_row(one, (first, [[team.zeros() for _ in team.chunks]] * count))
        _all_teams(together)  # none needs the scale any longer: the sums take its place
        for sums_ref, totals in zip(sums_refs, sums, strict=True):
            _sum_over_teams(team, together, shared, totals, sums_ref)

    shapes = [result_without_vma(_quartered(x).shape, x.dtype)]
    shapes += [result_without_vma((job.examples * plan.blocks, _WARPS, columns // _WARPS), jnp.float32)] * count
    more = [plgpu.Barrier(num_arrivals=plan.teams), plgpu.SMEM((_WARPS, columns // _WARPS), jnp.float32)]
    run = _kernel(kernel, job, plan, arriving, 2, interpret, shapes, more)
    dx, *sums = run(*map(_quartered, arriving), mean_hi, mean_lo, m2, *given)
    if job.examples == 1:
        return dx.reshape(x.shape), *(s.sum(0).reshape(columns) for s in sums)
    return dx.reshape(x.shape), *(s.reshape(job.examples, plan.blocks, columns).sum(1) for s in sums)


def _all_teams(barrier):
    """Wait for the other teams of the block."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _sum_over_teams(team: _Team, together, block_sums, totals, out_ref):
    """One team after the other adds its totals to the block's; the last writes them out. Always in the same order."""

    def add(turn: int):
        for total, c in zip(totals, team.chunks, strict=True):
            total = total if turn == 0 else team.shared(block_sums, c) + total
            if turn == team.plan.teams - 1:
                out_ref[team.block, :, c] = total
            else:
                block_sums[:, c] = total

    for turn in range(team.plan.teams):
        pl.when(team.team == turn)(functools.partial(add, turn))
        _all_teams(together)


def _kernel(body, job: Job, plan: _Plan, arriving, sums: int, interpret, out_type, more=()):
    rings = [plgpu.SMEM((plan.teams * plan.stages, *_quartered(a).shape[1:]), a.dtype) for a in arriving]
    partial = plgpu.SMEM((plan.teams, 2 * sums, _WARPS), jnp.float32)
    arrived = [plgpu.Barrier(num_barriers=plan.teams * plan.stages) for _ in arriving]
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=[*rings, partial, *arrived, *more],
        grid=(job.examples * plan.blocks,), grid_names=("block",), num_threads=plan.teams, thread_name="team",
        interpret=interpret, compiler_params=_PARAMS,
    )  # fmt: skip


def _quartered(a: Array) -> Any:
    return a.reshape(*a.shape[:-1], _WARPS, a.shape[-1] // _WARPS)
