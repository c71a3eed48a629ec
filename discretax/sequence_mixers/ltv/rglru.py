from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import mended
from discretax._constructors import keyed
from discretax._features import check_function, check_size, divided, linear
from discretax._types import Length, Resets, Timesteps, Values, widened
from discretax.init import inverse_softplus
from discretax.ops import depthwise_convolution
from discretax.ops._recurrence.chunked import chunked_recurrence
from discretax.ops._running.split_time import has_past
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

# Two CPU cores, forward and backward: chunks of a megabyte of states, which is this many numbers, are
# the fastest of those compared in "choices" in docs/performance.md. A parallel scan wants the whole
# sequence.
CHUNK = 2**18


class RGLRUCache(NamedTuple):
    """The state, and whether a sample of the sequence has been seen."""

    state: Float[Array, " features"]
    started: Bool[Array, ""]


class RGLRUSequenceMixer(AbstractRecurrentMixer[RGLRUCache]):
    r"""The real-gated linear recurrent unit of Hawk and Griffin.

    $$r_t = \sigma(W_a x_t + b_a), \qquad i_t = \sigma(W_x x_t + b_x), \qquad
    \log a_t = -8\, r_t \odot \mathrm{softplus}(\Lambda)$$
    $$h_t = a_t \odot h_{t-1} + \sqrt{1 - a_t^2} \odot (i_t \odot x_t), \qquad y_t = h_t$$

    $W_a$ and $W_x$ are block-diagonal, with `num_heads` blocks. The first sample of a sequence, and
    the sample at a reset, enters whole, $h_t = i_t \odot x_t$: there is no past to share the unit
    variance with. That is how the authors' code treats the first position of a document; the paper
    does not mention it. The cache remembers whether a sample has been seen: give one with `started`
    True and a state of zero to begin without the exception.

    $1 - a_t^2$ is computed as $-\mathrm{expm1}(2 \log a_t)$, exact for $a_t$ close to one. The
    derivative of its square root is held to 1000, as in the authors' code.

    lrnnx's RGLRU is [`discretax.sequence_mixers.GriffinSequenceMixer`][] with one head, exact GELU,
    no biases around and no exception for the first sample; its `a_log` is $-\Lambda$.

    !!! example

        ```python
        mixer = RGLRUSequenceMixer(64, num_heads=4, key=key)
        y, cache = mixer(x, resets=resets)  # x, y: (time, 64), resets: (time,)
        ```

    ??? cite

        De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
        Language Models, 2024 (arXiv:2402.19427).
    """

    Lambda: Float[Array, " features"]
    a_weight: Float[Array, "heads in out"]
    a_bias: Float[Array, "heads out"]
    input_weight: Float[Array, "heads in out"]
    input_bias: Float[Array, "heads out"]
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("Lambda",)
    contains_broken_samples: ClassVar[bool] = True

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        num_heads: int = 1,
        a_min: float = 0.9,
        a_max: float = 0.999,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `num_heads`: blocks of the gates' matrices; it divides `in_features`. One is a full matrix;
            the paper's large models have 16.
        - `a_min`, `a_max`: $e^{-\mathrm{softplus}(\Lambda)}$, the transition at an eighth of the
            gate's opening, starts between these, uniform in its square as in the authors' code.

        **Raises:**

        `ValueError` if `num_heads` does not divide `in_features`, or unless
        `0 < a_min <= a_max < 1`.
        """
        in_features = check_size("in_features", in_features)
        num_heads = check_size("num_heads", num_heads)
        width = divided("the width of the recurrence", in_features, "num_heads", num_heads)
        if not 0 < a_min <= a_max < 1:
            raise ValueError(
                f"the initial transition needs 0 < a_min <= a_max < 1; got a_min={a_min} and "
                f"a_max={a_max}."
            )
        Lambda_key, a_key, input_key = draw.split(key, 3)
        squared = draw.uniform(Lambda_key, (in_features,), minval=a_min**2, maxval=a_max**2)
        self.Lambda = inverse_softplus(-0.5 * jnp.log(squared))
        weight = lambda key: draw.normal(key, (num_heads, width, width)) * width**-0.5
        self.a_weight, self.input_weight = weight(a_key), weight(input_key)
        self.a_bias, self.input_bias = jnp.zeros((2, num_heads, width))
        self.in_features = in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> RGLRUCache:
        del max_seqlen
        return RGLRUCache(
            state=zero_cache(batch_size, (self.in_features,), dtype),
            started=zero_cache(batch_size, (), bool),
        )

    def mix(
        self,
        x: Values,
        cache: RGLRUCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, RGLRUCache]:
        refuse_timesteps(self, integration_timesteps, "its rates are those of its gates")
        time = x.shape[0]
        if time == 0:
            return x, cache
        started = cache.started | has_past()
        first = (jnp.arange(time) == 0) & ~started
        first = first if resets is None else first | resets
        gates = widened(self, x)
        h = cache.state.astype(gates.Lambda.dtype)
        h, y = chunked_recurrence(
            _terms,
            _read_out,
            gates,
            h,
            x,
            first,
            resets=first,
            length=length,
            chunk_size=max(64, CHUNK // x.shape[1]) if jax.default_backend() == "cpu" else time,
        )
        started = started | ((time if length is None else length) > 0)
        return y, RGLRUCache(h, started)

    def _recurrence(self, x, first):
        """What each sample does to the state: $a_t$ and $b_t$ of $h_t = a_t h_{t-1} + b_t$."""
        heads, width = self.a_bias.shape
        weights = jnp.concatenate([self.a_weight.mT, self.input_weight.mT], axis=1)
        logits = jnp.einsum("thi,hji->htj", x.reshape(-1, heads, width), weights)
        logits = logits.reshape(heads, -1, 2, width).transpose(2, 1, 0, 3)
        logits = logits + jnp.stack([self.a_bias, self.input_bias])[:, None]
        recurrence_gate, input_gate = jax.nn.sigmoid(logits).reshape(2, *x.shape)
        log_a = -8 * recurrence_gate * jax.nn.softplus(self.Lambda)[None]
        share = jnp.where(first[:, None], 1, _sqrt(-jnp.expm1(2 * log_a)))
        return jnp.exp(log_a), share * input_gate * x


def _terms(gates, x, first):
    return *gates._recurrence(mended(x).astype(gates.Lambda.dtype), first), None


def _read_out(gates, states, _):
    return states


@jax.custom_jvp
def _sqrt(x: Array) -> Array:
    """With a derivative of at most 1000, where that of the square root has no bound."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _sqrt(x), dx / (2 * _sqrt(jnp.maximum(x, 0.25e-6)))


