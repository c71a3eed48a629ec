"""The layout of mamba_ssm, beside its golden numbers: its options, and what is refused."""

import functools as ft
import json
import shutil

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from golden_file import FOLDER
from helpers import assert_equal, changed
from safetensors.numpy import load_file, save_file

from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.pretrained import load, save
from discretax.sequence_mixers import Mamba2SequenceMixer, MambaSequenceMixer

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def entries_of(folder):
    return json.loads((folder / CONFIG).read_text())


def build(mixer, **options):
    norm = ft.partial(eqx.nn.RMSNorm, eps=1e-5, use_bias=False)
    sizes = {"vocab_size": 7, "hidden_dim": 8, "num_blocks": 2, "pattern": (mixer,), "norm": norm}
    return LanguageModel(jr.key(0), **(sizes | options))


@pytest.mark.parametrize(
    ("mixer", "options", "ssm_cfg"),
    [
        (MambaSequenceMixer, {}, {}),
        (
            ft.partial(
                MambaSequenceMixer,
                state_dim=3,
                conv_width=2,
                expand=3,
                dt_rank=2,
                conv_bias=False,
                use_bias=True,
            ),
            {
                "channel_mixer": ft.partial(SwiGLU, intermediate_dim=128),
                "norm": ft.partial(eqx.nn.LayerNorm, eps=1e-5),
                "tie_embeddings": False,
            },
            {
                "d_state": 3,
                "d_conv": 2,
                "expand": 3,
                "dt_rank": 2,
                "conv_bias": False,
                "bias": True,
            },
        ),
        (
            ft.partial(Mamba2SequenceMixer, head_dim=8),
            {},
            {"layer": "Mamba2", "headdim": 8},
        ),
        (
            ft.partial(
                Mamba2SequenceMixer,
                state_dim=3,
                head_dim=4,
                num_groups=2,
                gate_norm="before",
                dt_limit=(0.01, 2.0),
            ),
            {},
            {
                "layer": "Mamba2",
                "d_state": 3,
                "headdim": 4,
                "ngroups": 2,
                "norm_before_gate": True,
                "dt_limit": [0.01, 2.0],
            },
        ),
        (
            ft.partial(
                Mamba2SequenceMixer,
                state_dim=3,
                head_dim=4,
                ssm_dim=8,
                D_has_hdim=True,
                learnable_init_states=True,
                gate_norm=None,
            ),
            {},
            {
                "layer": "Mamba2",
                "d_state": 3,
                "headdim": 4,
                "d_ssm": 8,
                "D_has_hdim": True,
                "learnable_init_states": True,
                "rmsnorm": False,
            },
        ),
    ],
)
def test_options(mixer, options, ssm_cfg, tmp_path):
    """They are written by the package's names, if they are not its defaults, and read again."""
    model = changed(build(mixer, **options), dtype="float32")
    save(model, tmp_path, layout="mamba_ssm")
    entries = entries_of(tmp_path)
    assert entries["ssm_cfg"] == ssm_cfg and "model_type" not in entries
    loaded, _ = load(tmp_path)
    assert_equal(loaded, model)
    if "d_ssm" in ssm_cfg:
        shapes = {name: array.shape for name, array in load_file(tmp_path / WEIGHTS).items()}
        assert shapes["backbone.layers.1.mixer.D"] == (8,)
        assert shapes["backbone.layers.1.mixer.init_states"] == (2, 4, 3)
        with pytest.raises(ValueError, match=r"is of none.*\n`layout='mamba_ssm'` may hold it"):
            save(model, tmp_path / "other")
    changed_entries = {**entries, "ssm_cfg": ssm_cfg | {"dt_min": 0.01}, "attn_cfg": {"a": 1}}
    (tmp_path / CONFIG).write_text(json.dumps(changed_entries))
    assert_equal(load(tmp_path)[0], model)


