from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, residual_blocks, swiglu
from discretax.sequence_mixers import Mamba3SequenceMixer
from discretax.sequence_mixers.ltv.mamba3 import Rate


class Mamba3(AbstractBackbone):
    """Blocks of Mamba-3 and a gated MLP (arXiv:2603.15569).

    Unlike the first two, Mamba-3 stands beside an MLP, as attention does in a transformer.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Mamba3)(
            hidden_dim=64, head_dim=32, rank=4, key=key
        )
        y, state = eqx.nn.inference_mode(model)(x, state)  # x, y: (time, 64)
        ```
    """

    blocks: tuple[ResidualBlock, ...]

    @keyed
    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        hidden_dim: int,
        num_blocks: int = 4,
        state_dim: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        rank: int | None = None,
        rotary_fraction: float = 0.5,
        rate: Rate = "softplus",
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        output_norm: bool = False,
        norm_eps: float = 1e-5,
        hidden_ratio: float = 4.0,
        intermediate_dim: int | None = None,
        use_bias: bool = False,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "rms",
        channel_mixer: ChannelMixerMaker | None = None,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `expand`, `head_dim`, `num_groups`, `rank`, `rotary_fraction`, `rate`,
            `A_floor`, `dt_min`, `dt_max`, `dt_init_floor`, `output_norm`, `norm_eps`: as in
            [`discretax.sequence_mixers.Mamba3SequenceMixer`][].
        - `hidden_ratio`, `use_bias`: of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][].
        - `intermediate_dim`: the width of the MLP, instead of that which `hidden_ratio` gives.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        mixer = directed(
            bidirectional,
            Mamba3SequenceMixer,
            state_dim=state_dim,
            expand=expand,
            head_dim=head_dim,
            num_groups=num_groups,
            rank=rank,
            rotary_fraction=rotary_fraction,
            rate=rate,
            A_floor=A_floor,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            output_norm=output_norm,
            norm_eps=norm_eps,
        )
        mlp = swiglu(type(self), channel_mixer, hidden_ratio, intermediate_dim, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
