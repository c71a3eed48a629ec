import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from discretax._features import check_features, check_size
from discretax.ops._rms import rms_normalised


class OffsetRMSNorm(eqx.Module):
    r"""RMS norm whose weight is kept by how far it is from one, as in Gemma.

    $$y = (1 + \mathrm{offset}) \odot x\,/\sqrt{\mathrm{mean}(x^2) + \mathrm{eps}}$$

    Weight decay then draws the weight to one, and a checkpoint in low precision keeps the digits of
    what was learned.
    """

    offset: Float[Array, " features"]
    eps: float = eqx.field(static=True)

    def __init__(self, in_features: int, eps: float = 1e-6):
        """**Arguments:** `in_features`; `eps`, added to the mean of the squares."""
        in_features = check_size("in_features", in_features)
        self.offset = jnp.zeros(in_features)
        self.eps = eps

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " features"]:
        check_features(self, x, self.offset.shape[0])
        y = rms_normalised(x, self.eps)
        return (y * (1 + self.offset.astype(y.dtype))).astype(x.dtype)
