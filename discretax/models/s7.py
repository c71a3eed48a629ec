from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.channel_mixers import IdentityChannelMixer
from discretax.models._backbone import AbstractBackbone, directed, standard_blocks
from discretax.sequence_mixers import S7SequenceMixer


class S7(AbstractBackbone):
    """S7's blocks: norm, the gated recurrence, sum (arXiv:2410.03464).

    They are large, about `2 * state_dim * hidden_dim**2` parameters each: see
    [`discretax.sequence_mixers.S7SequenceMixer`][].

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(S7)(hidden_dim=64, state_dim=16, key=key)
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
        state_dim: int = 64,
        a_min: float = 0.5,
        a_max: float = 0.999,
        use_bias: bool = False,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        norm: Norm = "batch",
        channel_mixer: ChannelMixerMaker = IdentityChannelMixer,
        activation: Activation = None,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `a_min`, `a_max`, `use_bias`: as in
            [`discretax.sequence_mixers.S7SequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `channel_mixer`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        """
        mixer = directed(
            bidirectional,
            S7SequenceMixer,
            state_dim=state_dim,
            a_min=a_min,
            a_max=a_max,
            use_bias=use_bias,
        )
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
