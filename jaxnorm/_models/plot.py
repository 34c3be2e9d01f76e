"""The picture of a report, by matplotlib."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#8a8a8a"  # Okabe and Ito's
_SHARES = ("dead", "saturated", "tiny", "constant", "nonfinite", "empty")


def figure(report: Any) -> Figure:
    """One line for each norm, from the first call at the top: bars of sizes, and shares as a heat map."""
    rows, names = report.rows, [row.path for row in report.rows]
    sick = {finding.path for finding in report.findings}
    found = plt.figure(figsize=(11.0, 1.5 + 0.3 * max(len(rows), 1)), layout="constrained")
    panels: Any = [
        ("rms", "RMS of the input", True), ("drift_mean", "Drift of the mean", False),
        ("gradient", "Gradient of scale", True),
    ]  # fmt: skip
    panels = [panel for panel in panels if any(panel[0] in row.quantities for row in rows)]
    axes = found.subplots(1, len(panels) + 1, sharey=True, squeeze=False)[0]
    at = np.arange(len(rows))
    for ax, (name, title, log) in zip(axes, panels, strict=False):
        values = [row.quantities.get(name, np.nan) for row in rows]
        finite = [value if np.isfinite(value) else 0.0 for value in values]
        colours = [_RED if path in sick else _BLUE for path in names]
        ax.barh(at, finite, color=colours, height=0.65)
        positive = [value for value in finite if value > 0]
        if log and positive and max(positive) > 30 * min(positive):
            ax.set_xscale("log")
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    shares = np.array([[row.quantities.get(name, np.nan) for name in _SHARES] for row in rows]).reshape(
        -1, len(_SHARES)
    )
    ax = axes[-1]
    ax.imshow(shares, aspect="auto", vmin=0, vmax=1, cmap="Reds", interpolation="nearest")
    for (i, j), share in np.ndenumerate(shares):
        text = "" if np.isnan(share) or share == 0 else f"{share:.0%}"
        ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "black")
    ax.set_xticks(range(len(_SHARES)), _SHARES, rotation=30, ha="right", fontsize=8)
    ax.set_title("Shares that should be 0", loc="left", fontsize=10)
    axes[0].set_yticks(at, names, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    for label, path in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(_RED if path in sick else _GREY)
    return found
