"""What a time-invariant mixer does to a signal: its poles, its memory, its frequencies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

from discretax._ensembles import check_one_member
from discretax._features import check_size
from discretax.inspection._layers import mixers_within
from discretax.sequence_mixers import AbstractLTIMixer


def impulse_response(mixer: AbstractLTIMixer, length: int) -> Float[Array, "time out features"]:
    r"""What an impulse leaves behind: $y_t = \sum_l K_l x_{t-l}$.

    With a state, $K_l = \mathrm{Re}(C \bar A^l \bar B)$, and $D$ is added at $l = 0$. Found by
    calling the mixer.

    **Arguments:** `mixer`, a time-invariant one; `length`, how many lags.

    **Returns:** $K$: `K[l, i, j]` is what output `i` has, `l` samples after a one at input `j`.

    **Raises:** `TypeError` for anything but a time-invariant mixer; `ValueError` for a length
    below 1, and for an ensemble of mixers.
    """
    _check_time_invariant(mixer, "impulse_response(mixer, length)")
    length = check_size("length", length)
    silence = jnp.zeros((length, mixer.in_features))
    respond = lambda impulse: mixer(silence.at[0].set(impulse))[0]
    return jax.vmap(respond, out_axes=-1)(jnp.eye(mixer.in_features))


def eigenvalues(mixer: AbstractLTIMixer) -> Complex[Array, "*features state"]:
    r"""The eigenvalues $\lambda$ of the discrete transition, $h_t = \bar A h_{t-1} + \dots$

    A mode of eigenvalue $\lambda$ decays to $1/e$ in $-1 / \ln|\lambda|$ samples and turns by
    $\arg(\lambda) / 2\pi$ cycles per sample. A mixer that keeps one of each pair of conjugate
    states has one of each pair here.

    **Arguments:** `mixer`, a time-invariant one.

    **Returns:** the eigenvalues; first an axis of features, if each feature has a system of its
    own.

    **Raises:** `TypeError` for anything but a time-invariant mixer; `ValueError` for an ensemble of
    mixers.
    """
    _check_time_invariant(mixer, "eigenvalues(mixer)")
    return mixer.discretize().eigenvalues()


def frequency_response(
    mixer: AbstractLTIMixer, frequencies: Float[Array, "*frequency"]
) -> Complex[Array, "*frequency out features"]:
    r"""What becomes of a lasting oscillation: $H(f) = \sum_l K_l e^{-2\pi i f l}$ for all lags $l$.

    An input $\cos(2\pi f t)$ at feature $j$ ends up as $|H_{ij}| \cos(2\pi f t + \arg H_{ij})$ at
    output $i$. Computed in closed form from the discrete system.

    **Arguments:** `mixer`, a time-invariant one; `frequencies`, in cycles per sample: 0.5 is the
    highest that samples can hold.

    **Returns:** $H$, one matrix per frequency.

    **Raises:** `TypeError` for anything but a time-invariant mixer; `ValueError` for an ensemble of
    mixers.
    """
    _check_time_invariant(mixer, "frequency_response(mixer, frequencies)")
    phase = 2 * jnp.pi * jnp.asarray(frequencies, float)
    return mixer.discretize().transfer(lax.complex(jnp.cos(phase), jnp.sin(phase)))


def _check_time_invariant(mixer: Any, call: str) -> None:
    if not isinstance(mixer, AbstractLTIMixer):
        within = mixers_within(mixer)
        raise TypeError(
            "only a time-invariant mixer (`AbstractLTIMixer`), such as an LRU or S5, has one "
            f"response to all signals; got {type(mixer).__name__}. Of a model, take "
            f"`model.blocks[0].sequence_mixer`{f'; of this mixer, {within}' if within else ''}."
        )
    check_one_member(mixer, f"eqx.filter_vmap(lambda mixer: {call})(mixers)")
