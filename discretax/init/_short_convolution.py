from jaxtyping import Array, Float, PRNGKeyArray

from discretax import _drawing as draw


def short_convolution(
    weight_key: PRNGKeyArray, bias_key: PRNGKeyArray, features: int, width: int, *, use_bias: bool
) -> tuple[Float[Array, "features width"], Float[Array, " features"] | None]:
    r"""One filter per feature and its bias, uniform in $\pm 1/\sqrt{\mathrm{width}}$."""
    bound = width**-0.5
    weight = draw.uniform(weight_key, (features, width), minval=-bound, maxval=bound)
    bias = draw.uniform(bias_key, (features,), minval=-bound, maxval=bound) if use_bias else None
    return weight, bias
