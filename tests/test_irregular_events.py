"""The example, run small."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, draw, imported_example

from discretax import Timeseries
from discretax.sequence_mixers import S5SequenceMixer

pytestmark = pytest.mark.slow

TIME, FEATURES = 20, 3
LENGTH = np.array([TIME, 12, 1])


@pytest.fixture(scope="module")
def example():
    with imported_example("irregular_events") as module:
        yield module


def series():
    """Samples that tell their place, 1, 2, ...; NaN in the padding."""
    samples = np.broadcast_to(np.arange(1.0, TIME + 1)[:, None], (3, TIME, FEATURES))
    valid = np.arange(TIME) < LENGTH[:, None]
    values = np.where(valid[..., None], samples, np.nan).astype(np.float32)
    return Timeseries(values, length=LENGTH)


@pytest.mark.parametrize("dropped", [0.0, 0.5, 0.999])
def test_gaps_lead_from_kept_sample_to_kept_sample(example, dropped):
    thinned = example.thin(series(), dropped, np.random.default_rng(0))
    assert (thinned.length >= 1).all()
    for i, length in enumerate(np.asarray(thinned.length)):
        places = np.asarray(thinned.values[i, :length, 0])
        np.testing.assert_array_equal(np.cumsum(thinned.timesteps[i, :length]), places)
        assert not thinned.values[i, length:].any()
        assert places[-1] <= LENGTH[i]
    if dropped == 0:
        np.testing.assert_array_equal(thinned.values, np.nan_to_num(series().values))
        np.testing.assert_array_equal(thinned.length, LENGTH)
        assert (thinned.timesteps == 1).all()


def test_as_many_samples_are_dropped_as_said(example):
    x = Timeseries(np.zeros((100, 1000, 1), np.float32), length=np.full(100, 1000))
    length = np.asarray(example.thin(x, 0.7, np.random.default_rng(0)).length)
    # A hundred thousand throws: the error of their mean is 0.0015.
    np.testing.assert_allclose(length.mean() / 1000, 0.3, atol=0.006)
    np.testing.assert_allclose(length.std(), np.sqrt(1000 * 0.7 * 0.3), rtol=0.3)


def test_what_the_model_is_told(example):
    thinned = example.thin(series(), 0.5, np.random.default_rng(1))
    np.testing.assert_array_equal(example.tell(thinned, "true").timesteps, thinned.timesteps)
    assert example.tell(thinned, "none").timesteps is None
    mean = example.tell(thinned, "mean")
    for i, length in enumerate(np.asarray(thinned.length)):
        last = float(thinned.values[i, length - 1, 0])
        np.testing.assert_allclose(mean.timesteps[i], last / length, rtol=1e-6)
    for gaps in example.GAPS:
        told = example.tell(thinned, gaps)
        np.testing.assert_array_equal(told.values, thinned.values)
        np.testing.assert_array_equal(told.length, thinned.length)


@pytest.mark.parametrize("discretization", ["dirac", "async", "zoh"])
def test_a_gap_stands_for_the_samples_that_were_dropped(example, discretization):
    """Dropped samples that were zero, or, held over the gap by `zoh`, as the next one kept."""
    mixer = S5SequenceMixer(FEATURES, jr.key(0), state_dim=4, discretization=discretization)
    x = Timeseries(draw(1, TIME, FEATURES), length=np.array([TIME]))
    rng = np.random.default_rng(3)
    thinned = example.thin(x, 0.6, rng)
    length = int(thinned.length[0])
    values, gaps = thinned.values[0, :length], thinned.timesteps[0, :length]
    assert 3 < length < TIME and gaps[0] > 1  # the first gap matters, too

    places = np.cumsum(gaps).astype(int) - 1
    filled = np.zeros((places[-1] + 1, FEATURES), np.float32)
    for place, gap, sample in zip(places, gaps.astype(int), np.asarray(values), strict=True):
        held = gap if discretization == "zoh" else 1
        filled[place - held + 1 : place + 1] = sample
    run = eqx.filter_jit(S5SequenceMixer.__call__)
    y, state = run(mixer, values, integration_timesteps=gaps)
    y_filled, state_filled = run(mixer, jnp.asarray(filled))
    assert_close(y, y_filled[places])
    assert_close(state, state_filled)


def rises():
    """Sixteen series that rise slowly or twice as fast."""
    labels, noise = np.arange(16) % 2, np.random.default_rng(0).normal(size=(16, 1))
    values = np.arange(TIME) * (1 + labels)[:, None] / TIME + 0.05 * noise
    values = values[..., None].astype(np.float32)
    return Timeseries(values, length=np.full(16, TIME)), jnp.asarray(labels)


def test_training_learns(example):
    x, labels = rises()
    thinned = example.thin(x, 0.5, np.random.default_rng(0))
    config = example.Config(4, 1, 4, 0.0, epochs=25, batch_size=8, learning_rate=0.1)
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        model, state, losses = example.train("s5", config, 0, thinned, labels)
    assert len(losses) == 25
    assert losses[-1] < 0.3 * losses[0]
    answers = np.asarray(example.predict(model, state, thinned)).argmax(1)
    assert np.mean(answers == np.asarray(labels)) > 0.8  # a guess is right half the time


def test_each_model_is_tested_with_the_gaps_it_was_told(example, monkeypatch, tmp_path, capsys):
    data, calls = rises(), []

    def told(x):
        if x.timesteps is None:
            return "none"
        return "mean" if (x.timesteps == x.timesteps[:, :1]).all() else "true"

    def train(name, config, seed, x, labels):
        return ("whole" if (x.length == TIME).all() else "thinned", told(x)), seed, []

    def predict(model, seed, x):
        """Right about as many series as there were calls before."""
        right = np.arange(16) < len(calls) % 17
        calls.append((*model, seed, told(x), float(x.length.sum()) / (16 * TIME)))
        return np.eye(2)[np.where(right, data[1], 1 - data[1])]

    monkeypatch.setattr(example, "load", lambda dataset, held_out: (data, data))
    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(example, "predict", predict)
    results = example.main(["--dropped=0.6", "--seeds=2", f"--out={tmp_path}"])

    expected_calls = iter(enumerate(calls))
    for seed in (0, 1):
        for on in ("thinned", "whole"):
            for gaps in ("true", "mean", "none"):
                for dropped in (0.0, 0.3, 0.5, 0.6, 0.7, 0.9):
                    i, (*model, model_seed, test_gaps, kept) = next(expected_calls)
                    assert model == [on, "none" if on == "whole" else gaps]
                    assert model_seed == seed
                    # With nothing dropped the true gaps are their mean.
                    assert test_gaps == (gaps if dropped or gaps == "none" else "mean")
                    np.testing.assert_allclose(kept, 1 - dropped, atol=0.1)
                    assert results[on, gaps][dropped][seed] == i % 17 / 16
    assert next(expected_calls, None) is None

    printed = capsys.readouterr().out
    assert example.table(results) in printed
    assert example.gains(results, 0.6) in printed
    assert (tmp_path / "GunPoint_s5.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_are_right_for_given_accuracies(example):
    results = {
        (on, gaps): {0.0: [0.9, 1.0, 0.8], 0.7: [0.5, 0.5, 0.5]}
        for on in example.TRAINED_ON
        for gaps in example.GAPS
    }
    results["whole", "true"][0.7] = [0.4, 0.7, 0.8]
    rows = [" ".join(line.split()) for line in example.table(results).splitlines()]
    assert rows[0] == "trained on gaps 0 % dropped 70 % dropped"
    assert rows[4] == "whole true 90.0 ± 10.0 63.3 ± 20.8"
    assert rows[6] == "whole none 90.0 ± 10.0 50.0 ± 0.0"
    assert len(rows) == 7

    title, *lines = example.gains(results, 0.7).splitlines()
    assert "70 % dropped" in title
    rows = [" ".join(line.split()) for line in lines]
    assert rows[1] == "trained on thinned over none 0.0 ± 0.0 more in 0 of 3 seeds"
    assert rows[3] == "trained on whole over none 13.3 ± 20.8 more in 2 of 3 seeds"


def test_every_model_takes_the_gaps(example):
    """By shapes alone, which compiles nothing."""
    x = example.thin(series(), 0.5, np.random.default_rng(0))
    config = example.Config(4, 1, 4, 0.0, epochs=1, batch_size=1, learning_rate=1e-2)
    for name in example.MODELS:
        model, state = eqx.filter_eval_shape(
            example.make_model, name, config, FEATURES, 2, jr.key(0)
        )
        log_p = eqx.filter_eval_shape(example.predict, model, state, x)
        assert log_p.shape == (3, 2), name


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--seeds=0", "--seeds must be above 0; got 0"),
        ("--epochs=-1", "--epochs must be above 0; got -1"),
        ("--dropped=1", r"--dropped must be in \(0, 1\); got 1\.0"),
        ("--model=lru", r"'lru' \(choose from '?s5'?, '?s4d'?, '?mamba'?\)"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([option, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
