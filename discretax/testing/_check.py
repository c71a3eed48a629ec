"""The list of laws, and the public functions over it."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from discretax.sequence_mixers import AbstractSequenceMixer
from discretax.testing import (
    _broken,
    _building,
    _causality,
    _padding,
    _precision,
    _refusals,
    _timesteps,
    _transformations,
    _views,
)
from discretax.testing._law import Law, MixerLaw, hold
from discretax.testing._subject import Subject

# A new law is a function with `@law` above it, in the file of its family: it takes the `Subject`,
# states itself in the first line of its docstring, and calls `same`, `require` or `refuses` for what
# must hold. It is one of every mixer's laws from then on; `tests/test_testing.py` wants a mixer that
# breaks it. A new family is a file in this row.
FAMILIES = (
    _views,
    _causality,
    _padding,
    _broken,
    _timesteps,
    _transformations,
    _precision,
    _building,
    _refusals,
)
LAWS = [entry for family in FAMILIES for entry in vars(family).values() if isinstance(entry, Law)]


def check_mixer(
    make: Callable[[PRNGKeyArray], AbstractSequenceMixer],
    *,
    streams: bool = True,
    takes_timesteps: bool = False,
    gap_is_zero_input: bool = False,
    rounds_the_past: bool = False,
    reference: Callable[[Any, Array], Array] | None = None,
    transition_size: Callable[[Any], Array] | None = None,
    not_drawn: Iterable[str] = (),
    longest: int = 100_000,
    without: Iterable[str] = (),
) -> None:
    r"""Checks a sequence mixer against every law that concerns it.

    Whole, chunks and steps agree, in gradients too; nothing comes from the future or from padding;
    resets separate; transformations, precisions, saving and loading change nothing; what does not
    fit is refused. JAX's settings are the caller's, but for x64: in
    `with jax.numpy_dtype_promotion("strict"):` a type that widens by itself breaks a law.

    **Arguments:**

    - `make`: makes the mixer from a key, of float32 parameters, or float64 where x64 is enabled.
        Make a small one: a few features find what many do, and compiling is most of the work.
    - `streams`: whether it has a cache. If not, it must refuse one.
    - `takes_timesteps`: whether it has a continuous time. If not, it must refuse timesteps.
    - `gap_is_zero_input`: by its equations, a gap of $k$ equals $k$ samples, the last of them the
        input and the others zero.
    - `rounds_the_past`: it transforms all of time at once, by an FFT for example, so that later
        samples move the past by rounding.
    - `reference`: a function of the mixer and the samples, `(time, features)`, that computes the
        output in another way, differentiable by JAX: the definition written out, or the
        convolution with the mixer's kernel.
    - `transition_size`: a function of the mixer that gives the size of its transitions,
        $|\bar A|$, for whatever the input may ask for, if they are promised to be at most one
        however it is trained.
    - `not_drawn`: names of the fields that start at the same numbers for every key.
    - `longest`: the number of samples called a long sequence.
    - `without`: names of laws to leave out. Say why where you do.

    **Raises:**

    `AssertionError` that lists every broken law, with the numbers and where they part.
    `TypeError` if `make` is no such function; `ValueError` for an unknown name in `without`.
    """
    laws = mixer_laws(
        make,
        streams=streams,
        takes_timesteps=takes_timesteps,
        gap_is_zero_input=gap_is_zero_input,
        rounds_the_past=rounds_the_past,
        reference=reference,
        transition_size=transition_size,
        not_drawn=not_drawn,
        longest=longest,
        without=without,
    )
    mixer = make(jr.key(0))  # where this fails, no law is to blame
    if not isinstance(mixer, AbstractSequenceMixer):
        raise TypeError(f"`make` must give an `AbstractSequenceMixer`; got {type(mixer).__name__}.")
    hold(laws)


def mixer_laws(
    make: Callable[[PRNGKeyArray], AbstractSequenceMixer],
    *,
    streams: bool = True,
    takes_timesteps: bool = False,
    gap_is_zero_input: bool = False,
    rounds_the_past: bool = False,
    reference: Callable[[Any, Array], Array] | None = None,
    transition_size: Callable[[Any], Array] | None = None,
    not_drawn: Iterable[str] = (),
    longest: int = 100_000,
    without: Iterable[str] = (),
) -> list[MixerLaw]:
    """The laws that concern a mixer, one by one: for tests of their own.

    They share what they compile, and build the mixer when the first of them is called.

    !!! example

        ```python
        @pytest.mark.parametrize("law", mixer_laws(make), ids=lambda law: law.name)
        def test_law(law):
            law()
        ```

    **Arguments:** those of [`discretax.testing.check_mixer`][].

    **Raises:** as it does, but the laws' own errors.
    """
    if isinstance(make, eqx.Module) or not callable(make):
        raise TypeError(
            "`make` is a function of a key that makes a mixer, such as "
            "`lambda key: LRUSequenceMixer(4, key, state_dim=3)`; got "
            f"{'an instance of ' * isinstance(make, eqx.Module)}{type(make).__name__}."
        )
    without = set(without)
    if unknown := without - {law.name for law in LAWS}:
        known = ", ".join(law.name for law in LAWS)
        raise ValueError(f"`without` names laws, {known}; got {', '.join(sorted(unknown))}.")
    subject = Subject(
        make,
        streams=streams,
        takes_timesteps=takes_timesteps,
        gap_is_zero_input=gap_is_zero_input,
        rounds_the_past=rounds_the_past,
        reference=reference,
        transition_size=transition_size,
        not_drawn=not_drawn,
        longest=longest,
    )
    return [bound for law in LAWS if law.name not in without for bound in law.of(subject)]
