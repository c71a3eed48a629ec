from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, residual_blocks, swiglu
from discretax.sequence_mixers import GLASequenceMixer


class GLA(AbstractBackbone):
    """Blocks of gated linear attention and a gated MLP (arXiv:2312.06635).

    The paper writes layer norms; its authors' code takes RMS norms, as here.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(GLA)(
            hidden_dim=64, num_heads=2, hidden_ratio=2.0, key=key
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
        conv_width: int | None = None,
        decay_rank: int = 16,
        temperature: float = 16.0,
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
        - `num_heads`, `head_dim`, `value_dim`, `conv_width`, `decay_rank`, `temperature`,
            `norm_eps`: as in [`discretax.sequence_mixers.GLASequenceMixer`][].
        - `hidden_ratio`, `use_bias`: of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][].
        - `intermediate_dim`: the width of the MLP, instead of that which `hidden_ratio` gives.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        mixer = directed(
            bidirectional,
            GLASequenceMixer,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            conv_width=conv_width,
            decay_rank=decay_rank,
            temperature=temperature,
            norm_eps=norm_eps,
        )
        mlp = swiglu(type(self), channel_mixer, hidden_ratio, intermediate_dim, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
