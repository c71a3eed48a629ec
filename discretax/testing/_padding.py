"""4. The length ends a sequence, a reset begins another."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from discretax.testing._compare import at, same
from discretax.testing._law import law
from discretax.testing._subject import RESETS, TIME, Gradients, Outcome, Subject, call, weights

TIMES = np.arange(TIME)


def uniform_gaps(x):
    return np.random.default_rng(3).uniform(size=TIME).astype(x.dtype)


def padded(subject, x, length):
    """Samples and options of which those from `length` on are broken, and the options up to there."""
    options = {}
    if subject.takes_timesteps:
        gaps = np.where(length > TIMES, uniform_gaps(x), np.resize([np.nan, np.inf, -1e4], TIME))
        options = {"integration_timesteps": gaps.astype(x.dtype)}
    cut = {name: value[:length] for name, value in options.items()}
    return np.where(TIMES[:, None] < length, x, np.nan).astype(x.dtype), options, cut


@law(variants=[0, 1, 5, TIME])
def length_ends_the_sequence(subject: Subject, length: int):
    """Samples past the length, though NaN, change neither valid outputs nor the cache."""
    mixer, x = subject.single()
    cache = subject.used_cache()
    with_nan, options, cut = padded(subject, x, length)
    y, final = subject.run(mixer, with_nan, cache, length=jnp.asarray(length), **options)
    if length == 0:
        same(Outcome(None, final), Outcome(None, cache), 0, of="length 0", to="no call")
        return
    expected = subject.run(mixer, x[:length], cache, **cut)
    valid = Outcome(at(y, slice(length)), final)
    same(valid, expected, of=f"length {length} of {TIME} samples", to=f"those {length} alone")
    if subject.streams and length == 5:  # a static length takes the same route or another
        static = subject.run(mixer, with_nan, cache, length=length, **options).cache
        pair = Outcome(None, static), Outcome(None, final)
        same(*pair, of="a length known to `jax.jit`", to="a traced one")


@law()
def length_ends_the_gradients(subject: Subject):
    """Samples past the length, though NaN, change no gradient."""
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        dy, dcache = weights(Outcome(x, cache))
        with_nan, options, cut = padded(subject, x, 5)
        cotangent = Outcome(dy * (TIMES[:, None] < 5), dcache)
        arguments = call, cotangent, mixer, with_nan, cache
        dmixer, dx, dbefore = subject.pull(*arguments, length=jnp.asarray(5), **options).gradients
        alone = subject.pull(call, Outcome(dy[:5], dcache), mixer, x[:5], cache, **cut).gradients
        gradients = Gradients(dmixer, at(dx, slice(5)), dbefore)
        same(gradients, alone, 1e-12, of=f"length 5 of {TIME} samples", to="those 5 alone")


@law()
def padded_batch_is_single_runs(subject: Subject):
    """Sequences of several lengths, padded and mapped over, are each as alone."""
    mixer, _ = subject.single()
    batch = subject.draw(3, TIME, seed=1)
    lengths = [TIME, 5, 1]
    cache = subject.empty_cache(mixer)
    y, final = eqx.filter_jit(jax.vmap(lambda x, length: call(mixer, x, cache, length=length)))(
        batch, np.array(lengths, np.int32)
    )
    for i, length in enumerate(lengths):
        valid = Outcome(at(y, (i, slice(length))), at(final, i))
        alone = subject.run(mixer, batch[i, :length], cache)
        same(valid, alone, of=f"a row of length {length}, batched", to="it alone")


@law(variants=[(0,), RESETS, (5, 6, 7, 12)])
def resets_are_separate_runs(subject: Subject, starts: tuple[int, ...]):
    """Where `resets` is True, the state before is zero: each piece is as if run alone."""
    mixer, x = subject.single()
    cache = subject.used_cache()
    together = subject.run(mixer, x, cache, resets=np.isin(TIMES, starts))
    alone = pieces_alone(subject, starts)
    same(alone, together, of="each piece alone", to=f"the whole with resets at {starts}")


@law(lambda subject: subject.takes_timesteps)
def resets_begin_with_their_own_timestep(subject: Subject):
    """With timesteps too each piece is as if run alone: the gap at a reset is not of the one before."""
    mixer, x = subject.single()
    gaps = uniform_gaps(x)
    resets = np.isin(TIMES, RESETS)
    cache = subject.used_cache()
    together = subject.run(mixer, x, cache, resets=resets, integration_timesteps=gaps)
    alone = pieces_alone(subject, RESETS, gaps)
    same(alone, together, of="each piece alone", to=f"the whole with resets at {RESETS}")


def pieces_alone(subject, starts, gaps=None):
    """The piece before each start from the used cache, those behind from the empty one."""
    mixer, x = subject.single()
    cache, outputs = subject.used_cache(), []
    for start, end in itertools.pairwise(sorted({0, *starts, TIME})):
        if start in starts:
            cache = subject.empty_cache(mixer)
        options = {} if gaps is None else {"integration_timesteps": gaps[start:end]}
        y, cache = subject.run(mixer, x[start:end], cache, **options)
        outputs.append(y)
    return Outcome(np.concatenate(outputs), cache)


@law()
def resets_gradients(subject: Subject):
    """Gradients with resets are those of each piece alone."""
    with jax.enable_x64(True):
        mixer, x, cache = subject.double()
        arguments = weights(Outcome(x, cache)), mixer, x, cache
        together = subject.pull(call, *arguments, resets=np.isin(TIMES, RESETS))
        alone = subject.pull_pieces(*arguments, RESETS, RESETS)
        same(together, alone, 1e-12, of=f"resets at {RESETS}", to="each piece alone")
