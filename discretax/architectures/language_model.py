import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._features import check_maker, check_size, described
from discretax._stateful import check_state
from discretax._timeseries import Timeseries, valid_samples, values_of, with_values
from discretax._types import Values, check_floating, widened
from discretax.blocks import AbstractBlock, ResidualBlock, StandardBlock
from discretax.blocks._parts import Norm, NormLayer, make_norm
from discretax.blocks.base import normalise
from discretax.channel_mixers import AbstractChannelMixer, IdentityChannelMixer
from discretax.encoder import EmbeddingEncoder
from discretax.heads import LanguageModelHead
from discretax.models import AbstractBackbone, BlockStack, DeepBackbone
from discretax.ops import chunked_cross_entropy
from discretax.sequence_mixers import AbstractSequenceMixer, SumSequenceMixer

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
    residual_dtype: Any = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        vocab_size: int,
        hidden_dim: int,
        num_blocks: int,
        pattern: Sequence[Callable[..., AbstractSequenceMixer]] = (),
        blocks: Sequence[Callable[..., AbstractBlock]] = (),
        channel_mixer: Callable[..., AbstractChannelMixer] | None = None,
        norm: Norm = "rms",
        drop_rate: float = 0.0,
        tie_embeddings: bool = True,
        embedding_scale: float = 1.0,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
        initializer_range: float = 0.02,
        dtype: Any = None,
        residual_dtype: Any = None,
    ):
        r"""**Arguments:**

        - `key`: for the initialisation.
        - `vocab_size`: number of tokens.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `pattern`: functions `(in_features, *, key)` that make a sequence mixer, for the first,
            second, ... block, and over again.
        - `blocks`: in place of `pattern`, `channel_mixer` and `drop_rate`: functions
            `(in_features, *, key)` that make whole blocks, for models whose blocks differ by more
            than their mixer: `functools.partial(ResidualBlock, sequence_mixer=..., ...)`. With a
            `residual_dtype` they are also given the keyword `dtype`.
        - `channel_mixer`: a function that makes a channel mixer, to which each block then gives a
            norm and a residual sum of its own ([`discretax.blocks.ResidualBlock`][]). Without one,
            a block is the sequence mixer alone, as in Mamba.
        - `norm`: as in [`discretax.blocks.StandardBlock`][], in the blocks and after them.
        - `drop_rate`: as in [`discretax.blocks.StandardBlock`][].
        - `tie_embeddings`: the logits' weight is the embedding.
        - `embedding_scale`: $s$; Gemma takes `hidden_dim**0.5`.
        - `logit_scale`: what the logits are multiplied by, before the soft cap.
        - `soft_cap`: as in [`discretax.heads.LanguageModelHead`][].
        - `initializer_range`: standard deviation with which the embedding starts. The last map of
            each mixer starts divided by the root of the number of residual sums, as in GPT-2, where
            it has one: attention, Mamba, Griffin's mixer, those with a matrix state and `SwiGLU` do.
        - `dtype`: of the activations: `jnp.bfloat16` computes in it, while parameters, states and
            logits stay float32. That of the embedding if left out.
        - `residual_dtype`: of the residual stream, if it is another: with `jnp.float32` beside
            activations of `jnp.bfloat16` the sum over many blocks keeps its digits.

        **Raises:**

        `ValueError` for neither a pattern nor blocks, or both, sizes below one, or a
        `residual_dtype` without a `dtype`; `TypeError` for mixers or blocks that are made already,
        which the model would share.
        """
        vocab_size = check_size("vocab_size", vocab_size)
        hidden_dim = check_size("hidden_dim", hidden_dim)
        num_blocks = check_size("num_blocks", num_blocks)
        for name, makers, kind, example in (
            ("pattern", pattern, AbstractSequenceMixer, "(MambaSequenceMixer,)"),
            ("blocks", blocks, AbstractBlock, "(RWKV7Block,)"),
        ):
            if not isinstance(makers, Sequence) or isinstance(makers, str):
                raise TypeError(
                    f"`{name}` must be a sequence of functions that make an `{kind.__name__}`, such "
                    f"as `{example}`; got {described(makers)}."
                )
            for i, maker in enumerate(makers):
                check_maker(f"{name}[{i}]", maker, kind)
        if channel_mixer is not None:
            check_maker("channel_mixer", channel_mixer, AbstractChannelMixer)
        if bool(pattern) == bool(blocks):
            raise ValueError(
                "`pattern` must have a function that makes a sequence mixer for at least one "
                "block, or `blocks` one that makes a block; got "
                f"{'both' if pattern else 'none'}. Give `pattern=(MambaSequenceMixer,)`."
            )
        if blocks and (channel_mixer is not None or drop_rate):
            raise ValueError(
                "`channel_mixer` and `drop_rate` are options of the blocks that are made of a "
                "`pattern`; got them beside `blocks`. Give them to what makes the blocks."
            )
        check_floating("dtype", dtype)
        check_floating("residual_dtype", residual_dtype)
        if residual_dtype is not None and dtype is None:
            raise ValueError(
                "`residual_dtype` is that of a residual stream beside activations of another type; "
                f"got {residual_dtype} and no `dtype`. Give `dtype=jnp.bfloat16`."
            )
        embedding_key, head_key, *keys = draw.split(key, 2 + num_blocks)
        encoder = EmbeddingEncoder(embedding_key, num_classes=vocab_size, out_features=hidden_dim)
        self.encoder = eqx.tree_at(
            lambda e: e.embedding.weight, encoder, replace_fn=lambda w: initializer_range * w
        )
        block = (
            ft.partial(StandardBlock, channel_mixer=IdentityChannelMixer, activation=None)
            if channel_mixer is None
            else ft.partial(ResidualBlock, channel_mixer=channel_mixer)
        )
        makers = blocks or [
            ft.partial(block, sequence_mixer=mixer, norm=norm, drop_rate=drop_rate)
            for mixer in pattern
        ]
        types = {} if residual_dtype is None else {"dtype": dtype}
        made_blocks = [
            makers[i % len(makers)](hidden_dim, key=block_key, **types)
            for i, block_key in enumerate(keys)
        ]
        sums = sum(1 + isinstance(block, ResidualBlock) for block in made_blocks)
        self.backbone = BlockStack([_divided(block, sums**0.5) for block in made_blocks])
        self.norm = make_norm(norm, hidden_dim)
        head = LanguageModelHead(
            hidden_dim, vocab_size, head_key, soft_cap=soft_cap, scale=logit_scale
        )
        self.head = _with_weight(head, None) if tie_embeddings else head
        self.embedding_scale = embedding_scale
        self.tie_embeddings = tie_embeddings
        self.dtype = dtype
        self.residual_dtype = residual_dtype

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
        mask: Bool[Array, " time"] | None = None,
        chunk_size: int = 128,
    ) -> tuple[NextTokenLoss, eqx.nn.State]:
        """The cross-entropy of each token after the first, given those before it.

        Tokens at or past the `length` cost nothing, nor does the first of a document, which
        `resets` marks. The logits of `chunk_size` samples at most exist together: see
        [`discretax.ops.chunked_cross_entropy`][].

        **Arguments:** as those of `__call__`; `mask`, True for the tokens that are to be predicted,
        such as those of the answers alone; `chunk_size`.

        **Returns:** the sum and the number of tokens predicted, and the new state. For a batch,
        `losses.total.sum() / losses.count.sum()`.

        **Raises:** `ValueError` for a mask that is not one boolean per token.
        """
        tokens = values_of(x)
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != tokens.shape or mask.dtype != bool:
                raise ValueError(
                    f"`mask` must be one boolean per token, bool{tokens.shape}; got "
                    f"{mask.dtype}{mask.shape}. It says which tokens are predicted."
                )
        hidden, state = self._hidden(x, state, key)
        head = widened(self._head(), hidden)  # in which the gradients of all chunks are added up
        losses = chunked_cross_entropy(head.logits, hidden[:-1], tokens[1:], chunk_size=chunk_size)
        counted = jnp.ones(losses.shape, bool) if mask is None else mask[1:]
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
        given = (self.residual_dtype, self.dtype, values.dtype)
        values = values.astype(next(dtype for dtype in given if dtype is not None))
        values = values * self.embedding_scale
        x, state = self.backbone(with_values(x, values), state, key=key)
        hidden, state = normalise(self.norm, values_of(x), state, x)
        return hidden if self.dtype is None else hidden.astype(self.dtype), state

    def _head(self) -> LanguageModelHead:
        embedding = self.encoder.embedding.weight
        return _with_weight(self.head, embedding) if self.tie_embeddings else self.head


def _with_weight(head: LanguageModelHead, weight: Array | None) -> LanguageModelHead:
    return eqx.tree_at(lambda h: h.weight, head, weight, is_leaf=lambda node: node is None)


def _divided(block: AbstractBlock, divisor: float) -> AbstractBlock:
    def where(block):
        mixer = block.sequence_mixer
        mixers = mixer.mixers if isinstance(mixer, SumSequenceMixer) else (mixer,)
        mixers = (*mixers, getattr(block, "channel_mixer", None))
        maps = [_at(mixer, name) for mixer in mixers for name in RESIDUAL_MAPS]
        return [layer.weight for layer in maps if layer is not None]

    return eqx.tree_at(where, block, replace_fn=lambda w: w / divisor) if where(block) else block


def _at(mixer: Any, path: str) -> Any:
    """None where there is no such thing."""
    return ft.reduce(lambda part, name: getattr(part, name, None), path.split("."), mixer)
