"""What stands around the scan of a state space model: projection, skip, and the size of its chunks."""

import jax

from discretax._broken import mended
from discretax.ops._scaled import scaled


# Mended again in the backward pass, which so keeps no copy of the samples.
@jax.checkpoint
def project(B, x):
    return mended(x) @ B.T


@jax.checkpoint
def skip(D, x):
    return scaled(mended(x), D, 0)


# On CPU one sequence at once is faster than its chunks, which a batch is not: with 4096 samples of 64
# states, alone 0.7 of their time, eight 1.45 times. So up to 2 MB of states, which is `WHOLE` complex
# numbers, time * state, are taken whole; beyond, chunks need a fraction of the memory. Both ways on
# both sides: "choices" in docs/performance.md. A parallel scan, which is what other devices run,
# wants the whole sequence.
WHOLE = 2**18
CHUNK = 1024


def choose_chunk_size(time: int, state_dim: int) -> int:
    whole = jax.default_backend() != "cpu" or time * state_dim <= WHOLE
    return time if whole else CHUNK
