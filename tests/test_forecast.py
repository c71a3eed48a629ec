"""The example, run small, on a series that is made up."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pandas as pd
import pytest
from helpers import assert_equal, imported_example, interrupted_at_the_first
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

pytestmark = pytest.mark.slow

PAST, HELD_OUT = 24 * 7 * 6, 96
SMALL = ("--hidden-dim=4", "--num-blocks=1", "--steps=4", "--every=2", "--piece=240")


@pytest.fixture(scope="module")
def example():
    with imported_example("forecast") as module:
        yield module


@pytest.fixture(scope="module")
def hours(example):
    hour, rng = np.arange(PAST + HELD_OUT), np.random.default_rng(0)
    day = np.sin(2 * np.pi * hour / 24)
    is_working_day = np.where(hour // 24 % 7 < 5, 1.0, 0.0)
    temperature = 15 + 5 * day + rng.normal(size=len(hour)).cumsum() / 10
    demand = 5 + day + 0.5 * is_working_day + 0.1 * rng.normal(size=len(hour))
    return example.Hours(demand, temperature, is_working_day)


@pytest.fixture(scope="module")
def origins(example):
    return np.arange(PAST - 1, PAST + HELD_OUT - example.HORIZON)


@pytest.fixture(scope="module")
def config(example):
    return example.parse([*SMALL])[1]


@pytest.fixture(scope="module")
def run(example, hours, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # for Optax
        patch.setattr(example, "load", lambda: hours)
        patch.setattr(example, "TEST", HELD_OUT)
        return out, example.main([*SMALL, "--seeds", "3", f"--out={out}"])


def test_forecasts_from_every_hour_are_scored_and_drawn(example, run, hours, origins):
    out, result = run
    assert sorted(path.name for path in out.iterdir()) == ["forecast.png", "seed3.eqx"]
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")
    truth = np.stack([hours.demand[o + 1 : o + 25] for o in origins])
    for name, forecasts in result["forecasts"].items():
        assert forecasts.shape == (len(origins), 24, 5)
        (told,) = result["results"][name]
        by_hour = np.abs(truth - forecasts[..., 2]).mean(0)
        np.testing.assert_allclose(told["mae by hour"], by_hour, rtol=1e-12)
        assert (np.diff(forecasts, axis=-1) > 0).all()
    history = result["results"]["s5"][0]["history"]
    assert len(history) == 2
    assert history[1] < history[0]


def with_another_future(hours, begin):
    """From the hour `begin` on; the calendar is as it was."""
    demand, temperature = hours.demand.copy(), hours.temperature.copy()
    demand[begin:] *= 1.5
    temperature[begin:] -= 9
    return hours._replace(demand=demand, temperature=temperature)


def test_the_stream_rolls_on_as_the_whole_pass_and_sees_no_future(
    example, run, config, hours, origins, monkeypatch
):
    out, result = run
    with jax.numpy_dtype_promotion("standard"):
        model, state, _ = example.train(config, 3, hours, PAST, out / "seed3.eqx", resume=True)
    begin, before = PAST + 30, result["forecasts"]["s5"]
    changed = with_another_future(hours, begin)
    after, error = example.forecast(model, state, changed, PAST, origins)
    assert_equal(after[origins < begin], before[origins < begin])
    assert (after[origins >= begin] != before[origins >= begin]).all()
    assert max(error, result["stream_error"]) < 1e-5

    # Answers that came an hour late are not taken for those of the stream.
    known = jnp.asarray(example.features(hours, PAST)[: origins[-1] + 1])
    late = np.roll(example.read(model, state, known), 1, axis=0)[PAST - 1 :]
    monkeypatch.setattr(example, "roll", lambda *_: late)
    with pytest.raises(RuntimeError, match="must be those of the whole pass; off by"):
        example.forecast(model, state, hours, PAST, origins)


def test_nothing_of_the_future_enters(example, hours, origins):
    """Neither into what is fitted, nor into a forecast; the calendar is known a day ahead."""
    assert_equal(
        example.training_data(with_another_future(hours, PAST), PAST),
        example.training_data(hours, PAST),
    )
    begin = PAST + 30
    changed = with_another_future(hours, begin)
    features = [example.features(h, PAST) for h in (hours, changed)]
    before, after = (
        example.baselines.forecasts(h.demand, known, PAST, origins)
        for h, known in zip((hours, changed), features, strict=True)
    )
    for name in before:
        assert_equal(after[name][origins < begin], before[name][origins < begin])
        if name != "a week before":  # which looks no nearer
            assert (after[name][origins >= begin] != before[name][origins >= begin]).all()
    assert_equal(features[1][:begin], features[0][:begin])
    assert (features[1][begin:, :2] != features[0][begin:, :2]).all()


def test_interrupted_and_resumed_equals_unbroken(example, config, hours, run, tmp_path):
    checkpoint = tmp_path / "seed3.eqx"

    def train(resume):
        with jax.numpy_dtype_promotion("standard"):
            return example.train(config, 3, hours, PAST, checkpoint, resume)

    with interrupted_at_the_first(example.checkpoints):
        train(resume=False)
    unbroken = (run[0] / "seed3.eqx").read_bytes()
    assert checkpoint.read_bytes() != unbroken
    *_, history = train(resume=True)
    assert history == run[1]["results"]["s5"][0]["history"]
    assert checkpoint.read_bytes() == unbroken  # model, state and optimiser state
    with pytest.raises(SystemExit, match=r"got learning_rate=0\.5 for learning_rate=0\.0"):
        example.train(
            example.dataclasses.replace(config, learning_rate=0.5), 3, hours, PAST, checkpoint, True
        )


def test_the_loss_is_the_pinball_loss_of_quantiles_in_order(example):
    """Of a piece that lies anywhere, from the first origin on that has a week of it before it."""
    week, rng, time, count = example.WEEK, np.random.default_rng(0), example.WEEK + 5, 3
    answers = rng.normal(size=(time, example.HORIZON * 5)).astype(np.float32)
    week_before, truth = rng.normal(size=(2, time - week, example.HORIZON)).astype(np.float32)

    losses = np.empty((time - week, example.HORIZON, 5))
    for i, j in np.ndindex(losses.shape[:2]):
        a = answers[week + i, 5 * j : 5 * j + 5]
        step = [math.log1p(math.exp(x)) for x in a]
        forecasts = [a[2] - step[1] - step[0], a[2] - step[1], a[2]]
        forecasts += [a[2] + step[3], a[2] + step[3] + step[4]]
        for k, quantile in enumerate((0.05, 0.25, 0.5, 0.75, 0.95)):
            missed = truth[i, j] - week_before[i, j] - forecasts[k]
            losses[i, j, k] = quantile * missed if missed > 0 else (quantile - 1) * missed
    by_place = np.stack([losses[place : place + count].mean() for place in range(3)])

    echo = lambda known, state, key: (known, state)  # known are the answers themselves
    data = (jnp.asarray(x) for x in (answers, week_before, truth))
    loss_of = jax.jit(ft.partial(example.loss_fn, week + count, *data, echo, None))
    seen = np.array([float(loss_of(key)[0]) for key in jr.split(jr.key(0), 20)])
    places = np.abs(seen[:, None] - by_place).argmin(1)
    np.testing.assert_allclose(seen, by_place[places], rtol=1e-5)
    assert set(places) == {0, 1, 2}

    # The scores have it from the forecasts themselves.
    forecasts = week_before[..., None] + np.asarray(example.in_order(answers[week:]))
    scored = example.baselines.quantile_loss(forecasts, truth)
    np.testing.assert_allclose(scored, losses.mean(-1), rtol=1e-5)
    assert (np.diff(example.in_order(100 * answers), axis=-1) >= 0).all()


def test_scores_by_hand(example):
    demand = np.arange(400.0) ** 2
    truth = np.array([[1.0, 2.0], [3.0, 5.0]])
    forecasts = truth[..., None] + np.array([-2.0, -1.0, 0.5, 1.0, 2.0])
    forecasts[1, 1] += 1.5  # the truth lies below the inner band, within the outer one
    scored = example.baselines.scores(forecasts, truth, demand, past=300)
    naive = np.mean([demand[t] - demand[t - 168] for t in range(168, 300)])
    assert scored["mae"] == pytest.approx((3 * 0.5 + 2) / 4)
    assert scored["mase"] == pytest.approx((3 * 0.5 + 2) / 4 / naive)
    assert scored["within 50%"] == 0.75
    assert scored["within 90%"] == 1
    np.testing.assert_allclose(scored["mae by hour"], [0.5, 1.25])
    np.testing.assert_allclose(scored["below"], [0, 0.25, 1, 1, 1])


def test_exponential_smoothing_forecasts_as_statsmodels_does(example, hours, origins):
    rolled = example.baselines.exponential_smoothing(hours.demand, PAST, origins)
    options = {"seasonal": "add", "seasonal_periods": 168, "initialization_method": "heuristic"}
    fitted = ETSModel(hours.demand[:PAST], **options).fit(disp=False)
    for i in (0, 50):
        known = ETSModel(hours.demand[: origins[i] + 1], **options).smooth(fitted.params)
        np.testing.assert_allclose(rolled[i, :, 2], known.forecast(24), rtol=1e-9)
    known = ETSModel(pd.Series(hours.demand[:PAST]), **options)  # the intervals want an index
    prediction = known.smooth(fitted.params).get_prediction(PAST, PAST + 23)
    for alpha, low in ((0.1, 0), (0.5, 1)):
        np.testing.assert_allclose(
            rolled[0][:, [low, -1 - low]], prediction.pred_int(alpha), rtol=1e-6
        )


def test_least_squares_finds_a_linear_law(example, hours, origins):
    """Of the value a day before and a feature: then there is nothing left to miss."""
    known = hours.temperature[:, None]
    demand = np.random.default_rng(1).normal(size=len(known))
    for t in range(24, len(demand)):
        demand[t] = 0.7 * demand[t - 24] + 0.3 * known[t - 24, 0]
    forecasts = example.baselines.least_squares(demand, known, PAST, origins)[:, -1]
    np.testing.assert_allclose(forecasts, demand[origins + 24, None] * np.ones(5), rtol=1e-6)


def test_the_worst_day_is_drawn_as_well(example, origins):
    truth = np.zeros((len(origins), 24))
    forecasts = np.abs(np.arange(len(origins)) - 40.0)[:, None, None] * np.ones((24, 5))
    days = example.forecast_figure.days(forecasts, truth, origins)
    assert days == {"an easy day": 48, "a typical one": 24, "the worst": 0}


def test_hours_are_the_means_of_their_halves(example, tmp_path, monkeypatch):
    columns = {
        "Demand": [1.0, 3.0, 5.0, 5.0],
        "WorkDay": [0, 0, 1, 1],
        "Temperature": [20.0, 21.0, 8.0, 6.0],
    }
    pd.DataFrame(columns).to_pickle(tmp_path / "file", compression="xz")
    monkeypatch.setattr(example.series, "packaged", lambda *_: tmp_path / "file")
    np.testing.assert_array_equal(example.load(), [[2.0, 5.0], [20.5, 7.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--steps=50", "--steps must be a multiple of --every, 100; got 50"),
        ("--model=gru", "--model must be one of lru, s5, mamba2; got gru"),
        ("--drop-rate=1", "--drop-rate must be in [0, 1); got 1.0"),
        ("--piece=168", "--piece must be above 168, a week; got 168"),
        ("--every=0", "--every must be above 0; got 0"),
        ("--seeds=1 1", "--seeds must be different from one another; got [1, 1]"),
    ],
)
def test_settings_out_of_range_are_refused(example, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.parse(option.replace("=", " ").split())
    assert rule in capsys.readouterr().err
