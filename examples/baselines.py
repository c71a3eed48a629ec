"""What a forecast is measured by: forecasts that need no network, and how far off any of them is.

Forecasts are (origins, horizon, quantiles). An origin is the last hour that is known; the forecast
is of the `HORIZON` hours after it. Whatever is fitted is fitted to the first `past` hours alone.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import norm
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

DAY, WEEK = 24, 24 * 7
HORIZON = DAY
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MEDIAN = QUANTILES.index(0.5)


def ahead(series: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """(origins, horizon): what follows each origin."""
    return series[origins[:, None] + np.arange(1, HORIZON + 1)]


def a_week_before(series: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """(origins, horizon): a week before what follows each origin."""
    return ahead(series, origins - WEEK)


def fitted_origins(past: int) -> np.ndarray:
    """Those that have a week before them, and all that they forecast within the past."""
    return np.arange(WEEK, past - HORIZON)


def with_errors(point: np.ndarray, past_errors: np.ndarray) -> np.ndarray:
    """A forecast of single numbers, and around it the quantiles of what its errors were."""
    shift = np.quantile(past_errors, QUANTILES, axis=0)  # (quantiles, horizon)
    shift[MEDIAN] = 0
    return point[..., None] + shift.T


def seasonal_naive(series: np.ndarray, past: int, origins: np.ndarray) -> np.ndarray:
    """As a week before."""
    fitted = fitted_origins(past)
    errors = ahead(series, fitted) - a_week_before(series, fitted)
    return with_errors(a_week_before(series, origins), errors)


def exponential_smoothing(series: np.ndarray, past: int, origins: np.ndarray) -> np.ndarray:
    r"""ETS(A, N, A) of statsmodels, with a season of a week: after each origin, level and season.

    Smoothed on with the parameters of the past. The error $h$ hours ahead is normal, with the variance
    $\sigma^2 (1 + (h - 1) \alpha^2)$ as long as $h$ is within the season.
    """
    options = {"seasonal": "add", "seasonal_periods": WEEK, "initialization_method": "heuristic"}
    fitted: Any = ETSModel(series[:past], **options).fit(disp=False)
    whole: Any = ETSModel(series, **options).smooth(fitted.params)
    point = whole.level[origins][:, None] + a_week_before(whole.season, origins)
    alpha = fitted.params[fitted.model.param_names.index("smoothing_level")]
    variance = fitted.scale * (1 + np.arange(HORIZON) * alpha**2)
    return point[..., None] + np.sqrt(variance)[:, None] * norm.ppf(QUANTILES)


def least_squares(
    series: np.ndarray, known: np.ndarray, past: int, origins: np.ndarray
) -> np.ndarray:
    """A linear map from the week before the origin, and the features `known` there, to each hour."""

    def regressors(origins):
        weeks = sliding_window_view(series, WEEK)[origins - WEEK + 1]
        return np.hstack([weeks, known[origins], np.ones((len(origins), 1))])

    fitted = fitted_origins(past)
    truth = ahead(series, fitted)
    weights = np.linalg.lstsq(regressors(fitted), truth, rcond=None)[0]
    errors = truth - regressors(fitted) @ weights
    return with_errors(regressors(origins) @ weights, errors)


def forecasts(
    series: np.ndarray, known: np.ndarray, past: int, origins: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "a week before": seasonal_naive(series, past, origins),
        "ETS": exponential_smoothing(series, past, origins),
        "least squares": least_squares(series, known, past, origins),
    }


def quantile_loss(forecasts: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The pinball loss, averaged over the quantiles: (origins, horizon)."""
    missed, quantiles = truth[..., None] - forecasts, np.array(QUANTILES)
    return np.maximum(quantiles * missed, (quantiles - 1) * missed).mean(-1)


def scores(forecasts: np.ndarray, truth: np.ndarray, series: np.ndarray, past: int) -> dict:
    """How far off, in the units of the series, and how often the truth lies within the bands.

    `mase` is the mean absolute error of the median, divided by what hours of the past differ from
    those a week before.
    """
    mae = np.abs(truth - forecasts[..., MEDIAN]).mean(0)
    scale = np.abs(series[WEEK:past] - series[: past - WEEK]).mean()
    within = {}
    for low in range(MEDIAN):
        lower, upper = forecasts[..., low], forecasts[..., -1 - low]
        share = QUANTILES[-1 - low] - QUANTILES[low]
        within[f"within {share:.0%}"] = float(((lower <= truth) & (truth <= upper)).mean())
    return {
        "mae": float(mae.mean()),
        "mase": float(mae.mean() / scale),
        "quantile loss": float(quantile_loss(forecasts, truth).mean()),
        **within,
        "mae by hour": mae.tolist(),
        "below": (truth[..., None] < forecasts).mean((0, 1)).tolist(),
    }


def table(results: dict[str, list[dict]]) -> str:
    """A row for each forecast; of several seeds, the mean and the deviation."""
    columns = {
        "MAE, MW": ("mae", 1000),
        "MASE": ("mase", 1),
        "quantile loss, MW": ("quantile loss", 1000),
        "in 50 %": ("within 50%", 100),
        "in 90 %": ("within 90%", 100),
    }
    lines = [f"{'':18}" + "".join(f"{name:>19}" for name in columns)]
    for name, runs in results.items():
        row = f"{name:18}"
        for key, scale in columns.values():
            values = scale * np.array([run[key] for run in runs])
            digits = 3 if key == "mase" else 1
            deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            row += f"{values.mean():.{digits}f}{deviation}".rjust(19)
        lines.append(row)
    return "\n".join(lines)
