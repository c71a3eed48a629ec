from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from discretax._broken import contained_step
from discretax._types import Length, Resets, Sample, Values
from discretax.ops import oscillator_ssm
from discretax.ops._recurrence.linear_recurrence import recurrence
from discretax.ops._recurrence.transitions import MATRICES, matrices, to_complex

Cache = Float[Array, "2 2 state"]


class OscillatorSystem(eqx.Module):
    r"""Oscillators in discrete time, whose position $y$ is read out as $\mathrm{Re}(C y_t) + D \odot x_t$:

    $$\begin{pmatrix} z_t \\ y_t \end{pmatrix} = M \begin{pmatrix} z_{t-1} \\ y_{t-1} \end{pmatrix}
    + F\, (B x_t)$$

    None is damped so much that it does not swing: the eigenvalues of $M$ are conjugate, or equal.

    Unpacks as `A_bar`, which is $M$, the complex `B_bar` $= F \otimes B$ and `C`, whose axes of size two
    stand for velocity and position. They are kept in the layout that
    [`discretax.ops.oscillator_ssm`][] computes with.
    """

    A_bar: Float[Array, "*time 2 2 state"]
    F: Float[Array, "*time 2 state"]
    B_planes: Float[Array, "2 state features"]
    C_planes: Float[Array, "features 2 state"]
    D: Float[Array, " features"]

    def __init__(
        self,
        M: tuple[tuple[Array, Array], tuple[Array, Array]],
        F: tuple[Array, Array],
        B: Float[Array, "state features 2"],
        C: Float[Array, "features state 2"],
        D: Float[Array, " features"],
    ):
        """**Arguments:** the entries of `M` and `F`, `(state,)` or `(time, state)`; `B` and `C` with
        real and imaginary part last; `D`, the elementwise skip."""
        self.A_bar = jnp.stack([jnp.stack(row, axis=-2) for row in M], axis=-3)
        self.F = jnp.stack(F, axis=-2)
        self.B_planes = jnp.moveaxis(B, -1, 0)
        self.C_planes = jnp.stack([C[..., 0], -C[..., 1]], axis=1)
        self.D = D

    @property
    def B_bar(self) -> Complex[Array, "*time 2 state features"]:
        F = self.F[..., None]
        return lax.complex(*(F * lax.broadcast_to_rank(part, F.ndim) for part in self.B_planes))

    @property
    def C(self) -> Complex[Array, "features 2 state"]:
        position = to_complex(self.C_planes).conj()
        return jnp.stack([jnp.zeros_like(position), position], axis=1)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.A_bar, self.B_bar, self.C))

    def __call__(
        self,
        x: Values,
        cache: Cache,
        *,
        length: Length | None = None,
        resets: Resets | None = None,
    ) -> tuple[Values, Cache]:
        return oscillator_ssm(
            self.A_bar,
            self.F,
            self.B_planes,
            self.C_planes,
            x,
            cache,
            D=self.D,
            length=length,
            resets=resets,
        )

    def step(self, x: Sample, cache: Cache) -> tuple[Sample, Cache]:
        def run(x, h):
            force = self.F[:, None] * (self.B_planes @ x)[None]
            h = jnp.einsum("ijn,jpn->ipn", self.A_bar, h) + force
            return jnp.einsum("opn,pn->o", self.C_planes, h[1]) + self.D * x, h

        return contained_step(run, x, cache)

    def kernel(self, length: int) -> Float[Array, "time state"]:
        r"""$(M^l F)_2$ for $l = 0, \dots$: where a unit force moves the position, and what becomes of it.

        Run as the recurrence that it is, which holds for a $M$ that cannot be diagonalised.
        """
        M = matrices(*self.A_bar[0], *self.A_bar[1])
        force = jnp.zeros((length, *self.F.shape), self.F.dtype).at[0].set(self.F)
        zero = jnp.zeros_like(self.F)
        return recurrence(M, force, zero, None, transitions=MATRICES)[:, 1]

    def eigenvalues(self) -> Complex[Array, " state"]:
        r"""One of each pair: $m + i \sqrt{-d}$ with $m = \frac12 \mathrm{tr}\,M$ and
        $d = (\frac{M_{11} - M_{22}}{2})^2 + M_{12} M_{21}$, which is above zero by rounding alone."""
        (M_11, M_12), (M_21, M_22) = self.A_bar
        d = ((M_11 - M_22) / 2) ** 2 + M_12 * M_21
        return lax.complex((M_11 + M_22) / 2, jnp.sqrt(jnp.maximum(-d, 0)))

    def transfer(self, z: Complex[Array, "*shape"]) -> Complex[Array, "*shape out features"]:
        r"""$H(z) = \sum_l K_l z^{-l}$ of the impulse response $K$, in closed form."""
        M, F, B, C, D = (
            part.astype(np.promote_types(part.dtype, np.complex64))
            for part in (self.A_bar, self.F, self.B_planes, self.C_planes, self.D)
        )
        w = 1 / z.astype(M.dtype)[..., None]
        (M_11, M_12), (M_21, M_22), (F_1, F_2) = (
            [lax.broadcast_to_rank(entry, w.ndim) for entry in row] for row in (*M, F)
        )
        determinant = (1 - M_11 * w) * (1 - M_22 * w) - M_12 * M_21 * w**2
        position = (M_21 * w * F_1 + (1 - M_11 * w) * F_2) / determinant
        # The planes of B and C are real numbers, and so are the positions' responses.
        response = jnp.einsum("opn,...n,pnf->...of", C, position, B)
        return response + lax.broadcast_to_rank(jnp.diag(D), response.ndim)
