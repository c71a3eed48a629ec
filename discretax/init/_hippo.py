import numpy as np
from jaxtyping import Complex, Float


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


def diagonalised_legs(
    state_dim: int,
) -> tuple[Complex[np.ndarray, " state"], Complex[np.ndarray, "state state"]]:
    r"""Eigenvalues $\Lambda$ and unitary eigenvectors $V$ of the normal part of HiPPO-LegS.

    With $P_n = \sqrt{n + 1/2}$, $A + P P^T$ is $-\frac12 I$ plus a skew-symmetric matrix, hence normal:
    $A + P P^T = V \Lambda V^*$, $\mathrm{Re}\,\Lambda = -\frac12$. Sorted by imaginary part, so that
    the first half holds one of each pair of conjugates. (S5, arXiv:2208.04933, section B.1.)
    """
    A, _ = hippo_legs(state_dim)
    P = np.sqrt(np.arange(state_dim) + 0.5)
    normal = A + np.outer(P, P)
    frequencies, V = np.linalg.eigh(-1j * (normal - np.diag(np.diagonal(normal))))
    return np.diagonal(normal).mean() + 1j * frequencies, V
