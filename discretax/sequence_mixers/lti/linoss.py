import math
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size
from discretax._types import Timesteps, widened
from discretax.sequence_mixers.base import AbstractContinuousMixer, zero_cache
from discretax.sequence_mixers.lti._oscillator_system import OscillatorSystem

Discretization = Literal["IM", "IMEX"]


class LinOSSSequenceMixer(AbstractContinuousMixer[Float[Array, "2 2 state"]]):
    r"""Linear oscillatory state space model: driven harmonic oscillators, with or without damping.

    $$\ddot y = -A y - G \dot y + B x, \qquad o_t = \mathrm{Re}(C y_t) + D \odot x_t$$

    with $A, G \ge 0$ diagonal. With $z = \dot y$, a step $\Delta$ goes from one sample to the next:

    | `discretization` | velocity | position |
    |---|---|---|
    | `"IM"` | $z_t = z_{t-1} + \Delta\,(-A y_t + B x_t)$ | $y_t = y_{t-1} + \Delta z_t$ |
    | `"IMEX"` | $z_t = z_{t-1} + \Delta\,(-A y_{t-1} - G z_t + B x_t)$ | $y_t = y_{t-1} + \Delta z_t$ |

    which, solved for $z_t$, is $(z_t, y_t) = M (z_{t-1}, y_{t-1}) + F\,(B x_t)$ with a real matrix $M$ of
    2 x 2 for each state. The implicit method forgets, $|\lambda|^2 = 1 / (1 + \Delta^2 A)$ for its
    eigenvalues $\lambda$; the implicit-explicit one does by its damping alone,
    $|\lambda|^2 = 1 / (1 + \Delta G)$, and keeps energy without. Where $A = 0$, $M$ cannot be
    diagonalised, and is not.

    $A = \mathrm{relu}(A^{diag})$, $G = \mathrm{relu}(G^{diag})$ and
    $\Delta_t = s\,\tau_t\,\sigma(\mathrm{steps})$ with the `step_rescale` $s$ and the timestep $\tau_t$
    before sample $t$, one if none are given. With `"IMEX"`, $A$ is held where the discrete oscillator
    swings and $|\lambda| \le 1$, by the step that is taken:
    $\sqrt{1 + \Delta G} - 1 \le \Delta \sqrt A \le \sqrt{1 + \Delta G} + 1$. Where gaps vary, that
    bounds each $M_t$, and not their product.

    The cache holds velocity and position, each in real and imaginary part, `(2, 2, state)`. With
    `"IMEX"` the velocity is seen from a frame, $z - \kappa y$ with $\kappa = (\Delta A - G)/2$: so
    rounding moves no eigenvalue much where two of them meet, at angles near $\pi$.

    The original code and discretax 0.3.0 do not hold $A$ without damping, and grow without bound where
    $\Delta^2 A > 4$.

    !!! example

        ```python
        mixer = LinOSSSequenceMixer(64, state_dim=32, damping=False, key=key)
        y, cache = mixer(x, integration_timesteps=gaps)  # x, y: (time, 64), gaps: (time,)
        ```

    ??? cite

        Rusch and Rus, Oscillatory State-Space Models, ICLR 2025 (arXiv:2410.03943). Damping: Boyer,
        Rusch and Rus, Learning to Dissipate Energy in Oscillatory State-Space Models, 2025
        (arXiv:2505.12171).
    """

    A_diag: Float[Array, " state"]
    G_diag: Float[Array, " state"] | None
    B: Float[Array, "state features 2"]
    C: Float[Array, "features state 2"]
    D: Float[Array, " features"]
    steps: Float[Array, " state"]
    step_rescale: float
    in_features: int = eqx.field(static=True)
    discretization: Discretization = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_diag", "G_diag", "B", "steps")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        discretization: Discretization = "IMEX",
        damping: bool = True,
        r_min: float = 0.9,
        theta_max: float = math.pi,
        step_rescale: float = 1.0,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of oscillators.
        - `discretization`: see the table above.
        - `damping`: learn $G$. With `"IMEX"` only.
        - `r_min`: with damping, $|\lambda|^2$ starts uniform between its square and 1.
        - `theta_max`: with damping, $\arg\lambda$ starts uniform between 0 and this, in radians per
            sample, at most $\pi$. Without damping $A$ starts uniform between 0 and 1.
        - `step_rescale`: multiplies every $\Delta$: 2 for a signal sampled half as often as the one
            that the model was trained on.

        **Raises:**

        `ValueError` for a size below 1, an unknown name, damping with `"IM"`, or an empty ring.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        check_name("discretization", discretization, Discretization)
        check_positive("step_rescale", step_rescale)
        if damping and discretization == "IM":
            raise ValueError(
                'damping goes with discretization="IMEX"; got "IM", which forgets by itself. Choose '
                "damping=False."
            )
        if not (0 < r_min <= 1 and 0 < theta_max <= math.pi):
            raise ValueError(
                "the ring of eigenvalues needs 0 < r_min <= 1 and 0 < theta_max <= pi; got "
                f"r_min={r_min} and theta_max={theta_max}."
            )
        if damping and r_min == 1:
            raise ValueError(
                "with damping `r_min` must be below 1; got 1: all damping would start at zero, "
                "where it learns nothing. Choose damping=False, or a ring."
            )
        A_key, G_key, B_key, C_key, D_key, step_key = draw.split(key, 6)
        self.steps = 0.5 * draw.normal(step_key, (state_dim,))
        self.A_diag, self.G_diag = draw.uniform(A_key, (state_dim,)), None
        if damping:
            step = jax.nn.sigmoid(self.steps)
            forgotten = (1 - r_min**2) * draw.uniform(G_key, (state_dim,))  # 1 - |lambda|^2
            self.G_diag = forgotten / (step * (1 - forgotten))
            self.A_diag = _from_angle(theta_max * self.A_diag, self.G_diag, step)
        uniform = lambda key, shape: draw.uniform(key, shape, minval=-1, maxval=1)
        self.B = uniform(B_key, (state_dim, in_features, 2)) / math.sqrt(in_features)
        self.C = uniform(C_key, (in_features, state_dim, 2)) / math.sqrt(state_dim)
        self.D = draw.normal(D_key, (in_features,))
        self.step_rescale = step_rescale
        self.in_features = in_features
        self.discretization = discretization

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "2 2 state"]:
        del max_seqlen
        return zero_cache(batch_size, (2, 2, self.A_diag.shape[0]), dtype)

    def discretize(self, integration_timesteps: Timesteps | None = None) -> OscillatorSystem:
        mixer = widened(self)
        step = self.step_rescale * jax.nn.sigmoid(mixer.steps)
        A = jax.nn.relu(mixer.A_diag)
        G = jnp.zeros_like(A) if mixer.G_diag is None else jax.nn.relu(mixer.G_diag)
        own_step = None
        if integration_timesteps is not None:
            timesteps = jnp.asarray(integration_timesteps, step.dtype)
            own_step, step = step, jnp.multiply.outer(timesteps, step)
            A, G, own_step = (lax.broadcast_to_rank(part, step.ndim) for part in (A, G, own_step))
        if self.discretization == "IM":
            M, F = _implicit(A, step)
        else:
            M, F = _implicit_explicit(A, G, step, own_step)
        return OscillatorSystem(M, F, mixer.B, mixer.C, mixer.D)

    def compute_kernel(self, length: int) -> Float[Array, "time state"]:
        r"""What a force moves a position by, $K_l = (M^l F)_2$: $y = K * (B x)$."""
        length = check_size("length", length)
        return self.discretize().kernel(length)


