import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import each_sample
from discretax._constructors import keyed
from discretax._features import check_positive, check_size, soft_capped
from discretax._projection import projected
from discretax._stateful import samples_of
from discretax._timeseries import Timeseries
from discretax._types import Values, accumulation_dtype
from discretax.heads.base import AbstractHead


class LanguageModelHead(AbstractHead):
    r"""Logits of the next token at every sample: $a W x_t$, with a constant `scale` $a$ that is one
    unless given.

    With `soft_cap` $c$ they are $c \tanh(a W x_t / c)$, as in Gemma: none is larger than $c$. They are
    float32, or float64 if `x` is, whatever the type of `x`.
    """

    weight: Float[Array, "tokens features"]
    soft_cap: float | None = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    @keyed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        soft_cap: float | None = None,
        scale: float = 1.0,
    ):
        """**Arguments:**

        - `in_features`: width of the model.
        - `out_features`: number of tokens of the vocabulary.
        - `key`: for the initialisation.
        - `soft_cap`: the largest logit; none if left out.
        - `scale`: what the logits are multiplied by.
        """
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        if soft_cap is not None:
            check_positive("soft_cap", soft_cap)
        check_positive("scale", scale)
        bound = in_features**-0.5
        self.weight = draw.uniform(key, (out_features, in_features), minval=-bound, maxval=bound)
        self.soft_cap = soft_cap
        self.scale = scale

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "time tokens"], eqx.nn.State]:
        """**Arguments:** `x`: `(time, in_features)` or a [`discretax.Timeseries`][] of such;
        `state`; `key`, unused.

        **Returns:** `(time, out_features)`, and `state`.
        """
        del key
        values = samples_of(x, state, self, self.weight.shape[1])
        return each_sample(x, self.logits, values), state

    def logits(self, x: Values) -> Float[Array, "time tokens"]:
        y = projected(x, self.weight.astype(x.dtype), accumulation_dtype(x))
        return soft_capped(self.scale * y, self.soft_cap)
