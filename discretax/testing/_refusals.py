"""What a caller may get wrong is refused with a `ValueError` that says what was received."""

import jax
import jax.numpy as jnp
import numpy as np

from discretax.testing._compare import refuses, require
from discretax.testing._law import law
from discretax.testing._subject import Subject, call

_same = lambda x: x
# What becomes of good samples, the options, and what the error says that it received.
UNFIT = {
    "one sample": (lambda x: x[0], {}, "({features},)"),
    "a batch": (lambda x: jnp.stack([x, x]), {}, "(2, 13, {features})"),
    "too wide": (lambda x: jnp.pad(x, ((0, 0), (0, 1))), {}, "(13, {wider})"),
    "whole numbers": (lambda x: x.astype(int), {}, "int32"),
    "length below 0": (_same, {"length": -1}, "-1"),
    "length beyond": (_same, {"length": 14}, "14"),
    "length not whole": (_same, {"length": 2.0}, "float"),
    "lengths": (_same, {"length": np.ones(3, np.int32)}, "(3,)"),
    "short resets": (_same, {"resets": np.zeros(12, bool)}, "(12,)"),
    "floating resets": (_same, {"resets": np.zeros(13, np.float32)}, "float32"),
    "short timesteps": (_same, {"integration_timesteps": np.ones(12, np.float32)}, "(12,)"),
    "negative timesteps": (_same, {"integration_timesteps": -np.ones(13, np.float32)}, "-1.0"),
}


@law(variants=UNFIT)
def unfit_input_is_refused(subject: Subject, change, options, received):
    """Samples and options that do not fit are refused, outside `jax.jit` by their values too."""
    mixer, x = subject.single()
    x, options = unfit_call(x, change, options)
    if "integration_timesteps" in options and not subject.takes_timesteps:
        received = ""  # it may refuse them as such
    features = mixer.in_features
    received = received.format(features=features, wider=features + 1)
    described = "".join(f", {name}={value}" for name, value in options.items())
    refuses(lambda: mixer(x, **options), f"mixer({x.dtype}{x.shape}{described})", received)


def unfit_call(x, change, options):
    arrays = {
        name: jnp.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    return change(jnp.asarray(x)), arrays


@law(lambda subject: subject.streams)
def unfit_cache_is_refused(subject: Subject):
    """A batched cache without `jax.vmap`, several samples in a step, a batch of none: refused."""
    mixer, x = subject.single()
    x = jnp.asarray(x)
    single, batched = (mixer.allocate_inference_cache(batch_size=size) for size in (None, 2))
    refuses(lambda: mixer(x, batched), "mixer(x, batched cache)", "cache", "2")
    refuses(lambda: mixer.step(x[0], batched), "mixer.step(sample, batched cache)", "cache", "2")
    refuses(lambda: mixer.step(x, single), "mixer.step(samples, cache)", str(x.shape))
    allocate = lambda: mixer.allocate_inference_cache(batch_size=0)
    refuses(allocate, "mixer.allocate_inference_cache(batch_size=0)", "batch_size", "0")


@law(lambda subject: not subject.streams)
def what_cannot_stream_says_so(subject: Subject):
    """A mixer that cannot stream refuses to allocate a cache, to take one and to step."""
    mixer, x = subject.single()
    refuses(mixer.allocate_inference_cache, "mixer.allocate_inference_cache()", "stream")
    refuses(lambda: mixer.step(jnp.asarray(x[0]), None), "mixer.step(sample, None)", "stream")
    refuses(lambda: mixer(jnp.asarray(x), jnp.zeros(3)), "mixer(x, cache)", "stream")
    cache = jax.eval_shape(lambda x: call(mixer, x).cache, x)
    require(cache is None, f"without streams, a call gives back None for a cache; got {cache}")
