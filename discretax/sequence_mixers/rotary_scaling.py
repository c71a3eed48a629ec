r"""How rotary positions are stretched, so that a model reads longer texts than it was trained on.

Each is a function of the frequencies $f_i = \theta^{-2i/r}$ of all pairs, in radians per sample, and
of the base $\theta$; queries and keys are multiplied by its `magnitude`. It is an option of
[`discretax.sequence_mixers.AttentionSequenceMixer`][]. The names are those of published configurations
(`rope_type`).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Linear(NamedTuple):
    r"""$f / \mathrm{factor}$: positions lie closer (arXiv:2306.15595)."""

    factor: float
    magnitude = 1.0

    def __call__(
        self, frequencies: Float[np.ndarray, " pairs"], base: float
    ) -> Float[np.ndarray, " pairs"]:
        del base
        return frequencies / self.factor


class Llama3(NamedTuple):
    r"""Frequencies that turn less than `low_freq_factor` times over the original length are divided
    by the factor, those that turn more than `high_freq_factor` times are kept, others are between
    (arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    magnitude = 1.0

    def __call__(
        self, frequencies: Float[np.ndarray, " pairs"], base: float
    ) -> Float[np.ndarray, " pairs"]:
        del base
        turns = self.original_length * frequencies / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


class Yarn(NamedTuple):
    r"""As Llama 3's, along a ramp over the pairs, and scores are multiplied by
    `attention_factor` squared, $0.1 \ln(\mathrm{factor}) + 1$ if left out (arXiv:2309.00071)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __call__(
        self, frequencies: Float[np.ndarray, " pairs"], base: float
    ) -> Float[np.ndarray, " pairs"]:
        pairs = len(frequencies)
        pair_of = lambda turns: (
            pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
        )
        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high = min(math.ceil(pair_of(self.beta_slow)), 2 * pairs - 1)
        divided = np.clip((np.arange(pairs) - low) / max(high - low, 1e-3), 0, 1)
        return frequencies * (1 - divided + divided / self.factor)

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


class Proportional(NamedTuple):
    r"""Of the whole head's pairs only the first part turns, `fraction` of them; the others stay."""

    fraction: float
    magnitude = 1.0

    def __call__(
        self, frequencies: Float[np.ndarray, " pairs"], base: float
    ) -> Float[np.ndarray, " pairs"]:
        del base
        return np.where(
            np.arange(len(frequencies)) < int(self.fraction * len(frequencies)), frequencies, 0.0
        )


RotaryScaling = Linear | Llama3 | Yarn | Proportional


def check_scaling(scaling: RotaryScaling, base: float) -> None:
    """Refuses numbers that stretch nothing: what is read would be no error, and nonsense."""
    for name, value in scaling._asdict().items():
        if name == "attention_factor" and value is None:
            continue
        is_number = isinstance(value, int | float | np.floating) and value is not True
        if not is_number or not 0 < float(value) < math.inf:
            raise ValueError(
                f"`{name}` of `{type(scaling).__name__}` must be a positive number; got {value!r}."
            )
    if isinstance(scaling, Llama3) and not scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(
            "`high_freq_factor` of `Llama3` must be above its `low_freq_factor`; got "
            f"{scaling.high_freq_factor} and {scaling.low_freq_factor}."
        )
    if isinstance(scaling, Proportional) and scaling.fraction > 1:
        raise ValueError(f"`fraction` of `Proportional` must be at most 1; got {scaling.fraction}.")
    if isinstance(scaling, Yarn) and not base > 1:
        raise ValueError(f"`rotary_base` must be above 1 with `Yarn`; got {base}.")
