from typing import Any, ClassVar, Literal, NoReturn

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size, divided
from discretax._types import Length, Resets, Timesteps, Values, widened
from discretax.init import diagonalised_legs, log_uniform_step
from discretax.ops import asynchronous, bilinear, dirac, zoh
from discretax.sequence_mixers.base import (
    AbstractContinuousMixer,
    AbstractSequenceMixer,
    refuse_timesteps,
    refuse_to_stream,
    zero_cache,
)
from discretax.sequence_mixers.lti._diagonal_system import DiagonalSystem
from discretax.sequence_mixers.wrappers.bidirectional import Bidirectional

Discretization = Literal["zoh", "bilinear", "dirac", "async", "no_discretization"]
OutputInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]


class S5SequenceMixer(AbstractContinuousMixer[Float[Array, "2 state"]]):
    r"""The simplified state space layer, S5, and, given timesteps, its event-driven form.

    $$\dot h = \Lambda \odot h + B x, \qquad h_t = \bar\Lambda \odot h_{t-1} + \gamma \odot (B x_t), \qquad
    y_t = m\,\mathrm{Re}(C h_t) + D \odot x_t$$

    with $\Delta = s\,e^{\mathrm{log\_step}}$ per state, $s$ the `step_rescale`, and

    | `discretization` | $\bar\Lambda$ | $\gamma$ |
    |---|---|---|
    | `"zoh"` | $e^{\Lambda \Delta \tau}$ | $\Lambda^{-1}(e^{\Lambda \Delta \tau} - 1)$ |
    | `"async"` | $e^{\Lambda \Delta \tau}$ | $\Lambda^{-1}(e^{\Lambda \Delta} - 1)$ |
    | `"dirac"` | $e^{\Lambda \Delta \tau}$ | 1 |
    | `"bilinear"` | $\frac{1 + \Lambda\Delta\tau/2}{1 - \Lambda\Delta\tau/2}$ | $\frac{\Delta}{1 - \Lambda\Delta/2}$ |
    | `"no_discretization"` | $\Lambda$ | 1 |

    where $\tau_t$ is the timestep before sample $t$, one if none are given. What an event adds does
    not depend on the gap before it, except with `"zoh"`, where the input is held over the gap.

    With `conj_sym`, one of each pair of conjugate states is kept, and $m = 2$ stands for the other.

    The cache holds the state's real and imaginary part, `(2, state)`.

    Two other implementations read differently: lrnnx calls `"zoh"` what is `"async"` here when
    timesteps are given, and its time-invariant S5 has a bilinear transform with swapped signs.

    !!! example

        ```python
        mixer = S5SequenceMixer(64, state_dim=32, discretization="async", key=key)
        y, cache = mixer(x, integration_timesteps=gaps)  # x, y: (time, 64), gaps: (time,)
        ```

    ??? cite

        Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling,
        ICLR 2023 (arXiv:2208.04933). Events: Schöne et al., Scalable Event-by-event Processing of
        Neuromorphic Sensory Signals with Deep State-Space Models, 2024 (arXiv:2404.18508).
    """

    Lambda_re: Float[Array, " state"]
    Lambda_im: Float[Array, " state"]
    B: Float[Array, "state features 2"]
    C: Float[Array, "features state 2"]
    D: Float[Array, " features"]
    log_step: Float[Array, "state 1"]
    step_rescale: float
    in_features: int = eqx.field(static=True)
    conj_sym: bool = eqx.field(static=True)
    clip_eigs: bool = eqx.field(static=True)
    discretization: Discretization = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("Lambda_re", "Lambda_im", "B", "log_step")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        ssm_blocks: int = 1,
        conj_sym: bool = True,
        C_init: OutputInit = "lecun_normal",
        clip_eigs: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states, counting both of each conjugate pair.
        - `ssm_blocks`: $\Lambda$ starts as that of so many HiPPO-LegS systems side by side.
        - `conj_sym`: keep one state of each conjugate pair.
        - `C_init`: `"trunc_standard_normal"` and `"lecun_normal"` draw $C$ in the basis of HiPPO-LegS;
            `"complex_normal"` draws it in the basis of the eigenvectors.
        - `clip_eigs`: hold $\mathrm{Re}\,\Lambda$ at or below $-10^{-4}$, so that the state is stable
            whatever training does.
        - `dt_min`, `dt_max`: $\Delta$ starts log-uniform between these, in sample intervals.
        - `step_rescale`: multiplies every $\Delta$: 2 for a signal sampled half as often as the one
            that the model was trained on.
        - `discretization`: see the table above.

        **Raises:**

        `ValueError` for sizes that do not divide, an unknown name, or `dt_min > dt_max`.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        ssm_blocks = check_size("ssm_blocks", ssm_blocks)
        check_name("discretization", discretization, Discretization)
        check_name("C_init", C_init, OutputInit)
        block_size = divided("state_dim", state_dim, "ssm_blocks", ssm_blocks)
        if conj_sym and block_size % 2:
            raise ValueError(
                "with `conj_sym`, each block must hold pairs: `state_dim / ssm_blocks` must be "
                f"even; got {state_dim} / {ssm_blocks} = {block_size}. Or set conj_sym=False."
            )
        check_positive("step_rescale", step_rescale)
        B_key, C_key, D_key, step_key = draw.split(key, 4)
        Lambda, V = diagonalised_legs(block_size)
        kept = block_size // 2 if conj_sym else block_size
        Lambda, V = np.tile(Lambda[:kept], ssm_blocks), V[:, :kept]
        num_states = kept * ssm_blocks

        self.Lambda_re = jnp.asarray(np.real(Lambda), float)
        self.Lambda_im = jnp.asarray(np.imag(Lambda), float)
        V = jnp.asarray(V, complex)
        in_legs = _lecun_normal(B_key, (state_dim, in_features), state_dim)
        in_legs = in_legs.reshape(ssm_blocks, block_size, in_features).astype(V.dtype)
        B = jnp.einsum("nk,bnh->bkh", V.conj(), in_legs).reshape(num_states, in_features)
        self.B = jnp.stack([B.real, B.imag], axis=-1)
        if C_init == "complex_normal":
            self.C = draw.normal(C_key, (in_features, num_states, 2)) * 0.5**0.5
        else:
            # The S5 code draws row by row in the one and all at once in the other, where the
            # number of rows then enters the variance.
            rows = 1 if C_init == "trunc_standard_normal" else in_features
            in_legs = _lecun_normal(C_key, (in_features, state_dim, 2), rows * state_dim)
            in_legs = lax.complex(in_legs[..., 0], in_legs[..., 1])
            in_legs = in_legs.reshape(in_features, ssm_blocks, block_size)
            C = jnp.einsum("hbn,nk->hbk", in_legs, V).reshape(in_features, num_states)
            self.C = jnp.stack([C.real, C.imag], axis=-1)
        self.D = draw.normal(D_key, (in_features,))
        self.log_step = log_uniform_step(step_key, (num_states, 1), dt_min, dt_max)
        self.step_rescale = step_rescale
        self.in_features = in_features
        self.conj_sym = conj_sym
        self.clip_eigs = clip_eigs
        self.discretization = discretization

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "2 state"]:
        del max_seqlen
        return zero_cache(batch_size, (2, self.Lambda_re.shape[0]), dtype)

    def discretize(self, integration_timesteps: Timesteps | None = None) -> DiagonalSystem:
        if self.discretization == "no_discretization":
            refuse_timesteps(
                self, integration_timesteps, 'with "no_discretization" its eigenvalues are discrete'
            )
        mixer = widened(self)
        tau = jnp.ones((), mixer.D.dtype)
        if integration_timesteps is not None:
            tau = jnp.asarray(integration_timesteps, mixer.D.dtype)
        A_bar, gamma = mixer._transition(tau)
        conjugates = 2 if self.conj_sym else 1
        return DiagonalSystem(
            A_bar=(A_bar.real, A_bar.imag),
            B=(mixer.B[..., 0], mixer.B[..., 1]),
            C=(conjugates * mixer.C[..., 0], conjugates * mixer.C[..., 1]),
            D=mixer.D,
            gamma=(gamma.real, gamma.imag),
        )

    def compute_kernel(self, length: int) -> Complex[Array, "time state"]:
        r"""$K_l = \bar\Lambda^l$, $l = 0, \dots$, length - 1: $h = K * (\bar B x)$."""
        length = check_size("length", length)
        return self.discretize().powers(length)

    def _transition(self, tau):
        Lambda_re = jnp.minimum(self.Lambda_re, -1e-4) if self.clip_eigs else self.Lambda_re
        Lambda = lax.complex(Lambda_re, self.Lambda_im)
        if self.discretization == "no_discretization":
            return Lambda, jnp.ones_like(Lambda)
        dt = (self.step_rescale * jnp.exp(self.log_step[:, 0])).astype(Lambda.dtype)
        tau = tau.astype(Lambda.dtype)
        dt_tau = jnp.multiply.outer(tau, dt)
        if self.discretization == "zoh":
            return zoh(Lambda, dt_tau)
        if self.discretization == "async":
            return asynchronous(Lambda, dt, tau[..., None])
        if self.discretization == "dirac":
            return dirac(Lambda, dt_tau)
        return bilinear(Lambda, dt_tau)[0], bilinear(Lambda, dt)[1]


