"""The example, run small."""

import functools as ft
import math
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_can_be_trained, imported_example

pytestmark = pytest.mark.slow

SMALL = (
    "--model=rglru",
    "--length=6",
    "--num-tokens=2",
    "--vocabulary=5",
    "--hidden-dim=8",
    "--num-blocks=1",
    "--steps=120",
    "--every=40",
    "--learning-rate=0.02",
)


@pytest.fixture(scope="module")
def example():
    with imported_example("selective_copying") as module:
        yield module


def test_sequences_hold_data_tokens_in_order_among_noise(example):
    config = example.Config(length=12, num_tokens=3, vocabulary=7)
    x, tokens = map(np.asarray, example.make_batch(config, jr.key(0), 2000))
    assert x.shape == (2000, 15) and tokens.shape == (2000, 3)
    body, markers = x[:, :12], x[:, 12:]
    assert (markers == 6).all()
    # Three places hold data: as many as there are tokens, so no two share one.
    assert ((body != example.NOISE).sum(1) == 3).all()
    np.testing.assert_array_equal(body[body != example.NOISE].reshape(-1, 3), tokens)

    # Every place and every token is as likely as another: five standard deviations.
    for counts, p in (
        ((body != example.NOISE).sum(0), 3 / 12),
        (np.bincount(tokens[:, 0], minlength=7)[1:6], 1 / 5),
        (np.bincount(tokens[:, 2], minlength=7)[1:6], 1 / 5),
    ):
        np.testing.assert_allclose(counts, 2000 * p, atol=5 * math.sqrt(2000 * p * (1 - p)))
    assert set(tokens.ravel()) == {1, 2, 3, 4, 5}
    again, _ = example.make_batch(config, jr.key(1), 2000)
    assert (again[:, :12] != body).any(axis=1).mean() > 0.99


def test_a_full_sequence_is_plain_copying(example):
    config = example.Config(length=4, num_tokens=4, vocabulary=9)
    x, tokens = example.make_batch(config, jr.key(2), 10)
    np.testing.assert_array_equal(x[:, :4], tokens)


def test_what_counts_is_written_at_the_markers(example):
    table = jr.normal(jr.key(0), (9, 5))  # log-probabilities after every token read

    def model(x, state):
        return table[x], state + 1

    x = jnp.array([[0, 3, 0, 8, 8], [7, 0, 1, 4, 8]])
    log_p, state = example.written(model, jnp.zeros(()), x, 2)
    np.testing.assert_array_equal(log_p, table[jnp.array([[8, 8], [4, 8]])])
    assert state == 1


def test_loss_and_accuracies_of_known_answers(example):
    p = np.full((2, 3, 4), 0.1)
    for (i, j), k in {(0, 0): 1, (0, 1): 2, (0, 2): 3, (1, 0): 1, (1, 1): 0, (1, 2): 1}.items():
        p[i, j, k] = 0.7
    tokens = jnp.array([[1, 2, 3], [1, 2, 2]])  # four of six, one sequence of two
    log_p = jnp.log(p.astype(np.float32))
    np.testing.assert_allclose(example.accuracies(log_p, tokens), (4 / 6, 1 / 2), rtol=1e-6)
    expected = -(4 * math.log(0.7) + 2 * math.log(0.1)) / 6
    np.testing.assert_allclose(example.loss_of(log_p, tokens), expected, rtol=1e-6)


def test_a_few_steps_teach_something(example, tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        results = example.main([*SMALL, f"--out={tmp_path}"])
    (history,) = results["rglru"]["histories"]
    assert len(history) == 3
    losses = [row["loss"] for row in history]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.9 * math.log(3)  # a guess among three data tokens
    assert history[-1]["tokens"] > 0.5
    assert all(0 <= row["sequences"] <= row["tokens"] <= 1 for row in history)

    printed = capsys.readouterr().out
    assert "2 tokens among 6, after 120 steps; a guess: 33.3% of the tokens" in printed
    row = re.search(r"^rglru +(\d+) +(\d+\.\d) % +(\d+\.\d) % +\d+$", printed, re.MULTILINE)
    assert int(row[1]) == results["rglru"]["parameters"]
    assert float(row[2]) == pytest.approx(100 * history[-1]["tokens"], abs=0.051)
    assert float(row[3]) == pytest.approx(100 * history[-1]["sequences"], abs=0.051)
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_every_model_can_be_trained(example):
    config = example.Config(length=6, num_tokens=2, hidden_dim=8, num_blocks=1)
    assert set(example.COMPARED) <= set(example.MODELS)
    for name in example.MODELS:
        make, loss = (
            ft.partial(example.make_model, name, config),
            ft.partial(example.loss_fn, config),
        )
        assert_can_be_trained(example.training, config, make, loss)


def test_the_table_of_given_numbers(example):
    def result(*pairs):
        ends = [[{"tokens": 0.0}, {"tokens": t, "sequences": s}] for t, s in pairs]
        return {"parameters": 1234, "histories": ends, "seconds": 59.6}

    assert example.table({"s5": result((0.305, 0.0)), "mamba": result((0.98, 0.9), (1, 0.8))}) == (
        "model  parameters         tokens      sequences  seconds\n"
        "s5           1234         30.5 %          0.0 %       60\n"
        "mamba        1234   99.0 ± 1.4 %   85.0 ± 7.1 %       60"
    )


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--model=lstm", r"'lstm' \(choose from '?lru'?, '?s5'?, .*'?all'?\)"),
        ("--seeds=0", "--seeds must be above 0; got 0"),
        ("--num-tokens=7", "--num-tokens must be at most --length, 6; got 7"),
        ("--vocabulary=2", "--vocabulary must be at least 3: noise, marker and data; got 2"),
        ("--every=50", "--steps must be a multiple of 50; got 120"),
        ("--every=0", "--every must be above 0; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([*SMALL, option, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
