"""Hybrid models in Hugging Face's layout, and mamba_ssm's: transformers' numbers, and the way back."""

import functools as ft
import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, assert_equal, logits_and_gradients
from safetensors.numpy import load_file, save_file

from discretax import generate, inference_state, streaming_mode
from discretax.pretrained import load, save
from discretax.pretrained._families import FAMILIES
from discretax.pretrained._jamba import rhythm_of
from discretax.sequence_mixers.rotary_scaling import Linear, Llama3, Proportional, Yarn

pytestmark = pytest.mark.slow

NAMES = (
    "mamba_ssm",
    "falcon_h1",
    "granitemoehybrid",
    "bamba",
    "jamba",
    "nemotron_h",
    "lfm2",
    "lfm3",
    "qwen3_5_text",
    "olmo_hybrid",
    "xlstm",
    "rwkv7",
)
every_family = pytest.mark.parametrize("name", NAMES)
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def folder_of(name):
    return FOLDER / "hf" / name


@every_family
def test_double_precision(name):
    """Logits and gradients; the logits again in chunks and single tokens; greedy texts."""
    with jax.enable_x64(True):
        golden = Golden(f"hf/{name}/golden", "float64")
        model, state = load(folder_of(name), dtype="float64")
        tokens = golden["input_ids_L37"].astype(int)
        y, d_model = logits_and_gradients(model, state, tokens, golden["w_L37"])
        assert_close(y, golden["logits_L37"], 1e-9)
        stored = FAMILIES[name].stored(d_model)
        for key, expected in golden.fields("g_L37").items():
            assert_close(stored[key].tensor(), expected, 1e-9)

        live = streaming_mode(eqx.nn.inference_mode(model))
        stream = inference_state(live, state, batch_size=2, max_seqlen=48)
        run = eqx.filter_jit(jax.vmap(live))
        tokens, ys = golden["input_ids_L48"].astype(int), []
        for start, end in ((0, 17), *((t, t + 1) for t in range(17, 31)), (31, 48)):
            y, stream = run(tokens[:, start:end], stream)
            ys.append(y)
        assert_close(jnp.concatenate(ys, axis=1), golden["logits_L48"], 1e-9)

        prompt = golden["gen_prompt"].astype(int)
        expected = golden["gen_ids_nocache"].astype(int)[:, prompt.shape[1] :]
        generated = generate(model, state, prompt, expected.shape[1], temperature=0)
        np.testing.assert_array_equal(generated.tokens, expected)


@every_family
def test_single_precision_and_the_way_back(name, tmp_path):
    with jax.enable_x64(False):
        golden = Golden(f"hf/{name}/golden", "float32")
        model, state = load(folder_of(name))
        tokens = golden["input_ids_L37"].astype(int)
        y = eqx.filter_jit(jax.vmap(lambda ids: model(ids, state)[0]))(tokens)
        assert_close(y, golden["logits_L37"], 1e-4)
        save(model, tmp_path, layout=FAMILIES[name].layout)
        original, saved = (load_file(at / WEIGHTS) for at in (folder_of(name), tmp_path))
        assert original.keys() == saved.keys()
        for key, array in original.items():
            assert (saved[key].dtype, saved[key].shape) == (array.dtype, array.shape)
            assert saved[key].tobytes() == array.tobytes()
        entries = json.loads((folder_of(name) / CONFIG).read_text())
        written = json.loads((tmp_path / CONFIG).read_text())
        if name == "mamba_ssm":  # whose vocabulary is padded already
            entries |= {"vocab_size": 64, "pad_vocab_size_multiple": 1}
        if name == "qwen3_5_text":  # positions of images
            for of_images in ("mrope_interleaved", "mrope_section"):
                del entries["rope_parameters"][of_images]
        if name in (
            "olmo_hybrid",
            "lfm3",
        ):  # which transformers would take for one that is not there
            entries["pad_token_id"] = None
        if name == "lfm2":  # whose width is rounded up, and written as it is
            entries |= {"intermediate_size": 24, "block_auto_adjust_ff_dim": False}
        if name == "xlstm":  # likewise
            entries |= {"ffn_proj_factor": 3.0, "ffn_round_up_to_multiple_of": 1}
        assert {key: entries.get(key, value) for key, value in written.items()} == written
        assert_equal(load(tmp_path)[0], model)


