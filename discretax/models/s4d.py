from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.models._backbone import AbstractBackbone, directed, glu
from discretax.models._gated import gated_blocks
from discretax.ops import Route
from discretax.sequence_mixers import S4DSequenceMixer
from discretax.sequence_mixers.lti._s4_parameters import StepTransform, Transform
from discretax.sequence_mixers.lti.s4d import Discretization, Init
from discretax.sequence_mixers.wrappers.gated import exact_gelu


class S4D(AbstractBackbone):
    """Blocks of S4D, exact GELU and GLU (arXiv:2206.11893).

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(S4D)(
            hidden_dim=64, state_dim=32, init="inv", key=key
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
        init: Init = "lin",
        n_ssm: int | None = None,
        channels: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: StepTransform = "exp",
        real_transform: Transform = "exp",
        imag_transform: Transform = "none",
        is_real: bool = False,
        deterministic: bool = False,
        l_max: int | None = None,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
        route: Route = None,
        bottleneck: int | None = None,
        gate: int | None = None,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        use_bias: bool = True,
        norm: Norm = "batch",
        channel_mixer: ChannelMixerMaker | None = None,
        activation: Activation = exact_gelu,
        bidirectional: bool = False,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `init`, `n_ssm`, `channels`, `dt_min`, `dt_max`, `dt_tie`, `dt_transform`,
            `real_transform`, `imag_transform`, `is_real`, `deterministic`, `l_max`, `step_rescale`,
            `discretization`, `route`: as in [`discretax.sequence_mixers.S4DSequenceMixer`][].
        - `bottleneck`, `gate`: as in [`discretax.sequence_mixers.GatedSequenceMixer`][]; without
            both, the mixer stands alone.
        - `drop_rate`, `prenorm`, `norm`, `activation`, `bidirectional`: as in
            [`discretax.models.Backbone`][].
        - `channel_mixer`: as in [`discretax.models.Backbone`][]; a GLU with `use_bias` if left out.
        - `use_bias`: in the GLU.
        """
        mixer = directed(
            bidirectional,
            S4DSequenceMixer,
            state_dim=state_dim,
            init=init,
            n_ssm=n_ssm,
            channels=channels,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_tie=dt_tie,
            dt_transform=dt_transform,
            real_transform=real_transform,
            imag_transform=imag_transform,
            is_real=is_real,
            deterministic=deterministic,
            l_max=l_max,
            step_rescale=step_rescale,
            discretization=discretization,
            route=route,
        )
        self.blocks = gated_blocks(
            key,
            hidden_dim,
            num_blocks,
            mixer,
            bottleneck,
            gate,
            glu(type(self), channel_mixer, use_bias),
            drop_rate,
            prenorm,
            norm,
            activation,
        )
