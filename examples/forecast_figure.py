"""The picture that forecast.py draws: three days with their bands, errors, and how often the truth is lower."""

from pathlib import Path
from typing import Any

import drawing
import numpy as np
from baselines import DAY, HORIZON, MEDIAN, QUANTILES, ahead, quantile_loss
from matplotlib.axes import Axes
from matplotlib.figure import Figure

START = np.datetime64("2014-01-01T00")


def days(forecasts: np.ndarray, truth: np.ndarray, origins: np.ndarray) -> dict[str, int]:
    """Which of the forecasts from midnight are drawn: by their loss, not by how they look."""
    midnights = np.flatnonzero((origins + 1) % DAY == 0)
    order = midnights[quantile_loss(forecasts, truth)[midnights].mean(1).argsort()]
    last = len(order) - 1
    return {
        "an easy day": order[last // 10],
        "a typical one": order[last // 2],
        "the worst": order[last],
    }


def draw(
    path: Path, demand: np.ndarray, origins: np.ndarray, forecasts: dict, results: dict
) -> None:
    """Above three days, below the error by the hour ahead and how often the truth is lower."""
    ours, *others = forecasts.values()
    truth = ahead(demand, origins)
    figure = Figure(figsize=(drawing.WIDTH, 6.4))
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    above, below = halves
    panels = above.subplots(1, 3, sharey=True)
    for axes, (kind, place) in zip(panels, days(ours, truth, origins).items(), strict=True):
        draw_day(axes, demand, origins[place], ours[place], others[0][place])
        day = (START + origins[place] + 1).item()
        axes.set_title(f"{day:%a} {day.day} {day:%B}:\n{kind}")
    panels[0].set_ylabel("demand, GW")
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")

    error, lower = below.subplots(1, 2, width_ratios=(1.4, 1))
    percent = 100 * np.array(QUANTILES)
    lower.plot([0, 100], [0, 100], **drawing.GUESS)
    ends = []
    for (name, runs), color in zip(results.items(), drawing.COLORS, strict=False):
        by_hour = 1000 * np.mean([run["mae by hour"] for run in runs], 0)
        share = 100 * np.mean([run["below"] for run in runs], 0)
        error.plot(np.arange(1, HORIZON + 1), by_hour, color=color)
        lower.plot(percent, share, "o-", color=color, markersize=4)
        ends.append((name, by_hour[-1], color))
    error.set(xlabel="hours ahead", title="mean absolute error, MW", xlim=(1, HORIZON))
    error.set_ylim(bottom=0)
    error.set_xticks([1, 6, 12, 18, 24])
    drawing.name_lines(error, ends)
    lower.set(xlabel="quantile, %", title="truth below it, %", xlim=(0, 100), ylim=(0, 100))
    drawing.save(figure, path)


def draw_day(
    axes: Axes, demand: np.ndarray, origin: int, forecast: np.ndarray, naive: np.ndarray
) -> None:
    """Two days and the next: what is known, what is forecast, what came."""
    shown, following = np.arange(-2 * DAY, HORIZON + 1), np.arange(1, HORIZON + 1)
    color = drawing.COLORS[0]
    for low, alpha in ((0, 0.2), (1, 0.35)):
        share = QUANTILES[-1 - low] - QUANTILES[low]
        lower, upper = forecast[:, low], forecast[:, -1 - low]
        label = f"{share:.0%} band"
        axes.fill_between(following, lower, upper, color=color, alpha=alpha, lw=0, label=label)
    axes.plot(following, forecast[:, MEDIAN], color=color, label="median")
    axes.plot(shown, demand[origin + shown], color="black", linewidth=1.2, label="truth")
    axes.plot(
        following,
        naive[:, MEDIAN],
        "--",
        color=drawing.COLORS[1],
        linewidth=1,
        label="a week before",
    )
    axes.axvline(0, **drawing.GUESS)
    axes.set_xlim(shown[0], shown[-1])
    axes.set_xticks([-48, -24, 0, 24], ["-48 h", "-24", "0", "+24"])
