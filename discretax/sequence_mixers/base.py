"""What every sequence mixer is."""

import abc
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from discretax._broken import contained, mended
from discretax._features import check_samples
from discretax._stateful import check_cache
from discretax._timeseries import (
    check_length,
    check_resets,
    check_timesteps,
    known,
    one_padding,
    zero_padding,
)
from discretax._types import Length, Resets, Sample, Timesteps, Values, conversion, widened
from discretax.ops._running.split_time import incoming_broken

Cache = TypeVar("Cache")
Answer = TypeVar("Answer", bound=tuple[Array, Any])


class AbstractSequenceMixer(eqx.Module, Generic[Cache]):
    """Mixes along time: a linear recurrence, seen over a whole sequence, a chunk or one step.

    The three views agree to rounding, in outputs, caches and gradients:

    - `mixer(x)` over a whole sequence;
    - `y, cache = mixer(chunk, cache)` over chunks of any lengths, concatenated;
    - `y, cache = mixer.step(sample, cache)` over single samples.
    """

    in_features: eqx.AbstractVar[int]
    recurrent_parameters: eqx.AbstractClassVar[tuple[str, ...]]
    """Names of the fields that act inside the recurrence. They are trained with a lower rate and
    without weight decay ([`discretax.optim`][])."""

    @abc.abstractmethod
    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> Cache:
        """The state before the first sample.

        **Arguments:**

        - `batch_size`: None for one sequence; a number for a leading axis to `jax.vmap` over.
        - `max_seqlen`: how many samples the cache must hold, for mixers whose cache grows with
            time. Recurrences ignore it.
        - `dtype`: of the cache; float32 by default, float64 with x64 enabled. The recurrence
            accumulates in float32 or wider in any case.
        """

    @abc.abstractmethod
    def __call__(
        self,
        x: Values,
        cache: Cache | None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, Cache]:
        """Mixes a sequence, or the next chunk of one.

        **Arguments:**

        - `x`: the samples, `(time, features)`.
        - `cache`: the state before the first sample; None stands for the one of
            `allocate_inference_cache`, which is zero unless the mixer learns another.
        - `integration_timesteps`: `(time,)`, elapsed time since the previous sample, in sample
            intervals. Mixers without a continuous time refuse it.
        - `length`: number of valid samples. Those at or past it change neither the returned cache
            nor any valid output.
        - `resets`: `(time,)`; where True at `t`, a sequence begins: the state before `t` is that
            of None.
        - `key`: for mixers that draw at random.

        **Returns:**

        The output, `(time, features)`, in the type of `x`, and the cache after the last valid
        sample.

        **Raises:**

        `ValueError` for shapes that do not fit the mixer.
        """

    @abc.abstractmethod
    def step(
        self, x: Sample, cache: Cache, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, Cache]:
        """One sample: `x` of shape `(features,)`, with the cache of the previous step."""


class AbstractCheckedMixer(AbstractSequenceMixer[Cache]):
    """A mixer whose cache is of one size, however many samples it has seen.

    What it is called with is checked here, and what it answers gets its types here. A broken sample,
    one that is not finite, is kept from what does not depend on it here: see `contains_broken_samples`.
    """

    contains_broken_samples: eqx.AbstractClassVar[bool]
    """False: `mix` is given finite samples and a finite cache, and NaN is put into its answer from a
    broken sample on, until a reset. True: `mix` is given what there is, and does the same by itself. An
    operation such as `discretax.ops.diagonal_ssm` does, with fewer copies."""

    @abc.abstractmethod
    def mix(
        self,
        x: Values,
        cache: Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Cache]:
        """As the call, with arguments that are known to fit and `x` zero where it is padding."""

    def __call__(
        self,
        x: Values,
        cache: Cache | None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, Cache]:
        del key
        zero = self.allocate_inference_cache()
        x, cache, timesteps = check_call(
            self, x, cache, zero, integration_timesteps, length, resets
        )
        return in_types_of((x, cache), self._mixed(x, cache, timesteps, length, resets))

    def _mixed(self, x, cache, timesteps, length, resets):
        if self.contains_broken_samples:
            return self.mix(x, cache, timesteps, length, resets)
        run = lambda cache: self.mix(mended(x), cache, timesteps, length, resets)
        return contained(run, cache, x, resets, length, incoming=incoming_broken)


class AbstractLTIMixer(AbstractCheckedMixer[Cache]):
    """A mixer whose system does not change with time, unless timesteps make it.

    It says how its parameters become a discrete system; the system knows how to run.
    """

    contains_broken_samples: ClassVar[bool] = True  # its system does

    @abc.abstractmethod
    def discretize(self, integration_timesteps: Timesteps | None = None) -> Any:
        r"""The discrete system $h_t = \bar A h_{t-1} + \bar B x_t$, $y_t = \mathrm{Re}(C h_t) + D x_t$.

        Unpacks as `A_bar, B_bar, C`; `D` is a field of it. With timesteps, `A_bar` has an axis of
        time.

        **Raises:** `ValueError` for timesteps if the mixer has no continuous time.
        """

    @abc.abstractmethod
    def compute_kernel(self, length: int) -> Array:
        """What a convolution over `length` samples convolves with."""

    def mix(
        self,
        x: Values,
        cache: Cache,
        integration_timesteps: Timesteps | None,
        length: Length | None,
        resets: Resets | None,
    ) -> tuple[Values, Cache]:
        system, u, h0 = widened((self.discretize(integration_timesteps), x, cache))
        return system(u, h0, length=length, resets=resets)

    def step(
        self, x: Sample, cache: Cache, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, Cache]:
        check_step(self, x, cache, self.allocate_inference_cache())
        x, timesteps = with_one_timestep(x, integration_timestep)
        system = self.discretize(None if timesteps is None else timesteps[0])
        system, u, h = widened((system, x, cache))
        return in_types_of((x, cache), system.step(u, h))


