"""Running trained models sample by sample or chunk by chunk."""

from discretax.inference._resampling import resampled as resampled
from discretax.inference._streaming import (
    discretized as discretized,
    inference_state as inference_state,
    streaming_mode as streaming_mode,
)
