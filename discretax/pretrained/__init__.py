"""Weights of published models, read from and written to folders in Hugging Face's layout."""

from discretax.pretrained._checkpoint import load as load, save as save
