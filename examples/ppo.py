"""Proximal policy optimisation (arXiv:1707.06347) of a policy that remembers, whatever the task.

The policy is a model in streaming mode, also while it is trained: `(Timeseries, stream) -> (y,
stream)`, where y is a logit for each action and a value. It acts step by step, its streams carried
from rollout to rollout and begun anew by `resets` where an episode begins. It learns from all steps of
a rollout in parallel, from the streams at its beginning.

A task has `begin(key)`, `observe(env)` and `advance(env, action, key)`, and its environments a `score`,
the rewards of the episode so far: see `repeat_previous.py`. Both are for one environment.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax

import discretax
from discretax import Timeseries
from discretax.ops import linear_recurrence


class Settings(Protocol):
    @property
    def updates(self) -> int: ...
    @property
    def environments(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def minibatches(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def discount(self) -> float: ...
    @property
    def gae_lambda(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def value_weight(self) -> float: ...
    @property
    def entropy_weight(self) -> float: ...
    @property
    def max_norm(self) -> float: ...


class Rollout(NamedTuple):
    """Of every environment and step, (environments, steps)."""

    seen: jax.Array
    begins: jax.Array
    actions: jax.Array
    log_p: jax.Array  # of the actions
    values: jax.Array
    rewards: jax.Array
    ends: jax.Array
    scores: jax.Array  # rewards of the episode so far, that of the step included


def make_optimiser(config: Settings) -> optax.GradientTransformation:
    steps = config.updates * config.epochs * config.minibatches
    schedule = optax.linear_schedule(config.learning_rate, 0.0, steps)
    return optax.chain(optax.clip_by_global_norm(config.max_norm), optax.adam(schedule))


@eqx.filter_jit
def begin(policy, state, task: Any, environments: int, key: jax.Array):
    """Streams and environments at the beginning."""
    stream = discretax.inference_state(policy, state, batch_size=environments)
    return stream, jax.vmap(task.begin)(jr.split(key, environments))


def read(policy, seen: jax.Array, begins: jax.Array, stream):
    """Log-probabilities (environments, time, actions), values (environments, time), and the streams."""
    y, stream = discretax.batched(policy)(Timeseries(seen, resets=begins), stream)
    return jax.nn.log_softmax(y[..., :-1]), y[..., -1], stream


def of_actions(log_p: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_p, actions[..., None], axis=-1)[..., 0]


def likeliest(key: jax.Array, log_p: jax.Array) -> jax.Array:
    """In the place of `jax.random.categorical`: what is learned, without the exploring."""
    del key
    return log_p.argmax(-1)


@eqx.filter_jit
def act(policy, stream, envs, key: jax.Array, task: Any, steps: int, choose=jr.categorical):
    """Step by step: the rollout, the values of what is seen after it, and streams and environments."""
    live = discretax.discretized(policy)

    def look(envs, stream):
        seen, begins = jax.vmap(task.observe)(envs)
        log_p, values, stream = read(live, seen[:, None], begins[:, None], stream)
        return seen, begins, log_p[:, 0], values[:, 0], stream

    def step(carry, key):
        stream, envs = carry
        seen, begins, log_p, values, stream = look(envs, stream)
        action_key, env_key = jr.split(key)
        actions = choose(action_key, log_p)
        env_keys = jr.split(env_key, len(actions))
        after, rewards, ends = jax.vmap(task.advance)(envs, actions, env_keys)
        done = actions, of_actions(log_p, actions), values, rewards, ends, envs.score + rewards
        return (stream, after), Rollout(seen, begins, *done)

    (stream, envs), rollout = lax.scan(step, (stream, envs), jr.split(key, steps))
    *_, last_values, _ = look(envs, stream)  # the next rollout sees it again, as its first
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), rollout), last_values, stream, envs


def advantages_of(rewards, values, ends, last_value, config: Settings) -> jax.Array:
    """Generalised advantage estimates (arXiv:1506.02438), (time,): a linear recurrence backwards."""
    # Nothing is to come once an episode has ended.
    discounts = jnp.where(ends, 0.0, config.discount)
    errors = rewards + discounts * jnp.append(values[1:], last_value) - values
    return linear_recurrence(config.gae_lambda * discounts, errors, reverse=True)


def loss_fn(policy, part, config: Settings) -> jax.Array:
    """The clipped objective with its sign turned, the error of the values, and minus the entropy."""
    stream, rollout, advantages, targets = part
    log_p, values, _ = read(policy, rollout.seen, rollout.begins, stream)  # all steps at once
    ratio = jnp.exp(of_actions(log_p, rollout.actions) - rollout.log_p)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    objective = jnp.minimum(ratio * advantages, clipped * advantages).mean()
    entropy = -(jnp.exp(log_p) * log_p).sum(-1).mean()
    error = ((values - targets) ** 2).mean() / 2
    return config.value_weight * error - config.entropy_weight * entropy - objective


@eqx.filter_jit
def learn(policy, opt_state, stream, rollout: Rollout, last_values, key, config: Settings):
    """Several passes over a rollout that began with `stream`, some environments at a time."""
    params, static = eqx.partition(policy, eqx.is_inexact_array)
    told = rollout.rewards, rollout.values, rollout.ends, last_values
    advantages = jax.vmap(partial(advantages_of, config=config))(*told)
    targets = advantages + rollout.values
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    data = stream, rollout, advantages, targets

    def update(carry, chosen):
        params, opt_state = carry
        part = jax.tree.map(lambda leaf: leaf[chosen], data)
        grads = jax.grad(lambda p: loss_fn(eqx.combine(p, static), part, config))(params)
        updates, opt_state = make_optimiser(config).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    shuffle = partial(jr.permutation, x=config.environments)
    orders = jax.vmap(shuffle)(jr.split(key, config.epochs))
    parts = orders.reshape(config.epochs * config.minibatches, -1)
    (params, opt_state), _ = lax.scan(update, (params, opt_state), parts)
    return eqx.combine(params, static), opt_state
