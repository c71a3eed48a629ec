"""What the examples share that draw their tokens afresh for every step: model, training, results."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import discretax
from discretax.blocks import ResidualBlock
from discretax.channel_mixers import SwiGLU
from discretax.encoder import EmbeddingEncoder
from discretax.heads import ClassificationHead
from discretax.models import BlockStack

UNASKED = -1  # in place of an answer, where none counts


class Schedule(Protocol):
    @property
    def steps(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


@eqx.nn.make_with_state
def make_model(backbone, vocabulary: int, classes: int, width: int, key: jax.Array):
    """`backbone(key, hidden_dim=width)` between an embedding and an answer after every token."""
    keys = jr.split(key, 3)
    encoder = EmbeddingEncoder(keys[0], num_classes=vocabulary, out_features=width)
    model = backbone(keys[1], hidden_dim=width)
    head = ClassificationHead(width, classes, keys[2], reduce=False)
    return discretax.Sequential(encoder=encoder, model=model, head=head)


def residual_stack(mixer, num_blocks: int, key: jax.Array, *, hidden_dim: int) -> BlockStack:
    """The same block around every mixer, with a gated MLP of twice the width."""
    mlp = partial(SwiGLU, intermediate_dim=2 * hidden_dim)
    return BlockStack(
        [
            ResidualBlock(hidden_dim, block_key, sequence_mixer=mixer, channel_mixer=mlp)
            for block_key in jr.split(key, num_blocks)
        ]
    )


def read(model, state, x):
    """Log-probabilities after every token, (batch, time, classes), and the state."""
    return discretax.batched(model)(x, state)


def loss_of(log_p: jax.Array, answers: jax.Array) -> jax.Array:
    """The mean over the answers that count."""
    asked = answers != UNASKED
    right = jnp.take_along_axis(log_p, jnp.where(asked, answers, 0)[..., None], axis=-1)[..., 0]
    return -right.mean(where=asked)


def make_optimiser(config: Schedule) -> optax.GradientTransformation:
    # No sequence is seen twice: there is nothing for weight decay to prevent.
    return discretax.optim.adamw_cosine(config.learning_rate, config.steps, weight_decay=0.0)


@eqx.filter_jit
def train_steps(model, state, opt_state, keys: jax.Array, loss_fn, config: Schedule):
    """One step for each key, by the loss and state `loss_fn(model, state, key)`; the mean loss.

    Two `jax.tree_util.Partial` of the same function and settings are equal, so what is compiled for
    one seed serves the next. Two `functools.partial` never are.
    """
    params, static = eqx.partition(model, eqx.is_inexact_array)
    update = make_optimiser(config).update

    def loss_of_params(params, state, key):
        return loss_fn(eqx.combine(params, static), state, key)

    def step(carry, key):
        params, state, opt_state = carry
        loss_and_grads = jax.value_and_grad(loss_of_params, has_aux=True)
        (loss, state), grads = loss_and_grads(params, state, key)
        updates, opt_state = update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), loss

    (params, state, opt_state), losses = lax.scan(step, (params, state, opt_state), keys)
    return eqx.combine(params, static), state, opt_state, losses.mean()


def train(name: str, config: Schedule, seed: int, make_model, loss_fn, test=lambda *_: {}):
    """The trained model, its state, and the loss and what `test(model, state, key)` tells on the way."""
    model_key, train_key, test_key = jr.split(jr.key(seed), 3)
    model, state = make_model(model_key)
    opt_state = make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    history = []
    rounds = jr.split(train_key, (config.steps // config.every, config.every))
    with tqdm(total=config.steps, desc=f"{name}, seed {seed}", ncols=100) as bar:
        for keys, fresh_key in zip(rounds, jr.split(test_key, len(rounds)), strict=True):
            model, state, opt_state, loss = train_steps(
                model, state, opt_state, keys, loss_fn, config
            )
            row = {"loss": loss, **test(model, state, fresh_key)}
            history.append({key: float(value) for key, value in row.items()})
            bar.set_postfix(history[-1])
            bar.update(config.every)
    return model, state, history


def compare(names: Sequence[str], seeds: int, train: Callable[[str, int], tuple[Any, Any]]) -> dict:
    """For every model: number of parameters, what `train(name, seed)` tells of it, and seconds,
    as they passed and of all CPU cores together."""
    results = {}
    for name in names:
        start, cpu_start, histories = time.perf_counter(), time.process_time(), []
        for seed in range(seeds):
            model, history = train(name, seed)
            histories.append(history)
        results[name] = {
            "parameters": count(model),
            "histories": histories,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
        }
    return results


def count(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))


def percent(fractions) -> str:
    """Mean and, of several, standard deviation."""
    values = 100 * np.asarray(fractions)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"
