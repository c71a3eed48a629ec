import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from discretax._stateful import check_state, read_state
from discretax._timeseries import valid_samples, zero_padding
from discretax._types import accumulation_dtype

AXIS_NAME = "batch"


class BatchNorm(eqx.nn.StatefulLayer):
    r"""Normalises each feature over the batch and over time, padding left out.

    $y = w \odot (x - \mu)/\sqrt{\sigma^2 + \epsilon} + b$. In training $\mu$ and $\sigma^2$ are those of
    the valid samples of the batch, gathered over the `jax.vmap` axis named `"batch"`; running
    averages of them go to the state. In inference mode the running averages are used, divided by
    the weight that they have collected so far, hence unbiased from the first step on. A sample that is
    not finite is in the statistics, and so in all outputs of its feature, in the whole batch.

    Equinox's layer of this name knows no padding and starts its running variance from one.

    ??? cite

        Ioffe and Szegedy, Batch Normalization, ICML 2015 (arXiv:1502.03167).
    """

    weight: Float[Array, " features"]
    bias: Float[Array, " features"]
    statistics: eqx.nn.StateIndex
    inference: bool
    streaming: bool
    momentum: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(self, in_features: int, *, momentum: float = 0.95, eps: float = 1e-5):
        """**Arguments:** `in_features`; `momentum` of the running averages; `eps`, added to the
        variance."""
        self.weight = jnp.ones(in_features)
        self.bias = jnp.zeros(in_features)
        # Two arrays, not one twice: a step that donates its state gives away each of them.
        mean, variance = jnp.zeros((2, in_features))
        self.statistics = eqx.nn.StateIndex((mean, variance, jnp.zeros(())))
        self.inference = False
        self.streaming = False
        self.momentum = momentum
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "time features"],
        state: eqx.nn.State,
        key: PRNGKeyArray | None = None,
        *,
        length: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "time features"], eqx.nn.State]:
        """**Arguments:** `x`; `state`; `key`, unused; `length`, number of valid samples, all if left
        out.

        **Returns:** the normalised `x`, and the state, with new running averages in training.

        **Raises:** `ValueError` in training without a `jax.vmap` axis named `"batch"`, in training
        while streaming, and for a batched state outside `jax.vmap`.
        """
        del key
        check_state(state, self)
        if self.streaming and not self.inference:
            raise ValueError(
                'norm="batch" streams in inference mode only: in training it averages over all samples '
                "of the batch, and a chunk has not all of them. Use "
                "`discretax.streaming_mode(eqx.nn.inference_mode(model))`, or, to train on chunks, "
                'build the model with norm="layer" and drop_rate=0.'
            )
        u = zero_padding(x, length).astype(accumulation_dtype(x, self.weight))
        statistics = read_state(state, self.statistics, self)
        if statistics[0].shape != self.weight.shape:
            raise ValueError(
                f"the norm's statistics must have the shape {self.weight.shape} of one state; got "
                f"{statistics[0].shape}. A state with a batch axis goes through `jax.vmap`; make "
                "one without by `discretax.inference_state(model, state)`."
            )
        running_mean, running_var, weight, scale, shift = (
            array.astype(u.dtype) for array in (*statistics, self.weight, self.bias)
        )
        if self.inference:
            mean = running_mean / jnp.where(weight == 0, 1, weight)
            var = jnp.where(weight == 0, 1, running_var / jnp.where(weight == 0, 1, weight))
        else:
            mean, var, count = _batch_statistics(u, length)
            blend = lambda old, new: jnp.where(
                count > 0, self.momentum * old + (1 - self.momentum) * new, old
            )
            blended = blend(running_mean, mean), blend(running_var, var), blend(weight, 1.0)
            kept = (new.astype(old.dtype) for new, old in zip(blended, statistics, strict=True))
            state = state.set(self.statistics, tuple(kept))
        factor = lax.rsqrt(var + self.eps)
        y = (u - mean[None]) * factor[None] * scale[None] + shift[None]
        return y.astype(x.dtype), state


def _batch_statistics(x, length):
    valid = jnp.ones((x.shape[0], 1), bool)
    if length is not None:
        valid = valid_samples(x.shape[0], length)[:, None]
    total = lambda values: _sum_over_batch(jnp.where(valid, values, 0).sum(0))
    count = _sum_over_batch(valid.sum(dtype=x.dtype))
    mean = total(x) / jnp.maximum(count, 1)
    return mean, total((x - mean[None]) ** 2) / jnp.maximum(count, 1), count


def _sum_over_batch(value):
    try:
        return lax.psum(value, AXIS_NAME)
    except NameError as error:
        raise ValueError(
            'norm="batch" averages over the batch and found no `jax.vmap` axis named "batch". '
            'Train with `jax.vmap(model, axis_name="batch", in_axes=(0, None), '
            "out_axes=(0, None))(x, state, key=keys)`, evaluate with `eqx.nn.inference_mode(model)`, "
            'or choose norm="layer".'
        ) from error
