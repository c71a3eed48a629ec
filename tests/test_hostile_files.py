"""Checkpoints that no one would write in good faith: refused by name, or loaded as they say, at once."""

import functools as ft
import json
import math
import shutil

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from golden_file import FOLDER
from safetensors.numpy import load_file, save_file

from discretax.pretrained import load
from discretax.pretrained._families import FAMILIES, family_of

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
# JSON may hold numbers that Python does not write: here they are strings.
LETTERS = ("1e400", "-1e400", "1e-400")
HOSTILE = [None, math.nan, math.inf, -math.inf, -1, 0, 0.5, 2**31, 2**63, 10**400, 1e300]
HOSTILE += [True, "", "silu", [], {}, [[1]], [["recurrent"]], [1, [2]], {"a": {"b": []}}]
every_family = pytest.mark.parametrize("name", FAMILIES)


class Asked(dict):
    """Entries that remember which of them were asked for."""

    def __init__(self, entries):
        super().__init__(entries)
        self.names = []

    def get(self, name, default=None):
        self.names.append(name)
        return super().get(name, default)


def entries_of(name):
    return json.loads((FOLDER / "hf" / name / CONFIG).read_text())


# Their entries are read by the same lines: each is tried in the first of them that has it.
READ_ALIKE = (
    "falcon_h1",
    "granitemoehybrid",
    "bamba",
    "jamba",
    "nemotron_h",
    "lfm2",
    "lfm3",
    "qwen3_5_text",
    "qwen3_5",
    "olmo_hybrid",
    "xlstm",
    "rwkv7",
    "rwkv7_native",
)


def all_that_is_asked_for():
    tried = set()
    for name in FAMILIES:
        entries = Asked(entries_of(name))
        family_of(entries, CONFIG)
        fields = [field for field in dict.fromkeys(entries.names) if field not in tried]
        tried.update(fields if name in READ_ALIKE else ())
        yield from ((name, field) for field in fields)


@ft.cache
def description(name):
    """Of the whole checkpoint."""
    model = eqx.filter_eval_shape(family_of(entries_of(name), CONFIG)[1], jr.key(0))
    return FAMILIES[name].describe(model)


def checkpoint(name, tmp_path):
    return shutil.copytree(FOLDER / "hf" / name, tmp_path / name)


def write_config(folder, entries):
    text = json.dumps(entries)
    for letters in LETTERS:
        text = text.replace(f'"{letters}"', letters)
    (folder / CONFIG).write_text(text)


def assert_refused_or_as_it_says(folder, name, entries, field, value):
    write_config(folder, entries)
    try:
        model, _ = load(folder)
    except ValueError as error:
        assert field in str(error) and len(str(error)) < 1000
        return str(error)
    else:
        changed = description(name) | {field: value}
        assert FAMILIES[name].describe(model) in (description(name), changed)


@pytest.mark.parametrize(("name", "field"), list(all_that_is_asked_for()))
def test_any_value_of_any_entry(name, field, tmp_path):
    folder, entries = checkpoint(name, tmp_path), entries_of(name)
    for value in HOSTILE:
        assert_refused_or_as_it_says(folder, name, entries | {field: value}, field, value)


@pytest.mark.parametrize("field", ["rope_type", "rope_theta", "partial_rotary_factor"])
def test_any_value_of_rotary_positions(field, tmp_path):
    """As transformers 5 writes them, and as 4 did."""
    name = "recurrent_gemma"
    folder, entries = checkpoint(name, tmp_path), entries_of(name)
    ropes = entries["rope_parameters"]
    for value in (*HOSTILE, *LETTERS):
        changed = ropes | {field: value}
        together = entries | {"rope_parameters": changed}
        apart = {k: v for k, v in (entries | changed).items() if "rope_" not in k or k == field}
        for written in (together, *([apart] if field != "rope_type" else [])):
            try:
                write_config(folder, written)
                model, _ = load(folder)
            except ValueError as error:
                assert repr(field) in str(error)
            else:
                described = FAMILIES[name].describe(model)
                assert described["rope_parameters"] in (ropes, changed)


