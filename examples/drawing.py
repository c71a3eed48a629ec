"""How the figures of the examples look: lines named where they end, on a ground of their own."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import rc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

# Told apart by the colour-blind too, and dark enough to write in.
COLORS = ("#0072b2", "#d55e00", "#008060", "#b0559a", "#a87400", "#4a4a9c", "#7f3b08", "#555555")
GUESS = {"color": "0.45", "linestyle": (0, (2, 2)), "linewidth": 1.2}
WIDTH = 7.5  # inches: at the width of a page, letters are as large as the text around them

rc("axes", grid=True, prop_cycle=cycler(color=COLORS), titlesize="medium")
rc("axes.spines", right=False, top=False)
rc("figure", facecolor="white", titlesize="medium")  # to be read on a dark page as well
rc("figure.constrained_layout", use=True, h_pad=0.1, w_pad=0.1)
rc("font", size=11)
rc("grid", alpha=0.25)
rc("lines", linewidth=1.8)
rc("savefig", dpi=180)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def name_lines(axes: Axes, lines: Iterable[tuple[str, float, str]], gap: float = 0.075) -> None:
    """Writes each name in its colour to the right of the height at which its line ends.

    Names that would overlap are moved apart, to `gap` of the height of the axes. Set the limits of
    the vertical axis before.
    """
    to_axes = axes.transScale + axes.transLimits
    names, ends, colors = zip(*sorted(lines, key=lambda line: line[1]), strict=True)
    places = np.array([to_axes.transform((axes.get_xlim()[1], end))[1] for end in ends])
    for _ in range(100):  # each pass moves neighbours away from their middle
        for i in range(len(places) - 1):
            lacking = gap - (places[i + 1] - places[i])
            if lacking > 1e-6:
                places[i : i + 2] += -lacking / 2, lacking / 2
    for name, place, color in zip(names, places, colors, strict=True):
        axes.text(1.02, place, name, color=color, va="center", transform=axes.transAxes)
