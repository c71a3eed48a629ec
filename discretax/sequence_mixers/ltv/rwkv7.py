import math
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_name, check_positive, check_size, divided, linear
from discretax._types import Length, Resets, Timesteps, Values, accumulation_dtype
from discretax.ops import delta_rule, token_shift
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache
from discretax.sequence_mixers.ltv._matrix_memory import layer_normalised

ValueResidual = Literal["gives", "takes"] | None
ACTIVATIONS = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid, None: lambda x: x}


class RWKV7Cache(NamedTuple):
    """The last sample, and the recurrence's state."""

    last: Float[Array, " features"]
    state: Float[Array, "heads key value"]


class RWKV7SequenceMixer(AbstractRecurrentMixer[RWKV7Cache]):
    r"""RWKV-7 "Goose", its time mixing: a delta rule whose erase and write strengths are vectors.

    $$x^c_t = x_t + \mu_c \odot (x_{t-1} - x_t), \qquad
    r = W_r x^r, \quad k = W_k x^k, \quad v = W_v x^v$$
    $$\log w = -e^{-1/2}\, \sigma(f_w(x^w)), \qquad a = \sigma(f_a(x^a)), \qquad
    \hat\kappa = \mathrm{l2}(\xi \odot k), \qquad
    \tilde k = k \odot (1 + (a - 1) \odot \alpha)$$
    $$S_t = \big(\mathrm{Diag}(w_t) - (\hat\kappa_t \odot a_t)\, \hat\kappa_t^T\big) S_{t-1}
    + \tilde k_t v_t^T$$
    $$y_t = W_o\, \big(f_g(x^g_t) \odot (\mathrm{norm}(S_t^T r_t)
    + (r_t^T (\rho \odot \tilde k_t))\, v_t)\big)$$

    Each $f$ is a map through few features: $f_w(x) = b + W_2 \tanh(W_1 x)$, $f_g(x) = W_2\,
    \sigma(W_1 x)$, $f_a$ with a bias and without an activation. $\mathrm{norm}$ takes mean and
    variance of each head. The decay is above $e^{-0.607} = 0.545$. See
    [`discretax.ops.delta_rule`][], of which a sample takes two steps, and
    [The matrix state](../matrix-state.md).

    In a model the values of all layers lean on those of the first, $v \leftarrow v + \sigma(f_v(x^v))
    \odot (v^{first} - v)$. A mixer with `value_residual="gives"` puts its values out behind its
    features, and one with `"takes"` expects those of the first layer behind the features of `x` and
    hands them on; [`discretax.models.RWKV7`][] connects them.

    The cache holds the last sample, `(features,)`, and the state, `(heads, head_dim, head_dim)`.

    !!! example

        ```python
        mixer = RWKV7SequenceMixer(64, head_dim=32, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, 2025 (arXiv:2503.14456).
    """

    shift: Float[Array, "6 features"]
    r_proj: eqx.nn.Linear
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    out_proj: eqx.nn.Linear
    decay: "LowRankMap"
    strength: "LowRankMap"
    gate: "LowRankMap"
    value_gate: "LowRankMap | None"
    erase_scale: Float[Array, " features"]
    strength_scale: Float[Array, " features"]
    bonus: Float[Array, "heads head_dim"]
    norm_weight: Float[Array, "heads head_dim"]
    norm_bias: Float[Array, "heads head_dim"]
    in_features: int = eqx.field(static=True)
    value_residual: ValueResidual = eqx.field(static=True)
    norm_eps: float = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("decay", "strength")

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        head_dim: int = 64,
        decay_rank: int | None = None,
        strength_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        value_residual: ValueResidual = None,
        layer: int = 0,
        num_layers: int = 1,
        norm_eps: float = 64e-5,
    ):
        r"""**Arguments:**

        - `in_features`: width of the features, without values that come with them.
        - `key`: for the initialisation.
        - `head_dim`: length of the keys and values of a head; it divides `in_features`.
        - `decay_rank`, `strength_rank`, `value_rank`, `gate_rank`: features through which $f_w$,
            $f_a$, $f_v$ and $f_g$ go; the authors' choice if left out, 2.5, 2.5, 1.7 and 5 times the
            root of the width, in multiples of 32.
        - `value_residual`: `"gives"` in a first layer, `"takes"` in those that follow it, or None.
        - `layer`, `num_layers`: where in the model the mixer stands, from 0; the authors' initial
            values depend on it.
        - `norm_eps`: added to the variances of the heads.

        **Raises:**

        `ValueError` for sizes below one or that do not divide, or a layer that the model has not.
        """
        width = check_size("in_features", in_features)
        head_dim = check_size("head_dim", head_dim)
        heads = divided("in_features", width, "head_dim", head_dim)
        check_name("value_residual", value_residual, ValueResidual)
        check_positive("norm_eps", norm_eps)
        early, late = _depth(layer, num_layers)
        rank = lambda name, given, factor: (
            max(32, 32 * round(factor * width**0.5 / 32))
            if given is None
            else check_size(name, given)
        )
        keys = draw.split(key, 7)
        place = jnp.arange(width) / width
        along = jnp.linspace(0, 1, width) if width > 1 else jnp.zeros(1)
        in_head = jnp.tile(jnp.linspace(-1, 1, head_dim) if head_dim > 1 else jnp.zeros(1), heads)
        zigzag = in_head * jnp.abs(in_head)

        # Of a receptance, decay, key, value, strength and gate.
        powers = early * jnp.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])
        self.shift = 1 - place[None] ** powers[:, None]
        self.r_proj = _orthogonal(width, width, keys[0], 1.0)
        self.k_proj = _orthogonal(width, width, keys[1], 0.1)
        self.v_proj = _orthogonal(width, width, keys[2], 1.0)
        self.out_proj = _orthogonal(width, width, None, 0.0)
        self.decay = LowRankMap(
            rank("decay_rank", decay_rank, 2.5),
            6 * along ** (1 + late**0.3) - 5.5 + 2.5 * zigzag,
            keys[3],
            activation="tanh",
        )
        self.strength = LowRankMap(
            rank("strength_rank", strength_rank, 2.5),
            0.3 * zigzag + 0.4 * (along - 0.5) - 0.19,
            keys[4],
        )
        self.value_gate = None
        if value_residual == "takes":
            self.value_gate = LowRankMap(
                rank("value_rank", value_rank, 1.7), 0.73 - 0.4 * (along - 0.5), keys[5]
            )
        self.gate = LowRankMap(
            rank("gate_rank", gate_rank, 5.0), width, keys[6], activation="sigmoid"
        )
        self.erase_scale = 0.71 - 0.1 * (along - 0.5)
        self.strength_scale = jnp.full(width, 1.02, float)
        self.bonus = jnp.full((heads, head_dim), -0.04, float)
        scale = ((1 + layer) / num_layers) ** 0.7
        self.norm_weight = jnp.full((heads, head_dim), scale, float)
        self.norm_bias = jnp.zeros((heads, head_dim))
        self.in_features = 2 * width if value_residual == "takes" else width
        self.value_residual = value_residual
        self.norm_eps = norm_eps

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> RWKV7Cache:
        del max_seqlen
        heads, head_dim = self.bonus.shape
        return RWKV7Cache(
            last=zero_cache(batch_size, (heads * head_dim,), dtype),
            state=zero_cache(batch_size, (heads, head_dim, head_dim), dtype),
        )

    def mix(
        self,
        x: Values,
        cache: RWKV7Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, RWKV7Cache]:
        refuse_timesteps(self, integration_timesteps, "how it forgets is the input's choice")
        dtype = accumulation_dtype(x, self.bonus)
        wide = lambda array: array.astype(dtype)
        by_head = lambda array: array.reshape(len(x), *self.bonus.shape)
        x, first_values = jnp.split(x, [self.bonus.size], axis=-1)
        before, last = token_shift(x, cache.last, length=length, resets=resets)
        leaning = lambda i: x + (before - x) * self.shift[i].astype(x.dtype)[None]
        x_r, x_w, x_k, x_v, x_a, x_g = map(leaning, range(6))

        r, k, v = linear(self.r_proj, x_r), linear(self.k_proj, x_k), linear(self.v_proj, x_v)
        if self.value_gate is not None:
            v = v + (first_values - v) * jax.nn.sigmoid(self.value_gate(x_v))
        elif self.value_residual == "gives":
            first_values = v
        r, k, v = wide(r), wide(k), by_head(wide(v))
        log_decay = -math.exp(-0.5) * jax.nn.sigmoid(wide(self.decay(x_w)))
        a = jax.nn.sigmoid(wide(self.strength(x_a)))
        erase = _of_length_one(by_head(k * wide(self.erase_scale)[None]))
        k = by_head(k * (1 + (a - 1) * wide(self.strength_scale)[None]))
        r, a = by_head(r), by_head(a)
        nothing = jnp.zeros_like(erase)
        y, state = delta_rule(
            r,
            jnp.stack([erase * a, k], axis=1),
            jnp.stack([nothing, v], axis=1),
            None,
            by_head(log_decay),
            cache.state,
            erase=jnp.stack([erase, nothing], axis=1),
            erase_first=True,
            length=length,
            resets=resets,
        )
        y = layer_normalised(y, self.norm_eps) * wide(self.norm_weight)[None]
        y = y + wide(self.norm_bias)[None]
        y = y + jnp.sum(r * k * wide(self.bonus)[None], axis=-1, keepdims=True) * v
        y = y.reshape(x.shape) * wide(self.gate(x_g))
        y = linear(self.out_proj, y.astype(x.dtype))
        return jnp.concatenate([y, first_values], axis=-1), RWKV7Cache(last, state)


