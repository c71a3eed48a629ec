"""The example of fine-tuning, run small."""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import imported_example

from discretax import pretrained

pytestmark = pytest.mark.slow

SMALL = ("--length=16", "--steps=12", "--learning-rate=0.05", "--batch-size=2")


@pytest.fixture(scope="module")
def example():
    with imported_example("fine_tune") as module:
        yield module


@pytest.fixture
def folder(example, monkeypatch, tmp_path):
    """A checkpoint of bytes, and a text that is soon learned."""
    monkeypatch.setattr(example.language_model, "distinct_topics", lambda: ["abc" * 20] * 9)
    config = example.language_model.Config(hidden_dim=8, num_blocks=1)
    model, _ = example.language_model.make_model("mamba", config, jr.key(0))
    pretrained.save(model, tmp_path / "model", entries={"bos_token_id": 0})
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        yield


def leaves(folder):
    model, _ = pretrained.load(folder)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array))
    }


def test_a_low_rank_part_is_trained_all_else_stays_and_a_run_goes_on(
    example, folder, tmp_path, capsys, monkeypatch
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = lambda out, *more: example.main([str(folder), *SMALL, "--rank=2", f"--out={out}", *more])
    told = run(whole)
    assert told["after"] < told["before"] - 0.1
    before, after = leaves(folder), leaves(whole / "model")
    changed = [name for name in before if not np.array_equal(after[name], before[name])]
    assert len(changed) > 2 and not any("embedding" in name for name in changed)
    for name in changed:
        rank = np.linalg.matrix_rank(after[name] - before[name], 1e-4)
        assert rank == min(2, *before[name].shape)
    sizes = [sum(before[name].shape) for name in changed]
    assert told["parameters"] == 2 * sum(sizes)
    assert f"rank 2: {2 * sum(sizes)} of " in capsys.readouterr().out

    windows, steps = example.windows, []

    def until_the_power_fails(text, config, step):
        steps.append(step)
        if step == 7 and steps.count(7) == 1:
            raise KeyboardInterrupt
        return windows(text, config, step)

    monkeypatch.setattr(example, "windows", until_the_power_fails)
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    run(broken, "--resume")
    assert steps == [0, *range(8), 0, *range(6, 12)]  # the first to compile with
    for name, leaf in leaves(broken / "model").items():
        np.testing.assert_array_equal(leaf, after[name])
    with pytest.raises(SystemExit, match=r"needs the settings .*rank=3 for rank=2"):
        run(broken, "--resume", "--rank=3")


def test_all_weights(example, folder, tmp_path):
    told = example.main([str(folder), *SMALL, "--rank=0", f"--out={tmp_path / 'out'}"])
    assert told["after"] < told["before"] - 0.5
    before, after = leaves(folder), leaves(tmp_path / "out" / "model")
    assert told["parameters"] == sum(leaf.size for leaf in before.values())
    assert not any(np.array_equal(before[name], after[name]) for name in before)


def test_tokens_need_a_tokenizer(example):
    from golden_file import FOLDER

    with pytest.raises(SystemExit, match=r"must hold tokenizer\.json"):
        example.main([str(FOLDER / "hf" / "mamba2")])
