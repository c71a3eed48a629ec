import math
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from discretax.sequence_mixers import (
    AbstractContinuousMixer,
    AbstractSequenceMixer,
    Discretized,
    S5SequenceMixer,
)

Model = TypeVar("Model", bound=PyTree)


def resampled(model: Model, rate: float) -> Model:
    """The model for signals sampled at `rate` times the rate that it was trained at.

    A mixer in continuous time has learned a differential equation and a step to sample it with.
    `resampled(model, 0.5)` doubles every step, for half as many samples per second; the answers at
    the same times stay the same, up to what the samples in between would have told. (With
    `"dirac"`, each sample is an impulse of its own: then only the decay between samples changes.)
    Parameters, caches and states are left as they are. Resampling composes:
    `resampled(resampled(model, 2), 0.5)` is `model`.

    A model that is given timesteps does not need this: state them in the intervals of training.

    **Arguments:**

    - `model`: any PyTree of layers, a single mixer included. What a wrapper such as
        [`discretax.sequence_mixers.Bidirectional`][] wraps is resampled within it.
    - `rate`: the new sampling rate divided by that of training.

    **Raises:**

    `ValueError` for a rate that is not positive, and for a model that holds a mixer without
    continuous time, or one that was already [`discretax.discretized`][].
    """
    if not 0 < rate < math.inf:
        raise ValueError(
            "`rate`, the new sampling rate divided by that of training, must be positive; got "
            f"{rate}."
        )
    steps = lambda tree: [_continuous(mixer).step_rescale for mixer in _innermost_mixers(tree)]
    rescaled = lambda step_rescale: step_rescale / float(rate)
    return eqx.tree_at(steps, model, replace_fn=rescaled) if steps(model) else model


def _innermost_mixers(tree: PyTree) -> list[AbstractSequenceMixer]:
    """The mixers that wrap no other mixer; a `Discretized` one hides what it wraps."""
    if isinstance(tree, Discretized):
        return [tree]
    within = lambda node: node is not tree and isinstance(node, AbstractSequenceMixer)
    nodes = [node for node in jax.tree.leaves(tree, is_leaf=within) if within(node)]
    if not nodes and isinstance(tree, AbstractSequenceMixer):
        return [tree]
    return [mixer for node in nodes for mixer in _innermost_mixers(node)]


def _continuous(mixer: AbstractSequenceMixer) -> AbstractContinuousMixer:
    if isinstance(mixer, Discretized):
        raise ValueError(
            f"the model is discretized: the matrices of its `{type(mixer.mixer).__name__}` are "
            "those of one sampling rate. Resample first: `discretized(resampled(model, rate))`."
        )
    name = type(mixer).__name__
    if isinstance(mixer, S5SequenceMixer) and mixer.discretization == "no_discretization":
        name = f'{name}(discretization="no_discretization")'
    elif isinstance(mixer, AbstractContinuousMixer):
        return mixer
    raise ValueError(
        f"`{name}` has no continuous time: what it has learned holds for one sampling rate. Train "
        "a model of `AbstractContinuousMixer`s, such as S5, or resample the signal."
    )
