"""What several test files share: the layers' mathematics in numpy, and a mixer written from scratch."""

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jaxtyping import Array

from discretax import Timeseries
from discretax._types import accumulation_dtype
from discretax.sequence_mixers import AbstractSequenceMixer
from discretax.sequence_mixers.base import check_call, check_step, zero_cache

EXAMPLES = Path(__file__).parents[1] / "examples"
TIME, FEATURES, STATE = 11, 4, 3


@contextlib.contextmanager
def imported_example(name):
    """A script of `examples/`, as a module; what it imports from beside it goes with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module(name)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def on_a_gpu():
    """Where the tests of its kernels run them; elsewhere they are interpreted."""
    return jax.default_backend() == "gpu"


def gpu_interpreter(*, detect_races=False):
    """What a kernel for GPUs is given as `interpret`."""
    if on_a_gpu():
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # not exported

    return InterpretGPUParams(detect_races=detect_races)


def races_found():
    """By the interpreter, since a kernel was last called; on a GPU nobody looks."""
    if on_a_gpu():
        return False
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

    return get_races().races_found


@contextlib.contextmanager
def interrupted_at_the_first(checkpoints):
    """What runs within is interrupted, as by Ctrl-C, once it has written a checkpoint."""
    save = checkpoints.save

    def save_and_interrupt(*args):
        save(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save", save_and_interrupt)
        yield


def assert_can_be_trained(training, config, make_model, loss_fn):
    """By shapes alone, which compiles nothing; `training` is that of `examples/`."""
    optimiser, keys = training.make_optimiser(config), jr.split(jr.key(0), 3)
    model, state = eqx.filter_eval_shape(make_model, jr.key(0))
    with jax.numpy_dtype_promotion("standard"):
        opt_state = eqx.filter_eval_shape(
            lambda model: optimiser.init(eqx.filter(model, eqx.is_inexact_array)), model
        )
        trained, *_, loss = eqx.filter_eval_shape(
            training.train_steps, model, state, opt_state, keys, loss_fn, config
        )
    assert jax.tree.structure(trained) == jax.tree.structure(model)
    assert loss.shape == ()


def assert_close(actual, expected, rtol=1e-5):
    """Each leaf of `actual` differs from `expected` by at most `rtol` of the leaf's largest entry."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        e = np.asarray(e)
        assert np.shape(a) == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max(initial=0))


def assert_equal(actual, expected):
    """Bit by bit, leaf by leaf."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def logits_and_gradients(model, state, tokens, w):
    """Of a batch: the logits, and what the gradient of `sum(logits * w)` is."""

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, w):
        y = jax.vmap(lambda ids: model(ids, state)[0])(tokens)
        return jnp.sum(y * w), y

    (_, y), d_model = loss(model, w)
    return y, d_model


def draw(*shape, seed=1):
    """Normal numbers, from numpy: they compile nothing."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def changed(tree, seed=100, dtype=None):
    """`tree` with noise added to every floating array: no weight stays at one, no bias at zero."""
    rng = np.random.default_rng(seed)
    noisy = lambda p: jnp.asarray(numbers(p) + 0.3 * rng.normal(size=p.shape), dtype or p.dtype)
    return jax.tree.map(lambda p: noisy(p) if eqx.is_inexact_array(p) else p, tree)


def parameters(tree) -> dict[str, Array]:
    """Every floating array of `tree`, by its path."""
    leaves, _ = jax.tree.flatten_with_path(eqx.filter(tree, eqx.is_inexact_array))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def nan_padded(x, length):
    """`x` with NaN from `length` on, as a `Timeseries` that says so."""
    values = jnp.where(jnp.arange(x.shape[0])[:, None] < length, x, jnp.nan)
    return Timeseries(values, length=length)


def numbers(array) -> np.ndarray:
    return np.asarray(array, np.float64)