@every_family
def test_transformers_reads_what_is_saved(name, tmp_path):
    """With the numbers of the golden file, which are ours."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers has no {name}")
    save(load(folder_of(name))[0], tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    golden = Golden(f"hf/{name}/golden", "float32")
    tokens = torch.asarray(np.asarray(golden["input_ids_L37"], int))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert_close(logits.numpy(), golden["logits_L37"], 1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_text_sharded"])
def test_the_same_model_in_other_files(name):
    """Beside a tower of images and heads for several tokens, and in shards."""
    assert_equal(load(folder_of(name))[0], load(folder_of("qwen3_5_text"))[0])


def change_tensors(folder, change):
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)


def test_files_with_several_parts(folder):
    """Whatever is of another part is skipped, and nothing else."""
    copy, norm = folder("qwen3_5"), "model.language_model.norm.weight"
    new = np.ones(3, "float32")
    change_tensors(copy, lambda arrays: arrays.update({"model.visual.x": new, "mtp.y": new}))
    assert_equal(load(copy)[0], load(folder_of("qwen3_5"))[0])
    change_tensors(copy, lambda arrays: arrays.update({"model.language_model.x": new}))
    with pytest.raises(ValueError, match=r"\nleft over: model\.language_model\.x$"):
        load(copy)
    change_tensors(copy, lambda arrays: arrays.update({"model.norm.weight": arrays[norm]}))
    with pytest.raises(ValueError, match=rf"'{norm}' and 'model.norm.weight' are one and the same"):
        load(copy)
    change_tensors(
        copy,
        lambda arrays: [arrays.pop(name) for name in list(arrays) if ".language_model." in name],
    )
    with pytest.raises(ValueError, match=r"no tensor whose name begins with 'model\.language_m"):
        load(copy)


def test_other_names_of_the_same_norms(folder):
    """Those of published files in layers of Gated DeltaNet, that of transformers beside attention."""
    copy = folder("olmo_hybrid")

    linear = {"attention_layer_norm": "input_layernorm"}
    linear["feedforward_layer_norm"] = "post_attention_layernorm"

    def rename(arrays):
        for name in list(arrays):
            layer, _, norm = name.removesuffix(".weight").rpartition(".")
            if norm in linear:
                arrays[f"{layer}.{linear[norm]}.weight"] = arrays.pop(name)
            elif norm == "post_attention_layernorm":
                arrays[f"{layer}.feedforward_layer_norm.weight"] = arrays.pop(name)

    change_tensors(copy, rename)
    assert_equal(load(copy)[0], load(folder_of("olmo_hybrid"))[0])


def test_filters_cut_otherwise(folder):
    """As transformers saves them: queries, keys and values in three equal parts."""
    copy = folder("olmo_hybrid")
    names = [f"model.layers.1.linear_attn.{kind}_conv1d.weight" for kind in "qkv"]

    def cut(arrays, ends):
        filters = np.concatenate([arrays[name] for name in names])
        arrays.update(dict(zip(names, np.split(filters, ends), strict=True)))

    change_tensors(copy, ft.partial(cut, ends=(19, 38)))
    assert_equal(load(copy)[0], load(folder_of("olmo_hybrid"))[0])
    change_tensors(copy, ft.partial(cut, ends=(28, 56)))
    with pytest.raises(
        ValueError, match=r"v_conv1d.weight: got shape \(0, 1, 4\), expected \(24, "
    ):
        load(copy)
    change_tensors(copy, lambda arrays: arrays.update({names[0]: arrays[names[0]][1:]}))
    with pytest.raises(
        ValueError, match=r"q_conv1d.weight: got shape \(27, 1, 4\), expected \(16, "
    ):
        load(copy)


def test_one_parameter_of_several_tensors(folder):
    """It is placed by the name of the last, and they must be of one type."""
    copy, name = folder("olmo_hybrid"), "model.layers.1.linear_attn.{}_conv1d.weight"
    asked = []
    load(copy, sharding=lambda name, leaf: asked.append((name, leaf.shape)))
    assert [item for item in asked if "1.linear_attn" in item[0] and "conv1d" in item[0]] == [
        (name.format("v"), (56, 4))
    ]
    half = lambda arrays: arrays.update({(k := name.format("k")): arrays[k].astype("float16")})
    change_tensors(copy, half)
    load(copy, dtype=jnp.float32)
    with pytest.raises(
        ValueError, match=r"1.linear_attn.k_conv1d.weight' are of types float32 and"
    ):
        load(copy)


@pytest.mark.parametrize(
    "entries",
    [{"rope_parameters": {"rope_theta": None}}, {"rope_parameters": None, "rope_theta": None}],
)
def test_a_hybrid_without_positions(entries, folder, tmp_path):
    copy = folder("olmo_hybrid")
    config = json.loads((copy / CONFIG).read_text()) | entries
    config = {key: value for key, value in config.items() if key != "rope_parameters" or value}
    (copy / CONFIG).write_text(json.dumps(config))
    model, _ = load(copy)
    assert model.backbone.blocks[3].sequence_mixer.rotary_dim == 0
    save(model, tmp_path / "saved")
    assert_equal(load(tmp_path / "saved")[0], model)


RHYTHMS = {"ma": (2, 1), "a": (1, 0), "aa": (1, 0), "mam": (3, 1), "amma": (3, 0), "mammam": (3, 1)}
RHYTHMS |= {"mm": (3, 2), "mmaamm": None, "mmama": None, "maa": None}


@pytest.mark.parametrize(("layers", "rhythm"), RHYTHMS.items())
def test_jamba_has_attention_in_a_rhythm(layers, rhythm):
    kinds = [{"m": "mamba", "a": "attention"}[letter] for letter in layers]
    assert rhythm_of(kinds) == rhythm


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
STRETCHED = [
    ({"rope_type": "linear", "factor": 2.0}, Linear(2.0)),
    (LLAMA3, Llama3(8.0, 1.0, 4.0, 64)),
    (YARN, Yarn(4.0, 64)),
    (YARN | {"attention_factor": 1.5, "beta_fast": 16.0}, Yarn(4.0, 64, 16.0, 1.0, 1.5)),
    ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, Proportional(0.5)),
]


@pytest.fixture
def folder(tmp_path):
    """`change(name, **entries)`: a copy of a checkpoint with other entries, or without them (None)."""

    def change(name, **entries):
        copy = shutil.copytree(folder_of(name), tmp_path / name, dirs_exist_ok=True)
        config = json.loads((folder_of(name) / CONFIG).read_text()) | entries
        config = {key: value for key, value in config.items() if value is not None}
        (copy / CONFIG).write_text(json.dumps(config))
        return copy

    return change


@pytest.mark.parametrize(("rope", "scaling"), STRETCHED)
def test_stretched_positions(rope, scaling, folder, tmp_path):
    """As transformers 5 writes them, as 4 did, and the way back."""
    together = folder("falcon_h1", rope_parameters=rope | {"rope_theta": 1e4})
    read = lambda model: model.backbone.blocks[0].sequence_mixer.mixers[1].rotary_scaling
    model, _ = load(together)
    assert read(model) == scaling
    save(model, tmp_path / "saved")
    assert read(load(tmp_path / "saved")[0]) == scaling
    if "partial_rotary_factor" not in rope:
        apart = folder("falcon_h1", rope_parameters=None, rope_scaling=rope, rope_theta=1e4)
        assert read(load(apart)[0]) == scaling


def rope(entries):
    return {"rope_parameters": entries | {"rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("falcon_h1", rope({"rope_type": "dynamic"}), "'rope_type' must be one of default, linear"),
        (
            "falcon_h1",
            rope(LLAMA3 | {"high_freq_factor": 1.0}),
            "'high_freq_factor' must be above low_freq_factor=1.0; got 1.0",
        ),
        (
            "falcon_h1",
            {"rope_parameters": YARN | {"rope_theta": 1.0}},
            "'rope_theta' must be above 1; got 1.0",
        ),
        ("falcon_h1", rope(YARN | {"mscale": 2.0}), "not known here: mscale=2.0"),
        (
            "falcon_h1",
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": YARN | {"mscale": 2.0}},
            "rope_scaling has entries that are not known here: mscale=2.0",
        ),
        (
            "falcon_h1",
            {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": "linear"},
            "'rope_scaling' must be an object; got 'linear'",
        ),
        (
            "falcon_h1",
            {"rope_parameters": None},
            "'rope_parameters' must be an object with rope_theta; got None",
        ),
        (
            "falcon_h1",
            {"ssm_multipliers": [1.0, 2.0]},
            "'ssm_multipliers' must be a list of 5 positive numbers",
        ),
        (
            "granitemoehybrid",
            {"num_local_experts": 8},
            "'num_local_experts' must be 0; got 8. Mixtures of experts are not supported",
        ),
        (
            "granitemoehybrid",
            {"layer_types": ["linear_attention"] * 4},
            "'layer_types' must be as the tensors are, of which none begins with "
            "'model.layers.2.mamba.'",
        ),
        (
            "granitemoehybrid",
            {"position_embedding_type": "alibi"},
            "'position_embedding_type' must be 'rope', 'nope' or null; got 'alibi'",
        ),
        (
            "bamba",
            {"attn_layer_indices": [7]},
            r"'attn_layer_indices' must be a list of layers, 0 to 2; got \[7\]",
        ),
        (
            "jamba",
            {"num_experts": 16},
            "'num_experts' must be 1; got 16. Mixtures of experts are not supported",
        ),
        (
            "jamba",
            {"num_experts": None},
            "'num_experts' must be 1; got 16",
        ),
        (
            "jamba",
            {"attn_layer_offset": 4},
            "'attn_layer_offset' must be a whole number from 0, below attn_layer_period=4; got 4",
        ),
        (
            "jamba",
            {"attn_layer_offset": 3},
            "'attn_layer_offset' must be as the tensors .* with 'model.layers.2.mamba.'; got 3",
        ),
        (
            "jamba",
            {"attn_layer_period": 1, "attn_layer_offset": 0},
            "'attn_layer_offset' must be as the tensors .* with 'model.layers.0.self_attn.'; got 0",
        ),
        (
            "nemotron_h",
            {"layers_block_type": None, "hybrid_override_pattern": "ME*-M"},
            "'hybrid_override_pattern' must be without 'E'; got 'ME\\*-M'. Mixtures of experts are not",
        ),
        (
            "nemotron_h",
            {"layers_block_type": None, "hybrid_override_pattern": "M-M*+"},
            r"'hybrid_override_pattern' must be a word of the letters M, \*, -, E; got 'M-M\*\+'",
        ),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-M--"},
            r"'hybrid_override_pattern' must be 'M-M\*-'; got 'M-M--'",
        ),
        (
            "nemotron_h",
            {"layers_block_type": ["mlp"] * 5},
            "must be as the tensors are, of which none begins with 'backbone.layers.0.mixer.up_proj.'",
        ),
        (
            "lfm2",
            {"block_ff_dim": 40},
            "'block_ff_dim' must be 36; got 40. Nothing else is supported",
        ),
        (
            "lfm2",
            {"full_attn_idxs": "all", "layer_types": None},
            "'full_attn_idxs' must be a list of layers; got 'all'",
        ),
        (
            "lfm3",
            {"rope_parameters": {"rope_theta": 1e4}},
            "'rope_parameters' must be an object for each of full_attention, sliding_attention",
        ),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention"] * 3},
            r"'layer_types' must be a list of 4 names among \['linear_attention', 'full_attention'\]",
        ),
        (
            "qwen3_5_text",
            {"layer_types": None, "full_attention_interval": 3},
            "'layer_types' must be as the tensors are, of which none begins with "
            "'model.layers.2.self_attn.'",
        ),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": 3, "linear_key_head_dim": 4},
            "'linear_num_key_heads' must be a divisor of linear_num_value_heads=4; got 3",
        ),
        (
            "qwen3_5_text",
            {"partial_rotary_factor": 0.5},
            "'partial_rotary_factor' must be 0.25; got 0.5. Nothing else",
        ),
        ("qwen3_5_text", {"attn_output_gate": False}, "'attn_output_gate' must be True; got False"),
        ("qwen3_5_text", {"output_gate_type": "relu"}, "'output_gate_type' must be 'swish'; got"),
        ("qwen3_5_text", {"num_experts": 8}, "not known here: num_experts=8"),
        (
            "qwen3_5",
            {"model_type": "qwen3_5_moe"},
            "'model_type' must be one of .*qwen3_5.*; got 'qwen3_5_moe'. Mixtures of experts are not",
        ),
        ("qwen3_5", {"text_config": None}, "has no entry 'text_config', which says what the model"),
        ("qwen3_5", {"text_config": [1]}, r"'text_config' must be an object, .*got \[1\]"),
        (
            "qwen3_5",
            {"text_config": {"model_type": "qwen3_5_moe_text"}},
            "config.json, text_config: 'model_type' must be 'qwen3_5_text'; got 'qwen3_5_moe_text'",
        ),
        (
            "qwen3_5",
            {"tie_word_embeddings": True},
            "text_config: 'tie_word_embeddings' must be True; got False",
        ),
        (
            "olmo_hybrid",
            {"rope_parameters": None},
            "'rope_parameters' must be an object with rope_theta; got None",
        ),
        ("olmo_hybrid", {"linear_use_gate": False}, "'linear_use_gate' must be True; got False"),
    ],
)
def test_what_is_refused(name, entries, message, folder):
    with pytest.raises(ValueError, match=message):
        load(folder(name, **entries))


def test_a_harmless_entry_of_a_part_is_ignored(folder):
    text = json.loads((folder_of("qwen3_5") / CONFIG).read_text())["text_config"]
    copy = folder("qwen3_5", text_config=text | {"checkpoint_date": "today"})
    with pytest.raises(ValueError, match=r"text_config has entries .*: checkpoint_date='today'"):
        load(copy)
    ignoring = load(copy, ignore_entries=("checkpoint_date",))[0]
    assert_equal(ignoring, load(folder_of("qwen3_5"))[0])
