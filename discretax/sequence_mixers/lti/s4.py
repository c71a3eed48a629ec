from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

import discretax.sequence_mixers.lti._s4_parameters as s4
from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_size
from discretax._types import Timesteps, widened
from discretax.init import Measure
from discretax.ops import Route
from discretax.sequence_mixers.lti._depthwise_system import DepthwiseSystem


class S4SequenceMixer(s4.AbstractS4Mixer):
    r"""The structured state space model, S4: diagonal plus low rank, a system for each feature.

    $$\dot h = (\Lambda - P P^*) h + B x, \qquad y = 2\,\mathrm{Re}(C h) + D x, \qquad
    \Lambda = -f(A_{re}) - i\,g(A_{im})$$

    where $h$, $B$, $P$ stand for themselves and their conjugates, $P^* h = 2\,\mathrm{Re}(\bar P h)$.
    The bilinear transform, with $\Delta = s\,e^{\mathrm{inv\_dt}}$, $R = (1 - \frac\Delta2\Lambda)^{-1}$
    and $M = \frac2\Delta I + P^* R P$, is again diagonal plus low rank, so that a step costs no more
    than the state is long:

    $$\bar A h = (1 + \Delta \Lambda R) h - 2 R P M^{-1} P^* R h, \qquad
    \bar B = \Delta (R B - R P M^{-1} P^* R B)$$

    As initialised and whatever training does, $\bar A$ is a contraction: $-P P^*$ only adds decay. That
    makes it safe to build the kernel $K_l = C \bar A^l \bar B$ from powers of $\bar A$, in two levels
    ([`discretax.ops.depthwise_kernel`][]). The original code evaluates its generating function on the
    unit circle instead and trains $C(I - \bar A^L)$ for one length $L$; here $C$ itself is trained,
    and serves every length and the steps. It also clips $\mathrm{Im}\,B$ to $[-2, 2]$ at
    initialisation, in a basis whose phase is arbitrary; the paper has no such clip, nor has this.

    The cache holds real and imaginary part of the states, `(features, 2, state_dim / 2)`.

    !!! example

        ```python
        mixer = S4SequenceMixer(64, init="legs", dt_max=0.01, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Gu, Goel and Ré, Efficiently Modeling Long Sequences with Structured State Spaces, ICLR 2022
        (arXiv:2111.00396).
    """

    A_real: Float[Array, "n_ssm state"]
    A_imag: Float[Array, "n_ssm state"]
    B: Float[Array, "n_ssm state 2"]
    P: Float[Array, "rank n_ssm state 2"]
    C: Float[Array, "channels features state 2"]
    D: Float[Array, "channels features"]
    inv_dt: Float[Array, "features steps"]
    step_rescale: float
    in_features: int = eqx.field(static=True)
    l_max: int | None = eqx.field(static=True)
    real_transform: s4.Transform = eqx.field(static=True)
    imag_transform: s4.Transform = eqx.field(static=True)
    dt_transform: s4.StepTransform = eqx.field(static=True)
    route: Route = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_real", "A_imag", "B", "P", "inv_dt")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        init: Measure = "legs",
        rank: int = 1,
        n_ssm: int | None = None,
        channels: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: s4.StepTransform = "exp",
        real_transform: s4.Transform = "exp",
        imag_transform: s4.Transform = "none",
        deterministic: bool = False,
        l_max: int | None = None,
        step_rescale: float = 1.0,
        route: Route = None,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input, and number of systems.
        - `key`: for the initialisation.
        - `state_dim`: states per feature, counting both of each conjugate pair.
        - `init`: the HiPPO system, `"legs"`, `"legt"` (rank 2) or `"fourier"`, see
            [`discretax.init.hippo`][].
        - `rank`: of the correction $P$; more than the system needs starts at zero.
        - `n_ssm`: number of trained $(\Lambda, P, B)$, shared in turn by the features; None for one
            each.
        - `channels`: readouts per feature; the output is `(time, channels * in_features)`.
        - `dt_min`, `dt_max`: $\Delta$ starts log-uniform between these, in sample intervals.
        - `dt_tie`: one $\Delta$ per feature (True) or per state.
        - `dt_transform`: $\Delta = e^{\mathrm{inv\_dt}}$ (`"exp"`) or its `"softplus"`.
        - `real_transform`, `imag_transform`: $f$ and $g$: `"none"`, `"exp"`, `"relu"`, `"sigmoid"`,
            `"softplus"`. All but `"none"` keep $\mathrm{Re} \Lambda < 0$ whatever training does.
        - `deterministic`: $\Delta$ evenly spread and $C$ the first coefficient, nothing drawn but $D$.
        - `l_max`: refuse longer sequences; None for any length.
        - `step_rescale`: multiplies every $\Delta$: 2 for a signal sampled half as often.
        - `route`: as in [`discretax.ops.depthwise_ssm`][]; None chooses.

        **Raises:**

        `ValueError` for an odd `state_dim`, an `n_ssm` that does not divide `in_features`, a `rank` too
        small for `init`, an unknown name, or `dt_min > dt_max`.
        """
        in_features, state_dim, channels, n_ssm, l_max = s4.check_options(
            in_features, state_dim, channels, n_ssm, l_max, real_transform, imag_transform,
            dt_transform, step_rescale,
        )  # fmt: skip
        rank = check_size("rank", rank)
        check_name("init", init, Measure)
        check_name("route", route, Route)
        step_key, C_key, D_key = draw.split(key, 3)
        half = state_dim // 2
        Lambda, B, P, first = s4.init_dplr(init, state_dim, rank)

        systems = n_ssm, half
        self.A_real = s4.untransformed(np.real(Lambda), real_transform, systems)
        self.A_imag = s4.untransformed(np.imag(Lambda), imag_transform, systems)
        self.B = s4.pairs(np.broadcast_to(B, systems))
        self.P = s4.pairs(np.broadcast_to(P[:, None], (rank, n_ssm, half)))
        self.C = s4.init_readout(C_key, (channels, in_features, half), deterministic, first)
        self.D = draw.normal(D_key, (channels, in_features))
        steps = (in_features, 1 if dt_tie else half)
        self.inv_dt = s4.init_step(step_key, steps, dt_min, dt_max, dt_transform, deterministic)
        self.step_rescale = step_rescale
        self.in_features = in_features
        self.l_max = l_max
        self.real_transform = real_transform
        self.imag_transform = imag_transform
        self.dt_transform = dt_transform
        self.route = route

    def discretize(self, integration_timesteps: Timesteps | None = None) -> DepthwiseSystem:
        mixer = widened(self)
        dt, Lambda, B, C = mixer._continuous_system(integration_timesteps)
        P = jax.vmap(lambda p: s4.shared(p, self.in_features), out_axes=-1)(s4.joined(mixer.P))
        P = lax.broadcast_to_rank(P, dt.ndim + 1)
        R = 1 / (1 - dt * Lambda / 2)
        # With a step for each state, Delta multiplies the rows of A: it belongs to P, not to P^*.
        P_dt, RP_adjoint = dt[..., None] * P, R[..., None] * P.conj()
        eye = lax.broadcast_to_rank(jnp.eye(P.shape[-1], dtype=R.real.dtype), P.ndim)
        M = 2 * eye + 2 * jnp.einsum("...fnr,...fns->...frs", RP_adjoint, P_dt).real
        U = -2 * R[..., None] * P_dt @ _inverse(M).astype(P.dtype)
        W = 2 * jnp.swapaxes(RP_adjoint, -1, -2)
        B_bar = R * dt * B
        # (I - Delta/2 A)^-1 Delta B, of which the low-rank part sees R Delta B.
        projected = jnp.einsum("...frn,...fn->...fr", W, dt * B).real.astype(P.dtype)
        B_bar = B_bar + jnp.einsum("...fnr,...fr->...fn", U, projected) / 2
        return DepthwiseSystem(
            1 + dt * Lambda * R,
            B_bar,
            C,
            mixer.D,
            low_rank=(U, W),
            l_max=self.l_max,
            route=self.route,
        )


def _inverse(M: Float[Array, "*lead rank rank"]) -> Float[Array, "*lead rank rank"]:
    return 1 / M if M.shape[-1] == 1 else jnp.linalg.inv(M)  # LU, one matrix after the other
