"""Linear recurrent sequence models for JAX and Equinox."""

__version__ = "0.2.0"

from discretax import (
    architectures as architectures,
    blocks as blocks,
    channel_mixers as channel_mixers,
    encoder as encoder,
    heads as heads,
    inference as inference,
    init as init,
    inspection as inspection,
    models as models,
    ops as ops,
    optim as optim,
    pretrained as pretrained,
    sequence_mixers as sequence_mixers,
    sharding as sharding,
)
from discretax._timeseries import Timeseries as Timeseries
from discretax.inference import (
    Generated as Generated,
    discretized as discretized,
    generate as generate,
    inference_state as inference_state,
    resampled as resampled,
    sample_token as sample_token,
    stream_tokens as stream_tokens,
    streaming_mode as streaming_mode,
)
