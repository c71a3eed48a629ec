"""Initialisations of recurrences."""

from discretax.init._hippo import (
    diagonalised_legs as diagonalised_legs,
    hippo_legs as hippo_legs,
)
from discretax.init._ring import ring as ring
from discretax.init._timescale import log_uniform_step as log_uniform_step
