import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


def short_convolution(
    weight_key: PRNGKeyArray, bias_key: PRNGKeyArray, features: int, width: int, *, use_bias: bool
) -> tuple[Float[Array, "features width"], Float[Array, " features"] | None]:
    r"""One filter per feature and its bias, uniform in $\pm 1/\sqrt{\mathrm{width}}$."""
    bound = width**-0.5
    weight = jr.uniform(weight_key, (features, width), minval=-bound, maxval=bound)
    bias = jr.uniform(bias_key, (features,), minval=-bound, maxval=bound) if use_bias else None
    return weight, bias
