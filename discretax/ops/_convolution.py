"""Causal convolution with a long kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
