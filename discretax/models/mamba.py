from typing import Literal

from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.channel_mixers import IdentityChannelMixer
from discretax.models._backbone import AbstractBackbone, directed, standard_blocks
from discretax.ops._selective_scan.selective_scan import SelectiveDiscretization
from discretax.sequence_mixers import MambaSequenceMixer
from discretax.sequence_mixers.ltv.mamba import StepInit


class Mamba(AbstractBackbone):
    r"""Mamba's blocks, $x \leftarrow x + \mathrm{mamba}(\mathrm{rms}(x))$ (arXiv:2312.00752).

    The mixer has its own gate and projections: no channel mixer follows it. Event-driven with
    `event=True` (arXiv:2411.12603).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Mamba)(
            hidden_dim=64, state_dim=32, key=key
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
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: StepInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        use_bias: bool = False,
        discretization: SelectiveDiscretization = "mamba",
        event: bool = False,
        b_c_dt_rms_eps: float | None = None,
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
        - `state_dim`, `conv_width`, `expand`, `dt_rank`, `dt_min`, `dt_max`, `dt_init`, `dt_scale`,
            `dt_init_floor`, `conv_bias`, `use_bias`, `discretization`, `event`,
            `b_c_dt_rms_eps`: as in [`discretax.sequence_mixers.MambaSequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `channel_mixer`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][]. The paper
            drops nothing.
        """
        mixer = directed(
            bidirectional,
            MambaSequenceMixer,
            state_dim=state_dim,
            conv_width=conv_width,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            use_bias=use_bias,
            discretization=discretization,
            event=event,
            b_c_dt_rms_eps=b_c_dt_rms_eps,
        )
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
