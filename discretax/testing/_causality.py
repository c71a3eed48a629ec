"""3. What is to come has no effect. (2. is up to the mixer's author: see `reference`.)"""

import jax
import numpy as np

from discretax.testing._compare import require
from discretax.testing._law import law
from discretax.testing._subject import TIME, Outcome, Subject, call, weights, zeros

NOW = 6


@law(lambda subject: subject.streams)
def causal(subject: Subject):
    """An output does not move when later samples do, nor does its gradient reach them."""
    mixer, x = subject.single()
    after = np.arange(TIME)[:, None] > NOW
    y, _ = subject.run(mixer, x)
    moved, _ = subject.run(mixer, x + 100 * after.astype(x.dtype))
    difference = np.abs(np.asarray(moved) - np.asarray(y))
    rounding = 1e-6 if subject.rounds_the_past else 0.0
    allowed = rounding * np.abs(moved).max()
    past, future = difference[: NOW + 1], difference[NOW + 1 :].max(axis=1)
    require(
        past.max() <= allowed,
        f"100 added to the samples after time {NOW} moves the output at time "
        f"{past.max(axis=1).argmax()} by {past.max():.3g}; allowed {allowed:.3g}",
    )
    require(
        future.min() > 0.1,
        f"100 added to the samples after time {NOW} moves the output at time "
        f"{NOW + 1 + future.argmin()} by {future.min():.3g} only; above 0.1 is due",
    )

    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        cotangent = Outcome(np.where(after, 0, weights(x)), zeros(cache))
        gradient = np.abs(subject.pull(call, cotangent, mixer, x, cache).gradients.samples)
    past, future = gradient[: NOW + 1], gradient[NOW + 1 :]
    allowed = rounding * gradient.max()
    require(
        future.max() <= allowed,
        f"the outputs up to time {NOW} have a gradient in the sample at time "
        f"{NOW + 1 + future.max(axis=1).argmax()}: {future.max():.3g}; allowed {allowed:.3g}",
    )
    require(
        (past != 0).all(),
        f"the outputs up to time {NOW} have no gradient in the sample at time "
        f"{past.min(axis=1).argmin()}",
    )
