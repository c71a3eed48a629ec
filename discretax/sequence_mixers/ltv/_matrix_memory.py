"""What the mixers with a matrix state share: how queries, keys and values are made, and the output."""

import abc
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._features import check_name, check_positive, check_size, linear, size_of_head
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.init import short_convolution
from discretax.ops import depthwise_convolution
from discretax.ops._rms import rms_normalised
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class MatrixCache(NamedTuple):
    """The samples that the convolution still sees, oldest first, and the recurrence's state."""

    window: Float[Array, "past convolved"]
    state: Float[Array, "heads key value"]


class AbstractMatrixMixer(AbstractRecurrentMixer[MatrixCache]):
    """Queries, keys and values; what a mixer does with them; norm, gate and projection."""

    projections: eqx.AbstractVar["Projections"]
    output: eqx.AbstractVar["Output"]

    @property
    def in_features(self) -> int:
        return self.projections.in_features

    @abc.abstractmethod
    def attend(
        self,
        x: Values,
        q: Float[Array, "time key_heads key"],
        k: Float[Array, "time *steps key_heads key"],
        v: Float[Array, "time *steps heads value"],
        state: Float[Array, "heads key value"],
        **options: Any,
    ) -> tuple[Float[Array, "time heads value"], Float[Array, "heads key value"]]:
        """What is read for each sample, and the state after the last; `options`: length and resets."""

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> MatrixCache:
        del max_seqlen
        return self.projections.allocate(batch_size, dtype)

    def mix(
        self,
        x: Values,
        cache: MatrixCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, MatrixCache]:
        refuse_timesteps(self, integration_timesteps, "how it forgets is the input's choice")
        q, k, v, window = self.projections(x, cache.window, length, resets)
        y, state = self.attend(x, q, k, v, cache.state, length=length, resets=resets)
        return self.output(y, x), MatrixCache(window, state)


