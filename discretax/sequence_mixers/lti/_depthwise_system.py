from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from discretax._broken import contained_step
from discretax._types import Length, Resets, Sample, Values
from discretax.ops import Route, Transition, depthwise_kernel, depthwise_ssm
from discretax.ops._recurrence.transitions import to_complex, to_planes
from discretax.ops._running.split_time import time_parts


class DepthwiseSystem(eqx.Module):
    r"""$h_t = \bar A h_{t-1} + \bar B x_t$, $y_t = \mathrm{Re}(C h_t) + D x_t$ for each feature by itself.

    Unpacks as the complex `A_bar, B_bar, C`. With several `channels`, each feature has so many
    readouts, and the output is `(time, channels * features)`, one channel after the other. They are
    kept as real planes, as [`discretax.ops.depthwise_ssm`][] computes with them.
    """

    transition: Transition
    B_planes: Float[Array, "*time features 2 state"]
    C_planes: Float[Array, "channels features 2 state"]
    D: Float[Array, "channels features"]
    l_max: int | None = eqx.field(static=True)
    route: Route = eqx.field(static=True)

    def __init__(
        self,
        A_bar: Complex[Array, "*time features state"],
        B_bar: Complex[Array, "*time features state"],
        C: Complex[Array, "channels features state"],
        D: Float[Array, "channels features"],
        *,
        low_rank: tuple[Array, Array] | None = None,
        l_max: int | None = None,
        route: Route = None,
    ):
        r"""**Arguments:** `A_bar`, the diagonal; `B_bar`; `C`; `D`; `low_rank`, complex $U$
        `(*time, features, state, rank)` and $W$ `(*time, features, rank, state)` by which the
        transition is $h \mapsto \bar A \odot h + U\,\mathrm{Re}(W h)$; `l_max`, the longest
        sequence to accept; `route`, as in [`discretax.ops.depthwise_ssm`][]."""
        U = W = None
        if low_rank is not None:
            U = jnp.stack([low_rank[0].real, low_rank[0].imag], axis=-3)
            W = jnp.stack([low_rank[1].real, -low_rank[1].imag], axis=-2)
        self.transition = Transition(to_planes(A_bar), U, W)
        self.B_planes = to_planes(B_bar)
        self.C_planes = to_planes(C.conj())
        self.D = D
        self.l_max = l_max
        self.route = route

    @property
    def A_bar(self) -> Complex[Array, "*time features state"]:
        """The diagonal; with a low-rank part, the dense matrices acting on the states followed by
        their conjugates, `(features, 2 state, 2 state)`."""
        A, U, W = self.transition
        diagonal = to_complex(A)
        if U is None or W is None:
            return diagonal
        U = lax.complex(U[..., 0, :, :], U[..., 1, :, :])
        W = to_complex(W).conj()
        mix = jnp.concatenate([U, U.conj()], -2) @ jnp.concatenate([W, W.conj()], -1) / 2
        diagonal = jnp.concatenate([diagonal, diagonal.conj()], -1)
        eye = jnp.eye(diagonal.shape[-1], dtype=diagonal.dtype)
        return mix + diagonal[..., None] * lax.broadcast_to_rank(eye, mix.ndim)

    @property
    def B_bar(self) -> Complex[Array, "*time features state"]:
        return self._with_conjugates(to_complex(self.B_planes))

    @property
    def C(self) -> Complex[Array, "channels features state"]:
        C = self._with_conjugates(to_complex(self.C_planes).conj())
        return C if self.transition.U is None else C / 2

    def __iter__(self) -> Iterator[Array]:
        return iter((self.A_bar, self.B_bar, self.C))

    def __call__(
        self,
        x: Values,
        cache: Float[Array, "features 2 state"],
        *,
        length: Length | None = None,
        resets: Resets | None = None,
    ) -> tuple[Values, Float[Array, "features 2 state"]]:
        time = x.shape[0] * time_parts()
        if self.l_max is not None and time > self.l_max:
            raise ValueError(
                f"this mixer was built for sequences of at most l_max={self.l_max} samples; got "
                f"{time}. Feed the sequence in chunks, or build the mixer with a larger "
                "`l_max`, or None."
            )
        y, h = depthwise_ssm(
            self.transition,
            self.B_planes,
            self.C_planes,
            x,
            cache,
            D=self.D,
            length=length,
            resets=resets,
            route=self.route,
        )
        return y.reshape(x.shape[0], self.D.size), h

    def step(
        self, x: Sample, cache: Float[Array, "features 2 state"]
    ) -> tuple[Sample, Float[Array, "features 2 state"]]:
        def run(x, h):
            h = self.transition(h) + self.B_planes * x[:, None, None]
            return jnp.einsum("cfpn,fpn->cf", self.C_planes, h) + self.D * x[None], h

        y, h = contained_step(run, x, cache, by_feature=True)
        return y.reshape(-1), h

    def kernel(self, length: int) -> Float[Array, "time channels features"]:
        return depthwise_kernel(self.transition, self.B_planes, self.C_planes, length)

    def eigenvalues(self) -> Complex[Array, "features eigenvalue"]:
        r"""Of the transition: $\bar A$ itself, or what its dense form has."""
        return self.A_bar if self.transition.U is None else jnp.linalg.eigvals(self.A_bar)

    def transfer(self, z: Complex[Array, "*shape"]) -> Complex[Array, "*shape out features"]:
        r"""$H(z) = \sum_l K_l z^{-l}$ of the impulse response $K$, in closed form."""
        A_bar, B_bar, C = self
        z = z.astype(A_bar.dtype)[..., None, None]
        A_bar = lax.broadcast_to_rank(A_bar, z.ndim - 2 + A_bar.ndim)

        def series(z):
            if self.transition.U is None:
                return jnp.einsum("cfn,...fn,fn->...cf", C, 1 / (1 - A_bar / z), B_bar)
            eye = lax.broadcast_to_rank(jnp.eye(A_bar.shape[-1], dtype=A_bar.dtype), A_bar.ndim)
            drive = lax.broadcast_to_rank(B_bar[..., None], A_bar.ndim)
            states = jnp.linalg.solve(eye - A_bar / z[..., None], drive)[..., 0]
            return jnp.einsum("cfn,...fn->...cf", C, states)

        response = (series(z) + series(z.conj()).conj()) / 2
        response = response + lax.broadcast_to_rank(self.D.astype(A_bar.dtype), response.ndim)
        eye = jnp.eye(self.D.shape[1], dtype=A_bar.dtype)
        matrix = response[..., None] * lax.broadcast_to_rank(eye, response.ndim + 1)
        return matrix.reshape(*matrix.shape[:-3], -1, matrix.shape[-1])

    def _with_conjugates(self, vectors):
        if self.transition.U is None:
            return vectors
        return jnp.concatenate([vectors, vectors.conj()], -1)
