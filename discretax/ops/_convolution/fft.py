"""Causal convolutions with long kernels."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from discretax._features import check_name


def fft_convolution(
    kernel: Float[Array, "lag *channels"], x: Float[Array, "time *channels"]
) -> Float[Array, "time *channels"]:
    r"""$y_t = \sum_{l=0}^{t} K_l x_{t-l}$, by FFT, along the first axis; the others broadcast.

    Both are padded so that nothing wraps around, to a size without prime factors above 5, for which
    an FFT is fast.
    """
    time = x.shape[0]
    size = fft_size(time + kernel.shape[0] - 1)
    product = jnp.fft.rfft(kernel, size, axis=0) * jnp.fft.rfft(x, size, axis=0)
    return jnp.fft.irfft(product, size, axis=0)[:time]


def fft_size(at_least: int) -> int:
    """The smallest number from `at_least` on with no prime factor above 5."""
    best = 1 << max(at_least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = -(-at_least // three)
            best = min(best, three << max(two - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


Order = Literal["project", "transform", "merge"] | None


def projected_convolution(
    kernel: Float[Array, "lag channels"],
    B: Float[Array, "channels features"],
    C: Float[Array, "out channels"],
    x: Float[Array, "time features"],
    *,
    order: Order = None,
) -> Float[Array, "time out"]:
    r"""$y = C\,(K * (B x))$, contracted in the cheapest order.

    | `order` | first | in between | at last |
    |---|---|---|---|
    | `"project"` | project in time | transform each channel | project back in time |
    | `"transform"` | transform each feature | project at each frequency | transform back |
    | `"merge"` | merge to a matrix of kernels, $C K_l B$ | transform each feature | multiply at each frequency |

    (Centaurus, arXiv:2501.13230, section 3.) All give the same numbers; the operations of each are
    counted from the shapes, and `None` takes the cheapest. Many channels between few features call
    for the second, a batch of long sequences of very few features for the third.

    **Raises:** `ValueError` for an unknown order.
    """
    check_name("order", order, Order)
    channels, features = B.shape
    if order is None:
        order = _cheapest_order(x.shape[0], kernel.shape[0], channels, features, C.shape[0])
    if order == "merge":
        return matrix_convolution(jnp.einsum("on,ln,ni->loi", C, kernel, B), x)
    if order == "project":
        return fft_convolution(kernel, x @ B.T) @ C.T
    time = x.shape[0]
    size = fft_size(time + kernel.shape[0] - 1)
    signal = _complex_times_real(jnp.fft.rfft(x, size, axis=0), B.T)
    product = signal * jnp.fft.rfft(kernel, size, axis=0)
    return jnp.fft.irfft(_complex_times_real(product, C.T), size, axis=0)[:time]


def matrix_convolution(
    kernel: Float[Array, "lag out features"], x: Float[Array, "time features"]
) -> Float[Array, "time out"]:
    r"""$y_t = \sum_l K_l x_{t-l}$ with a matrix for each lag, by FFT of features and kernels."""
    time = x.shape[0]
    size = fft_size(time + kernel.shape[0] - 1)
    spectrum = jnp.einsum(
        "foi,fi->fo", jnp.fft.rfft(kernel, size, axis=0), jnp.fft.rfft(x, size, axis=0)
    )
    return jnp.fft.irfft(spectrum, size, axis=0)[:time]


def _complex_times_real(values, matrix):
    return lax.complex(values.real @ matrix, values.imag @ matrix)


def _cheapest_order(time: int, lags: int, channels: int, features: int, out: int) -> Order:
    size = fft_size(time + lags - 1)
    transform = 2.5 * size * max(size.bit_length() - 1, 1)  # of one real signal
    projections = 2 * channels * (features + out)
    costs: dict[Order, float] = {
        "project": time * projections + (3 * transform + 3 * size) * channels,
        "transform": size * projections
        + (transform + 3 * size) * channels
        + transform * (features + out),
        "merge": lags * 2 * channels * features * (out + 1)
        + (transform + 4 * size) * features * out
        + transform * (features + out),
    }
    return min(costs, key=lambda order: costs[order])
