import jax
from jaxtyping import PRNGKeyArray

from discretax import sequence_mixers
from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, glu, standard_blocks
from discretax.ops import Route
from discretax.sequence_mixers.lti.centaurus import Discretization, Mode


class Centaurus(AbstractBackbone):
    """Blocks of Centaurus in one mode, and GLU (arXiv:2501.13230).

    The paper's networks change the mode from stage to stage, as a convolutional network changes
    its kind of convolution; build such a one from blocks.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(Centaurus)(
            hidden_dim=64, mode="dws", key=key
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
        mode: Mode = "neck",
        state_dim: int | None = None,
        sub_state_dim: int = 8,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
        route: Route = None,
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
        - `mode`, `state_dim`, `sub_state_dim`, `dt_min`, `dt_max`, `step_rescale`, `discretization`,
            `route`: as in [`discretax.sequence_mixers.Centaurus`][].
        - `drop_rate`, `prenorm`, `norm`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        - `channel_mixer`: as in [`discretax.models.Backbone`][]; a GLU with `use_bias` if left out.
        - `use_bias`: in the GLU.
        """
        mixer = directed(
            bidirectional,
            sequence_mixers.Centaurus,
            mode=mode,
            state_dim=state_dim,
            sub_state_dim=sub_state_dim,
            dt_min=dt_min,
            dt_max=dt_max,
            step_rescale=step_rescale,
            discretization=discretization,
            route=route,
        )
        channel_mixer = glu(type(self), channel_mixer, use_bias)
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, activation
        )
