"""The example, run small."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_can_be_trained, imported_example

pytestmark = pytest.mark.slow

SMALL = (
    "--task=parity",
    "--model=gated_delta_net_negative",
    "--train-length=6",
    "--test-length=16",
    "--hidden-dim=8",
    "--num-blocks=1",
    "--steps=200",
    "--every=100",
    "--learning-rate=0.02",
)


@pytest.fixture(scope="module")
def example():
    with imported_example("state_tracking") as module:
        yield module


def test_parity_is_that_of_the_ones_so_far(example):
    x, answers = map(np.asarray, example.make_batch("parity", 9, 300, jr.key(0)))
    assert x.shape == answers.shape == (300, 9)
    for bits, odd in zip(x, answers, strict=True):
        assert [sum(bits[: i + 1]) % 2 for i in range(9)] == odd.tolist()
    # Each bit is as often one as not: five standard deviations.
    np.testing.assert_allclose(x.mean(0), 0.5, atol=5 * 0.5 / 300**0.5)


@pytest.mark.parametrize("length", [8, 9])
def test_arithmetic_is_that_of_python(example, length):
    x, answers = map(np.asarray, example.make_batch("arithmetic", length, 300, jr.key(1)))
    assert x.shape == answers.shape == (300, length)
    written = np.array(list("01234+-*"))[x]
    for symbols, values in zip(written, answers, strict=True):
        for i, value in enumerate(values):
            assert eval("".join(symbols[: i + 1 - i % 2])) % 5 == value
    # Every number and every operator stands where it may, as often as another.
    for places, kinds in ((x[:, ::2], range(5)), (x[:, 1::2] - 5, range(3))):
        p, n = 1 / len(kinds), places.size
        counts = np.bincount(places.ravel(), minlength=len(kinds))
        np.testing.assert_allclose(counts, n * p, atol=5 * (n * p * (1 - p)) ** 0.5)


def test_a_product_ends_where_the_next_sum_begins(example):
    # 3 + 2 * 4 - 1
    plus, minus, times = example.PLUS, example.MINUS, example.TIMES
    operators, numbers = jnp.array([plus, plus, times, minus]), jnp.array([3, 2, 4, 1])
    assert example.values(operators, numbers).tolist() == [3, 0, 1, 0]


def test_a_few_steps_teach_parity(example, tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        results = example.main([*SMALL, f"--out={tmp_path}"])
    result = results["gated_delta_net_negative"]
    (curve,) = result["histories"]
    assert curve.shape == (16,)
    assert curve[:6].mean() > 0.9

    printed = capsys.readouterr().out
    assert "parity after 6 to 16 symbols, trained with 6, 200 steps; a guess: 50%" in printed
    row = re.search(r"^gated_delta_net_negative +(\d+) +(\d+\.\d) % +\d+$", printed, re.MULTILINE)
    assert int(row[1]) == result["parameters"]
    assert float(row[2]) == pytest.approx(100 * curve[5:].mean(), abs=0.051)
    assert [path.name for path in tmp_path.iterdir()] == ["parity.png"]
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_every_step_reads_with_other_noise_on_the_weights(example, monkeypatch):
    model = {"weights": jnp.ones((70, 70)), "scale": jnp.zeros(()), "sizes": jnp.arange(3)}
    read = []

    def remember(model, state, x):
        read.append(jax.tree.map(np.asarray, model))
        return jnp.zeros((*x.shape, 2)), state

    monkeypatch.setattr(example.training, "read", remember)
    for deviation, seed in ((0.0, 1), (0.03, 1), (0.03, 2)):
        config = example.Config(train_length=3, weight_noise=deviation)
        example.loss_fn("parity", config, model, None, jr.key(seed))
    exact, *noisy = read
    assert (exact["weights"] == 1).all() and exact["scale"] == 0
    for one in noisy:
        noise = one["weights"] - 1
        assert abs(noise.mean()) < 5 * 0.03 / noise.size**0.5
        assert noise.std() == pytest.approx(0.03, rel=5 / (2 * noise.size) ** 0.5)
        assert one["scale"] != 0
        np.testing.assert_array_equal(one["sizes"], [0, 1, 2])
    assert not np.isclose(noisy[0]["weights"], noisy[1]["weights"]).all()


def test_every_model_can_be_trained(example):
    config = example.Config(train_length=6, hidden_dim=8, num_blocks=1)
    for name in example.MIXERS:
        make = ft.partial(example.make_model, "arithmetic", name, config)
        loss = ft.partial(example.loss_fn, "arithmetic", config)
        assert_can_be_trained(example.training, config, make, loss)


def test_the_table_of_given_numbers(example):
    def result(*curves):
        return {"parameters": 1234, "histories": list(map(jnp.array, curves)), "cpu_seconds": 29.6}

    config = example.Config(train_length=2, test_length=3)
    one, two = result([1.0, 0.9, 0.8]), result([1.0, 0.4, 0.2], [1.0, 0.4, 0.4])
    assert example.table({"lru": one, "mamba": two}, config) == (
        "model                       parameters       accuracy   CPU, s\n"
        "lru                               1234         85.0 %       30\n"
        "mamba                             1234   35.0 ± 7.1 %       30"
    )


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--model=lstm", r"'lstm' \(choose from '?lru'?, '?mamba'?, .*'?all'?\)"),
        ("--seeds=0", "--seeds must be above 0; got 0"),
        ("--test-length=6", "--test-length must be above --train-length, 6, and at least 8; got 6"),
        ("--every=150", "--steps must be a multiple of 150; got 200"),
        ("--every=0", "--every must be above 0; got 0"),
        ("--weight-noise=-1", "--weight-noise must be at least 0; got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([*SMALL, option, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
