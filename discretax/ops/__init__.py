"""Pure array functions: recurrences and discretisations. They know no layer."""

from discretax.ops._diagonal_ssm import diagonal_ssm as diagonal_ssm
from discretax.ops._discretization import (
    asynchronous as asynchronous,
    bilinear as bilinear,
    dirac as dirac,
    zoh as zoh,
)
from discretax.ops._linear_recurrence import linear_recurrence as linear_recurrence
