"""Pure array functions: recurrences and discretisations. They know no layer."""

from discretax.ops._convolution.fft import (
    fft_convolution as fft_convolution,
    matrix_convolution as matrix_convolution,
    projected_convolution as projected_convolution,
)
from discretax.ops._convolution.short import (
    depthwise_convolution as depthwise_convolution,
    token_shift as token_shift,
)
from discretax.ops._cross_entropy import chunked_cross_entropy as chunked_cross_entropy
from discretax.ops._depthwise_ssm.depthwise_ssm import (
    Route as Route,
    depthwise_kernel as depthwise_kernel,
    depthwise_ssm as depthwise_ssm,
)
from discretax.ops._depthwise_ssm.transition import Transition as Transition
from discretax.ops._discretization import (
    asynchronous as asynchronous,
    bilinear as bilinear,
    dirac as dirac,
    zoh as zoh,
)
from discretax.ops._matrix_state.delta_rule import delta_rule as delta_rule
from discretax.ops._matrix_state.gated_linear_attention import (
    gated_linear_attention as gated_linear_attention,
)
from discretax.ops._matrix_state.mlstm import mlstm as mlstm
from discretax.ops._matrix_state.ssd import ssd as ssd
from discretax.ops._matrix_state.trapezoidal import (
    TrapezoidalState as TrapezoidalState,
    trapezoidal_ssd as trapezoidal_ssd,
)
from discretax.ops._phase import cumulative_phase as cumulative_phase
from discretax.ops._recurrence.diagonal_ssm import diagonal_ssm as diagonal_ssm
from discretax.ops._recurrence.linear_recurrence import linear_recurrence as linear_recurrence
from discretax.ops._recurrence.oscillator_ssm import oscillator_ssm as oscillator_ssm
from discretax.ops._running.dispatch import without_kernels as without_kernels
from discretax.ops._selective_scan.selective_scan import selective_scan as selective_scan
