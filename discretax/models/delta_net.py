from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, glu, standard_blocks
from discretax.sequence_mixers import DeltaNetSequenceMixer
from discretax.sequence_mixers.ltv._matrix_memory import l2_normalised


class DeltaNet(AbstractBackbone):
    """Blocks of DeltaNet and GLU (arXiv:2406.06484).

    The paper's own blocks are those of [`discretax.models.GatedDeltaNet`][] around this mixer.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(DeltaNet)(
            hidden_dim=64, negative_eigenvalues=True, key=key
        )
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    blocks: tuple[StandardBlock, ...]

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        hidden_dim: int,
        num_blocks: int = 4,
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int | None = 4,
        shared_beta: bool = False,
        negative_eigenvalues: bool = False,
        gate: bool = False,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        scale: float | None = None,
        activation: Literal["silu"] | None = "silu",
        key_norm: Callable[[Array], Array] = l2_normalised,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        use_bias: bool = False,
        norm: Norm = "batch",
        channel_mixer: ChannelMixerMaker | None = None,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `num_heads`, `head_dim`, `value_dim`, `conv_width`, `shared_beta`, `negative_eigenvalues`,
            `gate`, `output_norm`, `norm_eps`, `scale`, `activation`, `key_norm`: as in
            [`discretax.sequence_mixers.DeltaNetSequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        - `channel_mixer`: as in [`discretax.models.Backbone`][]; a GLU with `use_bias` if left out.
        - `use_bias`: in the GLU.
        """
        mixer = directed(
            bidirectional,
            DeltaNetSequenceMixer,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            conv_width=conv_width,
            shared_beta=shared_beta,
            negative_eigenvalues=negative_eigenvalues,
            gate=gate,
            output_norm=output_norm,
            norm_eps=norm_eps,
            scale=scale,
            activation=activation,
            key_norm=key_norm,
        )
        channel_mixer = glu(type(self), channel_mixer, use_bias)
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, jax.nn.gelu
        )
