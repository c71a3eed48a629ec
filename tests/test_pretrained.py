"""Checkpoints in Hugging Face's layout: transformers' numbers, the way back, and what is refused."""

import functools as ft
import json
import math
import shutil
import sys
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, assert_equal, logits_and_gradients
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from published_file import published
from safetensors.numpy import load_file, save_file

from discretax import generate, inference_state, streaming_mode
from discretax.architectures import LanguageModel
from discretax.models import scan_blocks
from discretax.pretrained import load, save
from discretax.pretrained._families import FAMILIES, family_of
from discretax.sequence_mixers import LRUSequenceMixer, MambaSequenceMixer

pytestmark = pytest.mark.slow

# transformers keeps RecurrentGemma's states and rotary frequencies in single precision.
TOLERANCE = dict.fromkeys(FAMILIES, 1e-9) | {"recurrent_gemma": 1e-6}
every_family = pytest.mark.parametrize(
    "name", ("mamba", "mamba2", "falcon_mamba", "recurrent_gemma")
)
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def folder_of(name):
    return FOLDER / "hf" / name


def tensors(model):
    """The model's leaves as the file has them."""
    name = next(name for name, family in FAMILIES.items() if family.describe(model))
    return {key: stored.tensor() for key, stored in FAMILIES[name].stored(model).items()}


@eqx.filter_jit
def logits(model, state, tokens):
    return jax.vmap(lambda ids: model(ids, state)[0])(tokens)


@every_family
def test_logits_and_gradients(name):
    with jax.enable_x64(True):
        golden = Golden(f"hf_{name}", "float64")
        model, state = load(folder_of(name), dtype="float64")
        tokens = golden["input_ids_L37"].astype(int)
        y, d_model = logits_and_gradients(model, state, tokens, golden["w_L37"])
        assert_close(y, golden["logits_L37"], TOLERANCE[name])
        gradients, expected = tensors(d_model), golden.fields("g_L37")
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert_close(gradient, expected[key], TOLERANCE[name])


@every_family
def test_blocks_one_by_one(name):
    """transformers keeps what goes into a block of RecurrentGemma, and what comes out of others."""
    with jax.enable_x64(True):
        golden = Golden(f"hf_{name}", "float64")
        model, state = load(folder_of(name), dtype="float64")
        blocks = model.backbone.blocks
        between = blocks[:-1] if name == "recurrent_gemma" else blocks[1:]
        for i, block in enumerate(between):
            run = eqx.filter_jit(jax.vmap(lambda x, block=block: block(x, state)[0]))
            actual = run(golden[f"hidden_{i}_L48"])
            assert_close(actual, golden[f"hidden_{i + 1}_L48"], TOLERANCE[name])


@every_family
def test_single_precision(name):
    with jax.enable_x64(False):
        golden = Golden(f"hf_{name}", "float32")
        model, state = load(folder_of(name))
        assert {leaf.dtype for leaf in tensors(model).values()} == {jnp.dtype("float32")}
        y = logits(model, state, golden["input_ids_L37"].astype(int))
        assert_close(y, golden["logits_L37"], 1e-4)


@every_family
def test_bfloat16(name):
    """Weights and activations of eight bits, through every layer."""
    golden = Golden(f"hf_{name}", "float32")
    model, state = load(folder_of(name), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in tensors(model).values()} == {jnp.dtype("bfloat16")}
    y = logits(model, state, golden["input_ids_L37"].astype(int))
    error = np.linalg.norm(y - golden["logits_L37"])
    assert y.dtype == jnp.float32 and error < 0.03 * np.linalg.norm(golden["logits_L37"])


@every_family
def test_prefill_in_chunks_then_single_tokens(name):
    with jax.enable_x64(True):
        golden = Golden(f"hf_{name}", "float64")
        live, state = streaming(name)
        run = eqx.filter_jit(jax.vmap(live))
        tokens, ys = golden["input_ids_L48"].astype(int), []
        for start, end in ((0, 17), (17, 18), (18, 35), *((t, t + 1) for t in range(35, 48))):
            y, state = run(tokens[:, start:end], state)
            ys.append(y)
        assert_close(jnp.concatenate(ys, axis=1), golden["logits_L48"], TOLERANCE[name])


@every_family
def test_greedy_generation(name):
    with jax.enable_x64(True):
        golden = Golden(f"hf_{name}", int)
        prompt, expected = golden["gen_prompt"], golden["gen_ids_nocache"]
        model, state = load(folder_of(name), dtype="float64")
        count = expected.shape[1] - prompt.shape[1]
        generated = generate(model, state, prompt, count, temperature=0)
        np.testing.assert_array_equal(generated.tokens, expected[:, prompt.shape[1] :])


