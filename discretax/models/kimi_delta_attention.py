from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, residual_blocks, swiglu
from discretax.sequence_mixers import KimiDeltaAttentionSequenceMixer


class KimiDeltaAttention(AbstractBackbone):
    """Blocks of Kimi Delta Attention and a gated MLP (arXiv:2510.26692).

    Kimi Linear has experts in place of the MLP, and attention in each fourth block: see [Language
    models](../language-models.md).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(KimiDeltaAttention)(
            hidden_dim=64, num_heads=2, key=key
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
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = False,
        lower_bound: float | None = None,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        gate_bias: bool = True,
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
        - `num_heads`, `num_value_heads`, `head_dim`, `value_dim`, `conv_width`,
            `negative_eigenvalues`, `lower_bound`, `A_init_range`, `dt_min`, `dt_max`,
            `dt_init_floor`, `gate_bias`, `norm_eps`: as in
            [`discretax.sequence_mixers.KimiDeltaAttentionSequenceMixer`][].
        - `hidden_ratio`, `use_bias`: of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][].
        - `intermediate_dim`: the width of the MLP, instead of that which `hidden_ratio` gives.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        mixer = directed(
            bidirectional,
            KimiDeltaAttentionSequenceMixer,
            num_heads=num_heads,
            num_value_heads=num_value_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            conv_width=conv_width,
            negative_eigenvalues=negative_eigenvalues,
            lower_bound=lower_bound,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            gate_bias=gate_bias,
            norm_eps=norm_eps,
        )
        mlp = swiglu(type(self), channel_mixer, hidden_ratio, intermediate_dim, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
