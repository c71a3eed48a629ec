"""The example that exports a model, run small; its file, read where this library is not."""

import dataclasses
import importlib.metadata
import re
import subprocess
import types
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import changed, imported_example
from jax import export

from discretax.models import Backbone
from discretax.sequence_mixers import AttentionSequenceMixer

pytestmark = pytest.mark.slow

ALONE = """
import runpy, sys
packages, *sys.argv = sys.argv[1:]
sys.path.append(packages)
for name in ("discretax", "equinox", "optax"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"found {name}")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def example():
    with imported_example("export_stream") as module:
        yield module


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """JAX and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {".."}:
            (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


@pytest.fixture(scope="module")
def made(example):
    """Model and state, as if trained: nothing is one or zero any more, no statistic that of the start."""
    small = ("--rows", "--hidden-dim=4", "--num-blocks=1", "--epochs=1", "--resolution=14")
    config, *_ = example.train_mnist.parse(small)
    model, state = example.train_mnist.make_model(config, jr.key(0))
    model = changed(model, seed=1)
    mean, var, weight = state.get(model["model"].blocks[0].norm.statistics)
    statistics = (mean + 0.3, var + 2.0, weight + 0.9)
    return config, model, state.set(model["model"].blocks[0].norm.statistics, statistics)


def noise():
    """As many images as there are of digits."""
    pixels = np.random.default_rng(0).integers(256, size=(5000, 784))
    return pixels, np.repeat(np.arange(10), 500)


@pytest.fixture(scope="module")
def run(example, made, packages, tmp_path_factory):
    """What is printed by the process alone, what the script returns, and the folder."""
    (config, model, state), out = made, tmp_path_factory.mktemp("export")
    params = example.eqx.filter(model, example.eqx.is_inexact_array)
    trees = model, state, example.train_mnist.make_optimiser(config).init(params)
    settings, checkpoints = dataclasses.asdict(config), example.train_mnist.checkpoints
    checkpoints.save(out / "trained.eqx", settings, [{"test_accuracy": 0.0}], trees)
    printed = []

    def run_alone(command, check):
        python, *rest = map(str, command)
        alone = [python, "-I", "-S", "-c", ALONE, str(packages), *rest]
        outcome = subprocess.run(alone, check=False, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        printed.append(outcome.stdout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "subprocess", types.SimpleNamespace(run=run_alone))
        patch.setattr(example.train_mnist, "mnist_data", noise)
        patch.setattr(example, "BATCHES", (1,))
        patch.setattr(example, "CHUNKS", (1,))
        told = example.main([f"--checkpoint={out / 'trained.eqx'}", f"--out={out}", "--calls=1"])
    return printed[0], told, out


@pytest.fixture(scope="module")
def step(example, run):
    return example.run_exported.StreamFile(run[-1] / "digits.stablehlo")


def test_where_jax_is_alone_the_answers_are_the_same(run):
    printed, told, out = run
    assert "neither discretax nor equinox" in printed
    error = re.search(r"the recorded ones, to (\S+) of the largest", printed)
    assert error is not None and float(error[1]) <= 1e-6
    assert told["size"] == (out / "digits.stablehlo").stat().st_size > 4000
    assert set(told["latencies"]) == {(1, 1)}
    assert (out / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_the_answers_are_those_of_the_whole_sequence(example, made, run):
    """Which the model reads in parallel."""
    _, model, state = made
    with np.load(run[-1] / "recorded.npz") as recorded:
        x, answers = recorded["samples"], recorded["answers"]
    whole = example.train_mnist.predict(model, state, jnp.asarray(x))
    assert answers.shape == (20, 14, 10)
    assert np.ptp(whole, axis=0).max() > 0.01
    np.testing.assert_allclose(answers[:, -1], whole, atol=1e-5)


def test_streams_start_over_one_by_one(step):
    x = np.random.default_rng(0).normal(size=(2, 1, 14)).astype(np.float32)
    first, state = step(x, step.start(2))
    later, _ = step(x, state)
    assert np.abs(later - first).min(axis=-1).max() > 1e-3
    again, _ = step(x, step.restarted(state, 1))
    np.testing.assert_array_equal(again, [later[0], first[1]])
    for streams in ([1], [-1], [False, True]):
        same, _ = step(x, step.restarted(state, streams))
        np.testing.assert_array_equal(same, again)
    for streams, error in (
        (2, IndexError),
        (-3, IndexError),
        ([True], IndexError),
        (0.5, TypeError),
    ):
        with pytest.raises(error, match="`streams` must be"):
            step.restarted(state, streams)
    with pytest.raises(ValueError, match="The state of another model"):
        step.restarted({"model 0": state}, 0)


def test_caches_that_grow(example, tmp_path):
    mixer = partial(AttentionSequenceMixer, num_heads=2)
    model, state = eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=4, num_blocks=1, sequence_mixer=mixer, norm="layer"
    )
    x = jr.normal(jr.key(1), (5, 4))
    with pytest.raises(ValueError, match=r"keeps every sample of a stream.*`exported"):
        example.exported(model, state, x[0])
    with pytest.raises(ValueError, match=r"`max_seqlen` must be .*; got 0"):
        example.exported(model, state, x[0], 0)
    (tmp_path / "file").write_bytes(example.exported(model, state, x[0], 5).serialize())
    step = example.run_exported.StreamFile(tmp_path / "file")
    answers, _ = step(x[None], step.start())
    whole, _ = eqx.nn.inference_mode(model)(x, state)
    np.testing.assert_allclose(answers[0], whole, atol=1e-5)


def test_what_does_not_fit_is_refused(step):
    state = step.start(2)
    (name,) = state
    x = np.zeros((2, 1, 14), np.float32)
    other = {"model 0": state[name]}
    for samples, wrong, says in (
        (x, other, rf"\['{name}'\].* got that of \['model 0'\]\. The state of another model"),
        (x, state[name], r"from `start` or from the last call; got list"),
        (x, {name: state[name][:-1]}, r"arrays of the shapes .* for each stream; got "),
        (x[0, 0], state, r"\(batch, time, 14\) in float32; got float32\(14,\)\. .*\[None, None\]"),
        (x[:, :, 1:], state, r"\(batch, time, 14\) in float32; got float32\(2, 1, 13\)"),
        (x.astype(int), state, r"\(batch, time, 14\) in float32; got int32\(2, 1, 14\)"),
        (x[:, :0], state, r"each of the 2 streams.*; got \(2, 0, 14\)"),
        (x[:1], state, r"each of the 2 streams.*; got \(1, 1, 14\)\..*`start\(batch_size\)`"),
    ):
        with pytest.raises(ValueError, match=says):
            step(samples, wrong)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        step.start(0)


def test_files_that_cannot_run_are_refused(example, step, tmp_path, capsys):
    def opened(data):
        file = tmp_path / "file"
        file.write_bytes(data)
        return example.run_exported.StreamFile(file)

    whole = bytes(step.exported.serialize())
    assert opened(whole).name == step.name
    later = re.sub(rb"dot_general_v\d", b"dot_general_v9", whole)
    strange = dataclasses.replace(step.exported, calling_convention_version=99).serialize()
    sine = export.export(jax.jit(jnp.sin))(jnp.zeros(3)).serialize()
    for data, says in (
        (later, rf"cannot be run by jax {jax.__version__}: .*export the saved model again"),
        (strange, r"cannot be run by jax .* calling convention is 99, .*export the saved"),
        (whole[: len(whole) // 2], "cannot be run by jax|no StableHLO"),
        (sine, r"must hold a function `\(samples, {name: state}\)`.*; got `sin`"),
        (b"StableHLO", "found no StableHLO in it"),
    ):
        with pytest.raises(ValueError, match=says):
            opened(data)
    with pytest.raises(SystemExit, match=r"found no file at .*nowhere\. `python"):
        example.run_exported.main([str(tmp_path / "nowhere")])
    for options, says in (
        (["--checkpoint=nowhere", "--seed=0"], "--seed must be left out beside --checkpoint"),
        (["--calls=0"], "--calls must be above 0; got 0"),
    ):
        with pytest.raises(SystemExit):
            example.main(options)
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--checkpoint must be a file .* got nowhere"):
        example.main(["--checkpoint=nowhere"])


def test_other_weights_bear_another_name(example, made, step):
    _, model, state = made
    assert example.name_of(model, state) == step.name
    assert example.name_of(changed(model, seed=2), state) != step.name


def test_other_answers_are_told(example, run, tmp_path):
    with np.load(run[-1] / "recorded.npz") as recorded:
        np.savez(
            tmp_path / "other", samples=recorded["samples"], answers=np.nan * recorded["answers"]
        )
    options = [str(run[-1] / "digits.stablehlo"), f"--recorded={tmp_path / 'other.npz'}"]
    with pytest.raises(SystemExit, match="more than rounding"):
        example.run_exported.main(options)
