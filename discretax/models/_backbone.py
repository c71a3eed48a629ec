"""The stack of blocks that every model is, stated once."""

import functools as ft
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_instance, check_maker, check_size, described
from discretax._stateful import check_state
from discretax.blocks import AbstractBlock, ResidualBlock, StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm, SequenceMixerMaker
from discretax.blocks.base import Samples
from discretax.channel_mixers import GLU, AbstractChannelMixer, SwiGLU
from discretax.sequence_mixers import AbstractSequenceMixer, Bidirectional

Block = TypeVar("Block", bound=AbstractBlock)


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
        sequence_mixer: SequenceMixerMaker,
        num_blocks: int = 4,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "batch",
        channel_mixer: ChannelMixerMaker = GLU,
        activation: Activation = jax.nn.gelu,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `sequence_mixer`, `channel_mixer`: functions `(in_features, *, key)` that make a mixer,
            called once per block: the class, or `functools.partial(SwiGLU, intermediate_dim=96)`.
        - `num_blocks`: how many blocks to stack.
        - `drop_rate`, `prenorm`, `norm`, `activation`: as in [`discretax.blocks.StandardBlock`][]. In
            training `norm="batch"` looks at later samples and at other sequences: to forecast, and
            for reinforcement learning, take `"layer"` or `"rms"`.
        - `bidirectional`: a mixer in each direction, [`discretax.sequence_mixers.Bidirectional`][];
            such a model needs whole sequences and does not stream.

        **Raises:** `TypeError` for mixers that are made already, which all blocks would share.
        """
        check_maker("sequence_mixer", sequence_mixer, AbstractSequenceMixer)
        self.blocks = standard_blocks(
            key,
            hidden_dim,
            num_blocks,
            directed(bidirectional, sequence_mixer),
            channel_mixer,
            drop_rate,
            prenorm,
            norm,
            activation,
        )


def directed(bidirectional: bool, mixer: SequenceMixerMaker, **options: Any) -> SequenceMixerMaker:
    """What makes the mixer of the `options`, or one in each direction."""
    mixer = ft.partial(mixer, **options)
    return ft.partial(Bidirectional, forward=mixer) if bidirectional else mixer


def standard_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    sequence_mixer: SequenceMixerMaker,
    channel_mixer: ChannelMixerMaker,
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
    activation: Activation,
) -> tuple[StandardBlock, ...]:
    make = ft.partial(StandardBlock, activation=activation)
    return _blocks(
        make,
        key,
        hidden_dim,
        num_blocks,
        (sequence_mixer,),
        channel_mixer,
        drop_rate,
        prenorm,
        norm,
    )


def residual_blocks(
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    pattern: Sequence[SequenceMixerMaker],
    channel_mixer: ChannelMixerMaker,
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
) -> tuple[ResidualBlock, ...]:
    """Blocks of the mixers of the `pattern`, and over again, a channel mixer after each."""
    return _blocks(
        ResidualBlock, key, hidden_dim, num_blocks, pattern, channel_mixer, drop_rate, prenorm, norm
    )


def _blocks(
    make: Callable[..., Block],
    key: PRNGKeyArray,
    hidden_dim: int,
    num_blocks: int,
    pattern: Sequence[SequenceMixerMaker],
    channel_mixer: ChannelMixerMaker,
    drop_rate: float,
    prenorm: bool,
    norm: Norm,
) -> tuple[Block, ...]:
    hidden_dim = check_size("hidden_dim", hidden_dim)
    num_blocks = check_size("num_blocks", num_blocks)
    check_maker("channel_mixer", channel_mixer, AbstractChannelMixer)
    return tuple(
        make(
            hidden_dim,
            block_key,
            sequence_mixer=pattern[i % len(pattern)],
            channel_mixer=channel_mixer,
            drop_rate=drop_rate,
            prenorm=prenorm,
            norm=norm,
        )
        for i, block_key in enumerate(draw.split(key, num_blocks))
    )


def glu(
    model: type[eqx.Module], channel_mixer: ChannelMixerMaker | None, use_bias: bool
) -> ChannelMixerMaker:
    """The `channel_mixer` that a user gives to the `model`, or its own, as the two below."""
    if channel_mixer is not None:
        return _alone(channel_mixer, model, use_bias=use_bias)
    return ft.partial(GLU, use_bias=use_bias)


def geglu(
    model: type[eqx.Module],
    channel_mixer: ChannelMixerMaker | None,
    hidden_dim: int,
    expansion: int,
    use_bias: bool,
) -> ChannelMixerMaker:
    if channel_mixer is not None:
        return _alone(channel_mixer, model, expansion=expansion)
    width = check_size("expansion", expansion) * check_size("hidden_dim", hidden_dim)
    return ft.partial(SwiGLU, intermediate_dim=width, use_bias=use_bias, non_linearity="gelu")


def swiglu(
    model: type[eqx.Module],
    channel_mixer: ChannelMixerMaker | None,
    hidden_ratio: float | None,
    intermediate_dim: int | None,
    use_bias: bool,
) -> ChannelMixerMaker:
    """Of the `intermediate_dim`, or of the width that the ratio gives if that is None."""
    widths = {"hidden_ratio": hidden_ratio, "intermediate_dim": intermediate_dim}
    if channel_mixer is not None:
        return _alone(channel_mixer, model, **widths, use_bias=use_bias)
    if intermediate_dim is not None:
        widths["hidden_ratio"] = None
    return ft.partial(SwiGLU, **widths, use_bias=use_bias)


def _alone(
    channel_mixer: ChannelMixerMaker, model: type[eqx.Module], **options: Any
) -> ChannelMixerMaker:
    """The channel mixer, beside which nothing would come of the options of the model's own."""
    arguments = inspect.signature(model).parameters
    for name, value in options.items():
        if name in arguments and value != arguments[name].default:
            raise ValueError(
                f"`{name}` is for the channel mixer that `{model.__name__}` makes itself; got {name}="
                f"{value!r} beside a `channel_mixer`. Give it to that one: "
                "`functools.partial(MyChannelMixer, ...)`."
            )
    return channel_mixer
