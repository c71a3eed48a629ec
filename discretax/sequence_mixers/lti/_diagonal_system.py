from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from discretax._broken import contained_step
from discretax._types import Length, Resets, Sample, Values
from discretax.ops._recurrence.diagonal_ssm import diagonal_ssm
from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import PLANES, times, to_complex

Planes = tuple[Array, Array]


class DiagonalSystem(eqx.Module):
    r"""$h_t = \bar A \odot h_{t-1} + \bar B x_t$, $y_t = \mathrm{Re}(C h_t) + D \odot x_t$, in discrete time.

    Unpacks as the complex `A_bar, B_bar, C`. Real and imaginary parts of the matrices are kept as they
    come, for a step to use; a sequence is run by the planes of [`discretax.ops.diagonal_ssm`][].
    """

    A_planes: Float[Array, "2 state"] | Float[Array, "time 2 state"]
    B_parts: Planes
    C_parts: Planes
    D: Float[Array, " features"]
    gamma_planes: Float[Array, "2 state"] | Float[Array, "time 2 state"] | None

    def __init__(
        self,
        A_bar: Planes,
        B: Planes,
        C: Planes,
        D: Float[Array, " features"],
        gamma: Planes | None = None,
    ):
        r"""**Arguments:** `A_bar`, `B` (state, features) and `C` (features, state), each as real and
        imaginary part; `D`, the elementwise skip; `gamma`, the input factor, by which
        $\bar B = \gamma \odot B$. It may change with time, like `A_bar`."""
        self.A_planes = jnp.stack(A_bar, axis=-2)
        self.B_parts, self.C_parts, self.D = B, C, D
        self.gamma_planes = None if gamma is None else jnp.stack(gamma, axis=-2)

    @property
    def _varying_gamma(self) -> Float[Array, "time 2 state"] | None:
        """The input factor if it changes with time; one that does not is in `B_planes`."""
        varies = self.gamma_planes is not None and self.gamma_planes.ndim == 3
        return self.gamma_planes if varies else None

    @property
    def B_planes(self) -> Float[Array, "2 state features"]:
        B_re, B_im = self.B_parts
        if self.gamma_planes is None or self._varying_gamma is not None:
            return jnp.stack([B_re, B_im])
        g_re, g_im = self.gamma_planes[..., None]
        return jnp.stack([g_re * B_re - g_im * B_im, g_re * B_im + g_im * B_re])

    @property
    def C_planes(self) -> Float[Array, "features 2 state"]:
        return jnp.stack([self.C_parts[0], -self.C_parts[1]], axis=1)

    @property
    def A_bar(self) -> Complex[Array, "*time state"]:
        return to_complex(self.A_planes)

    @property
    def B_bar(self) -> Complex[Array, "*time state features"]:
        B = lax.complex(*self.B_planes)
        if self._varying_gamma is None:
            return B
        return to_complex(self._varying_gamma)[..., None] * B[None]

    @property
    def C(self) -> Complex[Array, "features state"]:
        return lax.complex(*self.C_parts)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.A_bar, self.B_bar, self.C))

    def __call__(
        self,
        x: Values,
        cache: Float[Array, "2 state"],
        *,
        length: Length | None = None,
        resets: Resets | None = None,
    ) -> tuple[Values, Float[Array, "2 state"]]:
        return diagonal_ssm(
            self.A_planes,
            self.B_planes,
            self.C_planes,
            x,
            cache,
            D=self.D,
            gamma=self._varying_gamma,
            length=length,
            resets=resets,
        )

    def step(
        self, x: Sample, cache: Float[Array, "2 state"]
    ) -> tuple[Sample, Float[Array, "2 state"]]:
        # Without a copy of the matrices, which takes longer than the products.
        def run(x, h):
            drive = jnp.stack([part @ x for part in self.B_parts])
            if self.gamma_planes is not None:
                drive = times(self.gamma_planes, drive)
            h = times(self.A_planes, h) + drive
            y_re, y_im = (part @ plane for part, plane in zip(self.C_parts, h, strict=True))
            return y_re - y_im + self.D * x, h

        return contained_step(run, x, cache)

    def powers(self, length: int) -> Complex[Array, "time state"]:
        r"""$\bar A^l$ for $l = 0, \dots$: the states' response to a unit impulse.

        Run as the recurrence that it is. $e^{l \log \bar A}$ would lose the phase of long lags to
        rounding.
        """
        impulse = jnp.zeros((length, *self.A_planes.shape), self.A_planes.dtype).at[0, 0].set(1)
        h = recurrence(
            self.A_planes, impulse, jnp.zeros_like(self.A_planes), None, transitions=PLANES
        )
        return to_complex(h)

    def eigenvalues(self) -> Complex[Array, " state"]:
        r"""Of the transition: $\bar A$ itself."""
        return self.A_bar

    def transfer(self, z: Complex[Array, "*shape"]) -> Complex[Array, "*shape out features"]:
        r"""$H(z) = \sum_l K_l z^{-l}$ of the impulse response $K$, in closed form."""
        A_bar, B_bar, C = self
        skip = lax.broadcast_to_rank(jnp.diag(self.D).astype(C.dtype), z.ndim + 2)
        return transfer(A_bar, B_bar, C, z) + skip


def transfer(
    A_bar: Complex[Array, " state"],
    B_bar: Complex[Array, "state features"],
    C: Complex[Array, "out state"],
    z: Complex[Array, "*shape"],
) -> Complex[Array, "*shape out features"]:
    r"""$\sum_l \mathrm{Re}(C \bar A^l \bar B) z^{-l}$: half of a complex series plus its conjugate.

    $(G(z) + \overline{G(\overline z)}) / 2$ with $G(z) = C (1 - \bar A / z)^{-1} \bar B$.
    """
    z = z.astype(A_bar.dtype)[..., None, None]
    A_bar, C = (lax.broadcast_to_rank(array, z.ndim) for array in (A_bar, C))
    series = lambda z: (C / (1 - A_bar / z)) @ B_bar
    return (series(z) + series(z.conj()).conj()) / 2
