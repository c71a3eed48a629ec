"""Rates: fewer samples for the layers that follow, and as many as before again."""

from discretax.rates.downsample import Downsample as Downsample
from discretax.rates.upsample import Upsample as Upsample
