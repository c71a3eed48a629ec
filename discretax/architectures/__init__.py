"""Architectures: models from input to answer, for one kind of task."""

from discretax.architectures.language_model import (
    LanguageModel as LanguageModel,
    NextTokenLoss as NextTokenLoss,
)
