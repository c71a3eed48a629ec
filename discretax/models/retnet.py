from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, residual_blocks, swiglu
from discretax.sequence_mixers import RetentionSequenceMixer


class RetNet(AbstractBackbone):
    """Blocks of multi-scale retention and a gated MLP (arXiv:2307.08621).

    As the authors' code has them since 2023: the paper has layer norms, and an MLP without a gate
    that is twice as wide as the stream, which has as many parameters as the gated one of
    `hidden_ratio=2`.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(RetNet)(
            hidden_dim=64, num_heads=4, key=key
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
        rotary_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        hidden_ratio: float = 2.0,
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
        - `num_heads`, `head_dim`, `value_dim`, `rotary_base`, `norm_eps`: as in
            [`discretax.sequence_mixers.RetentionSequenceMixer`][].
        - `hidden_ratio`, `use_bias`: of the gated MLP, a [`discretax.channel_mixers.SwiGLU`][].
        - `intermediate_dim`: the width of the MLP, instead of that which `hidden_ratio` gives.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out.
        """
        mixer = directed(
            bidirectional,
            RetentionSequenceMixer,
            num_heads=num_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            rotary_base=rotary_base,
            norm_eps=norm_eps,
        )
        mlp = swiglu(type(self), channel_mixer, hidden_ratio, intermediate_dim, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
