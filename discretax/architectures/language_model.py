import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._features import check_maker, check_size, described
from discretax._stateful import check_state
from discretax._timeseries import Timeseries, valid_samples, values_of, with_values
from discretax._types import Values, widened
from discretax.blocks import AbstractBlock, ResidualBlock, StandardBlock
from discretax.blocks._parts import Norm, NormLayer, make_norm
from discretax.blocks.base import normalise
from discretax.channel_mixers import AbstractChannelMixer, IdentityChannelMixer
from discretax.encoder import EmbeddingEncoder
from discretax.heads import LanguageModelHead
from discretax.models import AbstractBackbone, BlockStack, DeepBackbone
from discretax.ops import chunked_cross_entropy
from discretax.sequence_mixers import AbstractSequenceMixer

# The last maps of mixers, which write into the residual stream.
RESIDUAL_MAPS = ("out_proj", "output.out_proj", "linear_out", "down_proj")


class NextTokenLoss(NamedTuple):
    """What predicting the tokens of a sequence costs: `total / count` is the mean, in nats."""

    total: Float[Array, ""]
    count: Float[Array, ""]


class LanguageModel(eqx.nn.StatefulLayer):
    r"""Embedding, blocks of any mixers, a last norm, and logits of the next token.

    $$x = s\,E[\mathrm{tokens}], \qquad x \leftarrow \mathrm{blocks}(x), \qquad
    \mathrm{logits} = W\,\mathrm{norm}(x)$$

    where $W$ is the embedding $E$ again if the two are tied.

    !!! example

        ```python
        recurrent = functools.partial(GriffinSequenceMixer, num_heads=4)
        attention = functools.partial(AttentionSequenceMixer, num_heads=4, window=256)
        model, state = eqx.nn.make_with_state(LanguageModel)(
            key,
            vocab_size=256,
            hidden_dim=128,
            num_blocks=6,
            pattern=(recurrent, recurrent, attention),
            channel_mixer=functools.partial(SwiGLU, intermediate_dim=384),
        )
        logits, state = model(tokens, state)  # (time,) -> (time, 256)
        ```
    """

    encoder: EmbeddingEncoder
    backbone: AbstractBackbone | DeepBackbone
    norm: NormLayer
    head: LanguageModelHead
    embedding_scale: float = eqx.field(static=True)
    tie_embeddings: bool = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        vocab_size: int,
        hidden_dim: int,
        num_blocks: int,
        pattern: Sequence[Callable[..., AbstractSequenceMixer]],
        channel_mixer: Callable[..., AbstractChannelMixer] | None = None,
        norm: Norm = "rms",
        drop_rate: float = 0.0,
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        soft_cap: float | None = None,
        initializer_range: float = 0.02,
        dtype: Any = None,
    ):
        r"""**Arguments:**

        - `key`: for the initialisation.
        - `vocab_size`: number of tokens.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `pattern`: functions `(in_features, *, key)` that make a sequence mixer, for the first,
            second, ... block, and over again.
        - `channel_mixer`: a function that makes a channel mixer, to which each block then gives a
            norm and a residual sum of its own ([`discretax.blocks.ResidualBlock`][]). Without one,
            a block is the sequence mixer alone, as in Mamba.
        - `norm`: as in [`discretax.blocks.StandardBlock`][], in the blocks and after them.
        - `drop_rate`: as in [`discretax.blocks.StandardBlock`][].
        - `tie_embeddings`: the logits' weight is the embedding.
        - `embedding_scale`: $s$; Gemma takes `hidden_dim**0.5`.
        - `soft_cap`: as in [`discretax.heads.LanguageModelHead`][].
        - `initializer_range`: standard deviation with which the embedding starts. The last map of
            each mixer starts divided by the root of the number of residual sums, as in GPT-2, where
            it has one: attention, Mamba, Griffin's mixer, those with a matrix state and `SwiGLU` do.
        - `dtype`: of the activations: `jnp.bfloat16` computes in it, while parameters, states and
            logits stay float32. That of the embedding if left out.

        **Raises:**

        `ValueError` for an empty pattern, or sizes below one; `TypeError` for mixers that are made
        already, which several blocks would share.
        """
        vocab_size = check_size("vocab_size", vocab_size)
        hidden_dim = check_size("hidden_dim", hidden_dim)
        num_blocks = check_size("num_blocks", num_blocks)
        if not isinstance(pattern, Sequence) or isinstance(pattern, str):
            raise TypeError(
                "`pattern` must be a sequence of functions that make a sequence mixer, such as "
                f"`(MambaSequenceMixer,)`; got {described(pattern)}."
            )
        for i, mixer in enumerate(pattern):
            check_maker(f"pattern[{i}]", mixer, AbstractSequenceMixer)
        if channel_mixer is not None:
            check_maker("channel_mixer", channel_mixer, AbstractChannelMixer)
        if not pattern:
            raise ValueError(
                "`pattern` must have a function that makes a sequence mixer for at least one "
                "block; got none. Give `pattern=(MambaSequenceMixer,)`."
            )
        embedding_key, head_key, *keys = jr.split(key, 2 + num_blocks)
        encoder = EmbeddingEncoder(embedding_key, num_classes=vocab_size, out_features=hidden_dim)
        self.encoder = eqx.tree_at(
            lambda e: e.embedding.weight, encoder, replace_fn=lambda w: initializer_range * w
        )
        make = (
            ft.partial(StandardBlock, channel_mixer=IdentityChannelMixer, activation=None)
            if channel_mixer is None
            else ft.partial(ResidualBlock, channel_mixer=channel_mixer)
        )
        sums = num_blocks * (1 if channel_mixer is None else 2)
        self.backbone = BlockStack(
            [
                _divided(
                    make(
                        hidden_dim,
                        key,
                        sequence_mixer=pattern[i % len(pattern)],
                        norm=norm,
                        drop_rate=drop_rate,
                    ),
                    sums**0.5,
                )
                for i, key in enumerate(keys)
            ]
        )
        self.norm = make_norm(norm, hidden_dim)
        head = LanguageModelHead(hidden_dim, vocab_size, head_key, soft_cap=soft_cap)
        self.head = _with_weight(head, None) if tie_embeddings else head
        self.embedding_scale = embedding_scale
        self.tie_embeddings = tie_embeddings
        self.dtype = dtype

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "time tokens"], eqx.nn.State]:
        """**Arguments:** `x`: `(time,)` tokens, or a [`discretax.Timeseries`][] of such, with `resets`
        where documents begin; `state`; `key`, for dropout.

        **Returns:** the logits of the token after each, and the new state.
        """
        hidden, state = self._hidden(x, state, key)
        return each_sample(x, self._head().logits, hidden), state

    def loss(
        self,
        x: Array | Timeseries,
        state: eqx.nn.State,
        key: PRNGKeyArray | None = None,
        *,
        chunk_size: int = 128,
    ) -> tuple[NextTokenLoss, eqx.nn.State]:
        """The cross-entropy of each token after the first, given those before it.

        Tokens at or past the `length` cost nothing, nor does the first of a document, which
        `resets` marks. The logits of `chunk_size` samples at most exist together: see
        [`discretax.ops.chunked_cross_entropy`][].

        **Arguments:** as those of `__call__`; `chunk_size`.

        **Returns:** the sum and the number of tokens predicted, and the new state. For a batch,
        `losses.total.sum() / losses.count.sum()`.
        """
        tokens = values_of(x)
        hidden, state = self._hidden(x, state, key)
        head = widened(self._head(), hidden)  # in which the gradients of all chunks are added up
        losses = chunked_cross_entropy(head.logits, hidden[:-1], tokens[1:], chunk_size=chunk_size)
        counted = jnp.ones(losses.shape, bool)
        if isinstance(x, Timeseries):
            if x.length is not None:
                counted &= valid_samples(tokens.shape[0], x.length)[1:]
            if x.resets is not None:
                counted &= ~x.resets[1:]
        total = jnp.where(counted, losses, 0).sum()
        return NextTokenLoss(total, counted.sum(dtype=total.dtype)), state

    def _hidden(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None
    ) -> tuple[Values, eqx.nn.State]:
        check_state(state, self)
        x, state = self.encoder(x, state)
        values = values_of(x)
        values = values if self.dtype is None else values.astype(self.dtype)
        x, state = self.backbone(with_values(x, values * self.embedding_scale), state, key=key)
        return normalise(self.norm, values_of(x), state, x)

    def _head(self) -> LanguageModelHead:
        embedding = self.encoder.embedding.weight
        return _with_weight(self.head, embedding) if self.tie_embeddings else self.head


def _with_weight(head: LanguageModelHead, weight: Array | None) -> LanguageModelHead:
    return eqx.tree_at(lambda h: h.weight, head, weight, is_leaf=lambda node: node is None)


def _divided(block: AbstractBlock, divisor: float) -> AbstractBlock:
    def where(block):
        mixers = (block.sequence_mixer, block.channel_mixer)
        maps = [_at(mixer, name) for mixer in mixers for name in RESIDUAL_MAPS]
        return [layer.weight for layer in maps if layer is not None]

    return eqx.tree_at(where, block, replace_fn=lambda w: w / divisor) if where(block) else block


def _at(mixer: eqx.Module, path: str) -> Any:
    """None where there is no such thing."""
    return ft.reduce(lambda part, name: getattr(part, name, None), path.split("."), mixer)