class Projections(eqx.Module):
    """Queries, keys and values: a linear map, a short convolution and an activation each.

    The convolution is one over all three, a filter for each feature. Several `steps` make several
    keys and values of each sample.
    """

    q_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    conv_weight: Float[Array, "convolved width"] | None
    in_features: int = eqx.field(static=True)
    key_heads: int = eqx.field(static=True)
    value_heads: int = eqx.field(static=True)
    key_dim: int = eqx.field(static=True)
    value_dim: int = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    activation: Activation | None = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        num_heads: int,
        head_dim: int | None,
        value_dim: int | None,
        *,
        num_value_heads: int | None = None,
        value_ratio: int = 1,
        conv_width: int | None = None,
        steps: int | None = None,
        activation: Activation | None = "silu",
        use_bias: bool = False,
    ):
        """`value_dim` is `value_ratio` times that of the keys if left out."""
        check_name("activation", activation, Activation | None)
        in_features = check_size("in_features", in_features)
        key_heads = check_size("num_heads", num_heads)
        value_heads = (
            key_heads if num_value_heads is None else check_size("num_value_heads", num_value_heads)
        )
        key_dim = size_of_head("head_dim", head_dim, in_features, key_heads)
        value_dim = (
            value_ratio * key_dim if value_dim is None else check_size("value_dim", value_dim)
        )
        if value_heads % key_heads:
            raise ValueError(
                "`num_value_heads` must be a multiple of `num_heads`, whose keys they share; got "
                f"{value_heads} and {key_heads}."
            )
        q_key, k_key, v_key, conv_key, bias_key = draw.split(key, 5)
        queries, each = key_heads * key_dim, 1 if steps is None else steps
        keys, values = each * queries, each * value_heads * value_dim
        project = lambda features, key: draw.linear(
            in_features, features, use_bias=use_bias, key=key
        )
        self.q_proj = project(queries, q_key)
        self.k_proj = project(keys, k_key)
        self.v_proj = project(values, v_key)
        self.conv_weight = None
        if conv_width is not None:
            width = check_size("conv_width", conv_width)
            self.conv_weight, _ = short_convolution(
                conv_key, bias_key, queries + keys + values, width, use_bias=False
            )
        self.in_features = in_features
        self.key_heads = key_heads
        self.value_heads = value_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.steps = steps
        self.activation = activation

    def allocate(self, batch_size: int | None, dtype: Any) -> MatrixCache:
        past = (0, 0)
        if self.conv_weight is not None:
            convolved, width = self.conv_weight.shape
            past = (width - 1, convolved)
        state = self.value_heads, self.key_dim, self.value_dim
        return MatrixCache(
            zero_cache(batch_size, past, dtype), zero_cache(batch_size, state, dtype)
        )

    def __call__(
        self,
        x: Values,
        window: Float[Array, "past convolved"] | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Array, Array, Array, Any]:
        """`q` (time, key_heads, key), `k` and `v` (time, *steps, heads, key or value), and the window."""
        maps = (self.q_proj, self.k_proj, self.v_proj)
        u = jnp.concatenate([linear(layer, x) for layer in maps], axis=-1)
        if self.conv_weight is not None:
            u, window = depthwise_convolution(
                u, self.conv_weight, None, window, length=length, resets=resets
            )
        if self.activation is not None:
            u = ACTIVATIONS[self.activation](u)
        queries = self.key_heads * self.key_dim
        keys = self.k_proj.weight.shape[0]
        q, k, v = jnp.split(u, (queries, queries + keys), axis=-1)
        steps = () if self.steps is None else (self.steps,)
        return (
            q.reshape(len(x), self.key_heads, self.key_dim),
            k.reshape(len(x), *steps, self.key_heads, self.key_dim),
            v.reshape(len(x), *steps, self.value_heads, self.value_dim),
            window,
        )

    def for_each_head(
        self, numbers: int, key: PRNGKeyArray, *, use_bias: bool = False
    ) -> eqx.nn.Linear:
        """Another map of the input, to some `numbers` for each head of the values."""
        return draw.linear(self.in_features, self.value_heads * numbers, use_bias, key=key)


def keys_of_half(
    in_features: int, num_heads: int, head_dim: int | None, value_dim: int | None
) -> tuple[int, int]:
    """Lengths of the keys and the values of a head, where the values share the features."""
    value_dim = size_of_head("value_dim", value_dim, in_features, num_heads)
    return (value_dim + 1) // 2 if head_dim is None else head_dim, value_dim


class LowRank(eqx.Module):
    """Two linear maps through fewer features, to some `numbers` for each head of the values."""

    down: eqx.nn.Linear
    up: eqx.nn.Linear

    def __init__(
        self, sizes: Projections, rank: int, numbers: int, key: PRNGKeyArray, *, use_bias: bool
    ):
        down_key, up_key = draw.split(key)
        self.down = draw.linear(sizes.in_features, rank, use_bias=False, key=down_key)
        self.up = draw.linear(rank, sizes.value_heads * numbers, use_bias=use_bias, key=up_key)

    def __call__(self, x: Values) -> Values:
        return linear(self.up, linear(self.down, x))


def projected(layer: eqx.nn.Linear | LowRank, x: Values) -> Values:
    return layer(x) if isinstance(layer, LowRank) else linear(layer, x)


Norm = Callable[[Float[Array, "time heads value"], float], Float[Array, "time heads value"]]


def rms_of_all_heads(
    y: Float[Array, "time heads value"], eps: float
) -> Float[Array, "time heads value"]:
    return rms_normalised(y, eps, (-2, -1))


def layer_normalised(
    y: Float[Array, "time heads value"], eps: float
) -> Float[Array, "time heads value"]:
    return rms_normalised(y - jnp.mean(y, axis=-1, keepdims=True), eps)


