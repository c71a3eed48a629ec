"""xLSTM in Hugging Face's layout: what is its own, and what is refused."""

import json
import shutil

import equinox as eqx
import jax
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, assert_equal
from safetensors.numpy import load_file, save_file

from discretax.pretrained import load, save

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(tmp_path):
    """`change(name, **entries)`: a copy of a checkpoint with other entries, or without them (None)."""

    def change(name, **entries):
        copy = shutil.copytree(FOLDER / "hf" / name, tmp_path / name)
        config = json.loads((copy / CONFIG).read_text()) | entries
        config = {key: value for key, value in config.items() if value is not None}
        (copy / CONFIG).write_text(json.dumps(config))
        return copy

    return change


def test_xlstm_with_biases_in_joined_tensors(tmp_path):
    """`weight_mode` "fused"; it is saved as the other one, with the same numbers."""
    with jax.enable_x64(True):
        golden = Golden("hf/xlstm_fused/golden", "float64")
        model, state = load(FOLDER / "hf" / "xlstm_fused", dtype="float64")
        run = eqx.filter_jit(jax.vmap(lambda ids: model(ids, state)[0]))
        assert_close(run(golden["input_ids"].astype(int)), golden["logits"], 1e-9)
        save(model, tmp_path)
        assert "backbone.blocks.0.mlstm_layer.q.bias" in load_file(tmp_path / WEIGHTS)
        assert_equal(load(tmp_path)[0], model)


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        (
            "xlstm",
            {"weight_mode": "split"},
            "'weight_mode' must be 'single' or 'fused'; got 'split'",
        ),
        (
            "xlstm",
            {"weight_mode": "fused"},
            "has 'weight_mode': 'fused', .*'qkv_opreact.weight' must be .*; got none",
        ),
        ("xlstm", {"head_dim": 4}, "'head_dim' must be 8; got 4. Nothing else is supported"),
        ("xlstm", {"embedding_dim": 8}, "'embedding_dim' must be 16; got 8"),
        ("xlstm", {"num_blocks": 4}, "'num_blocks' must be 3; got 4"),
        ("xlstm", {"eps": 1e-5}, "'eps' must be 1e-06; got 1e-05"),
        ("xlstm", {"cell_norm_eps": 1e-5}, "'cell_norm_eps' must be 1e-06; got 1e-05"),
        ("xlstm", {"add_out_norm": False}, "'add_out_norm' must be True; got False"),
        (
            "xlstm",
            {"use_bias": True},
            "'use_bias' must be False, as there is no tensor 'out_proj.bi",
        ),
    ],
)
def test_what_is_refused(name, entries, message, folder):
    with pytest.raises(ValueError, match=message):
        load(folder(name, **entries))


def test_heads_that_do_not_divide_the_width(folder):
    """Where the tensors have as many heads."""
    copy = folder("xlstm", num_heads=3)
    arrays = load_file(copy / WEIGHTS)
    gates = [name for name in arrays if "igate_preact" in name or "fgate_preact" in name]
    save_file(arrays | {name: arrays[name][[0, 1, 1]] for name in gates}, copy / WEIGHTS)
    with pytest.raises(
        ValueError, match="'qk_dim_factor' must be a factor by which num_heads=3 di"
    ):
        load(copy)
