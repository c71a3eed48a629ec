import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import contained, contained_step, mended
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size
from discretax._types import Length, Resets, Sample, Timesteps, Values, widened
from discretax.init import log_spaced_step
from discretax.ops import (
    Route,
    bilinear,
    dirac,
    matrix_convolution,
    projected_convolution,
    zoh,
)
from discretax.ops._depthwise_ssm.depthwise_ssm import carried_state, incoming_depthwise_state
from discretax.ops._running.split_time import incoming_broken
from discretax.sequence_mixers.base import AbstractContinuousMixer, zero_cache
from discretax.sequence_mixers.lti._depthwise_system import DepthwiseSystem
from discretax.sequence_mixers.lti._diagonal_system import DiagonalSystem, transfer

Mode = Literal["neck", "pointwise", "pw", "s5", "dws", "full"]
Discretization = Literal["zoh", "bilinear", "dirac", "euler"]


class Centaurus(AbstractContinuousMixer[Float[Array, "..."]]):
    r"""Centaurus: state space systems connected like the layers of a convolutional network.

    Each of $N$ channels is a system with $M$ sub-states; the `mode` says what goes into a channel and
    what becomes of it.

    $$s_{nm,t} = \bar A_{nm} s_{nm,t-1} + \gamma_{nm} u_{n,t}, \qquad
    v_{n,t} = \sum_m E_{nm} \mathrm{Re}\, s_{nm,t}$$

    | `mode` | $N$ | $u$ | $y$ |
    |---|---|---|---|
    | `"neck"`, a bottleneck | any | $B x$ | $C v$ |
    | `"dws"`, depthwise separable | features | $B \odot x$ | $C \odot v$ |
    | `"full"`, one for each pair of an input $i$ and an output $o$ | features² | $B_{oi} x_i$ | $\sum_i C_{oi} v_{oi}$ |
    | `"pointwise"`, `"pw"` or `"s5"` | any | $u_{nm} = B_{nm} x$, one for each sub-state | $C\,\mathrm{Re}\,s$, no $E$ |

    with $A_{nm} = -e^{\mathrm{log\_A\_real}} + i A_{imag}$ and $\Delta_n = s\,e^{\mathrm{log\_delta}}$,
    $s$ the `step_rescale`; with timesteps, $\Delta_{n,t} = \Delta_n \tau_t$.

    | `discretization` | $\bar A$ | $\gamma$ |
    |---|---|---|
    | `"zoh"`, `"bilinear"`, `"dirac"` | see [`discretax.ops.zoh`][] and kin | |
    | `"euler"` | $e^{\Delta A}$ | $\Delta$ |

    lrnnx takes a discretisation and then always computes what is `"euler"` here; its $\mathrm{Re} A$ is
    free, where this one stays negative. Its frequencies start $M$ times lower than here and in the
    authors' code.

    The cache holds real and imaginary part of the states, `(channels, 2, sub_state_dim)`, or
    `(2, state_dim * sub_state_dim)` in the pointwise mode.

    !!! example

        ```python
        mixer = Centaurus(64, mode="pointwise", state_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Pei, Let SSMs be ConvNets: State-space Modeling with Optimal Tensor Contractions, ICLR 2025
        (arXiv:2501.13230).
    """

    log_A_real: Float[Array, "state sub"]
    A_imag: Float[Array, "state sub"]
    E: Float[Array, "state sub"] | None
    log_delta: Float[Array, " state"]
    B: Float[Array, "*projection"]
    C: Float[Array, "*projection"]
    step_rescale: float
    in_features: int = eqx.field(static=True)
    mode: Mode = eqx.field(static=True)
    discretization: Discretization = eqx.field(static=True)
    route: Route = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("log_A_real", "A_imag", "log_delta")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        mode: Mode = "neck",
        state_dim: int | None = None,
        sub_state_dim: int = 8,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        discretization: Discretization = "zoh",
        route: Route = None,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `mode`: how the channels are connected, see the table above.
        - `state_dim`: number of channels $N$; by default what the mode asks for, else `in_features`.
        - `sub_state_dim`: states per channel $M$. $A_{nm}$ starts at $-\frac12 + i\pi m$.
        - `dt_min`, `dt_max`: the channels' $\Delta$ start evenly spread in logarithm between these, in
            sample intervals.
        - `step_rescale`: multiplies every $\Delta$: 2 for a signal sampled half as often.
        - `discretization`: see the table above.
        - `route`: as in [`discretax.ops.depthwise_ssm`][]; None chooses. With `"fft"` the projections
            are contracted in the cheapest order ([`discretax.ops.projected_convolution`][]). The
            pointwise mode always scans.

        **Raises:**

        `ValueError` for a `state_dim` other than `in_features` in mode `"dws"` or `in_features ** 2` in
        mode `"full"`, an unknown name, or `dt_min > dt_max`.
        """
        in_features = check_size("in_features", in_features)
        sub_state_dim = check_size("sub_state_dim", sub_state_dim)
        check_name("mode", mode, Mode)
        check_name("discretization", discretization, Discretization)
        check_name("route", route, Route)
        if mode in ("pw", "s5"):
            mode = "pointwise"
        if mode == "pointwise" and route not in (None, "scan"):
            raise ValueError(
                f'the mode "pointwise" runs by scan; got route={route!r}. Leave `route` out.'
            )
        required = {"dws": in_features, "full": in_features**2}.get(mode)
        state_dim = (required or in_features) if state_dim is None else state_dim
        state_dim = check_size("state_dim", state_dim)
        if required is not None and state_dim != required:
            rule = "in_features" if mode == "dws" else "in_features ** 2"
            raise ValueError(
                f'the mode "{mode}" has state_dim = {rule} = {required} channels; got '
                f"state_dim={state_dim}. Leave `state_dim` out."
            )
        check_positive("step_rescale", step_rescale)
        E_key, B_key, C_key = draw.split(key, 3)
        shape = (state_dim, sub_state_dim)
        self.log_A_real = jnp.full(shape, math.log(0.5), float)
        self.A_imag = jnp.broadcast_to(jnp.arange(float(sub_state_dim)) * math.pi, shape)
        self.E = None if mode == "pointwise" else draw.normal(E_key, shape) * 2**0.5
        self.log_delta = log_spaced_step(state_dim, dt_min, dt_max)
        if mode == "dws":
            self.B, self.C = jnp.ones(in_features), jnp.ones(in_features)
        elif mode == "full":
            self.B = draw.normal(B_key, (state_dim,)) * (2 / in_features) ** 0.5
            self.C = draw.normal(C_key, (state_dim,)) * (2 / in_features) ** 0.5
        else:
            width = state_dim * (sub_state_dim if mode == "pointwise" else 1)
            fan = lambda key, shape: (
                draw.uniform(key, shape, minval=-1, maxval=1) * shape[1] ** -0.5
            )
            self.B, self.C = fan(B_key, (width, in_features)), fan(C_key, (in_features, width))
        self.step_rescale = step_rescale
        self.in_features = in_features
        self.mode = mode
        self.discretization = discretization
        self.route = route

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, "..."]:
        del max_seqlen
        channels, sub_states = self.log_A_real.shape
        if self.mode == "pointwise":
            return zero_cache(batch_size, (2, channels * sub_states), dtype)
        return zero_cache(batch_size, (channels, 2, sub_states), dtype)

    def discretize(
        self, integration_timesteps: Timesteps | None = None
    ) -> "DiagonalSystem | CentaurusSystem":
        mixer = widened(self)
        A = lax.complex(-jnp.exp(mixer.log_A_real), mixer.A_imag)
        dt = self.step_rescale * jnp.exp(mixer.log_delta)[:, None]
        if integration_timesteps is not None:
            dt = jnp.multiply.outer(jnp.asarray(integration_timesteps, dt.dtype), dt)
        dt = dt.astype(A.dtype)
        if self.discretization == "euler":
            A_bar = jnp.exp(dt * lax.broadcast_to_rank(A, dt.ndim))
            gamma = jnp.broadcast_to(dt, A_bar.shape)
        else:
            discretize = {"zoh": zoh, "bilinear": bilinear, "dirac": dirac}[self.discretization]
            A_bar, gamma = discretize(A, dt)
        if mixer.E is not None:
            return CentaurusSystem(
                A_bar, gamma, mixer.E, mixer.B, mixer.C, self.in_features, self.mode, self.route
            )
        A_bar, gamma = (v.reshape(*v.shape[:-2], self.B.shape[0]) for v in (A_bar, gamma))
        return DiagonalSystem(
            A_bar=(A_bar.real, A_bar.imag),
            B=(mixer.B, jnp.zeros_like(mixer.B)),
            C=(mixer.C, jnp.zeros_like(mixer.C)),
            D=jnp.zeros(self.in_features, mixer.C.dtype),
            gamma=(gamma.real, gamma.imag),
        )

    def compute_kernel(self, length: int) -> Array:
        r"""$K_{n,l} = \mathrm{Re} \sum_m E_{nm} \bar A_{nm}^l \gamma_{nm}$, `(length, channels)`; in the
        pointwise mode $\bar A^l$, complex, `(length, states)`."""
        length = check_size("length", length)
        system = self.discretize()
        if isinstance(system, DiagonalSystem):
            return system.powers(length)
        return system.kernel(length)


class CentaurusSystem(eqx.Module):
    """Channels of sub-states between an input and an output projection, in discrete time.

    Unpacks as the complex `A_bar, B_bar, C` of all states side by side."""

    channels: DepthwiseSystem
    B_in: Float[Array, "*projection"]
    C_out: Float[Array, "*projection"]
    in_features: int = eqx.field(static=True)
    mode: Mode = eqx.field(static=True)

    def __init__(
        self,
        A_bar: Complex[Array, "*time channels sub"],
        gamma: Complex[Array, "*time channels sub"],
        E: Float[Array, "channels sub"],
        B: Float[Array, "*projection"],
        C: Float[Array, "*projection"],
        in_features: int,
        mode: Mode,
        route: Route,
    ):
        no_skip = jnp.zeros((1, E.shape[0]), E.dtype)
        self.channels = DepthwiseSystem(A_bar, gamma, _complex(E)[None], no_skip, route=route)
        self.B_in = B
        self.C_out = C
        self.in_features = in_features
        self.mode = mode

    @property
    def A_bar(self) -> Complex[Array, "*time state"]:
        A_bar = self.channels.A_bar
        return A_bar.reshape(*A_bar.shape[:-2], -1)

    @property
    def B_bar(self) -> Complex[Array, "*time state features"]:
        eye = jnp.eye(self.in_features, dtype=self.B_in.dtype)
        drive = _complex(self._project(eye).T)  # (channels, features)
        B_bar = self.channels.B_bar[..., None]
        B_bar = B_bar * lax.broadcast_to_rank(drive[:, None], B_bar.ndim)
        return B_bar.reshape(*B_bar.shape[:-3], -1, B_bar.shape[-1])

    @property
    def C(self) -> Complex[Array, "features state"]:
        E = self.channels.C[0]
        readout = self._read_out(jnp.eye(E.shape[0], dtype=self.C_out.dtype)).T
        return (_complex(readout)[:, :, None] * E[None]).reshape(readout.shape[0], -1)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.A_bar, self.B_bar, self.C))

    def __call__(
        self,
        x: Values,
        cache: Float[Array, "channels 2 sub"],
        *,
        length: Length | None = None,
        resets: Resets | None = None,
    ) -> tuple[Values, Float[Array, "channels 2 sub"]]:
        constant = self.channels.B_planes.ndim == 3 and resets is None
        convolves = self.mode != "dws" and self.channels.route == "fft" and constant

        def run(h):
            u = mended(x)
            if convolves and x.shape[0]:
                return self._convolve(u, h, length)
            v, h = self.channels(self._project(u), h, length=length, resets=resets)
            return self._read_out(v), h

        options = {"incoming": incoming_broken, "by_feature": self.mode == "dws"}
        return contained(run, cache, x, resets, length, **options)

    def step(
        self, x: Sample, cache: Float[Array, "channels 2 sub"]
    ) -> tuple[Sample, Float[Array, "channels 2 sub"]]:
        def run(x, h):
            v, h = self.channels.step(self._project(x[None])[0], h)
            return self._read_out(v[None])[0], h

        return contained_step(run, x, cache, by_feature=self.mode == "dws")

    def kernel(self, length: int) -> Float[Array, "time channels"]:
        return self.channels.kernel(length)[:, 0]

    def eigenvalues(self) -> Complex[Array, " state"]:
        r"""Of the transition: $\bar A$ itself."""
        return self.A_bar

    def transfer(self, z: Complex[Array, "*shape"]) -> Complex[Array, "*shape out features"]:
        r"""$H(z) = \sum_l K_l z^{-l}$ of the impulse response $K$, in closed form."""
        A_bar, B_bar, C = self
        return transfer(A_bar, B_bar, C, z)

    def _convolve(self, x, h0, length):
        """With the channels' readout and the projections contracted in the cheapest order."""
        kernel = self.kernel(x.shape[0])
        channels = self.channels
        system = channels.transition, channels.B_planes, channels.C_planes, self._project(x)
        h0 = incoming_depthwise_state(*system, h0, length, None)
        free, h = carried_state(*system, h0, length)
        if self.mode == "neck":
            forced = projected_convolution(kernel, self.B_in, self.C_out, x)
        else:
            weights = self.B_in * self.C_out
            forced = matrix_convolution(
                (kernel * weights[None]).reshape(-1, self.in_features, self.in_features), x
            )
        return forced + self._read_out(free[:, 0]), h

    def _project(self, x: Float[Array, "time features"]) -> Float[Array, "time channels"]:
        if self.mode == "neck":
            return x @ self.B_in.T
        return (x if self.mode == "dws" else jnp.tile(x, (1, self.in_features))) * self.B_in[None]

    def _read_out(self, v: Float[Array, "time channels"]) -> Float[Array, "time features"]:
        if self.mode == "neck":
            return v @ self.C_out.T
        v = v * self.C_out[None]
        if self.mode == "dws":
            return v
        return v.reshape(-1, self.in_features, self.in_features).sum(-1)


def _complex(values: Array) -> Array:
    return lax.complex(values, jnp.zeros_like(values))


def CentaurusNeck(in_features: int, key: PRNGKeyArray, **options: Any) -> Centaurus:
    """[`discretax.sequence_mixers.Centaurus`][] in mode `"neck"`."""
    return Centaurus(in_features, key, mode="neck", **options)


def CentaurusPWNeck(in_features: int, key: PRNGKeyArray, **options: Any) -> Centaurus:
    """[`discretax.sequence_mixers.Centaurus`][] in mode `"pointwise"`."""
    return Centaurus(in_features, key, mode="pointwise", **options)


def CentaurusDWS(in_features: int, key: PRNGKeyArray, **options: Any) -> Centaurus:
    """[`discretax.sequence_mixers.Centaurus`][] in mode `"dws"`."""
    return Centaurus(in_features, key, mode="dws", **options)


def CentaurusFull(in_features: int, key: PRNGKeyArray, **options: Any) -> Centaurus:
    """[`discretax.sequence_mixers.Centaurus`][] in mode `"full"`."""
    return Centaurus(in_features, key, mode="full", **options)