def _from_angle(theta, G, step):
    r"""The $A$ of the discrete oscillator that turns by `theta` a sample, $\mathrm{tr}\,M = 2 r \cos\theta$.

    $\Delta^2 A = (\sqrt S - 1)^2 + 4 \sqrt S \sin^2 \frac\theta2$ with $S = 1 + \Delta G$.
    """
    root = jnp.sqrt(1 + step * G)
    return ((root - 1) ** 2 + 4 * root * jnp.sin(theta / 2) ** 2) / step**2


def _implicit(A, step):
    S = 1 + step**2 * A
    return ((1 / S, -step * A / S), (step / S, 1 / S)), (step / S, step**2 / S)


def _implicit_explicit(A, G, step, own_step):
    r"""In the frame $z - \kappa y$, in which $M$ of the mixer's own step has an equal diagonal.

    $-M_{12} M_{21}$ is the square of the eigenvalues' imaginary part then. It vanishes where they
    meet, which as a difference of rounded numbers it would not.
    """
    held, below, above = _held(A, G, step)
    S = 1 + step * G
    c, F = step / S, (step / S, step**2 / S)
    if own_step is None:
        kappa = (step * held - G) / 2
        mean = 1 - step * (G + step * held) / (2 * S)
        M = (mean, -step * below * above / (4 * S)), (c, mean)
    else:
        kappa = (own_step * _held(A, G, own_step)[0] - G) / 2
        M_11, M_22 = 1 / S - kappa * c, 1 - step**2 * held / S + kappa * c
        M = (M_11, kappa * (1 / S - M_22) - step * held / S), (c, M_22)
    return M, (F[0] - kappa * F[1], F[1])


def _held(A, G, step):
    r"""`A`, held where the discrete oscillator is neither overdamped nor unstable; its distance from
    the least such value, and $\Delta^2$ times that from the greatest."""
    root = jnp.sqrt(1 + step * G)
    least = (G / (root + 1)) ** 2
    room = (root + 1) ** 2 - step**2 * A
    most = ((root + 1) / jnp.where(room < 0, step, 1)) ** 2  # no step of zero is divided by
    held = jnp.where(room < 0, most, jnp.maximum(A, least))
    return held, jnp.maximum(A - least, 0), jnp.maximum(room, 0)
