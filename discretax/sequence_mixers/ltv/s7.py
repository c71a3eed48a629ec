from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw
from discretax._broken import mended
from discretax._constructors import keyed
from discretax._features import check_size, linear
from discretax._types import Length, Resets, Timesteps, Values, widened
from discretax.ops._recurrence.chunked import chunked_recurrence
from discretax.sequence_mixers.base import AbstractRecurrentMixer, refuse_timesteps, zero_cache

# B_t and C_t exist for so many samples at once. Each chunk reads all of W_x, so it is not shorter.
CHUNK = 64


class S7SequenceMixer(AbstractRecurrentMixer[Float[Array, " state"]]):
    r"""S7: a state that all features share, and a system of which every part comes from the input.

    $$u = W_{in} x, \qquad [\alpha, B, C, D, b] = W_x u, \qquad
    \bar A_t = 1 - \frac{1}{(\alpha_t + \alpha)^2 + 1/2}$$
    $$h_t = \bar A_t \odot h_{t-1} + B_t^T u_t + b_t, \qquad v_t = C_t h_t + D_t \odot u_t, \qquad
    y_t = v_t \odot \sigma(W_{gate}\, \mathrm{gelu}(v_t))$$

    with $B_t$ and $C_t$ of shape (features, state), real. The reparametrisation keeps $\bar A_t$
    in $[-1, 1)$ whatever the input and the training, and bounds its derivative. $B_t$ and $C_t$ are
    made for a few samples at a time and again in the backward pass, so that memory grows with
    time x (features + state), not with their product.

    The cache holds the state, `(state,)`.

    $W_x$ is large: with width $H$ and $N$ states the mixer has $2NH^2 + 3H^2 + 2NH + N$ parameters.
    Two blocks of [`discretax.models.S7`][] of width 32, with 64 states, have 276 736.

    The authors' published code is another model: a complex diagonal $\Lambda$ that does not depend
    on the input, steps that do, and timesteps, $\bar A_t = e^{\Lambda \Delta_t \tau_t}$; $B_t$ and
    $C_t$ complex and $D$ fixed. What is here follows the paper, as lrnnx does. lrnnx starts $\alpha$
    at the real part of the HiPPO eigenvalues, where $\bar A = -1/3$ and the state forgets in three
    samples; here it starts with memories of `1 / (1 - a_min)` to `1 / (1 - a_max)` samples. lrnnx
    adds the input to the output, which here is the block's part.

    !!! example

        ```python
        mixer = S7SequenceMixer(64, state_dim=16, key=key)
        y, cache = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Soydan, Zubić, Messikommer, Mishra and Scaramuzza, S7: Selective and Simplified State Space
        Layers for Sequence Modeling, 2024 (arXiv:2410.03464).
    """

    in_proj: eqx.nn.Linear
    x_proj: eqx.nn.Linear
    gate_proj: eqx.nn.Linear
    alpha: Float[Array, " state"]
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("alpha",)
    contains_broken_samples: ClassVar[bool] = True

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        state_dim: int = 64,
        a_min: float = 0.5,
        a_max: float = 0.999,
        use_bias: bool = False,
    ):
        r"""**Arguments:**

        - `in_features`: width of the input and of the output.
        - `key`: for the initialisation.
        - `state_dim`: number of states.
        - `a_min`, `a_max`: for an input of zero, $1 - \bar A$ starts evenly spread in logarithm
            between `1 - a_min` and `1 - a_max`. $W_x$ starts normal with deviation
            `1 / in_features`.
        - `use_bias`: of $W_{in}$ and $W_{gate}$.

        **Raises:**

        `ValueError` for sizes below one, or unless `-1 <= a_min <= a_max < 1`.
        """
        in_features = check_size("in_features", in_features)
        state_dim = check_size("state_dim", state_dim)
        if not -1 <= a_min <= a_max < 1:
            raise ValueError(
                f"the initial transition needs -1 <= a_min <= a_max < 1; got a_min={a_min} and "
                f"a_max={a_max}."
            )
        in_key, x_key, gate_key = draw.split(key, 3)
        self.in_proj = draw.linear(in_features, in_features, use_bias, key=in_key)
        width = 2 * state_dim + 2 * in_features * state_dim + in_features
        self.x_proj = draw.linear_of(draw.normal(x_key, (width, in_features)) / in_features)
        self.gate_proj = draw.linear(in_features, in_features, use_bias, key=gate_key)
        self.alpha = jnp.sqrt(1 / jnp.geomspace(1 - a_min, 1 - a_max, state_dim) - 0.5)
        self.in_features = in_features

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Float[Array, " state"]:
        del max_seqlen
        return zero_cache(batch_size, self.alpha.shape, dtype)

    def mix(
        self,
        x: Values,
        cache: Float[Array, " state"],
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Float[Array, " state"]]:
        refuse_timesteps(self, integration_timesteps, "its transition is a function of the input")
        mixer = widened(self, x)
        h, y = chunked_recurrence(
            _terms,
            _read_out,
            mixer,
            cache.astype(mixer.alpha.dtype),
            x,
            resets=resets,
            length=length,
            chunk_size=CHUNK,
        )
        return y, h

    def _recurrence(self, x):
        """What each sample does to the state, and how it is read out."""
        u = linear(self.in_proj, x).astype(self.alpha.dtype)
        features, state_dim = self.in_features, self.alpha.size
        ends = [state_dim, features * state_dim, features * state_dim, features]
        alpha, B, C, D, b = jnp.split(
            linear(self.x_proj, u), [sum(ends[: i + 1]) for i in range(4)], axis=-1
        )
        B, C = (matrix.reshape(-1, features, state_dim) for matrix in (B, C))
        A_bar = 1 - 1 / ((alpha + self.alpha[None]) ** 2 + 0.5)
        return A_bar, jnp.einsum("thn,th->tn", B, u) + b, (C, D * u, x)


def _terms(mixer, x, _):
    return mixer._recurrence(mended(x))


def _read_out(mixer, h, readout):
    C, skip, x = readout
    v = (jnp.einsum("thn,tn->th", C, h) + skip).astype(x.dtype)
    gate = linear(mixer.gate_proj, jax.nn.gelu(v, approximate=False))
    return v * jax.nn.sigmoid(gate)
