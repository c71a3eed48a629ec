import math
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_size
from discretax._types import Timesteps, widened
from discretax.init import ring
from discretax.sequence_mixers.base import AbstractLTIMixer, refuse_timesteps, zero_cache
from discretax.sequence_mixers.lti._diagonal_system import DiagonalSystem


class LRUSequenceMixer(AbstractLTIMixer[Float[Array, "2 state"]]):
    r"""The Linear Recurrent Unit.

    $$\lambda = e^{-e^{\nu^{\log}} + i e^{\theta^{\log}}}, \qquad
    h_t = \lambda \odot h_{t-1} + e^{\gamma^{\log}} \odot (B x_t), \qquad
    y_t = \mathrm{Re}(C h_t) + D \odot x_t$$

    $|\lambda| < 1$ for any value of the parameters. $\gamma^{\log}$ starts at
    $\log\sqrt{1 - |\lambda|^2}$, so that white noise of unit variance drives every state with about
    that variance however long its memory, and is trained freely from there.

    The eigenvalues live in discrete time: there is no step size, and timesteps are refused.

    The cache holds the state's real and imaginary part, `(2, state)`.

    !!! example

        ```python
        mixer = LRUSequenceMixer(64, state_dim=128, r_min=0.9, r_max=0.999, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        y_next, cache = mixer(chunk, cache)  # goes on where x has ended
        ```

    ??? cite

        Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, ICML 2023
        (arXiv:2303.06349).
    """

    nu_log: Float[Array, " state"]
    theta_log: Float[Array, " state"]
    gamma_log: Float[Array, " state"]
    B_re: Float[Array, "state features"]
    B_im: Float[Array, "state features"]
    C_re: Float[Array, "features state"]
    C_im: Float[Array, "features state"]
    D: Float[Array, " features"]
    in_features: int = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = (
        "nu_log",
        "theta_log",
        "gamma_log",
        "B_re",
        "B_im",
    )

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of complex states.
        - `r_min`, `r_max`: $|\lambda|$ starts between these. Raise `r_min` towards 1 for long memory.
        - `max_phase`: $\arg\lambda$ starts between 0 and this, in radians per sample. Lower it for
            long sequences whose signal is slow.

        **Raises:**

        `ValueError` if a size is below 1 or the ring is empty or leaves the unit disc.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        ring_key, B_re_key, B_im_key, C_re_key, C_im_key, D_key = draw.split(key, 6)
        self.nu_log, self.theta_log, self.gamma_log = ring(
            ring_key, state_dim, r_min, r_max, max_phase
        )
        B_shape, C_shape = (state_dim, in_features), (in_features, state_dim)
        self.B_re = draw.normal(B_re_key, B_shape) / math.sqrt(2 * in_features)
        self.B_im = draw.normal(B_im_key, B_shape) / math.sqrt(2 * in_features)
        self.C_re = draw.normal(C_re_key, C_shape) / math.sqrt(state_dim)
        self.C_im = draw.normal(C_im_key, C_shape) / math.sqrt(state_dim)
        self.D = draw.normal(D_key, (in_features,))
        self.in_features = in_features
        self.state_dim = state_dim

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "2 state"]:
        del max_seqlen
        return zero_cache(batch_size, (2, self.state_dim), dtype)

    def discretize(self, integration_timesteps: Timesteps | None = None) -> DiagonalSystem:
        refuse_timesteps(
            self, integration_timesteps, "its eigenvalues are those of one sample, not of a time"
        )
        mixer = widened(self)
        radius, phase = jnp.exp(-jnp.exp(mixer.nu_log)), jnp.exp(mixer.theta_log)
        gamma = jnp.exp(mixer.gamma_log)
        return DiagonalSystem(
            A_bar=(radius * jnp.cos(phase), radius * jnp.sin(phase)),
            B=(mixer.B_re, mixer.B_im),
            C=(mixer.C_re, mixer.C_im),
            D=mixer.D,
            gamma=(gamma, jnp.zeros_like(gamma)),
        )

    def compute_kernel(self, length: int) -> Complex[Array, "time state"]:
        r"""$K_l = \lambda^l$, $l = 0, \dots$, length - 1: $h = K * (\bar B x)$, one lag after the other.

        The whole kernel from input to output is $\mathrm{Re}(C\,\mathrm{diag}(K_l)\,\bar B)$, `features`
        times as large; a convolution route never builds it.
        """
        length = check_size("length", length)
        return self.discretize().powers(length)
