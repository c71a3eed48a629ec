"""The language models whose writing is compared: one checkpoint, for all who read it."""

import functools as ft
import math
import pathlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.random as jr

from discretax import pretrained
from discretax.architectures import LanguageModel
from discretax.sequence_mixers import Mamba2SequenceMixer, MambaSequenceMixer

VOCABULARY = 50280
# The checkpoint has one epsilon for all norms of Mamba-2, which is that of the language model.
MIXERS = {"Mamba": MambaSequenceMixer, "Mamba-2": ft.partial(Mamba2SequenceMixer, norm_eps=1e-6)}


class Sizes(NamedTuple):
    mixer: str
    width: int
    state_dim: int
    blocks: int


def build(sizes: Sizes, key: jax.Array) -> LanguageModel:
    return LanguageModel(
        key,
        vocab_size=VOCABULARY,
        hidden_dim=sizes.width,
        num_blocks=sizes.blocks,
        pattern=(ft.partial(MIXERS[sizes.mixer], state_dim=sizes.state_dim),),
        # So small that the blocks have a say in the next token: at 0.02 each repeats the last.
        initializer_range=0.002,
    )


def save(folder: pathlib.Path, sizes: Sizes) -> None:
    """With random weights; once per folder."""
    if not folder.exists():
        model, _ = eqx.nn.make_with_state(build)(sizes, jr.key(0))
        pretrained.save(model, folder)


def weight_bytes(sizes: Sizes) -> int:
    model, _ = eqx.filter_eval_shape(eqx.nn.make_with_state(build), sizes, jr.key(0))
    leaves = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return 4 * sum(math.prod(leaf.shape) for leaf in leaves)
