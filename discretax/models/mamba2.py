import math

from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.channel_mixers import IdentityChannelMixer
from discretax.models._backbone import AbstractBackbone, directed, standard_blocks
from discretax.sequence_mixers import Mamba2SequenceMixer


class Mamba2(AbstractBackbone):
    r"""Mamba-2's blocks, $x \leftarrow x + \mathrm{mamba2}(\mathrm{rms}(x))$ (arXiv:2405.21060).

    The mixer has its own gate and projections: no channel mixer follows it.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Mamba2)(
            hidden_dim=64, head_dim=32, key=key
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
        state_dim: int = 128,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        use_bias: bool = False,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "rms",
        channel_mixer: ChannelMixerMaker = IdentityChannelMixer,
        activation: Activation = None,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `conv_width`, `expand`, `head_dim`, `num_groups`, `dt_min`, `dt_max`,
            `dt_init_floor`, `dt_limit`, `A_init_range`, `D_has_hdim`, `norm_eps`, `conv_bias`,
            `use_bias`: as in [`discretax.sequence_mixers.Mamba2SequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `channel_mixer`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][]. The paper
            drops nothing.
        """
        mixer = directed(
            bidirectional,
            Mamba2SequenceMixer,
            state_dim=state_dim,
            conv_width=conv_width,
            expand=expand,
            head_dim=head_dim,
            num_groups=num_groups,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            A_init_range=A_init_range,
            D_has_hdim=D_has_hdim,
            norm_eps=norm_eps,
            conv_bias=conv_bias,
            use_bias=use_bias,
        )
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
