"""Draw the schematic pictures of the pages: `python docs/pictures.py` writes docs/which-norm.png and docs/design.png.

The background is transparent and the ink a middle grey, so that they read in light and dark.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle

DOCS = Path(__file__).parent
INK, FILL, REST = "#7a869a", "#2f81f7", "#9aa4b255"
EXAMPLES, CHANNELS, POSITIONS = 4, 6, 3

# Of each norm: which elements share the statistic of the first example, first channel and first position.
SHARED = {
    "batch norm": lambda n, c, p: c == 0,
    "layer norm, RMS norm": lambda n, c, p: (n == 0) & (p == 0),
    "instance norm": lambda n, c, p: (n == 0) & (c == 0),
    "group norm": lambda n, c, p: (n == 0) & (c < 3),
}


def which_norm() -> None:
    figure, all_axes = plt.subplots(1, len(SHARED), figsize=(8.5, 3.0))
    n, c, p = np.meshgrid(range(EXAMPLES), range(CHANNELS), range(POSITIONS), indexing="ij")
    for axes, (name, rule) in zip(all_axes, SHARED.items(), strict=True):
        shared = rule(n, c, p)
        for at in np.ndindex(shared.shape):
            left, bottom = at[1], -(at[0] * (POSITIONS + 0.7) + at[2])
            color = FILL if shared[at] else REST
            axes.add_patch(Rectangle((left, bottom), 0.88, 0.88, color=color, linewidth=0))
        axes.set(xlim=(-0.3, CHANNELS), ylim=(-EXAMPLES * (POSITIONS + 0.7) + 0.6, 1.2), aspect="equal")
        axes.set_title(name, color=INK, fontsize=11)
        axes.set_xlabel("channels", color=INK)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    all_axes[0].set_ylabel("4 examples of 3 positions", color=INK)
    figure.savefig(DOCS / "which-norm.png", dpi=150, transparent=True, bbox_inches="tight")
    plt.close(figure)


LAYERS = [  # from above: what a user sees, down to what imports JAX alone
    ["jaxnorm", "linen, nnx", "weights", "inputs", "convert", "models"],
    ["_layers", "_convert", "_models"],
    ["_norms: one norm, one file", "_inputs", "_weights"],
    ["_ops: statistics and normalization, with their derivatives"],
    ["_backends: primitives, C++ and Pallas kernels"],
    ["_core: types, checks, sums, collectives"],
]


def design() -> None:
    figure, axes = plt.subplots(figsize=(8, 4.6))
    width, height = 12.0, 1.0
    for row, boxes in enumerate(LAYERS):
        bottom, each = -1.7 * row, width / len(boxes)
        for i, name in enumerate(boxes):
            style = dict(boxstyle="round,pad=0,rounding_size=0.15", facecolor=FILL + "30", edgecolor=INK, linewidth=1)
            box = FancyBboxPatch((i * each + 0.1, bottom), each - 0.2, height, **style)
            axes.add_patch(box)
            axes.text(i * each + each / 2, bottom + height / 2, name, ha="center", va="center", color=INK, fontsize=9.5)
        if row:
            axes.annotate("", (width / 2, bottom + height), (width / 2, bottom + 1.7),
                          arrowprops=dict(arrowstyle="->", color=INK, linewidth=1.4))  # fmt: skip
    axes.set(xlim=(0, width), ylim=(-1.7 * len(LAYERS) + 1.6, 1.1))
    axes.axis("off")
    figure.savefig(DOCS / "design.png", dpi=150, transparent=True, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    which_norm()
    design()
