import functools as ft

from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import ResidualBlock
from discretax.blocks._parts import ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, geglu, residual_blocks
from discretax.sequence_mixers import AttentionSequenceMixer, GriffinSequenceMixer


class Griffin(AbstractBackbone):
    """Griffin: two recurrent blocks, then one of local attention, over again (arXiv:2402.19427).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Griffin)(
            hidden_dim=64, window=256, key=key
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
        num_blocks: int = 6,
        num_heads: int = 4,
        num_kv_heads: int = 1,
        window: int = 1024,
        rotary_fraction: float = 0.5,
        lru_width: int | None = None,
        conv_width: int = 4,
        a_min: float = 0.9,
        a_max: float = 0.999,
        use_bias: bool = True,
        expansion: int = 3,
        drop_rate: float = 0.0,
        prenorm: bool = True,
        norm: Norm = "rms",
        channel_mixer: ChannelMixerMaker | None = None,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack; every third is attention.
        - `num_heads`: heads of the attention, and blocks of the recurrence's gates.
        - `num_kv_heads`, `window`, `rotary_fraction`: as in
            [`discretax.sequence_mixers.AttentionSequenceMixer`][].
        - `lru_width`, `conv_width`, `a_min`, `a_max`: as in
            [`discretax.sequence_mixers.GriffinSequenceMixer`][].
        - `use_bias`: of all linear maps but those to queries, keys and values.
        - `expansion`, `drop_rate`, `prenorm`, `norm`: as in [`discretax.models.RGLRU`][].
        """
        recurrent = ft.partial(
            GriffinSequenceMixer,
            lru_width=lru_width,
            num_heads=num_heads,
            conv_width=conv_width,
            a_min=a_min,
            a_max=a_max,
            use_bias=use_bias,
        )
        attention = ft.partial(
            AttentionSequenceMixer,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            window=window,
            rotary_fraction=rotary_fraction,
            out_bias=use_bias,
        )
        pattern = (recurrent, recurrent, attention)
        mlp = geglu(type(self), channel_mixer, hidden_dim, expansion, use_bias)
        self.blocks = residual_blocks(
            key, hidden_dim, num_blocks, pattern, mlp, drop_rate, prenorm, norm
        )