class GriffinCache(NamedTuple):
    """The samples that the convolution still sees, oldest first, and the recurrence's cache."""

    window: Float[Array, "past inner"]
    recurrence: RGLRUCache


class GriffinSequenceMixer(AbstractRecurrentMixer[GriffinCache]):
    r"""Griffin's recurrent block: a gated branch beside a short convolution and an RG-LRU.

    $$y = W_{out} (\mathrm{RGLRU}(\mathrm{conv}(W_x x + b_x)) \odot \phi(W_y x + b_y)) + b_{out}$$

    with $\phi$ the `activation` and [`discretax.sequence_mixers.RGLRUSequenceMixer`][] of the inner
    width. The convolution is causal, one short filter per feature, and does not look across a
    reset.

    !!! example

        ```python
        mixer = GriffinSequenceMixer(64, lru_width=96, num_heads=4, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient
        Language Models, 2024 (arXiv:2402.19427).
    """

    linear_x: eqx.nn.Linear
    linear_y: eqx.nn.Linear
    conv_weight: Float[Array, "inner width"]
    conv_bias: Float[Array, " inner"]
    rg_lru: RGLRUSequenceMixer
    linear_out: eqx.nn.Linear
    in_features: int = eqx.field(static=True)
    activation: Callable[[Array], Array] | None = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        lru_width: int | None = None,
        num_heads: int = 1,
        conv_width: int = 4,
        a_min: float = 0.9,
        a_max: float = 0.999,
        use_bias: bool = True,
        activation: Callable[[Array], Array] | None = jax.nn.gelu,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `lru_width`: width of the recurrence; `in_features` if left out.
        - `num_heads`, `a_min`, `a_max`: as in [`discretax.sequence_mixers.RGLRUSequenceMixer`][].
        - `conv_width`: how many samples the convolution sees, its own included.
        - `use_bias`: of $W_x$, $W_y$ and $W_{out}$.
        - `activation`: what the gated branch goes through; None for none.

        **Raises:**

        `ValueError` for sizes below one, or `num_heads` that do not divide the width; `TypeError`
        for an activation that is no function.
        """
        in_features = check_size("in_features", in_features)
        conv_width = check_size("conv_width", conv_width)
        inner = check_size("lru_width", in_features if lru_width is None else lru_width)
        check_function("activation", activation)
        x_key, y_key, conv_key, rg_lru_key, out_key = draw.split(key, 5)
        self.linear_x = draw.linear(in_features, inner, use_bias, key=x_key)
        self.linear_y = draw.linear(in_features, inner, use_bias, key=y_key)
        self.conv_weight = draw.normal(conv_key, (inner, conv_width)) * conv_width**-0.5
        self.conv_bias = jnp.zeros(inner)
        self.rg_lru = RGLRUSequenceMixer(
            inner, rg_lru_key, num_heads=num_heads, a_min=a_min, a_max=a_max
        )
        self.linear_out = draw.linear(inner, in_features, use_bias, key=out_key)
        self.in_features = in_features
        self.activation = activation

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> GriffinCache:
        inner, width = self.conv_weight.shape
        return GriffinCache(
            window=zero_cache(batch_size, (width - 1, inner), dtype),
            recurrence=self.rg_lru.allocate_inference_cache(batch_size, max_seqlen, dtype),
        )

    def mix(
        self,
        x: Values,
        cache: GriffinCache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, GriffinCache]:
        refuse_timesteps(self, integration_timesteps, "its rates are those of its gates")
        u, window = depthwise_convolution(
            linear(self.linear_x, x),
            self.conv_weight,
            self.conv_bias,
            cache.window,
            length=length,
            resets=resets,
        )
        h, state = self.rg_lru.mix(u, cache.recurrence, None, length, resets)
        gate = linear(self.linear_y, x)
        gate = gate if self.activation is None else self.activation(gate)
        return linear(self.linear_out, h.astype(x.dtype) * gate), GriffinCache(window, state)
