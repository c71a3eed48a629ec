from typing import ClassVar

import equinox as eqx
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import check_size, linear
from discretax._types import Values
from discretax.sequence_mixers.ltv._minimal import AbstractMinimalMixer, Gates


class MinGRUSequenceMixer(AbstractMinimalMixer):
    r"""minGRU: a gated recurrent unit whose gate and candidate do not look at the past.

    $$z_t = \sigma(W_z x_t + b_z), \qquad
    h_t = (1 - z_t) \odot h_{t-1} + z_t \odot g(W_h x_t + b_h), \qquad y_t = W_{out} h_t$$

    with $g(u) = u + \frac12$ for $u \ge 0$ and $\sigma(u)$ below: positive and increasing. Without
    `expand` there is no $W_{out}$.

    The authors' parallel form sums logarithms, for which $g$ is positive. The recurrence itself,
    computed here, has the same meaning and is stable without. The state before the first sample is
    zero. The cache holds the state, `(expand * features,)`.

    !!! example

        ```python
        mixer = MinGRUSequenceMixer(64, expand=2, key=key)
        y, cache = mixer(x)  # x, y: (time, 64), cache: (128,)
        ```

    ??? cite

        Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, Were RNNs All We Needed?, 2024
        (arXiv:2410.01201), section 3.1 and appendix B.
    """

    gate_proj: eqx.nn.Linear
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
        - `use_bias`: $b_z$ and $b_h$.

        **Raises:**

        `ValueError` for a size below one.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("expand", expand) * in_features
        gate_key, candidate_key, out_key = draw.split(key, 3)
        self.gate_proj = draw.linear(in_features, state_dim, use_bias, key=gate_key)
        self.candidate_proj = draw.linear(in_features, state_dim, use_bias, key=candidate_key)
        self.out_proj = None
        if expand > 1:
            self.out_proj = draw.linear(state_dim, in_features, use_bias=False, key=out_key)
        self.in_features = in_features

    def log_odds(self, x: Values) -> Gates:
        return linear(self.gate_proj, x)
