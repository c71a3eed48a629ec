"""One entry per exported mixer. Every law in `test_laws.py` runs over every entry.

A new mixer is one more `Case`. If it refuses timesteps, cannot stream or has no kernel, its entry
says so, and the laws check the refusal instead.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from discretax import ops
from discretax.sequence_mixers import (
    AbstractLTIMixer,
    AbstractSequenceMixer,
    Bidirectional,
    BidirectionalS5,
    Discretized,
    LRUSequenceMixer,
    S5SequenceMixer,
)
from discretax.sequence_mixers._diagonal_system import DiagonalSystem
from discretax.sequence_mixers.base import zero_cache

FEATURES, TIME = 4, 13


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[PRNGKeyArray], AbstractSequenceMixer]
    streams: bool = True
    takes_timesteps: bool = False
    # A gap of k equals k samples, the last of them the input and the others zero.
    gap_is_zero_input: bool = False
    # The output by convolution with `compute_kernel`, written out for this mixer's kernel.
    convolve: Callable[[AbstractSequenceMixer, Array], Array] | None = None
    # |A_bar| as promised by the paper to stay at most one.
    transition_size: Callable[[AbstractSequenceMixer], Array] | None = None

    # Fields that start at the same numbers for every key.
    not_drawn: tuple[str, ...] = ()
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


class Decay(AbstractLTIMixer[Array]):
    """A continuous-time mixer for the tests: impulses decaying at rates between the samples."""

    log_rate: Array
    frequency: Array
    B: Array
    C: Array
    D: Array
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("log_rate", "frequency", "B")

    def __init__(self, in_features: int, key: PRNGKeyArray, *, state_dim: int = 3):
        keys = jr.split(key, 5)
        self.log_rate = jr.normal(keys[0], (state_dim,))
        self.frequency = jr.normal(keys[1], (state_dim,))
        self.B = jr.normal(keys[2], (state_dim, in_features, 2))
        self.C = jr.normal(keys[3], (in_features, state_dim, 2))
        self.D = jr.normal(keys[4], (in_features,))
        self.in_features = in_features

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return zero_cache(batch_size, (2, self.log_rate.shape[0]), dtype)

    def discretize(self, integration_timesteps=None):
        timesteps = jnp.ones((), self.D.dtype)
        if integration_timesteps is not None:
            timesteps = jnp.asarray(integration_timesteps, self.D.dtype)[..., None]
        A = jax.lax.complex(-jnp.exp(self.log_rate), self.frequency)
        A_bar, _ = ops.dirac(A, timesteps.astype(A.dtype))
        return DiagonalSystem(
            A_bar=(A_bar.real, A_bar.imag),
            B=(self.B[..., 0], self.B[..., 1]),
            C=(self.C[..., 0], self.C[..., 1]),
            D=self.D,
        )

    def compute_kernel(self, length):
        return self.discretize().powers(length)


def convolve_states(mixer: AbstractLTIMixer, x: Array) -> Array:
    """h_t = sum_l K_l (B_bar x)_{t-l}, lag by lag, for a kernel of shape (time, state)."""
    _, B_bar, C = mixer.discretize()
    kernel = mixer.compute_kernel(x.shape[0])
    drive = x.astype(B_bar.dtype) @ B_bar.T
    delayed = lambda lag: jnp.pad(drive, ((lag, 0), (0, 0)))[: x.shape[0]]
    h = sum(kernel[lag] * delayed(lag) for lag in range(x.shape[0]))
    return (h @ C.T).real + mixer.discretize().D * x


def diagonal_size(mixer: AbstractLTIMixer) -> Array:
    return jnp.abs(mixer.discretize().A_bar)


def lru(key: PRNGKeyArray) -> LRUSequenceMixer:
    return LRUSequenceMixer(FEATURES, key, state_dim=3, r_min=0.3)


def bidirectional(key: PRNGKeyArray) -> Bidirectional:
    forward_key, backward_key = jr.split(key)
    return Bidirectional(Decay(FEATURES, forward_key), Decay(FEATURES, backward_key))


CASES = (
    Case("LRUSequenceMixer", lru, convolve=convolve_states, transition_size=diagonal_size),
    Case("Discretized", lambda key: Discretized(lru(key))),
    Case(
        "S5SequenceMixer",
        lambda key: S5SequenceMixer(FEATURES, key, state_dim=6, dt_min=0.1, dt_max=1.0),
        takes_timesteps=True,
        convolve=convolve_states,
        transition_size=diagonal_size,
        not_drawn=("Lambda_re", "Lambda_im"),
    ),
    Case(
        "S5SequenceMixer",
        lambda key: S5SequenceMixer(
            FEATURES, key, state_dim=4, ssm_blocks=2, conj_sym=False, discretization="async"
        ),
        takes_timesteps=True,
        gap_is_zero_input=True,
        convolve=convolve_states,
        transition_size=diagonal_size,
        not_drawn=("Lambda_re", "Lambda_im"),
        variant="async",
    ),
    Case(
        "BidirectionalS5",
        lambda key: BidirectionalS5(FEATURES, key, state_dim=4, discretization="bilinear"),
        streams=False,
        takes_timesteps=True,
        not_drawn=("Lambda_re", "Lambda_im"),
    ),
    Case("Bidirectional", bidirectional, streams=False, takes_timesteps=True),
    Case(
        "Decay",
        lambda key: Decay(FEATURES, key),
        takes_timesteps=True,
        gap_is_zero_input=True,
        convolve=convolve_states,
        transition_size=diagonal_size,
    ),
)
