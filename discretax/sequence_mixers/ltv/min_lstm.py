from typing import ClassVar

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_size, linear
from discretax._types import Values
from discretax.sequence_mixers.ltv._minimal import AbstractMinimalMixer, Gates


class MinLSTMSequenceMixer(AbstractMinimalMixer):
    r"""minLSTM: input and forget gate do not look at the past, and share out one.

    $$f_t = \sigma(W_f x_t + b_f), \qquad i_t = \sigma(W_i x_t + b_i)$$
    $$h_t = \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot g(W_h x_t + b_h),
    \qquad y_t = W_{out} h_t$$

    with $g$, $W_{out}$, the cache and the way of computing as in
    [`discretax.sequence_mixers.MinGRUSequenceMixer`][].

    !!! example

        ```python
        mixer = MinLSTMSequenceMixer(64, expand=2, key=key)
        y, cache = mixer(x)  # x, y: (time, 64), cache: (128,)
        ```

    ??? cite

        Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, Were RNNs All We Needed?, 2024
        (arXiv:2410.01201), section 3.2 and appendix B.
    """

    forget_proj: eqx.nn.Linear
    input_proj: eqx.nn.Linear
    candidate_proj: eqx.nn.Linear
    out_proj: eqx.nn.Linear | None
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self, in_features: int, key: PRNGKeyArray, *, expand: int = 1, use_bias: bool = True
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `expand`: the state has `expand * in_features` numbers.
        - `use_bias`: $b_f$, $b_i$ and $b_h$.

        **Raises:**

        `ValueError` for a size below one.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("expand", expand) * in_features
        forget_key, input_key, candidate_key, out_key = draw.split(key, 4)
        self.forget_proj = draw.linear(in_features, state_dim, use_bias, key=forget_key)
        self.input_proj = draw.linear(in_features, state_dim, use_bias, key=input_key)
        self.candidate_proj = draw.linear(in_features, state_dim, use_bias, key=candidate_key)
        self.out_proj = None
        if expand > 1:
            self.out_proj = draw.linear(state_dim, in_features, use_bias=False, key=out_key)
        self.in_features = in_features

    def log_odds(self, x: Values) -> Gates:
        log_gate = lambda layer: jax.nn.log_sigmoid(linear(layer, x))
        return log_gate(self.input_proj) - log_gate(self.forget_proj)
