"""Encoders: from raw samples to the width of the model."""

from discretax.encoder.base import AbstractEncoder as AbstractEncoder
from discretax.encoder.embedding import EmbeddingEncoder as EmbeddingEncoder
from discretax.encoder.linear import LinearEncoder as LinearEncoder
from discretax.encoder.patches import PatchEncoder as PatchEncoder
