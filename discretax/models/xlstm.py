from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import check_size
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, residual_blocks, swiglu
from discretax.sequence_mixers import MLSTMSequenceMixer


class XLSTM(AbstractBackbone):
    """Blocks of mLSTM and a gated MLP, those of xLSTM 7B (arXiv:2503.13427).

    The first paper (arXiv:2405.04517) has other blocks around the mLSTM, and some of sLSTM.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(XLSTM)(
            hidden_dim=64, num_heads=2, intermediate_dim=192, key=key
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
        num_heads: int = 4,
        head_dim: int | None = None,
        value_dim: int | None = None,
        input_bias: float = -10.0,
        forget_bias: tuple[float, float] = (3.0, 6.0),
        gate_soft_cap: float | None = 15.0,
        norm_eps: float = 1e-6,
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
        - `num_heads`, `head_dim`, `value_dim`, `input_bias`, `forget_bias`, `gate_soft_cap`,
            `norm_eps`: as in [`discretax.sequence_mixers.MLSTMSequenceMixer`][].
        - `intermediate_dim`: width of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][]; 8/3 of
            `hidden_dim`, rounded up to a multiple of 64, if left out.
        - `use_bias`: of the mLSTM and of the MLP.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        hidden_dim = check_size("hidden_dim", hidden_dim)
        mixer = directed(
            bidirectional,
            MLSTMSequenceMixer,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            input_bias=input_bias,
            forget_bias=forget_bias,
            gate_soft_cap=gate_soft_cap,
            norm_eps=norm_eps,
            use_bias=use_bias,
        )
        if channel_mixer is None and intermediate_dim is None:
            intermediate_dim = 64 * -(-hidden_dim // 24)
        mlp = swiglu(type(self), channel_mixer, None, intermediate_dim, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
