from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray, PyTree

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._dropout import make_dropout
from discretax._features import check_positive, check_size
from discretax._stateful import samples_of
from discretax._timeseries import with_values
from discretax.blocks.base import AbstractBlock, Samples, mixer_options, normalise
from discretax.sequence_mixers import RWKV7ChannelMixer, RWKV7SequenceMixer


class RWKV7Block(AbstractBlock):
    r"""A layer of RWKV-7: time mixing and channel mixing, which both look back by a sample.

    $$x \leftarrow x + \mathrm{drop}(\mathrm{time}(\mathrm{ln}(x))), \qquad
    x \leftarrow x + \mathrm{drop}(\mathrm{channel}(\mathrm{ln}(x)))$$

    The first layer's values are what those of all layers lean on. They travel beside the features: the
    first of several layers puts out samples of twice the width, those that follow take such samples,
    and the last puts out the features alone. The first one also normalises what it is given.

    ??? cite

        Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, 2025 (arXiv:2503.14456).
    """

    input_norm: eqx.nn.LayerNorm | None
    sequence_norm: eqx.nn.LayerNorm
    sequence_mixer: RWKV7SequenceMixer
    channel_norm: eqx.nn.LayerNorm
    channel_mixer: RWKV7ChannelMixer
    dropout: eqx.nn.Dropout
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    hidden_dim: int = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        hidden_dim: int,
        key: PRNGKeyArray,
        *,
        layer: int = 0,
        num_layers: int = 1,
        head_dim: int = 64,
        decay_rank: int | None = None,
        strength_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        intermediate_dim: int | None = None,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        head_norm_eps: float = 64e-5,
    ):
        """**Arguments:**

        - `hidden_dim`: width of the features.
        - `key`: for the initialisation.
        - `layer`, `num_layers`: where in the model the block stands, from 0.
        - `head_dim`, `decay_rank`, `strength_rank`, `value_rank`, `gate_rank`: as in
            [`discretax.sequence_mixers.RWKV7SequenceMixer`][].
        - `intermediate_dim`: as in [`discretax.sequence_mixers.RWKV7ChannelMixer`][].
        - `drop_rate`: probability with which dropout zeroes a feature.
        - `norm_eps`: added to the variances of the norms of the features.
        - `head_norm_eps`: added to those of the heads.

        **Raises:**

        `ValueError` for sizes that do not fit, a layer that the model has not, a rate outside
        [0, 1), or an eps that is not positive.
        """
        hidden_dim = check_size("hidden_dim", hidden_dim)
        check_positive("norm_eps", norm_eps)
        sequence_key, channel_key = draw.split(key)
        first, last = layer == 0, layer == num_layers - 1
        takes, gives = not first, first and not last
        self.sequence_mixer = RWKV7SequenceMixer(
            hidden_dim,
            sequence_key,
            head_dim=head_dim,
            decay_rank=decay_rank,
            strength_rank=strength_rank,
            value_rank=value_rank,
            gate_rank=gate_rank,
            value_residual="takes" if takes else "gives" if gives else None,
            layer=layer,
            num_layers=num_layers,
            norm_eps=head_norm_eps,
        )
        self.channel_mixer = RWKV7ChannelMixer(
            hidden_dim,
            channel_key,
            intermediate_dim=intermediate_dim,
            layer=layer,
            num_layers=num_layers,
        )
        norm = lambda: eqx.nn.LayerNorm(hidden_dim, eps=norm_eps)
        self.input_norm = norm() if first else None
        self.sequence_norm = norm()
        self.channel_norm = norm()
        self.dropout = make_dropout(drop_rate)
        self.in_features = self.sequence_mixer.in_features
        self.hidden_dim = hidden_dim
        self.out_features = hidden_dim if last else 2 * hidden_dim

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> PyTree:
        """Of the mixer of time, and of that of channels."""
        return (
            self.sequence_mixer.allocate_inference_cache(batch_size, max_seqlen, dtype),
            self.channel_mixer.allocate_inference_cache(batch_size, max_seqlen, dtype),
        )

    def __call__(
        self, x: Samples, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Samples, eqx.nn.State]:
        u = samples_of(x, state, self, self.in_features)
        keys = (None, None) if key is None else jr.split(key)
        caches = self.read_cache(state) if self.streaming else (None, None)
        options = mixer_options(x)
        u, values = jnp.split(u, [self.hidden_dim], axis=-1)
        if self.input_norm is not None:
            u, state = normalise(self.input_norm, u, state, x)

        mixed, state = normalise(self.sequence_norm, u, state, x)
        mixed = jnp.concatenate([mixed, values], axis=-1)
        mixed, cache = self.sequence_mixer(mixed, caches[0], **options)
        mixed, values = jnp.split(mixed, [self.hidden_dim], axis=-1)
        u = u + self.drop(mixed, keys[0])

        mixed, state = normalise(self.channel_norm, u, state, x)
        mixed, channel_cache = self.channel_mixer(mixed, caches[1], **options)
        u = u + self.drop(mixed, keys[1])

        state = self.write_cache(state, (cache, channel_cache))
        if self.out_features > self.hidden_dim:
            u = jnp.concatenate([u, values], axis=-1)
        return with_values(x, u), state