class Output(eqx.Module):
    r"""From what the heads read to the features: $W_o\, (w \odot \mathrm{norm}(y) \odot \phi(g(x)))$.

    $\mathrm{norm}$ divides each head by the root of its mean square, its weights $w$ being those of
    every head, unless it is another one; $\phi$ is the `activation` of the gate $g$. Without a
    `gate_proj` there is no gate. With `use_bias` the norm and $W_o$ have one each.
    """

    gate_proj: eqx.nn.Linear | LowRank | None
    norm_weight: Float[Array, "*heads value"] | None
    norm_bias: Float[Array, "*heads value"] | None
    out_proj: eqx.nn.Linear
    norm: Norm | None = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        sizes: Projections,
        key: PRNGKeyArray,
        *,
        gate_proj: eqx.nn.Linear | LowRank | None,
        activation: Activation = "silu",
        norm: Norm | None = rms_normalised,
        norm_eps: float,
        use_bias: bool = False,
    ):
        check_positive("norm_eps", norm_eps)
        heads, value_dim = sizes.value_heads, sizes.value_dim
        weights = (value_dim,) if norm is rms_normalised else (heads, value_dim)
        self.gate_proj = gate_proj
        self.norm_weight = None if norm is None else jnp.ones(weights)
        self.norm_bias = None if norm is None or not use_bias else jnp.zeros(weights)
        self.norm = norm
        self.out_proj = draw.linear(heads * value_dim, sizes.in_features, use_bias, key=key)
        self.norm_eps = norm_eps
        self.activation = activation

    def __call__(self, y: Float[Array, "time heads value"], x: Values) -> Values:
        dtype = accumulation_dtype(y, self.out_proj.weight)
        y = y.astype(dtype)
        if self.norm is not None and self.norm_weight is not None:
            wide = lambda array: lax.broadcast_to_rank(array.astype(dtype), y.ndim)
            y = self.norm(y, self.norm_eps) * wide(self.norm_weight)
            if self.norm_bias is not None:
                y = y + wide(self.norm_bias)
        y = y.reshape(len(x), -1) if len(x) else jnp.zeros((0, self.out_proj.in_features), dtype)
        if self.gate_proj is not None:
            y = y * ACTIVATIONS[self.activation](projected(self.gate_proj, x).astype(dtype))
        return linear(self.out_proj, y.astype(x.dtype))


def l2_normalised(x: Float[Array, "*lead key"]) -> Float[Array, "*lead key"]:
    """`x` divided by its length, with 1e-6 added to its square; float32, or float64 if `x` is."""
    wide = x.astype(accumulation_dtype(x))
    return wide * lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + 1e-6)


def write_strength(raw: Array, negative_eigenvalues: bool) -> Array:
    r"""$\sigma$, or $2\sigma$ by which what a key holds may change its sign."""
    beta = jax.nn.sigmoid(raw.astype(accumulation_dtype(raw)))
    return 2 * beta if negative_eigenvalues else beta


def softplus_decay(raw: Array, A_log: Array, dt_bias: Array) -> Array:
    r"""$-e^{\mathrm{A\_log}}\,\mathrm{softplus}(r + \mathrm{dt\_bias})$, the logarithm of a decay.

    `dt_bias` (heads,) or, for a decay per channel, (heads, key), and the result alike."""
    rate, biased = rate_and_biased(raw, A_log, dt_bias)
    return -rate * jax.nn.softplus(biased)


def rate_and_biased(raw: Array, A_log: Array, dt_bias: Array) -> tuple[Array, Array]:
    r"""$e^{\mathrm{A\_log}}$, one for each head, and $r + \mathrm{dt\_bias}$ of each sample."""
    dtype = accumulation_dtype(raw, A_log)
    raw, A_log, dt_bias = (array.astype(dtype) for array in (raw, A_log, dt_bias))
    rate = jnp.exp(A_log).reshape(1, -1, *(1,) * (dt_bias.ndim - 1))
    return rate, raw.reshape(len(raw), *dt_bias.shape) + dt_bias[None]
