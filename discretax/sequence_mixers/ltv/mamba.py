import math
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size, linear
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import short_convolution, step_bias
from discretax.ops import depthwise_convolution, selective_scan
from discretax.ops._rms import rms_normalised
from discretax.ops._selective_scan.selective_scan import SelectiveDiscretization
from discretax.sequence_mixers.base import (
    AbstractRecurrentMixer,
    refuse_timesteps,
    zero_cache,
)

StepInit = Literal["random", "constant"]


class MambaCache(NamedTuple):
    """The samples that the convolution still sees, oldest first, and the recurrence's state."""

    window: Float[Array, "past inner"]
    state: Float[Array, "state inner"]  # as the scan keeps it: a step then moves nothing


class MambaSequenceMixer(AbstractRecurrentMixer[MambaCache]):
    r"""Mamba: a gated layer around a selective scan, whose steps and projections come from the input.

    $$[u, z] = W_{in} x, \qquad u \leftarrow \mathrm{silu}(\mathrm{conv}(u)), \qquad
    [d, B, C] = W_x u, \qquad \Delta = \mathrm{softplus}(W_\Delta d + b_\Delta)$$
    $$h_t = \bar A_t \odot h_{t-1} + \gamma_t \odot (u_t B_t^T), \qquad
    y_t = W_{out} ((h_t C_t + D \odot u_t) \odot \mathrm{silu}(z_t))$$

    with $A = -e^{\mathrm{A\_log}}$ and $\bar A_t$, $\gamma_t$ from $A$ and $\Delta_t$ by the
    `discretization`, as in the table of [`discretax.ops.selective_scan`][]. $u$, $z$ and the states
    have `expand` times the width of $x$; the convolution is causal, one short filter per feature.

    With `event`, the state decays over the time that has passed and no longer over $\Delta_t$:
    $\bar A_t$ is made from $\Delta^A_t = \tau_t\,\mathrm{softplus}(\mathrm{dt\_A\_bias})$, where
    $\tau_t$ is the timestep before sample $t$, one if none are given. $\gamma_t$ keeps $\Delta_t$:
    what an event adds does not depend on the gap before it. Without `event` the steps are the
    input's choice, and timesteps are refused.

    With `b_c_dt_rms_eps` $= \epsilon$, each of $d$, $B$ and $C$ is divided by
    $\sqrt{\mathrm{mean}(v^2) + \epsilon}$ of its own entries $v$ before it is used, as in Falcon
    Mamba.

    The cache holds the convolution's window, `(conv_width - 1, inner)`, and the state,
    `(state, inner)`.

    lrnnx switches between the two forms by the presence of timesteps. Timesteps of one then differ
    from none; here they are the same. The parameters are those of its event form, less a weight
    that has no effect. Its bilinear step differs from its whole.

    !!! example

        ```python
        mixer = MambaSequenceMixer(64, state_dim=16, event=True, key=key)
        y, cache = mixer(x, integration_timesteps=gaps)  # x, y: (time, 64), gaps: (time,)
        ```

    ??? cite

        Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023
        (arXiv:2312.00752). Events: Schöne et al., STREAM: A Universal State-Space Model for Sparse
        Geometric Data, 2024 (arXiv:2411.12603).
    """

    in_proj: eqx.nn.Linear
    conv_weight: Float[Array, "inner width"]
    conv_bias: Float[Array, " inner"] | None
    x_proj: eqx.nn.Linear
    dt_proj: eqx.nn.Linear
    dt_A_bias: Float[Array, " inner"] | None
    dt_b_c_weights: tuple[Array, Array, Array] | None
    A_log: Float[Array, "inner state"]
    D: Float[Array, " inner"]
    out_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    dt_rank: int = eqx.field(static=True)
    b_c_dt_rms_eps: float | None = eqx.field(static=True)
    discretization: SelectiveDiscretization = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_A_bias")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: StepInit = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        use_bias: bool = False,
        discretization: SelectiveDiscretization = "mamba",
        event: bool = False,
        b_c_dt_rms_eps: float | None = None,
        b_c_dt_weights: bool = False,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states per inner feature. $A$ starts at $-1, -2, \dots$ for each.
        - `conv_width`: how many samples the convolution sees, its own included.
        - `expand`: the inner width is `expand * in_features`.
        - `dt_rank`: rank of the map from $u$ to $\Delta$; `"auto"` takes a sixteenth of
            `in_features`, rounded up.
        - `dt_min`, `dt_max`: the biases of the steps start such that without input $\Delta$ is
            log-uniform between these, in sample intervals.
        - `dt_init`, `dt_scale`: $W_\Delta$ starts uniform in $\pm$ `dt_scale / sqrt(dt_rank)`
            (`"random"`), or at that value (`"constant"`).
        - `dt_init_floor`: no step starts below it.
        - `conv_bias`: of the convolution.
        - `use_bias`: of $W_{in}$ and $W_{out}$.
        - `discretization`: `"mamba"` (the paper's code), `"zoh"` (its equations), `"bilinear"` or
            `"dirac"`.
        - `event`: the state decays over the timesteps.
        - `b_c_dt_rms_eps`: normalise $d$, $B$ and $C$, with this added to the mean of the squares;
            not if left out.
        - `b_c_dt_weights`: the normalised $d$, $B$ and $C$ are multiplied by learned weights, as in
            Jamba.

        **Raises:**

        `ValueError` for sizes below one, an unknown name, `dt_min > dt_max`, a `b_c_dt_rms_eps`
        that is not positive, or weights without it.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        conv_width = check_size("conv_width", conv_width)
        expand = check_size("expand", expand)
        check_name("discretization", discretization, SelectiveDiscretization)
        check_name("dt_init", dt_init, StepInit)
        if dt_rank == "auto":
            dt_rank = math.ceil(in_features / 16)
        dt_rank = check_size("dt_rank", dt_rank)
        if b_c_dt_rms_eps is not None:
            check_positive("b_c_dt_rms_eps", b_c_dt_rms_eps)
        in_key, conv_key, x_key, dt_key, step_key, event_key, out_key = draw.split(key, 7)
        inner = expand * in_features
        initial_bias = lambda key: step_bias(key, (inner,), dt_min, dt_max, dt_init_floor)
        self.in_proj = draw.linear(in_features, 2 * inner, use_bias=use_bias, key=in_key)
        weight_key, bias_key = draw.split(conv_key)
        self.conv_weight, self.conv_bias = short_convolution(
            weight_key, bias_key, inner, conv_width, use_bias=conv_bias
        )
        self.x_proj = draw.linear(inner, dt_rank + 2 * state_dim, use_bias=False, key=x_key)
        bound = dt_scale * dt_rank**-0.5
        shape = (inner, dt_rank)
        weight = (
            draw.uniform(dt_key, shape, minval=-bound, maxval=bound)
            if dt_init == "random"
            else jnp.full(shape, bound, float)
        )
        self.dt_proj = draw.linear_of(weight, initial_bias(step_key))
        self.dt_A_bias = initial_bias(event_key) if event else None
        self.A_log = jnp.tile(jnp.log(jnp.arange(1.0, state_dim + 1)), (inner, 1))
        self.D = jnp.ones(inner)
        self.out_proj = draw.linear(inner, in_features, use_bias=use_bias, key=out_key)
        self.in_features = in_features
        self.dt_rank = dt_rank
        if b_c_dt_weights and b_c_dt_rms_eps is None:
            raise ValueError(
                "`b_c_dt_weights=True` multiplies what is normalised; got b_c_dt_rms_eps=None. Give "
                "`b_c_dt_rms_eps=1e-6`."
            )
        sizes = (dt_rank, state_dim, state_dim)
        dt, b, c = (jnp.ones(size) for size in sizes)
        self.dt_b_c_weights = (dt, b, c) if b_c_dt_weights else None
        self.b_c_dt_rms_eps = b_c_dt_rms_eps
        self.discretization = discretization

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> MambaCache:
        del max_seqlen
        inner, width = self.conv_weight.shape
        return MambaCache(
            window=zero_cache(batch_size, (width - 1, inner), dtype),
            state=zero_cache(batch_size, self.A_log.shape[::-1], dtype),
        )

    def mix(
        self,
        x: Values,
        cache: MambaCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, MambaCache]:
        u, z = jnp.split(linear(self.in_proj, x), 2, axis=-1)
        u, window = depthwise_convolution(
            u, self.conv_weight, self.conv_bias, cache.window, length=length, resets=resets
        )
        u = jax.nn.silu(u)
        low_rank, B, C = jnp.split(
            linear(self.x_proj, u), (self.dt_rank, self.dt_rank + self.A_log.shape[1]), axis=-1
        )
        if self.b_c_dt_rms_eps is not None:
            weights = self.dt_b_c_weights or (None, None, None)
            low_rank, B, C = (
                _weighted(rms_normalised(v, self.b_c_dt_rms_eps), weight).astype(v.dtype)
                for v, weight in zip((low_rank, B, C), weights, strict=True)
            )
        dtype = accumulation_dtype(x, self.D)
        low_rank = low_rank.astype(dtype)
        y, state = selective_scan(
            u,
            jax.nn.softplus(linear(self.dt_proj, low_rank)),
            -jnp.exp(self.A_log.astype(dtype)),
            B,
            C,
            self.D,
            cache.state.T,
            dt_A=self._decay_steps(x.shape[0], integration_timesteps),
            discretization=self.discretization,
            length=length,
            resets=resets,
        )
        return linear(self.out_proj, y * jax.nn.silu(z)), MambaCache(window, state.T)

    def _decay_steps(self, time, timesteps):
        if self.dt_A_bias is None:
            refuse_timesteps(self, timesteps, "its steps are the input's choice unless event=True")
            return None
        timesteps = jnp.ones(time) if timesteps is None else timesteps
        per_interval = jax.nn.softplus(self.dt_A_bias.astype(accumulation_dtype(self.dt_A_bias)))
        return timesteps.astype(per_interval.dtype)[:, None] * per_interval[None]


def _weighted(x: Values, weight: Array | None) -> Values:
    return x if weight is None else x * weight.astype(x.dtype)[None]
