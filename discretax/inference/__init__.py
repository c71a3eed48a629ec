"""Running trained models sample by sample or chunk by chunk, and writing text with them."""

from discretax.inference._beam_search import beam_search as beam_search
from discretax.inference._generate import (
    Generated as Generated,
    TokenStream as TokenStream,
    generate as generate,
    stream_tokens as stream_tokens,
)
from discretax.inference._live import LiveStep as LiveStep, live as live
from discretax.inference._resampling import resampled as resampled
from discretax.inference._sampling import sample_token as sample_token
from discretax.inference._streaming import (
    discretized as discretized,
    inference_state as inference_state,
    streaming_mode as streaming_mode,
)
from discretax.inference._text import TextState as TextState