def streaming(name):
    model, state = load(folder_of(name), dtype="float64")
    live = streaming_mode(eqx.nn.inference_mode(model))
    return live, inference_state(live, state, batch_size=2)


@every_family
def test_the_way_back(name, tmp_path):
    """The same bits, the same entries but for those without effect, and the same model again."""
    model, _ = load(folder_of(name))
    save(model, tmp_path / "a" / "b")
    original, saved = folder_of(name), tmp_path / "a" / "b"
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert (saved / CONFIG).stat().st_mode == (saved / WEIGHTS).stat().st_mode
    assert_same_bits(load_file(saved / WEIGHTS), load_file(original / WEIGHTS))
    entries = json.loads((original / CONFIG).read_text())
    written = json.loads((saved / CONFIG).read_text())
    assert written == {name: entries[name] for name in written}
    again, _ = load(saved)
    assert jax.tree.structure(tensors(again)) == jax.tree.structure(tensors(model))
    assert_equal(again, model)


def test_the_residual_stream_in_float32(tmp_path):
    """In bfloat16 the logits' error falls; with wider weights nothing changes; and the way back."""
    norm = ft.partial(eqx.nn.RMSNorm, eps=1e-5, use_bias=False)
    model, state = eqx.nn.make_with_state(build)(num_blocks=6, norm=norm, hidden_dim=16)
    # Each block adds to the stream what is small beside it: there bfloat16 loses most. The weights
    # lose nothing.
    model = eqx.tree_at(lambda m: m.encoder.embedding.weight, model, replace_fn=lambda w: 50 * w)
    rounded = lambda w: w.astype(jnp.bfloat16).astype(w.dtype) if eqx.is_inexact_array(w) else w
    model = jax.tree.map(rounded, model)
    save(model, tmp_path)
    tokens, errors, loaded = jnp.arange(20)[None] % 7, [], {}
    expected = logits(model, state, tokens)
    for in_fp32 in (True, False):
        change_config(tmp_path, residual_in_fp32=in_fp32)
        wide = load(tmp_path)[0]
        assert (wide.dtype, wide.residual_dtype) == (None, None)
        loaded[in_fp32], _ = load(tmp_path, dtype=jnp.bfloat16)
        errors.append(np.linalg.norm(logits(loaded[in_fp32], state, tokens) - expected))
    assert errors[0] < 0.8 * errors[1]
    assert (loaded[True].dtype, loaded[True].residual_dtype) == (jnp.bfloat16, jnp.float32)
    assert (loaded[False].dtype, loaded[False].residual_dtype) == (None, None)
    for in_fp32, narrow in loaded.items():  # whose own type is then the files'
        for layout in ("huggingface", "mamba_ssm"):
            save(narrow, tmp_path, layout=layout)
            assert json.loads((tmp_path / CONFIG).read_text())["residual_in_fp32"] == in_fp32
            assert load(tmp_path)[0].residual_dtype == narrow.residual_dtype


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, "mixed"])
def test_types_of_files(dtype, folder, tmp_path):
    """Each tensor keeps its type, or is cast as numpy would, and goes back as it was."""
    arrays = load_file(folder / WEIGHTS)
    kind = lambda name: np.float32 if dtype == "mixed" and "A_log" in name else np.float16
    kind = kind if dtype == "mixed" else lambda _: dtype
    arrays = {name: array.astype(kind(name)) for name, array in arrays.items()}
    save_file(arrays, folder / WEIGHTS)
    model, _ = load(folder)
    assert_same_bits({name: np.asarray(leaf) for name, leaf in tensors(model).items()}, arrays)
    save(model, tmp_path / "saved")
    assert_same_bits(load_file(tmp_path / "saved" / WEIGHTS), arrays)
    wide, _ = load(folder, dtype="float32")
    for name, leaf in tensors(wide).items():
        np.testing.assert_array_equal(leaf, arrays[name].astype(np.float32))


@pytest.fixture
def folder(tmp_path):
    """A copy of the checkpoint of Mamba, to be tampered with."""
    return shutil.copytree(folder_of("mamba"), tmp_path / "mamba")


def change_config(folder, **entries):
    config = json.loads((folder / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))


def change_tensors(folder, **changes):
    """Replaces, adds or, for None, removes tensors; "__" stands for a dot."""
    arrays = load_file(folder / WEIGHTS) | {
        name.replace("__", "."): array for name, array in changes.items()
    }
    save_file({n: a for n, a in arrays.items() if a is not None}, folder / WEIGHTS)


