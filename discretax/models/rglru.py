from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, geglu, residual_blocks
from discretax.sequence_mixers import GriffinSequenceMixer


class RGLRU(AbstractBackbone):
    """Hawk: Griffin's recurrent blocks with gated MLPs, and no attention (arXiv:2402.19427).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(RGLRU)(
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
        lru_width: int | None = None,
        num_heads: int = 1,
        conv_width: int = 4,
        a_min: float = 0.9,
        a_max: float = 0.999,
        use_bias: bool = True,
        expansion: int = 3,
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
        - `lru_width`, `num_heads`, `conv_width`, `a_min`, `a_max`: as in
            [`discretax.sequence_mixers.GriffinSequenceMixer`][].
        - `use_bias`: of all linear maps.
        - `expansion`: how many times wider than the stream the gated MLP is, a
            [`discretax.channel_mixers.SwiGLU`][] with GELU.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.blocks.ResidualBlock`][].
        - `channel_mixer`, `bidirectional`: as in [`discretax.models.Backbone`][]; the MLP if left out. The paper
            drops nothing.
        """
        mixer = directed(
            bidirectional,
            GriffinSequenceMixer,
            lru_width=lru_width,
            num_heads=num_heads,
            conv_width=conv_width,
            a_min=a_min,
            a_max=a_max,
            use_bias=use_bias,
        )
        mlp = geglu(type(self), channel_mixer, hidden_dim, expansion, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, (mixer,), mlp, drop_rate, prenorm, norm
        )
