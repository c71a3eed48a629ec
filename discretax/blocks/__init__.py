"""Residual blocks around sequence mixers."""

from discretax.blocks._batch_norm import BatchNorm as BatchNorm
from discretax.blocks._offset_rms_norm import OffsetRMSNorm as OffsetRMSNorm
from discretax.blocks.base import AbstractBlock as AbstractBlock
from discretax.blocks.residual import ResidualBlock as ResidualBlock
from discretax.blocks.rwkv7 import RWKV7Block as RWKV7Block
from discretax.blocks.standard import StandardBlock as StandardBlock