class RWKV7ChannelMixer(AbstractRecurrentMixer[Float[Array, " features"]]):
    r"""The channel mixer of RWKV-7: an MLP of each sample and a part of the one before.

    $$y_t = W_v\, \mathrm{relu}\big(W_k (x_t + \mu \odot (x_{t-1} - x_t))\big)^2$$

    It looks back by a sample, and so it is a sequence mixer here. The cache is the last sample,
    `(features,)`.

    !!! example

        ```python
        mixer = RWKV7ChannelMixer(64, intermediate_dim=256, key=key)
        y, last = mixer(x)  # x, y: (time, 64), last: (64,)
        ```

    ??? cite

        Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, 2025 (arXiv:2503.14456).
    """

    shift: Float[Array, " features"]
    k_proj: eqx.nn.Linear
    v_proj: eqx.nn.Linear
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        intermediate_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `intermediate_dim`: width in between; four times `in_features` if left out.
        - `layer`, `num_layers`: as in [`discretax.sequence_mixers.RWKV7SequenceMixer`][].

        **Raises:**

        `ValueError` for sizes below one, or a layer that the model has not.
        """
        in_features = check_size("in_features", in_features)
        inner = 4 * in_features if intermediate_dim is None else intermediate_dim
        inner = check_size("intermediate_dim", inner)
        early, _ = _depth(layer, num_layers)
        self.shift = 1 - (jnp.arange(in_features) / in_features) ** (early**4)
        self.k_proj = _orthogonal(in_features, inner, key, 1.0)
        self.v_proj = _orthogonal(inner, in_features, None, 0.0)
        self.in_features = in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, " features"]:
        del max_seqlen
        return zero_cache(batch_size, (self.in_features,), dtype)

    def mix(
        self,
        x: Values,
        cache: Float[Array, " features"],
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Float[Array, " features"]]:
        refuse_timesteps(self, integration_timesteps, "it looks back by a sample")
        before, last = token_shift(x, cache, length=length, resets=resets)
        k = linear(self.k_proj, x + (before - x) * self.shift.astype(x.dtype)[None])
        return linear(self.v_proj, jax.nn.relu(k) ** 2), last


class LowRankMap(eqx.Module):
    r"""$b + W_2\, \phi(W_1 x)$, through fewer features. It starts as the constant $b$."""

    down: Float[Array, "rank in"]
    up: Float[Array, "out rank"]
    bias: Float[Array, " out"] | None
    activation: str | None = eqx.field(static=True)

    def __init__(
        self,
        rank: int,
        bias: Float[Array, " out"] | int,
        key: PRNGKeyArray,
        *,
        activation: Literal["tanh", "sigmoid"] | None = None,
    ):
        """`bias`, or the width if there is none."""
        width = bias if isinstance(bias, int) else len(bias)
        self.down = jnp.zeros((rank, width))
        self.up = jax.nn.initializers.orthogonal(0.1)(key, (width, rank), float)
        self.bias = None if isinstance(bias, int) else bias
        self.activation = activation

    def __call__(self, x: Values) -> Values:
        inner = ACTIVATIONS[self.activation](x @ self.down.T.astype(x.dtype))
        y = inner @ self.up.T.astype(x.dtype)
        return y if self.bias is None else y + self.bias.astype(x.dtype)[None]


def _of_length_one(x: Float[Array, "*lead key"]) -> Float[Array, "*lead key"]:
    """`x` divided by its length, or by 1e-12 if that is less."""
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def _depth(layer: int, num_layers: int) -> tuple[float, float]:
    """How early the layer stands, from one down to almost none, and how late, from 0 to 1."""
    num_layers = check_size("num_layers", num_layers)
    if layer not in range(num_layers):
        raise ValueError(
            f"`layer` must be one of the {num_layers} of `num_layers`, counted from 0; got {layer}."
        )
    return 1 - layer / num_layers, layer / max(1, num_layers - 1)


def _orthogonal(
    in_features: int, out_features: int, key: PRNGKeyArray | None, scale: float
) -> eqx.nn.Linear:
    """Without a bias; zero without a key."""
    shape = (out_features, in_features)
    weight = (
        jnp.zeros(shape)
        if key is None
        else jax.nn.initializers.orthogonal(scale)(key, shape, float)
    )
    return draw.linear_of(weight)
