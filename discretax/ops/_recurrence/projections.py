"""What stands around the scan of a state space model: projection, skip, and the size of its chunks."""

import jax
from jaxtyping import Array, Bool, Int

from discretax._broken import mended
from discretax._features import check_name
from discretax._timeseries import check_length, check_resets
from discretax.ops._checks import check_array
from discretax.ops._recurrence.linear_recurrence import Implementation
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


def check_projected(
    B: Array,
    C: Array,
    D: Array | None,
    x: Array,
    length: Int[Array, ""] | int | None,
    resets: Bool[Array, " time"] | None,
    implementation: Implementation,
) -> tuple[int, int]:
    """Refuses what does not fit between input, planes of the projections and output; time and state."""
    if x.ndim != 2 or C.ndim != 3:
        raise ValueError(
            "`x` must be (time, features) and `C` (out, 2, state); got "
            f"x: {x.shape} and C: {C.shape}. Use `jax.vmap` to batch."
        )
    (time, features), (out, _, state) = x.shape, C.shape
    check_array("x", x, time=time, features=features)
    check_array("B", B, planes=2, state=state, features=features)
    check_array("C", C, out=out, planes=2, state=state)
    check_array("D", D, out=out)
    if D is not None and out != features:
        raise ValueError(
            "`D` skips from as many features to as many outputs; got "
            f"x: {x.shape} and C: {C.shape}."
        )
    check_length(length, time)
    check_resets(resets, time)
    check_name("implementation", implementation, Implementation)
    return time, state
