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
    rates as rates,
    sequence_mixers as sequence_mixers,
    sharding as sharding,
)
from discretax._batched import batched as batched
from discretax._missing import drop_missing as drop_missing, fill_missing as fill_missing
from discretax._padding import bucket_by_length as bucket_by_length, pad as pad
from discretax._sequential import Sequential as Sequential
from discretax._stateful import AbstractStreamingLayer as AbstractStreamingLayer
from discretax._timeseries import Timeseries as Timeseries, map_values as map_values
from discretax.inference import (
    Generated as Generated,
    LiveStep as LiveStep,
    TextState as TextState,
    TokenStream as TokenStream,
    beam_search as beam_search,
    discretized as discretized,
    generate as generate,
    inference_state as inference_state,
    live as live,
    resampled as resampled,
    sample_token as sample_token,
    stream_tokens as stream_tokens,
    streaming_mode as streaming_mode,
)