def linear(layer, x):
    y = numbers(x) @ numbers(layer.weight).T
    return y if layer.bias is None else y + numbers(layer.bias)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    """The approximation by tanh, JAX's default."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def glu(mixer, x):
    return linear(mixer.w1, x) * sigmoid(linear(mixer.w2, x))


def lru(mixer, x):
    """h_t = lambda h_{t-1} + gamma B x_t, y_t = Re(C h_t) + D x_t, one sample after the other."""
    x = numbers(x)
    eigenvalues = np.exp(-np.exp(numbers(mixer.nu_log)) + 1j * np.exp(numbers(mixer.theta_log)))
    B = numbers(mixer.B_re) + 1j * numbers(mixer.B_im)
    C = numbers(mixer.C_re) + 1j * numbers(mixer.C_im)
    h, ys = np.zeros(len(eigenvalues), complex), []
    for sample in x:
        h = eigenvalues * h + np.exp(numbers(mixer.gamma_log)) * (B @ sample)
        ys.append((C @ h).real + numbers(mixer.D) * sample)
    return np.stack(ys)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def pool(kind, x):
    if len(x) == 0:
        return np.zeros(x.shape[1:])
    return {"mean": np.mean, "max": np.max}[kind](x, 0) if kind != "last" else x[-1]


def normalise(norm, layer, x, statistics=None):
    """`x` (time, features); `statistics`, mean and variance, for the batch norm."""
    x = numbers(x)
    if norm is None:
        return x
    if norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * numbers(layer.weight)
    if norm == "layer":
        mean, var, eps = x.mean(-1, keepdims=True), x.var(-1, keepdims=True), 1e-6
    else:
        (mean, var), eps = statistics, 1e-5
    return (x - mean) / np.sqrt(var + eps) * numbers(layer.weight) + numbers(layer.bias)


class Leaky(AbstractSequenceMixer[dict[str, Array]]):
    """h_t = exp(-rate * timesteps_t) h_{t-1} + x_t, y_t = h_t, written without the library's ops.

    The cache also counts the samples since the last reset, as an attention cache would.
    """

    rate: Array
    in_features: int = eqx.field(static=True)

    recurrent_parameters: ClassVar[tuple[str, ...]] = ("rate",)

    def __init__(self, in_features: int, key: Any):
        self.rate = jr.uniform(key, (in_features,), minval=0.1, maxval=1.0)
        self.in_features = in_features

    def allocate_inference_cache(self, batch_size=None, max_seqlen=1, dtype=None):
        return {
            "h": zero_cache(batch_size, (self.in_features,), dtype),
            "count": zero_cache(batch_size, (), jnp.int32),
        }

    def __call__(
        self, x, cache=None, *, integration_timesteps=None, length=None, resets=None, key=None
    ):
        zero = self.allocate_inference_cache()
        x, cache, gaps = check_call(self, x, cache, zero, integration_timesteps, length, resets)
        time, rate = x.shape[0], self.rate.astype(accumulation_dtype(self.rate, cache["h"]))
        gaps = jnp.ones(time, rate.dtype) if gaps is None else gaps.astype(rate.dtype)
        fresh = jnp.zeros(time, bool) if resets is None else resets
        valid = jnp.arange(time) < (time if length is None else length)

        def move(cache, inputs):
            x_t, gap, is_fresh, is_valid = inputs
            h, count = (jnp.where(is_fresh, 0, cache[name]) for name in ("h", "count"))
            is_finite = jnp.isfinite(h) & jnp.isfinite(x_t)
            h, x_t = (jnp.where(is_finite, value, 0) for value in (h, x_t))
            h = jnp.where(is_finite, jnp.exp(-rate * gap) * h + x_t, jnp.nan)
            moved = {"h": h, "count": count + 1}
            cache = {name: jnp.where(is_valid, moved[name], cache[name]) for name in cache}
            return cache, cache["h"]

        cache, y = lax.scan(move, cache, (x.astype(rate.dtype), gaps, fresh, valid))
        return y.astype(x.dtype), cache

    def step(self, x, cache, *, integration_timestep=None):
        check_step(self, x, cache, self.allocate_inference_cache())
        gap = None if integration_timestep is None else integration_timestep[None]
        y, cache = self(x[None], cache, integration_timesteps=gap)
        return y[0], cache


def leaky(mixer, x, timesteps=None):
    x, rate, ys = numbers(x), numbers(mixer.rate), []
    h = np.zeros(x.shape[1])
    for t, sample in enumerate(x):
        h = np.exp(-rate * (1 if timesteps is None else float(timesteps[t]))) * h + sample
        ys.append(h)
    return np.stack(ys)


def downsampled(layer, x, resets=None):
    """`Downsample` of valid samples alone, window by window: which samples count is said by a loop."""
    x, ys = numbers(x), []
    for start in range(0, len(x), layer.stride):
        rows = samples_that_count(start, min(start + layer.stride, len(x)), resets)
        if layer.how == "linear":  # the samples in their places
            y = np.zeros((layer.stride, x.shape[1]))
            y[[row - start for row in rows]] = x[rows]
            y = y.ravel()
        else:
            pool = {
                "mean": lambda u: u.mean(0),
                "max": lambda u: u.max(0),
                "stride": lambda u: u[-1],
            }
            y = pool[layer.how](x[rows])
        ys.append(y if layer.linear is None else linear(layer.linear, y))
    return np.stack(ys)


def samples_that_count(start, end, resets=None):
    """Those from the last reset in the window on."""
    last = max((t for t in range(start, end) if resets is not None and resets[t]), default=start)
    return list(range(last, end))


def upsampled(layer, x, time, resets=None):
    """`Upsample` to `time` valid samples, sample by sample."""
    x, ys, s = numbers(x), [], layer.stride
    resets = np.zeros(time, bool) if resets is None else resets[:time]
    for t in range(time):
        window, place = divmod(t, s)
        if layer.causal:
            parted = resets[window * s : t + 1].any() or window == 0
            value = np.zeros(x.shape[1]) if parted else x[window - 1]
        else:
            parted = resets[t + 1 : (window + 1) * s].any()
            value = np.zeros(x.shape[1]) if parted else x[window]
        if layer.linear is not None:
            value = linear(layer.linear, value)
        ys.append(value.reshape(-1, layer.out_features)[place if layer.how == "linear" else 0])
    return np.stack(ys)
