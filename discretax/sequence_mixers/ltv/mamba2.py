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
from discretax._timeseries import valid_samples
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import log_rate, short_convolution, step_bias
from discretax.ops import depthwise_convolution, linear_recurrence, ssd
from discretax.ops._rms import rms_normalised
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

GateNorm = Literal["after", "before"] | None


class Mamba2Cache(NamedTuple):
    """The samples that the convolution still sees, oldest first, and the recurrence's state."""

    window: Float[Array, "past convolved"]
    state: Float[Array, "heads head_dim state"]


class Mamba2SequenceMixer(AbstractRecurrentMixer[Mamba2Cache]):
    r"""Mamba-2: a gated layer around heads whose states decay by one number per sample.

    $$[z, u, d] = W_{in} x, \qquad [v, B, C] = \mathrm{silu}(\mathrm{conv}(u)), \qquad
    \Delta = \mathrm{clip}(\mathrm{softplus}(d + \mathrm{dt\_bias}))$$
    $$h_t = e^{\Delta_t A} h_{t-1} + \Delta_t v_t B_t^T, \qquad
    y_t = W_{out}\, (w \odot \mathrm{rms}((h_t C_t + D v_t) \odot \mathrm{silu}(z_t)))$$

    with $A = -e^{\mathrm{A\_log}}$, $\Delta$, $A$ and $D$ one number per head (`D_has_hdim`: $D$ one
    per feature of a head), and $v$ cut into heads of `head_dim` features. Heads share $B$ and $C$
    within a group, as in [`discretax.ops.ssd`][], and
    $\mathrm{rms}$ divides each group's features by the root of their mean square. $z$ and $v$ have
    `expand` times the width of $x$; the convolution is causal, one short filter per feature. With
    `gate_norm="before"` the norm stands before the gate, and with None there is none. `scales` are
    constants that multiply $z$, $v$, $B$, $C$ and $d$ where $W_{in}$ puts them out, as in Falcon-H1.

    With an `ssm_dim` below the inner width, $z$ and $v$ have that width, and the other features are a
    gated map without memory: $W_{in}$ also puts out $[g, w]$, before the others, and $W_{out}$ takes
    $\mathrm{silu}(g) \odot w$ before $y$. With `learnable_init_states` each sequence starts from a
    state $h_0$ that is learned, after a reset too, and not from zero.

    The cache holds the convolution's window, `(conv_width - 1, ssm + 2 * groups * state)`, and the
    state, `(heads, head_dim, state)`.

    The steps are clipped to `dt_limit` wherever they are used. transformers does not clip them when
    it generates with a cache.

    !!! example

        ```python
        mixer = Mamba2SequenceMixer(64, state_dim=32, head_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Dao and Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through
        Structured State Space Duality, ICML 2024 (arXiv:2405.21060).
    """

    in_proj: eqx.nn.Linear
    conv_weight: Float[Array, "convolved width"]
    conv_bias: Float[Array, " convolved"] | None
    dt_bias: Float[Array, " heads"]
    A_log: Float[Array, " heads"]
    D: Float[Array, "heads *head_dim"]
    norm_weight: Float[Array, " ssm"] | None
    out_proj: eqx.nn.Linear
    initial_state: Float[Array, "heads head_dim state"] | None
    in_features: int = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    norm_groups: int = eqx.field(static=True)
    gate_norm: GateNorm = eqx.field(static=True)
    scales: tuple[float, float, float, float, float] = eqx.field(static=True)
    dt_limit: tuple[float, float] = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "initial_state")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 128,
        conv_width: int = 4,
        expand: int = 2,
        inner_dim: int | None = None,
        ssm_dim: int | None = None,
        head_dim: int = 64,
        num_groups: int = 1,
        norm_groups: int | None = None,
        gate_norm: GateNorm = "after",
        scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        learnable_init_states: bool = False,
        norm_eps: float = 1e-5,
        conv_bias: bool = True,
        use_bias: bool = False,
        out_bias: bool | None = None,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states per inner feature.
        - `conv_width`: how many samples the convolution sees, its own included.
        - `expand`: the inner width is `expand * in_features`.
        - `inner_dim`: the inner width itself, in place of `expand`.
        - `ssm_dim`: how many of the inner features have a state, `d_ssm` in mamba_ssm; all if left
            out.
        - `head_dim`: features per head; it divides the number of features that have a state.
        - `num_groups`: of heads that share $B$ and $C$; it divides the number of heads.
        - `norm_groups`: of features that the norm takes together; `num_groups` if left out, 1 for
            one norm over all.
        - `gate_norm`: the norm `"after"` the gate, `"before"` it, or None for no norm.
        - `scales`: of $z$, $v$, $B$, $C$ and $d$.
        - `dt_min`, `dt_max`: the biases of the steps start such that without input $\Delta$ is
            log-uniform between these, in sample intervals.
        - `dt_init_floor`: no step starts below it.
        - `dt_limit`: the least and the largest step.
        - `A_init_range`: $-A$ starts uniform between these.
        - `D_has_hdim`: whether $D$ is `(heads, head_dim)` rather than `(heads,)`.
        - `learnable_init_states`: whether the state before the first sample is learned. It starts
            from zero.
        - `norm_eps`: added to the mean squares of the norm.
        - `conv_bias`: of the convolution.
        - `use_bias`: of $W_{in}$ and, unless `out_bias` says otherwise, of $W_{out}$.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or ranges that are none.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        conv_width = check_size("conv_width", conv_width)
        expand = check_size("expand", expand)
        head_dim = check_size("head_dim", head_dim)
        num_groups = check_size("num_groups", num_groups)
        check_positive("norm_eps", norm_eps)
        check_name("gate_norm", gate_norm, GateNorm)
        for i, scale in enumerate(scales):
            check_positive(f"scales[{i}]", scale)
        width = "inner_dim" if inner_dim is not None else "the inner width, expand * in_features"
        inner = expand * in_features if inner_dim is None else check_size("inner_dim", inner_dim)
        mlp_dim = 0
        if ssm_dim is not None:
            mlp_dim = inner - check_size("ssm_dim", ssm_dim)
            if mlp_dim < 0:
                raise ValueError(f"`ssm_dim` must be at most {width}, {inner}; got {ssm_dim}.")
            width = "ssm_dim"
        ssm_dim = inner - mlp_dim
        num_heads = divided(width, ssm_dim, "head_dim", head_dim)
        norm_groups = num_groups if norm_groups is None else check_size("norm_groups", norm_groups)
        heads = f"the number of heads, {width} / head_dim"
        divided(heads, num_heads, "num_groups", num_groups)
        divided(width, ssm_dim, "norm_groups", norm_groups)
        if not 0 <= dt_limit[0] < dt_limit[1]:
            raise ValueError(
                f"`dt_limit` must be (low, high) with 0 <= low < high; got {dt_limit}."
            )
        in_key, conv_key, bias_key, A_key, step_key, out_key = draw.split(key, 6)
        convolved = ssm_dim + 2 * num_groups * state_dim

        self.in_proj = draw.linear(
            in_features,
            2 * mlp_dim + ssm_dim + convolved + num_heads,
            use_bias=use_bias,
            key=in_key,
        )
        self.conv_weight, self.conv_bias = short_convolution(
            conv_key, bias_key, convolved, conv_width, use_bias=conv_bias
        )
        self.dt_bias = step_bias(step_key, (num_heads,), dt_min, dt_max, dt_init_floor)
        self.A_log = log_rate(A_key, (num_heads,), *A_init_range)
        self.D = jnp.ones((num_heads, head_dim) if D_has_hdim else num_heads)
        self.norm_weight = None if gate_norm is None else jnp.ones(ssm_dim)
        out_bias = use_bias if out_bias is None else out_bias
        self.out_proj = draw.linear(inner, in_features, use_bias=out_bias, key=out_key)
        state_shape = (num_heads, head_dim, state_dim)
        self.initial_state = jnp.zeros(state_shape) if learnable_init_states else None
        self.in_features = in_features
        self.state_dim = state_dim
        self.num_groups = num_groups
        self.norm_groups = norm_groups
        self.gate_norm = gate_norm
        self.scales = scales
        self.dt_limit = (dt_limit[0], dt_limit[1])
        self.norm_eps = norm_eps

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Mamba2Cache:
        del max_seqlen
        convolved, width = self.conv_weight.shape
        heads = self.A_log.shape[0]
        shape = (heads, self.ssm_dim // heads, self.state_dim)
        state = zero_cache(batch_size, shape, dtype)
        if self.initial_state is not None:
            state = state + jnp.broadcast_to(self.initial_state.astype(state.dtype), state.shape)
        return Mamba2Cache(zero_cache(batch_size, (width - 1, convolved), dtype), state)

    @property
    def ssm_dim(self) -> int:
        """How many of the inner features have a state."""
        return self.conv_weight.shape[0] - 2 * self.num_groups * self.state_dim

    def mix(
        self,
        x: Values,
        cache: Mamba2Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Mamba2Cache]:
        refuse_timesteps(self, integration_timesteps, "its steps are the input's choice")
        time, inner, ssm_dim = x.shape[0], self.out_proj.weight.shape[1], self.ssm_dim
        mlp_dim, states = inner - ssm_dim, self.num_groups * self.state_dim
        dtype = accumulation_dtype(x, self.D)
        projected = linear(self.in_proj, x)
        if set(self.scales) != {1.0}:
            sizes = np.array([2 * mlp_dim, ssm_dim, ssm_dim, states, states, len(self.A_log)])
            scales = np.repeat((1.0, *self.scales), sizes)
            projected = projected * jnp.asarray(scales, x.dtype)[None]
        ends = np.cumsum([mlp_dim, mlp_dim, ssm_dim, self.conv_weight.shape[0]])
        gate, values, z, u, dt = jnp.split(projected, ends, axis=-1)
        u, window = depthwise_convolution(
            u, self.conv_weight, self.conv_bias, cache.window, length=length, resets=resets
        )
        v, B, C = jnp.split(jax.nn.silu(u), (ssm_dim, ssm_dim + states), axis=-1)
        C = C.reshape(time, self.num_groups, self.state_dim)
        dt = jax.nn.softplus(dt.astype(dtype) + self.dt_bias.astype(dtype)[None])
        dt, A = jnp.clip(dt, *self.dt_limit), -jnp.exp(self.A_log.astype(dtype))
        y, state = ssd(
            v.reshape(time, *cache.state.shape[:2]),
            dt,
            A,
            B.reshape(time, self.num_groups, self.state_dim),
            C,
            self.D,
            cache.state,
            length=length,
            resets=resets,
        )
        y = y.astype(dtype)
        if self.initial_state is not None and resets is not None and time > 0:
            started, left = _restarted(self.initial_state, dt * A[None], C, length, resets)
            y, state = y + started, state + left.astype(state.dtype)
        y = y.reshape(time, ssm_dim)
        if self.gate_norm == "before":
            y = self._normalise(y)
        y = y * jax.nn.silu(z.astype(dtype))
        if self.gate_norm == "after":
            y = self._normalise(y)
        if mlp_dim:
            mapped = jax.nn.silu(gate.astype(dtype)) * values.astype(dtype)
            y = jnp.concatenate([mapped, y], axis=-1)
        y = linear(self.out_proj, y.astype(x.dtype))
        return y, Mamba2Cache(window, state)

    def _normalise(self, y: Float[Array, "time ssm"]) -> Float[Array, "time ssm"]:
        time, width = y.shape
        groups = y.reshape(time, self.norm_groups, width // self.norm_groups)
        y = rms_normalised(groups, self.norm_eps).reshape(time, width)
        return y if self.norm_weight is None else y * self.norm_weight.astype(y.dtype)[None]


def _restarted(
    h0: Float[Array, "heads head_dim state"],
    log_decay: Float[Array, "time heads"],
    C: Float[Array, "time groups state"],
    length: Length | None,
    resets: Resets,
) -> tuple[Float[Array, "time heads head_dim"], Float[Array, "heads head_dim state"]]:
    """What starting from `h0` instead of zero adds after the first reset: to the output and, in the end,
    to the state. The recurrence is linear, hence it is `h0` times the decay since the last reset."""
    (time, heads), h0 = log_decay.shape, h0.astype(log_decay.dtype)
    if length is not None:
        valid = valid_samples(time, length)
        log_decay, resets = jnp.where(valid[:, None], log_decay, 0), resets & valid
    decay = jnp.exp(log_decay)
    remains = linear_recurrence(decay, jnp.where(resets[:, None], decay, 0), resets=resets)
    grouped = h0.reshape(C.shape[1], -1, *h0.shape[1:])
    read = jnp.einsum("gkpn,tgn->tgkp", grouped, C.astype(h0.dtype))
    read = read.reshape(time, heads, -1)
    return remains[..., None] * read, remains[-1][:, None, None] * h0
