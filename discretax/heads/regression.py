import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from discretax._constructors import keyed
from discretax._timeseries import Timeseries
from discretax.heads.base import AbstractHead, PooledLinear
from discretax.heads.pooling import Kind


class RegressionHead(AbstractHead):
    r"""Real numbers: $W\,\mathrm{pool}(x) + b$."""

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
        - `out_features`: how many numbers to predict.
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
    ) -> tuple[Float[Array, "... out"], eqx.nn.State]:
        del key
        return self.pooled_linear(x, state, self)
