"""The mixer that is tested, and what its laws share: each way to run it is compiled once."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from discretax.sequence_mixers import AbstractSequenceMixer
from discretax.testing._compare import kind, path_of, require

TIME = 13
# Lengths of pieces, here and below, are 0, 1 and 5: each is compiled once for a mixer.
CUTS = (5, 5, 6, 7, 8)
RESETS = (1, 2, 7, 8)
RAISED_BY = "raised by "  # begins the note on an error of the mixer


class Outcome(NamedTuple):
    output: Any
    cache: Any


class Gradients(NamedTuple):
    mixer: Any
    samples: Any
    cache: Any


class Pulled(NamedTuple):
    outcome: Outcome
    gradients: Gradients


class Subject:
    """A mixer under test. Its options are those of [`discretax.testing.check_mixer`][]."""

    def __init__(
        self,
        make: Callable[[PRNGKeyArray], AbstractSequenceMixer],
        *,
        streams: bool,
        takes_timesteps: bool,
        gap_is_zero_input: bool,
        rounds_the_past: bool,
        reference: Callable[[Any, Array], Array] | None,
        transition_size: Callable[[Any], Array] | None,
        not_drawn: Iterable[str],
        longest: int,
    ):
        self.make = make
        self.streams = streams
        self.takes_timesteps = takes_timesteps
        self.gap_is_zero_input = gap_is_zero_input
        self.rounds_the_past = rounds_the_past
        self.reference = reference
        self.transition_size = transition_size
        self.not_drawn = tuple(not_drawn)
        self.longest = longest
        # Of this subject alone: what they compile is forgotten with it.
        self.run = eqx.filter_jit(call)
        self.step = eqx.filter_jit(take_step)
        self.pull = eqx.filter_jit(_pull)
        self._made = {}
        self._used = {}

    def precision(self) -> contextlib.AbstractContextManager:
        return jax.enable_x64(False)

    def made(self, seed: int = 0, double: bool = False) -> tuple[Any, np.ndarray]:
        if (seed, double) not in self._made:
            with jax.enable_x64(double):
                mixer_key, x_key = jr.split(jr.key(seed))
                mixer = self.make(mixer_key)
                if not isinstance(mixer, AbstractSequenceMixer):
                    raise TypeError(
                        f"`make` must give an `AbstractSequenceMixer`; got {type(mixer).__name__}."
                    )
                x = np.asarray(jr.normal(x_key, (TIME, mixer.in_features)))
            self._made[seed, double] = mixer, x
        return self._made[seed, double]

    def single(self) -> tuple[Any, np.ndarray]:
        """The mixer, and samples."""
        return self.made()

    def double(self) -> tuple[Any, np.ndarray, PyTree]:
        """The mixer in double precision, samples, and the cache that earlier ones left."""
        return *self.made(double=True), self.used_cache(double=True)

    def draw(self, *shape: int, seed: int) -> np.ndarray:
        """Normal numbers, from numpy: neither they nor their slices compile anything."""
        features = self.single()[0].in_features
        values = np.random.default_rng(seed).normal(size=(*shape, features))
        return values.astype(jnp.zeros(0).dtype)

    def empty_cache(self, mixer: Any) -> PyTree:
        """None where nothing streams.

        Of one size for every length that the laws run, where a cache grows with time.
        """
        return allocate(mixer, max_seqlen=2 * TIME) if self.streams else None

    def used_cache(self, double: bool = False) -> PyTree:
        """As earlier samples left it; None where nothing streams."""
        if not self.streams:
            return None
        if double not in self._used:
            with jax.enable_x64(False):
                mixer, _ = self.single()
                cache = self.run(mixer, self.draw(5, seed=7), self.empty_cache(mixer)).cache
            with jax.enable_x64(double):
                like = self.empty_cache(self.made(double=double)[0])
                self._used[double] = jax.tree.map(
                    lambda leaf, like: jnp.asarray(np.asarray(leaf), like.dtype), cache, like
                )
        return self._used[double]

    def pull_empty_cache(self, mixer: Any, dcache: PyTree) -> PyTree:
        """What the empty cache's product with a cotangent gives the mixer, which may have learned it."""
        if not jax.tree.leaves(floats(dcache)):
            return zeros(mixer)
        product = lambda mixer: dot(self.empty_cache(mixer), dcache)
        return jax.tree.map(np.asarray, eqx.filter_grad(product)(mixer))

    def pull_pieces(
        self,
        cotangent: Outcome,
        mixer: Any,
        x: np.ndarray,
        cache: PyTree,
        cuts: tuple[int, ...],
        fresh: tuple[int, ...] = (),
    ) -> Pulled:
        """As `pull`, one piece after the other and back again by the chain rule.

        Pieces that begin at a time in `fresh` start from the empty cache.
        """
        dy, dcache = cotangent
        edges = list(itertools.pairwise((0, *cuts, len(x))))
        ys, before = [], []
        for start, end in edges:
            if start in fresh:
                cache = self.empty_cache(mixer)
            before.append(cache)
            piece = Outcome(dy[start:end], dcache)
            (y, cache), _ = self.pull(call, piece, mixer, x[start:end], cache)
            ys.append(y)
        dmixer, dxs = zeros(mixer), []
        for (start, end), earlier in zip(reversed(edges), reversed(before), strict=True):
            piece = Outcome(dy[start:end], dcache)
            _, (dpiece, dx, dcache) = self.pull(call, piece, mixer, x[start:end], earlier)
            dmixer = jax.tree.map(np.add, dmixer, dpiece)
            dxs.append(dx)
            if start in fresh:
                dmixer = jax.tree.map(np.add, dmixer, self.pull_empty_cache(mixer, dcache))
                dcache = zeros(dcache)
        gradients = Gradients(dmixer, np.concatenate(dxs[::-1]), dcache)
        return Pulled(Outcome(np.concatenate(ys), cache), gradients)


