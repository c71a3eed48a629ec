import math

import jax
from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, glu, standard_blocks
from discretax.sequence_mixers import LRUSequenceMixer


class LRU(AbstractBackbone):
    """Blocks of LRU and GLU (arXiv:2303.06349).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(LRU)(
            hidden_dim=64, state_dim=128, r_min=0.9, key=key
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
        state_dim: int = 64,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        use_bias: bool = True,
        norm: Norm = "batch",
        channel_mixer: ChannelMixerMaker | None = None,
        activation: Activation = jax.nn.gelu,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `r_min`, `r_max`, `max_phase`: as in
            [`discretax.sequence_mixers.LRUSequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        - `channel_mixer`: as in [`discretax.models.Backbone`][]; a GLU with `use_bias` if left out.
        - `use_bias`: in the GLU.
        """
        mixer = directed(
            bidirectional,
            LRUSequenceMixer,
            state_dim=state_dim,
            r_min=r_min,
            r_max=r_max,
            max_phase=max_phase,
        )
        channel_mixer = glu(type(self), channel_mixer, use_bias)
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
