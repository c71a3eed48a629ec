import math
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size, divided, linear
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import log_rate, short_convolution, step_bias
from discretax.ops import depthwise_convolution, ssd
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

    The cache holds the convolution's window, `(conv_width - 1, inner + 2 * groups * state)`, and the
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
    norm_weight: Float[Array, " inner"] | None
    out_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    state_dim: int = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    norm_groups: int = eqx.field(static=True)
    gate_norm: GateNorm = eqx.field(static=True)
    scales: tuple[float, float, float, float, float] = eqx.field(static=True)
    dt_limit: tuple[float, float] = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")

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
        - `head_dim`: features per head; it divides the inner width.
        - `num_groups`: of heads that share $B$ and $C$; it divides the number of heads.
        - `norm_groups`: of features that the norm takes together; `num_groups` if left out.
        - `gate_norm`: the norm `"after"` the gate, `"before"` it, or None for no norm.
        - `scales`: of $z$, $v$, $B$, $C$ and $d$.
        - `dt_min`, `dt_max`: the biases of the steps start such that without input $\Delta$ is
            log-uniform between these, in sample intervals.
        - `dt_init_floor`: no step starts below it.
        - `dt_limit`: the least and the largest step.
        - `A_init_range`: $-A$ starts uniform between these.
        - `D_has_hdim`: whether $D$ is `(heads, head_dim)` rather than `(heads,)`.
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
        num_heads = divided(width, inner, "head_dim", head_dim)
        norm_groups = num_groups if norm_groups is None else check_size("norm_groups", norm_groups)
        heads = f"the number of heads, {width} / head_dim"
        divided(heads, num_heads, "num_groups", num_groups)
        divided(width, inner, "norm_groups", norm_groups)
        if not 0 <= dt_limit[0] < dt_limit[1]:
            raise ValueError(
                f"`dt_limit` must be (low, high) with 0 <= low < high; got {dt_limit}."
            )
        in_key, conv_key, bias_key, A_key, step_key, out_key = jr.split(key, 6)
        convolved = inner + 2 * num_groups * state_dim

        self.in_proj = eqx.nn.Linear(
            in_features, inner + convolved + num_heads, use_bias=use_bias, key=in_key
        )
        self.conv_weight, self.conv_bias = short_convolution(
            conv_key, bias_key, convolved, conv_width, use_bias=conv_bias
        )
        self.dt_bias = step_bias(step_key, (num_heads,), dt_min, dt_max, dt_init_floor)
        self.A_log = log_rate(A_key, (num_heads,), *A_init_range)
        self.D = jnp.ones((num_heads, head_dim) if D_has_hdim else num_heads)
        self.norm_weight = None if gate_norm is None else jnp.ones(inner)
        out_bias = use_bias if out_bias is None else out_bias
        self.out_proj = eqx.nn.Linear(inner, in_features, use_bias=out_bias, key=out_key)
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
        heads, inner = self.A_log.shape[0], self.out_proj.weight.shape[1]
        return Mamba2Cache(
            window=zero_cache(batch_size, (width - 1, convolved), dtype),
            state=zero_cache(batch_size, (heads, inner // heads, self.state_dim), dtype),
        )

    def mix(
        self,
        x: Values,
        cache: Mamba2Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Mamba2Cache]:
        refuse_timesteps(self, integration_timesteps, "its steps are the input's choice")
        time, inner = x.shape[0], self.out_proj.weight.shape[1]
        convolved = self.conv_weight.shape[0]
        dtype = accumulation_dtype(x, self.D)
        states = self.num_groups * self.state_dim
        projected = linear(self.in_proj, x)
        if set(self.scales) != {1.0}:
            sizes = np.array([inner, inner, states, states, len(self.A_log)])
            projected = projected * jnp.asarray(np.repeat(self.scales, sizes), x.dtype)[None]
        z, u, dt = jnp.split(projected, (inner, inner + convolved), axis=-1)
        u, window = depthwise_convolution(
            u, self.conv_weight, self.conv_bias, cache.window, length=length, resets=resets
        )
        v, B, C = jnp.split(jax.nn.silu(u), (inner, inner + states), axis=-1)
        y, state = ssd(
            v.reshape(time, *cache.state.shape[:2]),
            jnp.clip(
                jax.nn.softplus(dt.astype(dtype) + self.dt_bias.astype(dtype)[None]), *self.dt_limit
            ),
            -jnp.exp(self.A_log.astype(dtype)),
            B.reshape(time, self.num_groups, self.state_dim),
            C.reshape(time, self.num_groups, self.state_dim),
            self.D,
            cache.state,
            length=length,
            resets=resets,
        )
        y = y.reshape(time, inner).astype(dtype)
        if self.gate_norm == "before":
            y = self._normalise(y)
        y = y * jax.nn.silu(z.astype(dtype))
        if self.gate_norm == "after":
            y = self._normalise(y)
        y = linear(self.out_proj, y.astype(x.dtype))
        return y, Mamba2Cache(window, state)

    def _normalise(self, y: Float[Array, "time inner"]) -> Float[Array, "time inner"]:
        time, inner = y.shape
        groups = y.reshape(time, self.norm_groups, inner // self.norm_groups)
        y = rms_normalised(groups, self.norm_eps).reshape(time, inner)
        return y if self.norm_weight is None else y * self.norm_weight.astype(y.dtype)[None]
