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
    "--model=gla",
    "--num-pairs=2",
    "--num-keys=3",
    "--num-values=3",
    "--hidden-dim=16",
    "--num-blocks=1",
    "--steps=200",
    "--every=100",
    "--learning-rate=0.02",
)


@pytest.fixture(scope="module")
def example():
    with imported_example("associative_recall") as module:
        yield module


def test_every_key_is_asked_for_once_and_its_value_is_the_answer(example):
    config = example.Config(num_pairs=4, num_keys=6, num_values=5)
    pairs = np.arange(2000) % 4 + 1
    x, answers = example.make_batch(config, jr.key(0), jnp.array(pairs))
    np.testing.assert_array_equal(x.length, 3 * pairs)
    values = np.asarray(x.values)
    assert values.shape == answers.shape == (2000, 12)
    orders = []
    for row, answer, n in zip(values, np.asarray(answers), pairs, strict=True):
        keys, told, asked = row[: 2 * n : 2], row[1 : 2 * n : 2] - 6, row[2 * n : 3 * n]
        assert len(set(keys)) == n and set(keys) <= set(range(6)) and set(told) <= set(range(5))
        beside = dict(zip(keys, told, strict=True))
        assert sorted(asked) == sorted(keys)
        assert answer[2 * n : 3 * n].tolist() == [beside[key] for key in asked]
        assert (np.delete(answer, np.s_[2 * n : 3 * n]) == example.training.UNASKED).all()
        if n == 4:
            orders.append([keys.tolist().index(key) for key in asked])
    # Every key, value and place of the first question as often as another: five deviations.
    whole = values[pairs == 4]
    for drawn, kinds in (
        (whole[:, 0], 6),
        (whole[:, 1] - 6, 5),
        (np.array(orders)[:, 0], 4),
    ):
        n, p = len(drawn), 1 / kinds
        counts = np.bincount(drawn, minlength=kinds)
        np.testing.assert_allclose(counts, n * p, atol=5 * math.sqrt(n * p * (1 - p)))


def test_only_answers_that_are_asked_for_count(example):
    p = np.full((1, 4, 3), 0.2, np.float32)
    for i, k in enumerate((0, 1, 2, 2)):
        p[0, i, k] = 0.6
    answers = jnp.array([[-1, 1, -1, 0]])
    loss = example.training.loss_of(jnp.log(p), answers)
    np.testing.assert_allclose(loss, -(math.log(0.6) + math.log(0.2)) / 2, rtol=1e-6)


def test_accuracy_is_over_the_answers_alone(example):
    config = example.Config(num_pairs=2, num_keys=3, num_values=3)

    def model(x, state):  # always says the value that stood beside the first key
        return jax.nn.one_hot(jnp.full(len(x.values), x.values[1] - 3), 3), state

    of = ft.partial(example.accuracy, model, None, config)
    assert of(jnp.array(1), jr.key(0)) == 1
    # The other value is the same in one of three.
    np.testing.assert_allclose(of(jnp.array(2), jr.key(0)), (1 + 1 / 3) / 2, atol=0.1)


def test_recurrent_states_are_of_one_size(example):
    config = example.Config(num_pairs=4, hidden_dim=8, key_dim=5, num_blocks=3)
    sizes = {name: example.state_size(name, config) for name in example.MIXERS}
    assert sizes.pop("attention") == 3 * 2 * 8 * 12  # keys and values of 12 tokens
    assert set(sizes.values()) == {3 * 5 * 8}


def test_a_few_steps_teach_something(example, tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        results = example.main([*SMALL, f"--out={tmp_path}"])
    (history,) = results["gla"]["histories"]
    assert [set(row) for row in history] == [{"loss", "2"}] * 2
    assert history[1]["loss"] < history[0]["loss"]
    assert history[1]["2"] > 0.7  # a guess among the two values that were read has 2/3

    printed = capsys.readouterr().out
    assert "values told right, by the number of pairs, after 200 steps" in printed
    row = re.search(r"^gla +(\d+) +(\d+) +(\d+\.\d) +\d+$", printed, re.MULTILINE)
    assert int(row[1]) == results["gla"]["parameters"]
    assert int(row[2]) == 8 * 16
    assert float(row[3]) == pytest.approx(100 * history[1]["2"], abs=0.051)
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_every_model_can_be_trained(example):
    config = example.Config(num_pairs=2, hidden_dim=8, num_blocks=1)
    for name in example.MIXERS:
        make, loss = (
            ft.partial(example.make_model, name, config),
            ft.partial(example.loss_fn, config),
        )
        assert_can_be_trained(example.training, config, make, loss)


def test_the_table_of_given_numbers(example):
    def result(*ends):
        histories = [[{}, {"2": two, "4": four}] for two, four in ends]
        return {"parameters": 1234, "histories": histories, "cpu_seconds": 59.6}

    config = example.Config(num_pairs=4)
    results = {"gla": result((1.0, 0.305)), "mamba": result((0.98, 0.9), (1.0, 0.8))}
    assert example.table(results, config) == (
        "model                 parameters  state   2 pairs, %   4 pairs, %   CPU, s\n"
        "gla                         1234   1024        100.0         30.5       60\n"
        "mamba                       1234   1024   99.0 ± 1.4   85.0 ± 7.1       60"
    )


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--model=lstm", r"'lstm' \(choose from '?mamba'?, '?mamba2'?, .*'?all'?\)"),
        ("--seeds=0", "--seeds must be above 0; got 0"),
        ("--num-pairs=4", "--num-pairs must be at least 2 and at most --num-keys, 3; got 4"),
        ("--hidden-dim=6", "--hidden-dim must be a multiple of 4: .*; got 6"),
        ("--every=150", "--steps must be a multiple of 150; got 200"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([*SMALL, option, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
