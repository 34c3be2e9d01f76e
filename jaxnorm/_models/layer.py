"""One call of a norm, as it was measured, and what is said of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .measure import About


class Finding(NamedTuple):
    """One fault: where it is, its name, what was seen, and the line to write."""

    path: str
    fault: str
    says: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}. {self.says} {self.write}"


class Layer(NamedTuple):
    """One call of a norm, in NumPy."""

    path: str
    what: About
    m: Any  # Measured, whose fields are NumPy's

    @property
    def evaluates(self) -> bool:
        """Whether it normalized by its running statistics."""
        return self.what.running and self.m.train == 0

    @property
    def trains(self) -> bool:
        return self.what.running and self.m.train == 1

    @property
    def drift_mean(self) -> float:
        """The root mean square over channels of (batch mean - running mean), in running standard deviations."""
        deviation = np.sqrt(self.m.running_var + (self.what.epsilon or 0.0) + 1e-30)
        with np.errstate(over="ignore"):
            return float(np.sqrt(np.mean(((self.m.batch_mean - self.m.running_mean) / deviation) ** 2)))

    @property
    def drift_var(self) -> float:
        """The median over channels of |log2(batch variance / running variance)|."""
        epsilon = (self.what.epsilon or 0.0) + 1e-30
        with np.errstate(invalid="ignore"):
            logs = np.log2((self.m.batch_var + epsilon) / (self.m.running_var + epsilon))
        return float(np.median(np.abs(logs)))

    @property
    def dead(self) -> np.ndarray:
        """Where a channel of the output is constant beside the others."""
        return self.m.out_var <= 1e-8 * self.m.out_var.max(initial=0.0)

    @property
    def untouched(self) -> bool:
        """Whether its running statistics are those of the start."""
        return not self.m.running_mean.any() and bool((self.m.running_var == 1).all())

    @property
    def finite(self) -> bool:
        return self.m.nonfinite == 0 and all(np.isfinite(a).all() for a in (self.m.running_mean, self.m.running_var))
