"""Architectures: models from input to answer, for one kind of task."""

from discretax.architectures.classifier import Classifier as Classifier
from discretax.architectures.language_model import (
    LanguageModel as LanguageModel,
    NextTokenLoss as NextTokenLoss,
)
from discretax.architectures.unet import UNet as UNet
