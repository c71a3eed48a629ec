"""4. A sample that is not finite is seen from where it stands on, until a reset."""

import jax
import numpy as np

from discretax.testing._compare import at, require, same
from discretax.testing._law import law
from discretax.testing._subject import CUTS, TIME, Gradients, Outcome, Subject, call, weights, zeros

TIMES = np.arange(TIME)
NOW, RESET = 6, 8
streaming = lambda subject: subject.streams


def broken(x: np.ndarray, time: int = NOW, value: float = np.nan) -> np.ndarray:
    """In one of its features."""
    x = x.copy()
    x[time, 0] = value
    return x


@law(streaming, {"nan": (np.nan,), "inf": (np.inf,)})
def a_broken_sample_is_causal(subject: Subject, value: float):
    """What comes before a sample that is not finite, outputs and gradients, is as with a fine one."""
    mixer, x = subject.single()
    cache = subject.used_cache()
    y, expected = (subject.run(mixer, u, cache).output for u in (broken(x, value=value), x))
    past, fine = (Outcome(at(output, slice(NOW)), None) for output in (y, expected))
    same(past, fine, of=f"before a sample of {value}", to="before a fine one")
    seen = not np.isfinite(y[NOW]).all()
    require(seen, f"a sample of {value} at time {NOW} gives an output that is finite")

    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        cotangent = Outcome(np.where(TIMES[:, None] < NOW, weights(x), 0), zeros(cache))
        gradients, expected = (
            subject.pull(call, cotangent, mixer, u, cache).gradients
            for u in (broken(x, value=value), x)
        )
        to = "before a fine one"
        same(
            gradients, expected, 1e-12, of=f"gradients of what is before a sample of {value}", to=to
        )


@law(streaming, ["chunks", "steps"])
def a_broken_sample_in_pieces(subject: Subject, view: str):
    """After a sample that is not finite, those outputs of chunks and steps are finite that are in the whole."""
    mixer, x = subject.single()
    for value in (np.nan, np.inf):
        with_broken, cache, ys = broken(x, 2, value), subject.used_cache(), []
        whole = np.isfinite(subject.run(mixer, with_broken, cache).output)
        for piece in np.split(with_broken, CUTS) if view == "chunks" else with_broken:
            y, cache = (subject.run if view == "chunks" else subject.step)(mixer, piece, cache)
            ys.append(np.atleast_2d(y))
        pieces = np.isfinite(np.concatenate(ys))
        apart = (pieces != whole).any(axis=1)
        require(
            not apart.any(),
            f"a sample of {value} at time 2: in {view} and in the whole, other features are finite "
            f"at time {np.flatnonzero(apart)[:1]}",
        )


@law()
def nan_before_a_reset_does_not_leak(subject: Subject):
    """A state of NaN ends at a reset: it is selected, not multiplied. So do its gradients."""
    mixer, x = subject.single()
    cache = subject.empty_cache(mixer)
    resets = TIMES == RESET
    found = f"what follows a NaN at {NOW} and a reset at {RESET}"
    y, final = subject.run(mixer, broken(x), cache, resets=resets)
    alone = subject.run(mixer, x[RESET:], cache)
    same(Outcome(at(y, slice(RESET, None)), final), alone, of=found, to="it alone")

    with jax.enable_x64(True):
        mixer, x, _ = subject.double()
        cache = subject.empty_cache(mixer)
        dy, dcache = weights(Outcome(x, cache))
        behind = Outcome(np.where(TIMES[:, None] < RESET, 0, dy), dcache)
        gradients = subject.pull(call, behind, mixer, broken(x), cache, resets=resets).gradients
        cotangent = Outcome(dy[RESET:], dcache)
        alone = subject.pull(call, cotangent, mixer, x[RESET:], cache).gradients
        before = np.zeros((RESET, *x.shape[1:]), x.dtype)
        dempty = subject.pull_empty_cache(mixer, alone.cache)
        dmixer = jax.tree.map(np.add, alone.mixer, dempty)
        expected = Gradients(dmixer, np.concatenate([before, alone.samples]), zeros(cache))
        same(gradients, expected, 1e-12, of=f"gradients of {found}", to="those of it alone")
