"""Initialisations of recurrences."""

from discretax.init._hippo import (
    Measure as Measure,
    diagonalised_hippo as diagonalised_hippo,
    diagonalised_legs as diagonalised_legs,
    hippo as hippo,
    hippo_legs as hippo_legs,
)
from discretax.init._inverse_softplus import inverse_softplus as inverse_softplus
from discretax.init._ring import ring as ring
from discretax.init._short_convolution import short_convolution as short_convolution
from discretax.init._timescale import (
    log_rate as log_rate,
    log_spaced_step as log_spaced_step,
    log_uniform_step as log_uniform_step,
    step_bias as step_bias,
)
