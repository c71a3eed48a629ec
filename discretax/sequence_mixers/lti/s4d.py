from typing import ClassVar, Literal

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import discretax.sequence_mixers.lti._s4_parameters as s4
from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name
from discretax._types import Timesteps, widened
from discretax.ops import Route, bilinear, dirac, zoh
from discretax.sequence_mixers.lti._depthwise_system import DepthwiseSystem

Discretization = Literal["zoh", "bilinear", "dirac"]
Init = Literal["lin", "inv", "legs", "quad", "real", "rand"]
_DISCRETIZE = {"zoh": zoh, "bilinear": bilinear, "dirac": dirac}


class S4DSequenceMixer(s4.AbstractS4Mixer):
    r"""The diagonal state space model, S4D: a system of its own for each feature.

    $$\dot h = A \odot h + B x, \qquad y = 2\,\mathrm{Re}(C h) + D x, \qquad
    A = -f(A_{re}) - i\,g(A_{im})$$

    discretised with $\Delta = s\,e^{\mathrm{inv\_dt}}$, $s$ the `step_rescale`. $f$ and $g$ are the
    `real_transform` and the `imag_transform`; one of each pair of conjugate states is kept, whence
    the 2. With timesteps $\tau_t$, $\Delta_t = \Delta \tau_t$.

    | `init` | $A_n$ |
    |---|---|
    | `"lin"` | $-\frac12 + i\pi n$ |
    | `"inv"` | $-\frac12 + i\frac{N}{\pi}(\frac{N}{2n+1} - 1)$ |
    | `"legs"` | the eigenvalues of HiPPO-LegS' normal part, with its $B$ |
    | `"quad"` | $-\frac12 + \frac{i}{\pi}(1 + 2n)^2$ |
    | `"real"` | $-(n + 1)$ |
    | `"rand"` | $-\frac12 + i e^z$, $z$ standard normal |

    The cache holds real and imaginary part of the states, `(features, 2, state_dim / 2)`.

    !!! example

        ```python
        mixer = S4DSequenceMixer(64, state_dim=32, init="inv", key=key)
        y, cache = mixer(x, integration_timesteps=gaps)  # x, y: (time, 64), gaps: (time,)
        ```

    ??? cite

        Gu, Gupta, Goel and Ré, On the Parameterization and Initialization of Diagonal State Space
        Models, NeurIPS 2022 (arXiv:2206.11893).
    """

    A_real: Float[Array, "n_ssm state"]
    A_imag: Float[Array, "n_ssm state"] | None
    B: Float[Array, "n_ssm state *parts"]
    C: Float[Array, "channels features state *parts"]
    D: Float[Array, "channels features"]
    inv_dt: Float[Array, "features steps"]
    step_rescale: float
    in_features: int = eqx.field(static=True)
    l_max: int | None = eqx.field(static=True)
    discretization: Discretization = eqx.field(static=True)
    real_transform: s4.Transform = eqx.field(static=True)
    imag_transform: s4.Transform = eqx.field(static=True)
    dt_transform: s4.StepTransform = eqx.field(static=True)
    route: Route = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_real", "A_imag", "B", "inv_dt")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        init: Init = "lin",
        n_ssm: int | None = None,
        channels: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: s4.StepTransform = "exp",
        real_transform: s4.Transform = "exp",
        imag_transform: s4.Transform = "none",
        is_real: bool = False,
        deterministic: bool = False,
        l_max: int | None = None,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
        route: Route = None,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input, and number of systems.
        - `key`: for the initialisation.
        - `state_dim`: states per feature, counting both of each conjugate pair.
        - `init`: how $A$ and $B$ start, see the table above; $B = 1$ except for `"legs"`.
        - `n_ssm`: number of trained $(A, B)$, shared in turn by the features; None for one each.
        - `channels`: readouts per feature; the output is `(time, channels * in_features)`.
        - `dt_min`, `dt_max`: $\Delta$ starts log-uniform between these, in sample intervals.
        - `dt_tie`: one $\Delta$ per feature (True) or per state.
        - `dt_transform`: $\Delta = e^{\mathrm{inv\_dt}}$ (`"exp"`) or its `"softplus"`.
        - `real_transform`, `imag_transform`: $f$ and $g$: `"none"`, `"exp"`, `"relu"`, `"sigmoid"`,
            `"softplus"`. All but `"none"` keep $\mathrm{Re} A < 0$ whatever training does.
        - `is_real`: real states only, `state_dim` of them: exponential moving averages.
        - `deterministic`: $\Delta$ evenly spread and $C$ the first coordinate, nothing drawn but $D$.
        - `l_max`: refuse longer sequences; None for any length.
        - `step_rescale`: multiplies every $\Delta$: 2 for a signal sampled half as often.
        - `discretization`: `"zoh"`, `"bilinear"` or `"dirac"`, see [`discretax.ops.zoh`][] and kin.
        - `route`: as in [`discretax.ops.depthwise_ssm`][]; None chooses.

        **Raises:**

        `ValueError` for an odd `state_dim`, an `n_ssm` that does not divide `in_features`, an unknown
        name, or `dt_min > dt_max`.
        """
        in_features, state_dim, channels, n_ssm, l_max = s4.check_options(
            in_features, state_dim, channels, n_ssm, l_max, real_transform, imag_transform,
            dt_transform, step_rescale, pairs=not is_real,
        )  # fmt: skip
        check_name("discretization", discretization, Discretization)
        check_name("init", init, Init)
        check_name("route", route, Route)
        step_key, A_key, C_key, D_key = draw.split(key, 4)
        size = 2 * state_dim if is_real else state_dim
        half = size // 2
        systems = n_ssm, half
        real, imag, B, first = s4.init_diagonal(init, size, n_ssm, A_key)

        self.A_real = s4.untransformed(real, real_transform, systems)
        self.A_imag = None if is_real else s4.untransformed(imag, imag_transform, systems)
        B = s4.pairs(np.broadcast_to(B, systems))
        C = s4.init_readout(C_key, (channels, in_features, half), deterministic, first)
        self.B, self.C = (B[..., 0], C[..., 0]) if is_real else (B, C)
        self.D = draw.normal(D_key, (channels, in_features))
        steps = (in_features, 1 if dt_tie else half)
        self.inv_dt = s4.init_step(step_key, steps, dt_min, dt_max, dt_transform, deterministic)
        self.step_rescale = step_rescale
        self.in_features = in_features
        self.l_max = l_max
        self.discretization = discretization
        self.real_transform = real_transform
        self.imag_transform = imag_transform
        self.dt_transform = dt_transform
        self.route = route

    def discretize(self, integration_timesteps: Timesteps | None = None) -> DepthwiseSystem:
        mixer = widened(self)
        dt, A, B, C = mixer._continuous_system(integration_timesteps)
        A_bar, gamma = _DISCRETIZE[self.discretization](A, dt)
        return DepthwiseSystem(A_bar, gamma * B, C, mixer.D, l_max=self.l_max, route=self.route)
