"""The config.json of each family's smallest checkpoint is understood, down to the number of parameters.

The files in `published/` hold what the checkpoints' own do, as far as that could be read in public
code; what is left, about tokens and versions, is as transformers writes it. Of LFM3 there is
transformers' default. To add one: a file there, and its size here.
"""

import math

import equinox as eqx
import jax.random as jr
import pytest
from published_file import FOLDER, published

from discretax.pretrained._families import family_of

# As transformers counts the parameters of the model that it builds.
SIZES = {
    "mamba-130m": 129_135_360,
    "mamba-130m-hf": 129_135_360,
    "mamba2-130m": 128_989_632,
    "mamba2-130m-hf": 128_989_632,
    "Mamba-Codestral-7B": 7_285_403_648,
    "falcon-mamba-7b": 7_272_665_088,
    "recurrentgemma-2b": 2_682_862_080,
    "Falcon-H1-Tiny-90M": 91_131_072,
    "Falcon-H1-0.5B": 521_411_104,
    "granite-4.0-h-350m": 340_332_224,
    "granite-4.0-350m": 352_379_904,
    "Bamba-9B-v2": 9_780_235_392,
    "AI21-Jamba-Reasoning-3B": 3_029_337_472,
    "Nemotron-H-4B-Base-8K": 4_489_223_040,
    "LFM2-350M": 354_483_968,
    "LFM2.5-230M": 229_693_184,
    "lfm3": 1_728_801_536,
    "Qwen3.5-0.8B": 752_393_024,
    "Olmo-Hybrid-7B": 7_430_870_688,
    "xLSTM-7b": 6_865_424_896,
    "rwkv7-168M-pile": 167_638_272,  # added up by hand
}


def test_every_file_is_tried():
    assert {path.stem for path in FOLDER.iterdir()} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_published_configurations(name):
    """The numbers among their entries are those that would be written again, too."""
    entries = published(name)
    family, make = family_of(entries, name)
    model = eqx.filter_eval_shape(make, jr.key(0))
    stored = family.stored(model).values()
    assert sum(math.prod(tensor.shape) for tensor in stored) == SIZES[name]
    described = family.describe(model) or {}
    numbers = {k: v for k, v in described.items() if isinstance(v, int | float)}
    numbers.pop("block_auto_adjust_ff_dim", None)  # written as the width that is meant
    numbers.pop("expand", None)  # beside an inner width
    for of_the_mlp in (
        "ffn_proj_factor",
        "ffn_round_up_to_multiple_of",
    ):  # a factor without rounding
        numbers.pop(of_the_mlp, None)
    if "pad_vocab_size_multiple" in numbers:  # the vocabulary is written padded
        del numbers["vocab_size"], numbers["pad_vocab_size_multiple"]
    assert numbers and {k: entries.get(k, v) for k, v in numbers.items()} == numbers