def call(mixer: Any, x: Any, cache: PyTree = None, **options: Any) -> Outcome:
    """The mixer's call; what it gives back is of the kind of what it was given."""
    described = ", ".join(f"{name}={_kind(value)}" for name, value in options.items())
    how = f"mixer({_kind(x)}{'' if cache is None else ', cache'}{described and ', '}{described})"
    with _noting(how, x):
        result = mixer(x, cache, **options)
    return _fitting(how, result, x, cache)


def take_step(mixer: Any, x: Any, cache: PyTree, **options: Any) -> Outcome:
    described = "".join(f", {name}={_kind(value)}" for name, value in options.items())
    how = f"mixer.step({_kind(x)}, cache{described})"
    with _noting(how, x):
        result = mixer.step(x, cache, **options)
    return _fitting(how, result, x, cache)


def allocate(mixer: Any, **options: Any) -> PyTree:
    described = ", ".join(f"{name}={value}" for name, value in options.items())
    with _noting(f"mixer.allocate_inference_cache({described})", None):
        cache = mixer.allocate_inference_cache(**options)
    for path, leaf in parameters(cache).items():
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        require(real, f"cache.{path} is {kind(leaf)}: keep real and imaginary part, not complex")
    return cache


def in_steps(mixer: Any, x: Array, cache: PyTree) -> Outcome:
    def body(cache, sample):
        y, cache = take_step(mixer, sample, cache)
        return cache, y

    cache, y = jax.lax.scan(body, cache, x)
    return Outcome(y, cache)


def _pull(
    view: Callable[..., Outcome],
    cotangent: Outcome,
    mixer: Any,
    x: Any,
    cache: PyTree = None,
    **options: Any,
) -> Pulled:
    """What `view` gives, and what its product with `cotangent` gives mixer, samples and cache."""

    def product(arguments):
        outcome = view(*arguments, **options)
        return dot(outcome, cotangent), outcome

    differentiate = eqx.filter_value_and_grad(product, has_aux=True)
    (_, outcome), gradients = differentiate(Gradients(mixer, x, cache))
    return Pulled(outcome, gradients)


def floats(tree: PyTree) -> PyTree:
    return eqx.filter(tree, eqx.is_inexact_array)


def parameters(tree: PyTree) -> dict[str, Array]:
    """Every floating array of `tree`, by its path."""
    leaves, _ = jax.tree.flatten_with_path(floats(tree))
    return {path_of(keys): leaf for keys, leaf in leaves}


def zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(np.zeros_like, floats(tree))


def weights(tree: PyTree) -> PyTree:
    """Another for every entry of every floating leaf."""
    leaves, structure = jax.tree.flatten(floats(tree))
    return jax.tree.unflatten(
        structure,
        [
            np.cos(np.arange(leaf.size) + i).reshape(leaf.shape).astype(leaf.dtype)
            for i, leaf in enumerate(leaves)
        ],
    )


def dot(a: PyTree, b: PyTree) -> Array:
    products = jax.tree.map(jnp.vdot, jax.tree.leaves(floats(a)), jax.tree.leaves(floats(b)))
    return jnp.stack(products).sum()


@contextlib.contextmanager
def _noting(how: str, x: Any) -> Iterator[None]:
    """An error of the mixer says how the law called it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{RAISED_BY}{how}{', traced' if isinstance(x, Tracer) else ''}")
        raise


def _fitting(how: str, result: Any, x: Any, cache: PyTree) -> Outcome:
    require(
        isinstance(result, tuple) and len(result) == 2,
        f"{how} gives back (output, cache); got {type(result).__name__}",
    )
    y, after = result
    require(
        eqx.is_array(y) and kind(y) == kind(x),
        f"{how} gives back an output of the kind of the samples; got {_kind(y)}",
    )
    if cache is not None:
        before, after_kinds = (jax.tree.map(_kind, tree) for tree in (cache, after))
        require(
            before == after_kinds,
            f"{how} gives back a cache of the kind that it was given, {before}; got {after_kinds}",
        )
    return Outcome(y, after)


def _kind(value: Any) -> str:
    return kind(value) if hasattr(value, "dtype") else repr(value)