class BidirectionalS5(AbstractSequenceMixer[None]):
    r"""S5 in both directions with one $\Lambda$, $B$ and $\Delta$, and a $C$ for each.

    $y_t = m\,\mathrm{Re}(C h^{forward}_t + C^{backward} h^{backward}_t) + D \odot x_t$, as the paper
    has it. For two independent S5, use [`discretax.sequence_mixers.Bidirectional`][].

    !!! example

        ```python
        mixer = BidirectionalS5(64, state_dim=32, key=key)
        y, _ = mixer(x, length=length)  # x, y: (time, 64); there is no cache
        ```
    """

    forward: S5SequenceMixer
    C_backward: Float[Array, "features state 2"]
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(self, in_features: int, key: PRNGKeyArray, **options: Any):
        """**Arguments:** those of [`discretax.sequence_mixers.S5SequenceMixer`][]."""
        forward_key, backward_key = draw.split(key)
        self.forward = S5SequenceMixer(in_features, forward_key, **options)
        self.C_backward = S5SequenceMixer(in_features, backward_key, **options).C
        self.in_features = in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> NoReturn:
        refuse_to_stream(self)

    def __call__(
        self,
        x: Values,
        cache: None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, None]:
        backward = eqx.tree_at(
            lambda mixer: (mixer.C, mixer.D),
            self.forward,
            (self.C_backward, jnp.zeros_like(self.forward.D)),
        )
        return Bidirectional(self.forward, backward)(
            x,
            cache,
            integration_timesteps=integration_timesteps,
            length=length,
            resets=resets,
            key=key,
        )

    def step(self, x: Any, cache: Any, *, integration_timestep: Any | None = None) -> NoReturn:
        refuse_to_stream(self)


def _lecun_normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    r"""Standard deviation $1/\sqrt{\mathrm{fan\_in}}$, of normal numbers cut off at two before it."""
    of_cut_off = 0.87962566103423978  # their standard deviation
    scale = jnp.sqrt(jnp.asarray(1 / fan_in, float)) / of_cut_off
    return draw.truncated_normal(key, shape, -2, 2) * scale
