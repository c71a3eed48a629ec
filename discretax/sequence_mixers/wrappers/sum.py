import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray

from discretax import _drawing as draw
from discretax._constructors import keyed
from discretax._features import (
    check_positive,
    check_samples,
    check_size,
    described,
    made,
    out_features,
)
from discretax._stateful import check_cache
from discretax._types import Length, Resets, Sample, Timesteps, Values
from discretax.sequence_mixers.base import AbstractSequenceMixer, check_sample

Maker = Callable[..., AbstractSequenceMixer]


class SumSequenceMixer(AbstractSequenceMixer[tuple[Any, ...]]):
    r"""Several mixers side by side, whose outputs are summed: $y = \sum_i b_i\, f_i(a_i x)$.

    With a Mamba-2 and attention it is the mixer of Falcon-H1, whose constants $a$ and $b$ are part of
    its design. The cache is a tuple of theirs.

    !!! example

        ```python
        mixer = SumSequenceMixer(
            64,
            key,
            mixers=(Mamba2SequenceMixer, AttentionSequenceMixer),
            out_scales=(0.8, 0.9),
        )
        y, _ = mixer(x)  # x, y: (time, 64)
        ```

    ??? cite

        Zuo et al., Falcon-H1: A Family of Hybrid-Head Language Models, 2025 (arXiv:2507.22448).
    """

    mixers: tuple[AbstractSequenceMixer, ...]
    in_features: int = eqx.field(static=True)
    in_scales: tuple[float, ...] = eqx.field(static=True)
    out_scales: tuple[float, ...] = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ()

    @keyed
    def __init__(
        self,
        in_features: int,
        key: PRNGKeyArray,
        *,
        mixers: Sequence[AbstractSequenceMixer | Maker],
        in_scales: Sequence[float] | None = None,
        out_scales: Sequence[float] | None = None,
    ):
        """**Arguments:**

        - `in_features`: width of the input.
        - `key`: for the initialisation.
        - `mixers`: mixers of that width, or functions `(in_features, *, key)` that make them, with
            outputs of one width.
        - `in_scales`, `out_scales`: $a$ and $b$ above, one number for each mixer; ones if left out.

        **Raises:**

        `ValueError` for no mixers, mixers of another width, or scales that are not as many and
        positive; `TypeError` for what is no mixer.
        """
        in_features = check_size("in_features", in_features)
        if not isinstance(mixers, Sequence) or isinstance(mixers, str) or not mixers:
            raise ValueError(
                "`mixers` must be a sequence of at least one mixer, "
                f"`(Mamba2SequenceMixer, AttentionSequenceMixer)`; got {described(mixers)}."
            )
        self.mixers = tuple(
            made(f"mixers[{i}]", mixer, AbstractSequenceMixer, in_features, key=mixer_key)
            for i, (mixer, mixer_key) in enumerate(
                zip(mixers, draw.split(key, len(mixers)), strict=True)
            )
        )
        for i, mixer in enumerate(self.mixers):
            if mixer.in_features != in_features:
                raise ValueError(
                    f"`mixers[{i}]` must be of width in_features = {in_features}; got "
                    f"{type(mixer).__name__} of width {mixer.in_features}."
                )
            if any(mixer is other for other in self.mixers[:i]):
                raise ValueError(
                    f"`mixers[{i}]` is one of the mixers before it, whose parameters training would "
                    "part. Make each with a key of its own."
                )
        widths = [out_features(mixer, in_features) for mixer in self.mixers]
        if len(set(widths)) > 1:
            raise ValueError(f"`mixers` must put out one width, to be summed; got {widths}.")
        self.in_features = in_features
        self.in_scales = _scales("in_scales", in_scales, len(mixers))
        self.out_scales = _scales("out_scales", out_scales, len(mixers))

    def allocate_inference_cache(
        self, batch_size: int | None = None, max_seqlen: int = 1, dtype: Any = None
    ) -> tuple[Any, ...]:
        return tuple(
            mixer.allocate_inference_cache(batch_size, max_seqlen, dtype) for mixer in self.mixers
        )

    def __call__(
        self,
        x: Values,
        cache: tuple[Any, ...] | None = None,
        *,
        integration_timesteps: Timesteps | None = None,
        length: Length | None = None,
        resets: Resets | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Values, tuple[Any, ...]]:
        check_samples(self, x, self.in_features)
        keys = (None,) * len(self.mixers) if key is None else jr.split(key, len(self.mixers))
        return self._summed(
            lambda i, x, cache: self.mixers[i](
                x,
                cache,
                integration_timesteps=integration_timesteps,
                length=length,
                resets=resets,
                key=keys[i],
            ),
            x,
            cache,
        )

    def step(
        self, x: Sample, cache: tuple[Any, ...], *, integration_timestep: Any | None = None
    ) -> tuple[Sample, tuple[Any, ...]]:
        check_sample(self, x)
        return self._summed(
            lambda i, x, cache: self.mixers[i].step(
                x, cache, integration_timestep=integration_timestep
            ),
            x,
            cache,
        )

    def _summed(self, mix, x, cache):
        if cache is None:
            cache = (None,) * len(self.mixers)
        elif not isinstance(cache, tuple) or len(cache) != len(self.mixers):
            check_cache(self, cache, self.allocate_inference_cache())
        ys, caches = zip(
            *(mix(i, self.in_scales[i] * x, part) for i, part in enumerate(cache)),
            strict=True,
        )
        scaled = [b * y for b, y in zip(self.out_scales, ys, strict=True)]
        return ft.reduce(operator.add, scaled), caches


def _scales(name: str, scales: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if scales is None:
        return (1.0,) * count
    numbers = np.asarray(scales)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.number):
        raise ValueError(f"`{name}` must be one number for each of {count} mixers; got {scales!r}.")
    for i, scale in enumerate(numbers.tolist()):
        check_positive(f"{name}[{i}]", scale)
    return tuple(map(float, numbers))
