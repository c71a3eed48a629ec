"""Filters for a signal, and a U-Net that opens and closes them."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from discretax.architectures import UNet
from discretax.blocks import StandardBlock
from discretax.channel_mixers import IdentityChannelMixer
from discretax.encoder import PatchEncoder
from discretax.sequence_mixers import S5SequenceMixer


class Denoiser(eqx.nn.StatefulLayer):
    r"""Filters, of which a U-Net says how far each is open.

    $$u = E x + \mathrm{S5}(E x), \qquad y = V \, (\sigma(\mathrm{unet}(\log u^2)) \cdot u)$$

    The samples $x$ lie in patches, and the filters are a linear recurrence over them. What is twice as
    loud comes out nearly twice as loud. It looks ahead to the end of a hop, `patch * stride` samples,
    for which a stream waits anyway: that comes in chunks of whole hops.
    """

    encoder: PatchEncoder
    filters: StandardBlock
    unet: UNet
    decoder: eqx.nn.Linear

    def __init__(
        self,
        key: jax.Array,
        *,
        filters: int,
        width: int,
        blocks: int,
        sequence_mixer,
        patch: int = 16,
        stride: int = 4,
    ):
        """**Arguments:** `filters`, how many; `width` of the U-Net, and twice that behind its `stride`;
        `blocks` in each of its stages, of the `sequence_mixer`; `patch`, how many samples lie in one."""
        keys = jr.split(key, 4)
        self.encoder = PatchEncoder(1, filters, keys[0], patch_size=patch)
        self.filters = StandardBlock(
            filters,
            keys[1],
            sequence_mixer=partial(S5SequenceMixer, state_dim=64),
            channel_mixer=IdentityChannelMixer,
            norm=None,
            activation=None,
            drop_rate=0.0,
        )
        self.unet = UNet(
            filters,
            filters,
            keys[2],
            sequence_mixer=sequence_mixer,
            widths=(width, 2 * width),
            strides=(stride,),
            blocks_per_stage=blocks,
            causal=False,
        )
        self.decoder = eqx.nn.Linear(filters, patch, use_bias=False, key=keys[3])

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array | None = None):
        """From (time, 1) to (time, 1), and the state; the time is a multiple of the patch."""
        del key
        u, state = self.encoder(x, state)
        u, state = self.filters(u, state)
        opening, state = self.unet(jnp.log(u**2 + 1e-4), state)
        y = jax.vmap(self.decoder)(jax.nn.sigmoid(opening) * u)
        return y.reshape(x.shape), state
