from typing import Literal

import numpy as np
from jaxtyping import Complex, Float

Measure = Literal["legs", "legt", "fourier"]


def hippo(
    measure: Measure, state_dim: int
) -> tuple[
    Float[np.ndarray, "state state"], Float[np.ndarray, " state"], Float[np.ndarray, "r state"]
]:
    r"""A HiPPO system $\dot h = A h + B x$ and the vectors $P$ that make $A + P^T P$ normal.

    | `measure` | $h$ keeps | rank |
    |---|---|---|
    | `"legs"` | Legendre coefficients of the whole past (scaled) | 1 |
    | `"legt"` | Legendre coefficients of a window of the past (translated) | 2 |
    | `"fourier"` | Fourier coefficients of a window of the past | 1 |

    (HiPPO, arXiv:2008.07669; the normal form S4, arXiv:2111.00396, appendix C; the window measures
    at half speed and Fourier as in How to Train Your HiPPO, arXiv:2206.12037.)

    **Returns:** $A$, $B$ and $P$ of shape `(rank, state)`, in float64.
    """
    if measure == "legs":
        A, B = hippo_legs(state_dim)
        return A, B, np.sqrt(np.arange(state_dim) + 0.5)[None]
    n = np.arange(state_dim)
    if measure == "legt":
        root = np.sqrt(2 * n + 1.0)
        sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
        parity = np.stack([n % 2 == 1, n % 2 == 0])
        return -np.outer(root, root) * sign / 2, root / 2, parity * root / np.sqrt(2)
    B = np.where(n % 2 == 0, np.sqrt(2.0), 0.0)
    B[0] = 1
    frequencies = np.where(n[1:] % 2 == 1, n[1:] // 2, 0)
    rotation = np.diag(frequencies, -1) - np.diag(frequencies, 1)
    return np.pi * rotation - np.outer(B, B), B, B[None]


def hippo_legs(
    state_dim: int,
) -> tuple[Float[np.ndarray, "state state"], Float[np.ndarray, " state"]]:
    r"""The HiPPO-LegS system $\dot h = A h + B x$, which keeps a signal's Legendre coefficients.

    $A_{nk} = -\sqrt{(2n+1)(2k+1)}$ below the diagonal, $-(n+1)$ on it, 0 above; $B_n = \sqrt{2n+1}$.
    (HiPPO, arXiv:2008.07669, eq. 2 without the factor 1/t; S4, arXiv:2111.00396, eq. 2.)

    **Returns:** $A$ and $B$, in float64.
    """
    n = np.arange(state_dim)
    root = np.sqrt(2 * n + 1.0)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root


def diagonalised_hippo(
    measure: Measure, state_dim: int
) -> tuple[Complex[np.ndarray, " state"], Complex[np.ndarray, "state state"]]:
    r"""Eigenvalues $\Lambda$ and unitary eigenvectors $V$ of the normal part of a HiPPO system.

    $A + P^T P = V \Lambda V^*$ is a multiple of one plus a skew-symmetric matrix. Sorted by imaginary
    part, so that the first half holds one of each pair of conjugates. (S5, arXiv:2208.04933,
    section B.1.)
    """
    A, _, P = hippo(measure, state_dim)
    normal = A + P.T @ P
    frequencies, V = np.linalg.eigh(-1j * (normal - np.diag(np.diagonal(normal))))
    if measure == "fourier" and state_dim % 2 == 0:
        # The constant and its partner do not rotate: take them as a pair of conjugates.
        middle = state_dim // 2
        V[:, middle - 1 : middle + 1] = 0
        V[0, middle - 1 : middle + 1] = 0.5**0.5
        V[1, middle - 1 : middle + 1] = 0.5**0.5 * np.array([1j, -1j])
    return np.diagonal(normal).mean() + 1j * frequencies, V


def diagonalised_legs(
    state_dim: int,
) -> tuple[Complex[np.ndarray, " state"], Complex[np.ndarray, "state state"]]:
    r"""[`discretax.init.diagonalised_hippo`][] of LegS, where $\mathrm{Re}\,\Lambda = -\frac12$."""
    return diagonalised_hippo("legs", state_dim)
