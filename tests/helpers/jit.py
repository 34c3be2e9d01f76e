"""`jax.jit` for programs that run once or twice."""

import functools

import jax

# LLVM optimizes none of their code, which would take up to a third of the time that they cost. XLA's own passes run, so
# that kernels, collectives and bytes are those of any program; where bits are compared, use jax.jit.
jit_unoptimized = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