@every_family
def test_sizes_that_the_tensors_have_not(name, tmp_path):
    """The error says the entry, its value and what the tensors say."""
    folder, entries = checkpoint(name, tmp_path), entries_of(name)
    # Of windows no tensor tells; LFM2's width and mamba_ssm's vocabulary are rounded; the other is that of the inner width, where
    # both are there.
    untold = ["attention_window_size", "sliding_window"] + ["intermediate_size"] * (name == "lfm2")
    untold += ["vocab_size"] * (name == "mamba_ssm")
    untold += ["expand"] * ("intermediate_size" in entries)
    untold += ["attn_layer_period"] * (name == "jamba")  # which has one layer of attention
    sizes = {k for k, v in description(name).items() if type(v) is int and k in entries}
    for field in sizes:
        for value in (entries[field] + 1, 2**30, 2**31, 2**62):
            changed = entries | {field: value}
            error = assert_refused_or_as_it_says(folder, name, changed, field, value)
            if field not in untold:
                assert error is not None and str(value) in error


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba"])
def test_the_inner_width_by_its_factor(name, tmp_path):
    folder, entries = checkpoint(name, tmp_path), entries_of(name)
    del entries["intermediate_size"]
    write_config(folder, entries)
    load(folder)
    write_config(folder, entries | {"expand": 2**30})
    with pytest.raises(ValueError, match=r"'expand': 1073741824.*A_log' must .*got \(32, 4\)"):
        load(folder)


def test_kinds_of_blocks_that_do_not_occur(tmp_path):
    """What would be the sizes of theirs, no tensor says."""
    folder = checkpoint("recurrent_gemma", tmp_path)
    arrays = load_file(folder / WEIGHTS)
    attention_first = {
        k: v for k, v in arrays.items() if "layers.0." not in k and "layers.1." not in k
    }
    save_file(
        {k.replace("layers.2.", "layers.0."): v for k, v in attention_first.items()},
        folder / WEIGHTS,
    )
    entries = entries_of("recurrent_gemma") | {"num_hidden_layers": 1, "block_types": ["attention"]}
    for more in (
        {},
        {"lru_width": 2**30 + 1, "conv1d_width": 2**30},
        {"_block_types": ["attention"]},
    ):
        write_config(folder, entries | more)
        assert load(folder)[0].backbone.blocks[0].sequence_mixer.window == 16
    write_config(folder, entries | {"_block_types": ["recurrent"]})
    with pytest.raises(ValueError, match=r"'_block_types' must be \['attention'\]; got \['recurr"):
        load(folder)


def test_missing_tensors_bound_nothing(tmp_path):
    folder = checkpoint("mamba", tmp_path)
    arrays = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in arrays.items() if "A_log" not in k}, folder / WEIGHTS)
    write_config(folder, entries_of("mamba") | {"state_size": 2**31 - 1})
    with pytest.raises(ValueError, match=r"'state_size': 2147483647.*'mixer.A_log' .*got none"):
        load(folder)


def test_an_entry_of_transformers_alone(tmp_path):
    """Its own configuration of Falcon Mamba writes it; it says how the same is computed."""
    folder = checkpoint("falcon_mamba", tmp_path)
    write_config(folder, entries_of("falcon_mamba") | {"use_falcon_mambapy": True})
    load(folder)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "nested too deeply to be read"),
        (f'{{"model_type": {DEEP}}}', "nested too deeply to be read"),
        (f'{{"vocab_size": {"9" * 5000}}}', "is not JSON: Exceeds the limit"),
        ('{"model_type": "' + 10**6 * "a" + '"}', "'model_type' must be one of .*; got 'aaa.*a'"),
    ],
    ids=["deep", "deep entry", "long number", "long text"],
)
def test_files_that_are_no_configuration(content, message, tmp_path):
    folder = checkpoint("mamba", tmp_path)
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert len(str(caught.value)) < 1000
    shutil.copy(FOLDER / "hf" / "mamba" / CONFIG, folder)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(DEEP)
    with pytest.raises(ValueError, match=r"index.json is nested too deeply"):
        load(folder)


def add_tensor(folder, name, dtype, shape, size):
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    old = header.pop(name, None)
    assert old is None or old["shape"] == shape
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
    if old is not None:  # no gaps are allowed: the old numbers go to another tensor
        header["unused"] = old
    header = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + body + bytes(size))


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "I8", "BOOL"])
def test_a_redundant_head_of_another_type(kind, dtype, tmp_path):
    folder = checkpoint("mamba", tmp_path)
    add_tensor(folder, "lm_head.weight", kind, [61, 16], 61 * 16)
    with pytest.raises(ValueError, match=rf"'lm_head.weight' is of type {kind}; supported are F64"):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_])
def test_whole_numbers_are_not_cast(dtype, tmp_path):
    """They would be those of a quantised checkpoint, without its scales."""
    folder = checkpoint("mamba", tmp_path)
    arrays = load_file(folder / WEIGHTS)
    name = "backbone.layers.1.mixer.D"
    save_file(arrays | {name: arrays[name].astype(dtype)}, folder / WEIGHTS)
    for given in (None, jnp.float32):
        with pytest.raises(ValueError, match=rf"tensor '{name}' is of type \w+; supported are F64"):
            load(folder, dtype=given)
