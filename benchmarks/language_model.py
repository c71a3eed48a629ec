"""The language models that are compared: one checkpoint, for all who read it."""

import functools as ft
import json
import math
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.random as jr

from discretax import pretrained
from discretax.architectures import LanguageModel
from discretax.pretrained._families import family_of
from discretax.sequence_mixers import Mamba2SequenceMixer, MambaSequenceMixer

VOCABULARY = 50280
# The checkpoint has one epsilon for all norms of Mamba-2, which is that of the language model.
MIXERS = {"Mamba": MambaSequenceMixer, "Mamba-2": ft.partial(Mamba2SequenceMixer, norm_eps=1e-6)}
# Configurations of published checkpoints.
PUBLISHED = pathlib.Path(__file__).parent.parent / "tests" / "published"


class Sizes(NamedTuple):
    mixer: str
    width: int
    state_dim: int
    blocks: int
    vocab_size: int = VOCABULARY


def build(sizes: Sizes | str, key: jax.Array) -> LanguageModel:
    """Of these sizes, or of a published configuration by its name."""
    if isinstance(sizes, str):
        entries = json.loads((PUBLISHED / f"{sizes}.json").read_text())
        return family_of(entries, sizes)[1](key)
    return LanguageModel(
        key,
        vocab_size=sizes.vocab_size,
        hidden_dim=sizes.width,
        num_blocks=sizes.blocks,
        pattern=(ft.partial(MIXERS[sizes.mixer], state_dim=sizes.state_dim),),
        # So small that the blocks have a say in the next token: at 0.02 each repeats the last.
        initializer_range=0.002,
    )


def shapes(sizes: Sizes | str) -> LanguageModel:
    return eqx.filter_eval_shape(eqx.nn.make_with_state(build), sizes, jr.key(0))[0]


def vocabulary(sizes: Sizes | str) -> int:
    return shapes(sizes).encoder.embedding.weight.shape[0]


def save(folder: pathlib.Path, sizes: Sizes | str) -> None:
    """With random weights; once per folder."""
    if not folder.exists():
        model, _ = eqx.nn.make_with_state(build)(sizes, jr.key(0))
        pretrained.save(model, folder)


def weight_bytes(sizes: Sizes | str, *, of_blocks: bool = False) -> int:
    """Of all weights, or without those of the vocabulary, which a prompt's tokens do not go through
    but for the last."""
    model = shapes(sizes)
    if of_blocks:
        model = eqx.tree_at(lambda model: (model.encoder, model.head), model, (None, None))
    leaves = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return 4 * sum(math.prod(leaf.shape) for leaf in leaves)
