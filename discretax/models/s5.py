import functools as ft
from typing import Literal

import jax
from jaxtyping import PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import check_name
from discretax.blocks import StandardBlock
from discretax.blocks._parts import Activation, ChannelMixerMaker, Norm
from discretax.channel_mixers import HalfGLU, IdentityChannelMixer
from discretax.models._backbone import AbstractBackbone, glu, standard_blocks
from discretax.sequence_mixers import BidirectionalS5, S5SequenceMixer
from discretax.sequence_mixers.lti.s5 import Discretization, OutputInit

Name = Literal["full_glu", "half_glu1", "half_glu2", "gelu"]


class S5(AbstractBackbone):
    r"""Blocks of S5 and GLU (arXiv:2208.04933); event-driven with timesteps (arXiv:2404.18508).

    Between the S5 layer's output $z$ and the residual sum, with $u = \mathrm{gelu}(z)$, stands

    | `activation` | |
    |---|---|
    | `"full_glu"` | $(W_1 u + b_1) \odot \sigma(W_2 u + b_2)$ |
    | `"half_glu1"` | $u \odot \sigma(W u + b)$ |
    | `"half_glu2"` | $z \odot \sigma(W u + b)$, as in event-driven S5 |
    | `"gelu"` | $u$ |

    With `"half_glu2"`, the S5 code drops features of $u$ alone; here they are dropped from $z$.

    !!! example

        ```python
        model, state = eqx.nn.make_with_state(S5)(
            hidden_dim=64, discretization="async", key=key
        )
        events = discretax.Timeseries(x, timesteps=gaps)  # x: (time, 64), gaps: (time,)
        y, state = eqx.nn.inference_mode(model)(events, state)  # y.values: (time, 64)
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
        ssm_blocks: int = 1,
        conj_sym: bool = True,
        C_init: OutputInit = "lecun_normal",
        clip_eigs: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
        bidirectional: bool = False,
        drop_rate: float = 0.1,
        prenorm: bool = True,
        use_bias: bool = True,
        norm: Norm = "batch",
        activation: Name | Activation = "full_glu",
        channel_mixer: ChannelMixerMaker | None = None,
    ):
        """**Arguments:**

        - `key`: for the initialisation.
        - `hidden_dim`: width of the residual stream.
        - `num_blocks`: how many blocks to stack.
        - `state_dim`, `ssm_blocks`, `conj_sym`, `C_init`, `clip_eigs`, `dt_min`, `dt_max`,
            `step_rescale`, `discretization`: as in
            [`discretax.sequence_mixers.S5SequenceMixer`][].
        - `bidirectional`: [`discretax.sequence_mixers.BidirectionalS5`][], for which what
            [`discretax.models.Backbone`][] says holds too.
        - `drop_rate`, `prenorm`, `norm`: as in [`discretax.models.Backbone`][].
        - `use_bias`: $b$ in the table above.
        - `activation`: a name of the table above, or, as in [`discretax.models.Backbone`][], a
            function or None; $z$ then goes through that, and through the channel mixer.
        - `channel_mixer`: as there; a [`discretax.channel_mixers.GLU`][] if left out. Beside one,
            the names but `"full_glu"` are refused.
        """
        if isinstance(activation, str):
            check_name("activation", activation, Name)
            phi = None if activation == "half_glu2" else jax.nn.gelu
            if activation != "full_glu" and channel_mixer is not None:
                raise ValueError(
                    f"activation={activation!r} chooses the channel mixer as well; got a "
                    "`channel_mixer` beside it. Give a function, such as `activation=jax.nn.gelu`."
                )
        else:
            phi = activation
        if activation in ("half_glu1", "half_glu2"):
            gate_activation = jax.nn.gelu if activation == "half_glu2" else None
            channel_mixer = ft.partial(HalfGLU, use_bias=use_bias, gate_activation=gate_activation)
        elif activation == "gelu":
            channel_mixer = IdentityChannelMixer
        else:
            channel_mixer = glu(type(self), channel_mixer, use_bias)
        mixer = ft.partial(
            BidirectionalS5 if bidirectional else S5SequenceMixer,
            state_dim=state_dim,
            ssm_blocks=ssm_blocks,
            conj_sym=conj_sym,
            C_init=C_init,
            clip_eigs=clip_eigs,
            dt_min=dt_min,
            dt_max=dt_max,
            step_rescale=step_rescale,
            discretization=discretization,
        )
        self.blocks = standard_blocks(
            key, hidden_dim, num_blocks, mixer, channel_mixer, drop_rate, prenorm, norm, phi
        )
