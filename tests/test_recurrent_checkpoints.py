"""xLSTM and RWKV-7 in files: what is their own, and what is refused."""

import json
import shutil

import equinox as eqx
import jax
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, assert_equal
from safetensors.numpy import load_file, save_file

from discretax.pretrained import load, save

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def folder(tmp_path):
    """`change(name, **entries)`: a copy of a checkpoint with other entries."""

    def change(name, **entries):
        copy = shutil.copytree(FOLDER / "hf" / name, tmp_path / name)
        text = json.dumps(json.loads((copy / CONFIG).read_text()) | entries)
        (copy / CONFIG).write_text(text)
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


def test_older_files_of_rwkv7(folder):
    """They have the six weights of the sample before in one tensor."""
    copy = folder("rwkv7", num_heads=32)  # as published ones say of every size
    arrays = load_file(copy / WEIGHTS)
    for i in range(3):
        at = f"model.layers.{i}.attn.x_"
        six = [arrays.pop(f"{at}{letter}").reshape(-1) for letter in "rwkvag"]
        arrays[f"{at}x"] = np.stack(six)
    save_file(arrays, copy / WEIGHTS)
    assert_equal(load(copy)[0], load(FOLDER / "hf" / "rwkv7")[0])


def test_rwkv7_by_its_authors_names(tmp_path):
    """The numbers of the author's code, and the way back; gradients are those of `rwkv7`."""
    with jax.enable_x64(True):
        golden = Golden("hf/rwkv7_native/golden", "float64")
        model, state = load(FOLDER / "hf" / "rwkv7_native", dtype="float64")
        run = eqx.filter_jit(jax.vmap(lambda ids: model(ids, state)[0]))
        assert_close(run(golden["input_ids_L37"].astype(int)), golden["logits_L37"], 1e-9)
    model, _ = load(FOLDER / "hf" / "rwkv7_native")
    save(model, tmp_path, layout="rwkv_lm")
    original, saved = (load_file(at / WEIGHTS) for at in (FOLDER / "hf" / "rwkv7_native", tmp_path))
    assert original.keys() == saved.keys()
    for name, array in original.items():
        assert (saved[name].dtype, saved[name].shape) == (array.dtype, array.shape)
        assert saved[name].tobytes() == array.tobytes()
    assert_equal(load(tmp_path)[0], model)


def test_rwkv7_without_a_configuration(tmp_path):
    """As its authors' files are once they are safetensors; another head than of 64 is theirs alone."""
    copy = shutil.copytree(FOLDER / "hf" / "rwkv7_native", tmp_path / "copy")
    model, _ = load(copy)
    arrays = load_file(copy / WEIGHTS)
    unused = {f"blocks.0.att.v{i}": arrays[f"blocks.1.att.v{i}"] for i in range(3)}
    save_file(arrays | unused, copy / WEIGHTS)
    (copy / CONFIG).unlink()
    assert_equal(load(copy)[0], model)
    with pytest.raises(ValueError, match=r"norm_eps: 0.00064, where .*\n.*layout='rwkv_lm'` may"):
        save(model, tmp_path / "saved")
    save_file(arrays | {"blocks.1.ffn.s_emb.weight": arrays["emb.weight"]}, copy / WEIGHTS)
    with pytest.raises(ValueError, match=r"those of a RWKV-7 .*\nleft over: blocks.1.ffn.s_emb"):
        load(copy)
    (copy / WEIGHTS).rename(copy / "RWKV-x070.pth")
    with pytest.raises(FileNotFoundError, match=r"a .pth or .*, are not opened.*RWKV's.*save_file"):
        load(copy)


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


@pytest.mark.parametrize("name", ["rwkv7", "rwkv7_native"])
def test_heads_of_rwkv7_that_do_not_fit(name, folder):
    copy = folder(name, **{"head_dim" if name == "rwkv7" else "head_size": 6})
    arrays = load_file(copy / WEIGHTS)
    save_file({k: v[:, :6] if k.endswith(".r_k") else v for k, v in arrays.items()}, copy / WEIGHTS)
    with pytest.raises(ValueError, match="must be a divisor of the width 16; got 6"):
        load(copy)
