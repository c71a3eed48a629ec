import math

import jax
from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, glu, standard_blocks
from discretax.sequence_mixers import LinOSSSequenceMixer
from discretax.sequence_mixers.lti.linoss import Discretization


class LinOSS(AbstractBackbone):
    """Blocks of LinOSS and GLU (arXiv:2410.03943, arXiv:2505.12171).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(LinOSS)(
            hidden_dim=64, state_dim=32, damping=False, key=key
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
        discretization: Discretization = "IMEX",
        damping: bool = True,
        r_min: float = 0.9,
        theta_max: float = math.pi,
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
        - `state_dim`, `discretization`, `damping`, `r_min`, `theta_max`: as in
            [`discretax.sequence_mixers.LinOSSSequenceMixer`][].
        - `drop_rate`, `prenorm`, `norm`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        - `channel_mixer`: as in [`discretax.models.Backbone`][]; a GLU with `use_bias` if left out.
        - `use_bias`: in the GLU.
        """
        mixer = directed(
            bidirectional,
            LinOSSSequenceMixer,
            state_dim=state_dim,
            discretization=discretization,
            damping=damping,
            r_min=r_min,
            theta_max=theta_max,
        )
        channel_mixer = glu(type(self), channel_mixer, use_bias)
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
