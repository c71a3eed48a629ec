"""Hybrid models in Hugging Face's layout: transformers' numbers, and the way back."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_file import FOLDER, Golden
from helpers import assert_close, assert_equal
from safetensors.numpy import load_file

from discretax import generate, inference_state, streaming_mode
from discretax.pretrained import load, save
from discretax.pretrained._checkpoint import FAMILIES

pytestmark = pytest.mark.slow

NAMES = ("falcon_h1", "granitemoehybrid", "bamba", "lfm2", "lfm3")
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

        @eqx.filter_jit
        @eqx.filter_value_and_grad(has_aux=True)
        def loss(model, w):
            y = jax.vmap(lambda ids: model(ids, state)[0])(tokens)
            return jnp.sum(y * w), y

        (_, y), d_model = loss(model, golden["w_L37"])
        assert_close(y, golden["logits_L37"], 1e-9)
        stored = family_of(model).stored(d_model)
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
        save(model, tmp_path)
        original, saved = (load_file(at / WEIGHTS) for at in (folder_of(name), tmp_path))
        assert original.keys() == saved.keys()
        for key, array in original.items():
            assert (saved[key].dtype, saved[key].shape) == (array.dtype, array.shape)
            assert saved[key].tobytes() == array.tobytes()
        entries = json.loads((folder_of(name) / CONFIG).read_text())
        written = json.loads((tmp_path / CONFIG).read_text())
        if name == "lfm2":  # whose width is rounded up, and written as it is
            entries |= {"intermediate_size": 24, "block_auto_adjust_ff_dim": False}
        assert {key: entries.get(key, value) for key, value in written.items()} == written
        assert_equal(load(tmp_path)[0], model)


def family_of(model):
    return next(family for family in FAMILIES.values() if family.describe(model))
