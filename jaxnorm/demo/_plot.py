"""The picture: how each network learned, and what became of the values that enter its last ReLU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

if TYPE_CHECKING:
    from ._train import Run

FORMATS = (".png", ".svg", ".pdf")
INK, GREY, FAINT = "#1f2430", "#6b7280", "#d5d8de"
COLOURS = {"no normalization": "#D55E00", "batch norm": "#0072B2", "layer norm": "#009E73"}  # Okabe and Ito's
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
}


def draw(
    runs: dict[str, Run], out: Path, *, batch_size: int, learning_rate: float, layer: int, command: str
) -> None:  # fmt: skip
    """Write the picture of these runs, by title, to a file, whose own title is the command that draws it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.5), dpi=160, facecolor="white")
        grid: Any = figure.add_gridspec(
            len(runs), 2, width_ratios=(1.2, 1), wspace=0.14, hspace=0.12, left=0.07, right=0.985, top=0.86, bottom=0.13
        )
        _learning(figure.add_subplot(grid[:, 0]), runs, f"training step ({batch_size} images each)", learning_rate)
        panels = [figure.add_subplot(grid[i, 1]) for i in range(len(runs))]
        _distributions(panels, runs)
        panels[0].set_title(f"What enters the last ReLU (layer {layer})")
        figure.savefig(out, metadata={"Title": command})


def _learning(axes, runs: dict[str, Run], steps: str, learning_rate: float) -> None:
    """Accuracy against steps, the name of each line at its end."""
    axes.set_title(f"Handwritten digits at learning rate {learning_rate:g}")
    last = max(run.looks[-1] for run in runs.values())
    for level in (25, 50, 75, 100):
        axes.axhline(level, color=FAINT, linewidth=0.8, zorder=0)
    axes.axhline(10, color=GREY, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
    axes.text(0.995 * last, 4.5, "chance", color=GREY, fontsize=9.5, ha="right", va="center")
    for title, run in runs.items():
        axes.plot(run.looks, 100 * run.accuracies, color=COLOURS[title], linewidth=2.2, solid_capstyle="round")
    heights = _apart([100 * run.accuracies[-1] for run in runs.values()], 5.5)
    halo = withStroke(linewidth=4, foreground="white")
    for height, (title, run) in zip(heights, runs.items(), strict=True):
        label = f"{title}  {100 * run.accuracies[-1]:.1f} %"
        look: Any = dict(color=COLOURS[title], fontweight="bold", path_effects=[halo])
        axes.text(0.995 * last, height, label, ha="right", va="center", **look)
    axes.set(xlim=(0, last), ylim=(0, 101), xlabel=steps, ylabel="test accuracy (%)", yticks=(0, 25, 50, 75, 100))


def _apart(heights: list[float], gap: float) -> list[float]:
    """Where to write each label: above its line's end where there is room, else below, and never on another label."""
    places = [0.0] * len(heights)
    above = 100.0
    for i in sorted(range(len(heights)), key=lambda i: -heights[i]):
        has_room = heights[i] + 2 * gap <= above
        above = places[i] = heights[i] + gap if has_room else min(heights[i], above) - gap
    return places


def _distributions(panels, runs: dict[str, Run]) -> None:
    """One histogram each, dark where the ReLU lets values pass; in outline, the same before training."""
    finite = {title: [z[np.isfinite(z)] for z in (run.before, run.after)] for title, run in runs.items()}
    reaches = [np.percentile(np.abs(after), 99) for _, after in finite.values() if after.size]
    reach = max(1.0, float(min(np.max(reaches), 2.5 * np.min(reaches)))) if reaches else 1.0
    bins = np.linspace(-reach, reach, 2 * 60 + 1)  # zero is an edge
    middle, width = (bins[1:] + bins[:-1]) / 2, bins[1] - bins[0]
    for axes, (title, (before, after)) in zip(panels, finite.items(), strict=True):
        outline, filled = (np.histogram(z, bins)[0] for z in (before, after))
        outline, filled = (h / max(1, h.max()) for h in (outline, filled))
        for side, alpha in ((middle < 0, 0.25), (middle > 0, 1.0)):
            axes.bar(middle[side], filled[side], width, color=COLOURS[title], alpha=alpha, linewidth=0)
        axes.stairs(outline, bins, color=GREY, linewidth=1)
        axes.axvline(0, color=INK, linewidth=0.9)
        passing = "diverged"
        if after.size:
            passing = f"std {after.std(dtype=np.float64):.2g}, {100 * np.mean(after > 0):.0f} % pass"
        at = dict(transform=axes.transAxes, ha="right", va="top")
        axes.text(1, 0.98, title, color=COLOURS[title], fontweight="bold", **at)
        axes.text(1, 0.77, passing, fontsize=10, **at)
        axes.set(xlim=(-reach, reach), ylim=(0, 1.4), yticks=())
        axes.spines["left"].set_visible(False)
        axes.tick_params(labelbottom=axes is panels[-1], bottom=axes is panels[-1])
    halo = withStroke(linewidth=3, foreground="white")
    at = dict(transform=panels[0].transAxes, va="top", fontsize=9.5, color=GREY, path_effects=[halo])
    panels[0].text(0, 0.97, "outline: before training", **at)
    panels[0].text(0, 0.79, "pale: the ReLU stops it", **at)
    panels[-1].set_xlabel("pre-activation (dimensionless), on the test images")