def test_both_halves_of_the_first_map_of_an_mlp(tmp_path):
    """What is multiplied, then what is the gate."""
    mlp = ft.partial(SwiGLU, intermediate_dim=128)
    model = build(MambaSequenceMixer, channel_mixer=mlp)
    save(model, tmp_path, layout="mamba_ssm")
    stored = load_file(tmp_path / WEIGHTS)
    mlp = model.backbone.blocks[1].channel_mixer
    assert_equal(
        (stored["backbone.layers.1.mlp.fc1.weight"], stored["backbone.layers.1.mlp.fc2.weight"]),
        (jnp.concatenate([mlp.up_proj.weight, mlp.gate_proj.weight]), mlp.down_proj.weight),
    )


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_from_one_layout_to_the_other(name, tmp_path):
    model, _ = load(FOLDER / "hf" / name)
    save(model, tmp_path / "a", layout="mamba_ssm")
    again, _ = load(tmp_path / "a")
    assert_equal(again, model)
    save(again, tmp_path / "b")
    original, saved = (load_file(at / WEIGHTS) for at in (FOLDER / "hf" / name, tmp_path / "b"))
    assert_equal(saved, original)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER / "hf" / "mamba_ssm", tmp_path / "mamba_ssm")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"attn_layer_idx": [1]}, r"'attn_layer_idx' must be \[\]; got \[1\]. Attention is not"),
        ({"vocab_size": 65}, "'vocab_size': 65, 'pad_vocab_size_multiple': 8, so that"),
        (
            {"rms_norm": False},
            "'rms_norm' must be True, as there is no tensor 'backbone.norm_f.bias'",
        ),
        ({"d_intermediate": 100}, "'d_intermediate': 100, so that the tensor 'mlp.fc2.weight'"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg: 'layer' must be 'Mamba1' or 'Mamba2'"),
        ({"ssm_cfg": {"d_state": 8}}, "ssm_cfg has 'd_state': 8, so that .* got"),
        ({"ssm_cfg": {"dt_rank": 2}}, "ssm_cfg has 'dt_rank': 2, so that .* got"),
        ({"ssm_cfg": {"headdim": 8}}, "ssm_cfg has entries that are not known here: headdim=8"),
        (
            {"ssm_cfg": {"layer": "Mamba2", "headdim": 5}},
            "'headdim' must be a divisor of d_ssm = 32",
        ),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 33}}, "'d_ssm' must be at most .* = 32; got 33"),
        (
            {"ssm_cfg": {"layer": "Mamba2", "headdim": 8}},
            "'headdim': 8, 'd_ssm': 32, so that .* size 4",
        ),
        ({"ssm_cfg": []}, r"'ssm_cfg' must be an object; got \[\]"),
        (
            {"model_type": "mamba_ssm"},
            r"'model_type' must be one of mamba, .*; got 'mamba_ssm'",
        ),
    ],
)
def test_what_is_refused(entries, message, folder):
    (folder / CONFIG).write_text(json.dumps(entries_of(folder) | entries))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_how_pickled_weights_are_converted(folder):
    """The file of the package itself, of which safetensors can be made without it."""
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"weights_only=True.*safetensors.torch.save_file"):
        load(folder)


def test_the_repeated_weight_of_the_logits(folder):
    """It may be missing, but not another one."""
    arrays = load_file(folder / WEIGHTS)
    model, _ = load(folder)
    head = arrays.pop("lm_head.weight")
    save_file(arrays, folder / WEIGHTS)
    assert_equal(load(folder)[0], model)
    save_file(arrays | {"lm_head.weight": head + 1}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"ties .* but 'lm_head.weight' differs"):
        load(folder)


def test_the_layout_that_holds_a_model(tmp_path):
    """The error names it; nothing is chosen by what the model is."""
    layer_norm = ft.partial(eqx.nn.LayerNorm, eps=1e-5)
    model = build(MambaSequenceMixer, norm=layer_norm)
    with pytest.raises(
        ValueError, match=r"LayerNorm, is of none.*\n`layout='mamba_ssm'` may hold it"
    ):
        save(model, tmp_path)
    model = build(MambaSequenceMixer, norm="rms")
    with pytest.raises(
        ValueError, match=r"norm.eps: 1e-06.*1e-05\n`layout='huggingface'` may hold"
    ):
        save(model, tmp_path, layout="mamba_ssm")
    with pytest.raises(
        ValueError, match=r"`layout` must be one of 'huggingface', 'mamba_ssm', .*; got 'pt'"
    ):
        save(model, tmp_path, layout="pt")
