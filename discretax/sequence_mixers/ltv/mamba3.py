import math
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size, divided, linear
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import step_bias
from discretax.ops import TrapezoidalState, cumulative_phase, trapezoidal_ssd
from discretax.ops._rms import rms_normalised
from discretax.ops._rotary import turned
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

Rate = Literal["softplus", "heavy_tail"]


class Mamba3Cache(NamedTuple):
    """By which part of a turn the states are turned, the states, and the last sample."""

    phase: Float[Array, "heads pairs"]
    state: TrapezoidalState


class Mamba3SequenceMixer(AbstractRecurrentMixer[Mamba3Cache]):
    r"""Mamba-3: heads whose states rotate, discretised by the trapezoidal rule.

    $$[z, v, B, C, d, a, l, \omega] = W_{in} x, \qquad
    \Delta = \mathrm{softplus}(d + \mathrm{dt\_bias}), \qquad
    A = -\max(\rho(a), \mathrm{A\_floor}), \qquad \lambda = \sigma(l)$$
    $$\theta_t = \theta_{t-1} + \pi \tanh(\omega_t)\, \Delta_t, \qquad
    B_t \leftarrow R_{\theta_t} (w_B \odot \mathrm{rms}(B_t) + b_B), \qquad
    C_t \leftarrow R_{\theta_t} (w_C \odot \mathrm{rms}(C_t) + b_C)$$
    $$h_t = e^{\Delta_t A_t} \big(h_{t-1} + (1 - \lambda_t) \Delta_t\, v_{t-1} B_{t-1}^T\big)
    + \lambda_t \Delta_t\, v_t B_t^T, \qquad
    y_t = W_{out}\, ((h_t C_t + D v_t) \odot \mathrm{silu}(z_t))$$

    $\Delta$, $A$, $\lambda$ and $D$ are one number per head, and $v$ is cut into heads of `head_dim`
    features. $R_\theta$ turns pairs of states, which makes the transition a complex one: what a state
    counts may go round. Heads share $B$, $C$ and $\omega$ within a group, but not their biases. There
    is no convolution; see [`discretax.ops.trapezoidal_ssd`][].

    With a `rank` $R$ above one (MIMO), $R$ inputs $v_r = m_r \odot v$ write to the states of a head,
    each with a $B_r$, and $R$ outputs are read, gated by $\mathrm{silu}(n_r \odot z)$ and summed with
    the weights $o_r$. With `output_norm`, each head is divided by the root of its mean square before
    the gate.

    $\rho$ is the `rate`: `"softplus"`, as in the paper, or `"heavy_tail"`, $1 + a$ for $a \ge 0$ and
    $1 / (1 - a)$ below, of the authors' code since June 2026. Weights trained with one do not serve
    the other. That code turns neighbouring states, $2i$ and $2i + 1$, and with a rank $i$ and
    $i + \mathrm{state}/2$; so do we.

    The cache holds $\theta / 2\pi$, `(heads, pairs)`, the states, `(heads, head_dim, state)`, and the
    inputs and $B$ of the last sample, `(rank, heads, head_dim)` and `(rank, heads, state)`.

    !!! example

        ```python
        mixer = Mamba3SequenceMixer(64, state_dim=32, head_dim=32, rank=4, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Lahoti et al., Mamba-3: Improved Sequence Modeling using State Space Principles, 2026
        (arXiv:2603.15569).
    """

    in_proj: eqx.nn.Linear
    dt_bias: Float[Array, " heads"]
    B_weight: Float[Array, " state"]
    C_weight: Float[Array, " state"]
    B_bias: Float[Array, "heads rank state"]
    C_bias: Float[Array, "heads rank state"]
    D: Float[Array, " heads"]
    in_weight: Float[Array, "heads rank head_dim"] | None
    gate_weight: Float[Array, "heads rank head_dim"] | None
    out_weight: Float[Array, "heads rank head_dim"] | None
    norm_weight: Float[Array, "heads head_dim"] | None
    out_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    num_pairs: int = eqx.field(static=True)
    rate: Rate = eqx.field(static=True)
    A_floor: float = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("D", "dt_bias")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        rank: int | None = None,
        rotary_fraction: float = 0.5,
        rate: Rate = "softplus",
        A_floor: float = 1e-4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        output_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states per inner feature.
        - `expand`: the inner width is `expand * in_features`.
        - `head_dim`: features per head; it divides the inner width.
        - `num_groups`: of heads that share $B$ and $C$; it divides the number of heads.
        - `rank`: inputs and outputs of a head (MIMO); None for one each, without weights of their
            own (SISO). The paper's MIMO models have 4.
        - `rotary_fraction`: the part of the states that are turned.
        - `rate`: $\rho$, from which $-A$ comes.
        - `A_floor`: the least $-A$.
        - `dt_min`, `dt_max`: the biases of the steps start such that without input $\Delta$ is
            log-uniform between these, in sample intervals.
        - `dt_init_floor`: no step starts below it.
        - `output_norm`: whether each head is normalised before the gate.
        - `norm_eps`: added to the mean squares of the norms.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, a fraction that turns no pair, an
        unknown `rate`, or ranges that are none.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        expand = check_size("expand", expand)
        head_dim = check_size("head_dim", head_dim)
        num_groups = check_size("num_groups", num_groups)
        inputs = 1 if rank is None else check_size("rank", rank)
        check_name("rate", rate, Rate)
        check_positive("A_floor", A_floor)
        check_positive("norm_eps", norm_eps)
        inner = expand * in_features
        heads = divided("the inner width, expand * in_features", inner, "head_dim", head_dim)
        what = "the number of heads, expand * in_features / head_dim"
        divided(what, heads, "num_groups", num_groups)
        fits = 0 < rotary_fraction <= 1
        pairs = int(state_dim * rotary_fraction) // 2 if fits else 0
        if pairs == 0:
            raise ValueError(
                "`rotary_fraction` must be above 0 and at most 1, and turn at least one pair of "
                f"states; got {rotary_fraction} of state_dim = {state_dim}."
            )
        if state_dim % 2:
            raise ValueError(
                f"`state_dim` must be even, for states are turned in pairs; got {state_dim}."
            )
        in_key, step_key, out_key = draw.split(key, 3)
        written = num_groups * inputs * state_dim
        projected = 2 * inner + 2 * written + 3 * heads + pairs

        self.in_proj = draw.linear(in_features, projected, use_bias=False, key=in_key)
        self.dt_bias = step_bias(step_key, (heads,), dt_min, dt_max, dt_init_floor)
        self.B_weight = jnp.ones(state_dim)
        self.C_weight = jnp.ones(state_dim)
        self.B_bias = jnp.ones((heads, inputs, state_dim))
        self.C_bias = jnp.ones((heads, inputs, state_dim))
        self.D = jnp.ones(heads)
        self.in_weight = self.gate_weight = self.out_weight = None
        if rank is not None:
            self.in_weight = jnp.full((heads, inputs, head_dim), 1 / inputs, float)
            self.gate_weight = jnp.ones((heads, inputs, head_dim))
            self.out_weight = jnp.full((heads, inputs, head_dim), 1 / inputs, float)
        self.norm_weight = jnp.ones((heads, head_dim)) if output_norm else None
        self.out_proj = draw.linear(inner, in_features, use_bias=False, key=out_key)
        self.in_features = in_features
        self.num_groups = num_groups
        self.num_pairs = pairs
        self.rate = rate
        self.A_floor = A_floor
        self.norm_eps = norm_eps

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Mamba3Cache:
        del max_seqlen
        heads, rank, state = self.B_bias.shape
        head_dim = self.out_proj.weight.shape[1] // heads
        zeros = lambda *shape: zero_cache(batch_size, shape, dtype)
        return Mamba3Cache(
            phase=zeros(heads, self.num_pairs),
            state=TrapezoidalState(
                h=zeros(heads, head_dim, state),
                x=zeros(rank, heads, head_dim),
                B=zeros(rank, heads, state),
            ),
        )

    def mix(
        self,
        x: Values,
        cache: Mamba3Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Mamba3Cache]:
        refuse_timesteps(self, integration_timesteps, "its steps are the input's choice")
        dtype = accumulation_dtype(x, self.D)
        wide = lambda array: array.astype(dtype)
        time, (heads, rank, state) = x.shape[0], self.B_bias.shape
        inner, written = self.out_proj.weight.shape[1], self.num_groups * rank * state
        sizes = (inner, inner, written, written, heads, heads, heads)
        parts = jnp.split(linear(self.in_proj, x), np.cumsum(sizes), axis=-1)
        z, v, B, C, step, rate, trapezoid, omega = parts
        dt = jax.nn.softplus(wide(step) + wide(self.dt_bias)[None])
        A = -jnp.maximum(RATES[self.rate](wide(rate)), self.A_floor)
        phases, phase = cumulative_phase(
            jnp.tanh(wide(omega))[:, None] * dt[..., None] / 2,
            cache.phase,
            length=length,
            resets=resets,
        )
        angles = 2 * math.pi * phases
        z, v = (wide(array).reshape(time, 1, heads, inner // heads) for array in (z, v))
        v = v if self.in_weight is None else v * by_rank(wide(self.in_weight))[None]
        y, after = trapezoidal_ssd(
            v,
            dt,
            dt * A,
            jax.nn.sigmoid(wide(trapezoid)),
            self._turned(B, wide(self.B_weight), wide(self.B_bias), angles),
            self._turned(C, wide(self.C_weight), wide(self.C_bias), angles),
            cache.state,
            length=length,
            resets=resets,
        )
        y = y + wide(self.D)[None, None, :, None] * v
        if self.norm_weight is not None:
            y = rms_normalised(y, self.norm_eps) * wide(self.norm_weight)[None, None]
        z = z if self.gate_weight is None else z * by_rank(wide(self.gate_weight))[None]
        y = y * jax.nn.silu(z)
        y = y if self.out_weight is None else y * by_rank(wide(self.out_weight))[None]
        y = linear(self.out_proj, y.sum(1).reshape(time, inner).astype(x.dtype))
        return y, Mamba3Cache(phase, after)

    def _turned(
        self,
        rows: Float[Array, "time written"],
        weight: Float[Array, " state"],
        bias: Float[Array, "heads rank state"],
        angles: Float[Array, "time heads pairs"],
    ) -> Float[Array, "time rank heads state"]:
        """Normalised, given to the heads of each group, and turned."""
        heads, rank, state = bias.shape
        rows = rows.astype(weight.dtype).reshape(len(rows), rank, self.num_groups, state)
        rows = rms_normalised(rows, self.norm_eps) * weight[None, None, None]
        rows = jnp.repeat(rows, heads // self.num_groups, axis=2) + by_rank(bias)[None]
        neighbours = self.in_weight is None
        pairs = (state // 2, 2) if neighbours else (2, state // 2)
        axis = -1 if neighbours else -2
        first, second = jnp.unstack(rows.reshape(*rows.shape[:-1], *pairs), axis=axis)
        first, first_rest = jnp.split(first, [self.num_pairs], axis=-1)
        second, second_rest = jnp.split(second, [self.num_pairs], axis=-1)
        first, second = turned(first, second, angles[:, None])
        both = [
            jnp.concatenate([first, first_rest], axis=-1),
            jnp.concatenate([second, second_rest], axis=-1),
        ]
        return jnp.stack(both, axis=axis).reshape(rows.shape)


def by_rank(array: Float[Array, "heads rank _"]) -> Float[Array, "rank heads _"]:
    return jnp.swapaxes(array, 0, 1)


def heavy_tail(x: Array) -> Array:
    r"""$1 + x$ for $x \ge 0$, else $1 / (1 - x)$: positive, and without a bend at zero."""
    return jnp.maximum(x, 0) + 1 / (1 - jnp.minimum(x, 0))


RATES = {"softplus": jax.nn.softplus, "heavy_tail": heavy_tail}
