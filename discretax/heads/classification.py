import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._constructors import keyed
from discretax._timeseries import Timeseries
from discretax._types import accumulation_dtype
from discretax.heads.base import AbstractHead, PooledLinear
from discretax.heads.pooling import Kind


class ClassificationHead(AbstractHead):
    r"""Log-probabilities of the classes: $\mathrm{log\_softmax}(W\,\mathrm{pool}(x) + b)$.

    Not logits: the negative log-likelihood of label `k` is `-y[k]`, and `jnp.exp(y)` sums to one.
    """

    pooled_linear: PooledLinear

    @keyed
    def __init__(
        self,
        in_features: int,
        out_features: int,
        key: PRNGKeyArray,
        *,
        reduce: bool = True,
        pooling: Kind = "mean",
    ):
        """**Arguments:**

        - `in_features`: width of the model.
        - `out_features`: number of classes.
        - `key`: for the initialisation.
        - `reduce`: one answer for the sequence (True) or one per time step (False).
        - `pooling`: `"mean"`, `"last"` or `"max"` over the valid samples.

        **Raises:**

        `ValueError` for an unknown pooling, or one that `reduce=False` would leave unused.
        """
        self.pooled_linear = PooledLinear(
            in_features, out_features, key, reduce=reduce, pooling=pooling
        )

    def __call__(
        self, x: Array | Timeseries, state: eqx.nn.State, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "... classes"], eqx.nn.State]:
        del key
        y, state = self.pooled_linear(x, state, self)
        return jax.nn.log_softmax(y.astype(accumulation_dtype(y))), state