def into_shards(folder):
    arrays = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(arrays)}
    for shard in set(names.values()):
        save_file({n: a for n, a in arrays.items() if names[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards(folder):
    into_shards(folder)
    assert_equal(load(folder)[0], load(folder_of("mamba"))[0])


def test_redundant_head(folder):
    embedding = load_file(folder / WEIGHTS)[EMBEDDING]
    change_tensors(folder, lm_head__weight=embedding)
    model, _ = load(folder)
    assert model.head.weight is None
    other = np.arange(embedding.size, dtype="float32").reshape(embedding.shape)
    change_tensors(folder, lm_head__weight=other)
    with pytest.raises(ValueError, match=r"ties .* but 'lm_head.weight' differs from 'backbone"):
        load(folder)
    change_config(folder, tie_word_embeddings=False)
    model, _ = load(folder)
    np.testing.assert_array_equal(model.head.weight, other)


def test_sharding(folder):
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    whole = NamedSharding(mesh, PartitionSpec())
    in_parts = NamedSharding(mesh, PartitionSpec("model"))
    asked = {}

    def sharding(name, leaf):
        asked[name] = leaf
        return in_parts if name.endswith("in_proj.weight") else whole

    model, _ = load(folder, sharding=sharding)
    assert asked.keys() == load_file(folder / WEIGHTS).keys()
    for name, (leaf,) in ((n, s.parts) for n, s in FAMILIES["mamba"].stored(model).items()):
        assert leaf.sharding == (in_parts if "in_proj" in name else whole)
        assert (asked[name].shape, asked[name].dtype) == (leaf.shape, leaf.dtype)
    assert_equal(model, load(folder)[0])
    for leaf in jax.tree.leaves(eqx.filter(load(folder, sharding=whole)[0], eqx.is_array)):
        assert leaf.sharding == whole


def test_hub(folder, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert_equal(load("someone/mamba-tiny")[0], load(folder)[0])
    assert asked == [("someone/mamba-tiny", [CONFIG, INDEX, WEIGHTS, "model-*.safetensors"])]


@pytest.mark.parametrize("module", ["huggingface_hub", "safetensors"])
def test_missing_packages(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    source = "someone/mamba-tiny" if module == "huggingface_hub" else folder_of("mamba")
    with pytest.raises(
        ImportError, match=rf"`{module}` is needed: `pip install 'discretax-zoo\[pre"
    ):
        load(source)


def test_embeddings_are_scaled_by_a_root_in_bfloat16():
    model = eqx.filter_eval_shape(family_of(published("recurrentgemma-2b"), CONFIG)[1], jr.key(0))
    assert model.embedding_scale == 50.5


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


def change_header(folder, change):
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    header = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def only_pickle(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    into_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def shard_elsewhere(folder):
    into_shards(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def twice(folder):
    into_shards(folder)
    shard = folder / "model-00001-of-00003.safetensors"
    save_file(load_file(shard) | load_file(folder / "model-00002-of-00003.safetensors"), shard)


config = lambda **entries: ft.partial(change_config, **entries)
weights = lambda **changes: ft.partial(change_tensors, **changes)
header = lambda change: ft.partial(change_header, change=change)


@pytest.mark.parametrize(
    ("tamper", "error", "message"),
    [
        (remove(CONFIG), FileNotFoundError, r"mamba has no config.json"),
        (remove(WEIGHTS), FileNotFoundError, r"neither model.safetensors nor .*index.json"),
        (only_pickle, FileNotFoundError, r"pytorch_model.bin, are not opened.*save_pretrained"),
        (missing_shard, FileNotFoundError, r"lacks model-00002-of-00003.safetensors, which"),
        (shard_elsewhere, ValueError, r"index.json must have a `weight_map` .* beside it"),
        (twice, ValueError, r"a tensor stands in more than one of the files model-00001"),
        (rewrite(CONFIG, b"{'a': 1}"), ValueError, r"config.json is not JSON: Expecting"),
        (rewrite(CONFIG, b"\xff\xfe{"), ValueError, r"config.json is not JSON"),
        (rewrite(CONFIG, b"[]"), ValueError, r"must hold a JSON object; got list"),
        (cut, ValueError, r"no whole safetensors file: .*Fetch or save it again"),
        (rewrite(WEIGHTS, b""), ValueError, r"no whole safetensors file"),
        (rewrite(WEIGHTS, b"\xff" * 64), ValueError, r"no whole safetensors file"),
        (
            header(lambda h: h[EMBEDDING].update(shape=[61, 17])),
            ValueError,
            r"no whole safetensors file",
        ),
        (
            header(lambda h: h[EMBEDDING].update(data_offsets=[0, 1 << 40])),
            ValueError,
            r"no whole safetensors file",
        ),
        (
            header(lambda h: h[EMBEDDING].update(dtype="I32")),
            ValueError,
            r"'backbone.embeddings.weight' is of type I32; supported are F64, F32, F16, BF16",
        ),
        (
            header(lambda h: h[EMBEDDING].update(shape=[16, 61])),
            ValueError,
            r"'hidden_size': 16, so that .*embeddings.weight' must be of size 16 .* 1; got \(16, 61\)",
        ),
        (
            weights(backbone__norm_f__weight=None, backbone__layers__1__mixer__D=None),
            ValueError,
            r"missing: backbone.layers.1.mixer.D\nmissing: backbone.norm_f.weight",
        ),
        (
            weights(backbone__layers__1__mixer__E=np.ones(3), backbone__norm_f__weight=None),
            ValueError,
            r"missing: backbone.norm_f.weight\nleft over: backbone.layers.1.mixer.E",
        ),
        (
            weights(backbone__layers__1__mixer__conv1d__weight=np.ones((32, 4))),
            ValueError,
            r"1.mixer.conv1d.weight: got shape \(32, 4\), expected \(32, 1, 4\)",
        ),
        (config(tie_word_embeddings=False), ValueError, r"missing: lm_head.weight"),
        (
            config(model_type="llama"),
            ValueError,
            r"'model_type' must be one of mamba, .*got 'llama'",
        ),
        (config(model_type=["mamba"]), ValueError, r"'model_type' must be one of"),
        (
            config(architectures=["MambaModel"]),
            ValueError,
            r"'architectures' must be \['MambaForCausalLM'\]; got \['MambaModel'\]",
        ),
        (config(hidden_act="gelu"), ValueError, r"'hidden_act' must be 'silu'; got 'gelu'"),
        (
            config(quantization_config={}, sliding=3),
            ValueError,
            r"not known here: quantization_config=\{\}, sliding=3",
        ),
        (config(vocab_size="61"), ValueError, r"'vocab_size' must be a whole number .*got '61'"),
        (config(num_hidden_layers=True), ValueError, r"'num_hidden_layers' must be .*got True"),
        (config(use_bias=0), ValueError, r"'use_bias' must be true or false; got 0"),
        (config(layer_norm_epsilon=0), ValueError, r"'layer_norm_epsilon' must be a positive"),
        (config(layer_norm_epsilon=None), ValueError, r"'layer_norm_epsilon' must be a positive"),
        (config(intermediate_size=33), ValueError, r"'intermediate_size' must be a multiple of"),
        (config(time_step_rank="full"), ValueError, r"'time_step_rank' must be a whole number"),
        (rewrite(CONFIG, b'{"model_type": "mamba"}'), ValueError, r"has no entry 'state_size'"),
    ],
)
def test_what_is_not_loaded(tamper, error, message, folder):
    tamper(folder)
    with pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"intermediate_size": 15361}, "'intermediate_size' must be even, twice the width"),
        ({"block_types": ["recurrent", "mlp"]}, "'block_types' must be a list of names among"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_type' must be 'default'; got 'yarn'"),
        ({"rope_parameters": {"factor": 2}}, "rope_parameters has entries .*not known.*factor=2"),
        ({"rope_parameters": 3}, "'rope_parameters' must be an object; got 3"),
        ({"attention_dropout": 0.1}, "'attention_dropout' must be 0.0; got 0.1"),
        ({"logits_soft_cap": None}, "'logits_soft_cap' must be a positive number .*; got None"),
    ],
)
def test_what_is_not_a_recurrent_gemma(entries, message):
    with pytest.raises(ValueError, match=message):
        family_of(published("recurrentgemma-2b") | entries, CONFIG)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_heads": 64}, "'num_heads' must be 128; got 64"),
        ({"intermediate_size": 4096}, "'intermediate_size' must be 8192; got 4096"),
        ({"time_step_limit": [0.0]}, "'time_step_limit' must be two numbers"),
        ({"time_step_limit": [0.0, "1"]}, "'time_step_limit' must be two numbers"),
    ],
)
def test_what_is_not_a_mamba2(entries, message):
    with pytest.raises(ValueError, match=message):
        family_of(published("Mamba-Codestral-7B") | entries, CONFIG)


def test_limits_of_steps(tmp_path):
    """As JSON has them, with infinity written out or not, and back."""
    for stored, limit in (([0.0, math.inf], (0.0, math.inf)), ([0.01, 2], (0.01, 2.0))):
        shutil.copytree(folder_of("mamba2"), tmp_path, dirs_exist_ok=True)
        change_config(tmp_path, time_step_limit=stored)
        model, _ = load(tmp_path)
        save(model, tmp_path)
        for loaded in (model, load(tmp_path)[0]):
            assert loaded.backbone.blocks[1].sequence_mixer.dt_limit == limit


def test_unfit_arguments(folder):
    with pytest.raises(ValueError, match="`dtype` must be of a floating type; got int"):
        load(folder, dtype=int)
    with pytest.raises(ValueError, match=r"`dtype` is float64, which JAX has only with"):
        load(folder, dtype="float64")
    change_tensors(folder, backbone__norm_f__weight=np.ones(16))
    with pytest.raises(ValueError, match=r"tensor 'backbone.norm_f.weight' is float64.*dtype=jnp"):
        load(folder)
    for source in ("no/such/folder", "./nowhere", folder / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"there is no folder .* no name on the Hugging"
        ):
            load(source)
    with pytest.raises(ValueError, match=r"entries.*may not hold model_type, vocab_size"):
        save(load(folder_of("mamba"))[0], folder, entries={"model_type": 1, "vocab_size": 2})
    with pytest.raises(ValueError, match=r"not known here: sliding=3"):
        save(load(folder_of("mamba"))[0], folder, entries={"sliding": 3})


def test_entries_that_are_known_to_be_harmless(folder):
    """They are named by whoever knows it, and only what is not known here can be."""
    change_config(folder, checkpoint_date="today", sliding=3)
    with pytest.raises(
        ValueError, match=r"not known here: sliding=3\. .*`ignore_entries` of `load`"
    ):
        load(folder, ignore_entries=("checkpoint_date",))
    names = ["checkpoint_date", "sliding", "not_there"]
    assert_equal(load(folder, ignore_entries=names)[0], load(folder_of("mamba"))[0])
    with pytest.raises(
        ValueError, match=r"not known here; .*config.json has use_cache, vocab_size, wh"
    ):
        load(folder, ignore_entries=(*names, "vocab_size", "use_cache"))
    for unfit in ("sliding", (3,)):
        with pytest.raises(TypeError, match="`ignore_entries` must be a sequence of names"):
            load(folder, ignore_entries=unfit)


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").touch()
    with pytest.raises(ValueError, match=r"'weights' is a file. Give the folder"):
        load("weights")


def build(mixer=MambaSequenceMixer, **options):
    options = {"vocab_size": 7, "hidden_dim": 4, "num_blocks": 2, "pattern": (mixer,)} | options
    return LanguageModel(jr.key(0), **options)


def test_models_built_here_are_saved(tmp_path):
    """With whatever runs them, and over what was there."""
    mixer = ft.partial(
        MambaSequenceMixer, use_bias=True, conv_bias=False, expand=3, b_c_dt_rms_eps=1e-3
    )
    for model in (build(), build(mixer, tie_embeddings=False, drop_rate=0.1, dtype=jnp.bfloat16)):
        save(scan_blocks(eqx.nn.inference_mode(model)), tmp_path, entries={"eos_token_id": 3})
        loaded, _ = load(tmp_path)
        assert_same_bits(
            *({n: np.asarray(leaf) for n, leaf in tensors(m).items()} for m in (loaded, model))
        )
        assert json.loads((tmp_path / CONFIG).read_text())["eos_token_id"] == 3
    assert loaded.backbone.blocks[0].sequence_mixer.b_c_dt_rms_eps == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": LRUSequenceMixer}, "with LRUSequenceMixer and RMSNorm, is of none"),
        ({"norm": "layer"}, "with MambaSequenceMixer and LayerNorm, is of none"),
        ({"soft_cap": 3.0}, r"head.soft_cap: 3.0, where the family has None"),
        (
            {"pattern": (MambaSequenceMixer, LRUSequenceMixer)},
            r"blocks\[1\].sequence_mixer: 'LRUSequenceMixer', where the family has 'MambaSeq",
        ),
        ({"embedding_scale": 2.0}, r"embedding_scale: 2.0, where the family has 1.0"),
        (
            {"mixer": ft.partial(MambaSequenceMixer, discretization="zoh", event=True)},
            r"\.dt_A_bias: 'array of shape \(8,\)'.*None\n.*discretization: 'zoh', where .* 'mamba'",
        ),
    ],
)
def test_what_is_not_saved(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save(build(**options), tmp_path)
    with pytest.raises(
        TypeError, match=r"takes a `discretax.architectures.LanguageModel`; got Mamba"
    ):
        save(build().backbone.blocks[0].sequence_mixer, tmp_path)
    assert not list(tmp_path.iterdir())
