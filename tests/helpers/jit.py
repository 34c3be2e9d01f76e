"""`jax.jit` for programs that run once or twice."""

import contextlib
import functools
from typing import Any

import jax


def _options() -> dict[str, Any]:
    """Those of XLA's that halve the time to compile for a CPU, as far as this release of JAX has them."""
    known = {}
    for name, value in {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}.items():
        with contextlib.suppress(RuntimeError):  # there is no such option
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
            known[name] = value
    return known


# LLVM optimizes none of their code. XLA's own passes run, so that kernels, collectives and bytes are those of any
# program; where accuracy is measured or bits are compared, use jax.jit.
OPTIONS = _options()
jit_unoptimized = functools.partial(jax.jit, compiler_options=OPTIONS)
# The same for all programs of a process that a test starts, as its XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
