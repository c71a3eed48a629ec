import jax.numpy as jnp
from jaxtyping import Array, Float


def inverse_softplus(y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The $x$ with $\mathrm{softplus}(x) = \log(1 + e^x) = y$, for positive `y`.

    Biases under a softplus start here, so that the steps start at `y`. (Mamba, arXiv:2312.00752,
    section 3.6.)
    """
    # log(exp(y) - 1), arranged so that neither a small nor a large y is lost to rounding.
    return y + jnp.log(-jnp.expm1(-y))
