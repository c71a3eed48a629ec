"""The example, run small."""

import functools as ft
import json

import jax
import numpy as np
import pytest
from helpers import imported_example, interrupted_at_the_first

pytestmark = pytest.mark.slow

SMALL = ("--train-size=40", "--batch-size=10", "--hidden-dim=4", "--num-blocks=1", "--epochs=2")


@pytest.fixture(scope="module")
def example():
    with imported_example("train_mnist") as module:
        module.mnist_data = ft.cache(module.mnist_data)  # the same in each run; takes seconds
        yield module


@pytest.fixture(scope="module")
def run(example):
    def run(out, *options):
        with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
            return example.main([*SMALL, *options, f"--out={out}"])

    return run


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return out, run(out)


def test_trains_and_writes_checkpoint_and_figures(unbroken):
    out, result = unbroken
    for figure in ("stream.png", "training.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    header = json.loads((out / "checkpoint.eqx").read_bytes().split(b"\n", 1)[0])
    assert sorted(header) == ["config", "history"]
    assert header["config"]["hidden_dim"] == 4
    assert header["history"] == result["history"]
    assert len(result["history"]) == 2
    assert result["accuracy"] == result["history"][-1]["test_accuracy"]
    assert all(0 < row["train_loss"] < 10 for row in result["history"])
    written = sorted(path.name for path in out.iterdir())
    assert written == ["checkpoint.eqx", "stream.png", "training.png"]


def test_streamed_answer_equals_the_parallel_one(unbroken):
    _, result = unbroken
    assert result["stream_error"] < 1e-5


def test_interrupted_and_resumed_equals_unbroken(example, run, unbroken, tmp_path):
    with interrupted_at_the_first(example.checkpoints):
        run(tmp_path)
    first_epoch = (tmp_path / "checkpoint.eqx").read_bytes()
    assert len(json.loads(first_epoch.split(b"\n", 1)[0])["history"]) == 1
    assert not (tmp_path / "stream.png").exists()

    resumed = run(tmp_path, "--resume")
    out, result = unbroken
    assert resumed["history"] == result["history"]
    # Header, model, state and optimiser state, bit for bit. With them all the seed did its work:
    # the first epoch was trained twice.
    last_epoch = (tmp_path / "checkpoint.eqx").read_bytes()
    assert last_epoch == (out / "checkpoint.eqx").read_bytes()
    assert last_epoch != first_epoch


def test_resume_refuses_other_settings(run, unbroken):
    out, _ = unbroken
    before = (out / "checkpoint.eqx").read_bytes()
    with pytest.raises(SystemExit) as error:
        run(out, "--resume", "--learning-rate=0.5", "--seed=3")
    message = str(error.value)
    assert str(out / "checkpoint.eqx") in message
    assert "learning_rate=0.5 for learning_rate=0.005, seed=3 for seed=0" in message
    assert "leave --resume out" in message
    assert (out / "checkpoint.eqx").read_bytes() == before


def test_resume_refuses_a_missing_checkpoint(run, tmp_path):
    with pytest.raises(SystemExit, match=r"found none at .*checkpoint\.eqx\. Leave --resume out"):
        run(tmp_path / "nowhere", "--resume")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--epochs=0", "--epochs must be at least 1; got 0"),
        ("--train-size=45", "--train-size must be a multiple of 10 up to 4000; got 45"),
        ("--batch-size=41", "--batch-size must be between 1 and --train-size, 40; got 41"),
        ("--learning-rate=-1", "--learning-rate must be above 0; got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(run, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        run(tmp_path, option)
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("train_size", [40, 4000])
def test_split_is_stratified_and_disjoint(example, train_size):
    _, labels = example.mnist_data()
    train, test = example.split(labels, train_size)
    assert np.bincount(labels[train]).tolist() == [train_size // 10] * 10
    assert np.bincount(labels[test]).tolist() == [100] * 10
    assert len({*train, *test}) == train_size + 1000
    np.testing.assert_array_equal(test, example.split(labels, 4000)[1])


def test_mean_pool(example):
    images = np.random.default_rng(0).uniform(size=(3, 6, 8))
    pooled = example.mean_pool(images, 2)
    assert pooled.shape == (3, 3, 4)
    for n, i, j in np.ndindex(pooled.shape):
        corners = [images[n, 2 * i + di, 2 * j + dj] for di in (0, 1) for dj in (0, 1)]
        np.testing.assert_allclose(pooled[n, i, j], sum(corners) / 4, rtol=1e-12)


@pytest.mark.parametrize(
    "options, shape",
    [((), (2, 196, 1)), (("--resolution=28",), (2, 784, 1)), (("--rows",), (2, 28, 28))],
)
def test_sequences_read_the_image_row_by_row(example, options, shape):
    config, *_ = example.parse([*options])
    images = np.arange(2 * config.resolution**2, dtype=np.float32)
    images = images.reshape(2, config.resolution, config.resolution)
    x = example.to_sequences(images, config)
    assert x.shape == shape
    np.testing.assert_array_equal(x.ravel(), np.arange(x.size))
