"""The stack of blocks that every model is, stated once."""

import functools as ft
import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import check_instance, check_maker, check_size, described
from discretax._stateful import check_state
from discretax.blocks import AbstractBlock, ResidualBlock, StandardBlock
from discretax.blocks._parts import Norm
from discretax.blocks.base import Samples
from discretax.channel_mixers import GLU, AbstractChannelMixer, IdentityChannelMixer, SwiGLU
from discretax.sequence_mixers import AbstractSequenceMixer


class AbstractBackbone(eqx.nn.StatefulLayer):
    """Blocks one after the other, `(x, state) -> (x, state)`, to stand between encoder and head."""

    blocks: eqx.AbstractVar[tuple[AbstractBlock, ...]]

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        """**Arguments:** `x`: `(time, hidden_dim)` or a [`discretax.Timeseries`][] of such; `state`;
        `key`, for dropout in training.

        **Returns:** the same kind as `x`, and the new state.
        """
        check_state(state, self)
        num_blocks = len(self.blocks)
        keys = (None,) * num_blocks if key is None else jr.split(key, num_blocks)
        for block, block_key in zip(self.blocks, keys, strict=True):
            x, state = block(x, state, key=block_key)
        return x, state


class BlockStack(AbstractBackbone):
    """A model from blocks of any kind: `BlockStack([block, other_block])`.

    !!! example

        ```python
        lru = StandardBlock(64, sequence_mixer=LRUSequenceMixer, channel_mixer=GLU, key=key)
        gla = ResidualBlock(64, sequence_mixer=GLASequenceMixer, channel_mixer=GLU, key=other_key)
        model = BlockStack([lru, gla])
        y, state = eqx.nn.inference_mode(model)(x, eqx.nn.State(model))  # x, y: (time, 64)
        ```
    """

    blocks: tuple[AbstractBlock, ...]

    def __init__(self, blocks: Sequence[AbstractBlock]):
        """**Arguments:** `blocks`, each of the width that the one before puts out.

        **Raises:** `TypeError` for anything but a sequence of blocks; `ValueError` for blocks whose
        widths do not fit.
        """
        if not isinstance(blocks, Sequence) or isinstance(blocks, str):
            raise TypeError(
                f"`blocks` must be a sequence of blocks, `[block, other_block]`; got "
                f"{described(blocks)}."
            )
        for i, block in enumerate(blocks):
            check_instance(f"blocks[{i}]", block, AbstractBlock)
        for i, (block, after) in enumerate(itertools.pairwise(blocks)):
            if block.out_features != after.in_features:
                raise ValueError(
                    f"blocks must fit one another: blocks[{i}] puts out {block.out_features} features; "
                    f"got blocks[{i + 1}] of in_features={after.in_features}. Make all for one width."
                )
        self.blocks = tuple(blocks)


class Backbone(AbstractBackbone):
    """A model from any mixer: `Backbone(key, hidden_dim=64, sequence_mixer=MyMixer)`.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Backbone)(
            hidden_dim=64, sequence_mixer=MinGRUSequenceMixer, channel_mixer=GLU, key=key
        )
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    blocks: tuple[AbstractBlock, ...]

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        hidden_dim: int,
        sequence_mixer: Callable[..., AbstractSequenceMixer],
        channel_mixer: Callable[..., AbstractChannelMixer] = GLU,
        num_blocks: int = 4,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "batch",
        activation: Callable[[Array], Array] | None = jax.nn.gelu,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `sequence_mixer`, `channel_mixer`: functions `(in_features, *, key)` that make a mixer,
            called once per block.
        - `num_blocks`: how many blocks to stack.
        - `drop_rate`, `prenorm`, `norm`, `activation`: as in [`discretax.blocks.StandardBlock`][].

        **Raises:** `TypeError` for mixers that are made already, which all blocks would share.
        """
        check_maker("sequence_mixer", sequence_mixer, AbstractSequenceMixer)
        check_maker("channel_mixer", channel_mixer, AbstractChannelMixer)
        self.blocks = standard_blocks(
            key,
            hidden_dim,
            num_blocks,
            sequence_mixer,
            channel_mixer,
            drop_rate,
            prenorm,
            norm,
            activation,
        )


def standard_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    sequence_mixer: Callable[..., AbstractSequenceMixer],
    channel_mixer: Callable[..., AbstractChannelMixer],
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
    activation: Callable[[Array], Array] | None = jax.nn.gelu,
) -> tuple[StandardBlock, ...]:
    hidden_dim = check_size("hidden_dim", hidden_dim)
    num_blocks = check_size("num_blocks", num_blocks)
    block = ft.partial(
        StandardBlock,
        hidden_dim,
        sequence_mixer=sequence_mixer,
        channel_mixer=channel_mixer,
        drop_rate=drop_rate,
        prenorm=prenorm,
        norm=norm,
        activation=activation,
    )
    return tuple(block(block_key) for block_key in jr.split(key, num_blocks))


def mixer_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    mixer: Callable[..., AbstractSequenceMixer],
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
) -> tuple[StandardBlock, ...]:
    """Blocks of a mixer that has a gate and projections of its own: nothing follows it."""
    return standard_blocks(
        key, hidden_dim, num_blocks, mixer, IdentityChannelMixer, drop_rate, prenorm, norm, None
    )


def residual_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    pattern: Sequence[Callable[..., AbstractSequenceMixer]],
    channel_mixer: Callable[..., AbstractChannelMixer],
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
) -> tuple[ResidualBlock, ...]:
    """Blocks of the mixers of the `pattern`, and over again, a channel mixer after each."""
    hidden_dim = check_size("hidden_dim", hidden_dim)
    num_blocks = check_size("num_blocks", num_blocks)
    block = ft.partial(
        ResidualBlock,
        hidden_dim,
        channel_mixer=channel_mixer,
        drop_rate=drop_rate,
        prenorm=prenorm,
        norm=norm,
    )
    return tuple(
        block(block_key, sequence_mixer=pattern[i % len(pattern)])
        for i, block_key in enumerate(jr.split(key, num_blocks))
    )


def geglu(hidden_dim: int, expansion: int, use_bias: bool) -> Callable[..., SwiGLU]:
    width = check_size("expansion", expansion) * check_size("hidden_dim", hidden_dim)
    return ft.partial(SwiGLU, intermediate_dim=width, use_bias=use_bias, non_linearity="gelu")


def swiglu(
    hidden_ratio: float, intermediate_dim: int | None, use_bias: bool
) -> Callable[..., SwiGLU]:
    """Of the `intermediate_dim`, or of the width that the ratio gives if that is None."""
    ratio = hidden_ratio if intermediate_dim is None else None
    return ft.partial(
        SwiGLU, hidden_ratio=ratio, intermediate_dim=intermediate_dim, use_bias=use_bias
    )
