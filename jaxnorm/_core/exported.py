"""NamedTuples in programs that `jax.export` writes."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import jax.export

T = TypeVar("T", bound=type)


def exported(kind: T) -> T:
    """Let `jax.export` serialize programs whose arguments or results hold this NamedTuple, named "jaxnorm.<Name>".

    A process that reads such a program has jaxnorm imported, or registers a NamedTuple of these fields by that name:

        Affine = jax.export.register_namedtuple_serialization(
            collections.namedtuple("Affine", ["scale", "bias"]), serialized_name="jaxnorm.Affine")
    """
    with contextlib.suppress(ValueError):  # registered before, and the module is being reloaded
        jax.export.register_namedtuple_serialization(kind, serialized_name=f"jaxnorm.{kind.__name__}")
    return kind
