"""The native backend by name, the kernels that a compiled program calls, and Python in a process of its own."""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import pytest

from jaxnorm._backends import cpu


def forced(row):
    return dataclasses.replace(row, spec=dataclasses.replace(row.spec, implementation="native"))


def kernels_in(f, *args) -> list[str]:
    """The kernels that the compiled program of f calls, each as often as it stands there."""
    return kernels_of(jax.jit(f).lower(*args).compile())


def kernels_of(compiled) -> list[str]:
    return re.findall(r'custom_call_target="jaxnorm_(\w+)"', compiled.as_text())


def run_python(code: str, **env) -> str:
    """A fresh interpreter, without what the tests set."""
    if (isa := env.get("JAXNORM_ISA", "baseline")) not in cpu.library().instruction_sets:
        pytest.skip(f"this processor has no {isa}")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAXNORM_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, "JAX_PLATFORMS": "cpu", **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