class AbstractContinuousMixer(AbstractLTIMixer[Cache]):
    """A time-invariant mixer of a system in continuous time, sampled with a step of its own.

    It takes timesteps, and it can be sampled at another rate than it was trained at.
    """

    step_rescale: eqx.AbstractVar[float]
    """Multiplies every step: 2 for a signal sampled half as often as the one of training."""


class AbstractRecurrentMixer(AbstractCheckedMixer[Cache]):
    """A mixer that says how a chunk is mixed, and no more: the base to write one of your own on.

    A step is a chunk of one sample. What `mix` is given has been checked, and what it returns may be of
    wider types than `x` and `cache`: the call and the step give it theirs. The library's mixers whose
    system is chosen by the input, linear and time-varying ones (LTV), are written on it. So is anything
    else that carries a cache of one size.
    """

    contains_broken_samples: ClassVar[bool] = False

    def step(
        self, x: Sample, cache: Cache, *, integration_timestep: Any | None = None
    ) -> tuple[Sample, Cache]:
        check_step(self, x, cache, self.allocate_inference_cache())
        x, timesteps = with_one_timestep(x, integration_timestep)
        y, after = self._mixed(x[None], cache, timesteps, None, None)
        return in_types_of((x, cache), (y[0], after))


def with_one_timestep(
    x: Sample, integration_timestep: Any | None
) -> tuple[Sample, Timesteps | None]:
    """The sample, and the timesteps of it alone."""
    if integration_timestep is None:
        return x, None
    timesteps = jnp.asarray(integration_timestep, jnp.result_type(float))[None]
    check_timesteps(timesteps, 1)
    values, timesteps = _broken_by_unfit(x[None], timesteps)
    return values[0], timesteps


def _broken_by_unfit(x: Values, timesteps: Timesteps | None) -> tuple[Values, Timesteps | None]:
    """A timestep whose number is known has been refused if unfit. Else it breaks its sample."""
    if timesteps is None or known(timesteps) is not None:
        return x, timesteps
    fit = jnp.isfinite(timesteps) & (timesteps >= 0)
    x = jnp.where(fit[:, None], x, jnp.asarray(jnp.nan, x.dtype))
    return x, jnp.where(fit, timesteps, jnp.ones_like(timesteps))


def check_call(
    mixer: AbstractSequenceMixer,
    x: Array,
    cache: Cache | None,
    zero: Cache,
    integration_timesteps: Timesteps | None,
    length: Length | None,
    resets: Resets | None,
) -> tuple[Array, Cache, Timesteps | None]:
    """Refuses inputs that do not fit, by name; returns samples, cache and timesteps to go on with.

    The cache is `zero` if there is none. In the padding stand samples of zero and timesteps of one.
    """
    check_samples(mixer, x, mixer.in_features)
    cache = zero if cache is None else cache
    check_cache(mixer, cache, zero)
    check_length(length, x.shape[0])
    check_timesteps(integration_timesteps, x.shape[0], length)
    check_resets(resets, x.shape[0])
    timesteps = one_padding(integration_timesteps, length)
    x, timesteps = _broken_by_unfit(zero_padding(x, length), timesteps)
    return x, cache, timesteps


def in_types_of(given: Answer, answer: Answer) -> Answer:
    """`answer`, sample and cache, in the types in which they were given."""
    return jax.tree.map(lambda new, old: jnp.asarray(new, jnp.result_type(old)), answer, given)


def check_step(mixer: AbstractSequenceMixer, x: Array, cache: PyTree, zero: PyTree) -> None:
    check_sample(mixer, x)
    check_cache(mixer, cache, zero)


def check_sample(mixer: AbstractSequenceMixer, x: Array) -> None:
    if x.shape != (mixer.in_features,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"`{type(mixer).__name__}.step` takes one floating sample of shape "
            f"({mixer.in_features},); got {x.dtype}{x.shape}. Use `jax.vmap` to batch."
            f"{conversion(x, float)}"
        )


def refuse_timesteps(mixer: AbstractSequenceMixer, timesteps: Any | None, reason: str) -> None:
    """For a mixer without a continuous time: `ValueError` with the `reason` if there are any."""
    if timesteps is not None:
        raise ValueError(
            f"`{type(mixer).__name__}` takes no integration timesteps: {reason}. Mixers with a "
            "continuous time, such as S5, do. Leave the timesteps out, or give them as a feature."
        )


def refuse_to_stream(mixer: AbstractSequenceMixer) -> NoReturn:
    """For a mixer that needs the future: what it does instead of allocating, taking or stepping."""
    raise ValueError(
        f"`{type(mixer).__name__}` cannot stream: its output depends on samples that have not come "
        "yet. Call it on whole sequences, without a cache, or train a causal mixer."
    )


def zero_cache(batch_size: int | None, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros of `shape`, with an axis of `batch_size` in front unless it is None.

    **Raises:** `ValueError` for a batch of none.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            f"`batch_size` must be None (one sequence) or at least 1; got {batch_size}."
        )
    return jnp.zeros(shape if batch_size is None else (batch_size, *shape), dtype)
