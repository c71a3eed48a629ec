"""Heads: from the residual stream to the answer."""

from discretax.heads.base import AbstractHead as AbstractHead
from discretax.heads.classification import ClassificationHead as ClassificationHead
from discretax.heads.language_model import LanguageModelHead as LanguageModelHead
from discretax.heads.pooling import Pooling as Pooling
from discretax.heads.regression import RegressionHead as RegressionHead
