"""Keeps a state that every symbol changes: what negative eigenvalues are good for.

    python examples/state_tracking.py                 # parity, six models
    python examples/state_tracking.py --task arithmetic --steps 2000 --weight-noise 0
    python examples/state_tracking.py --model gated_delta_net_negative --seeds 3

After every symbol the model writes the state so far:

    parity:      is the number of ones odd?        arithmetic: the value modulo 5

    read     1 0 1 1 0 1                           3 + 2 * 4 - 1
    written  1 1 0 1 1 0                           3 3 0 0 1 1 0

The two are parity and modular arithmetic without brackets of the Chomsky hierarchy's benchmark
(arXiv:2207.02098). Bits are drawn evenly; so are the numbers 0 to 4 and, between them, +, - and *.
Multiplication binds first, and an operator at the end is not counted. There the answer is asked
once, at the end of sequences of many lengths; here after every symbol, of which each is the end of
a sequence that begins with the first. A model that is causal sees no difference, and learns sooner.

Trained on 40 symbols, the model reads 256. No layer has a convolution: what it knows of earlier
symbols is in its states.

Every step of training reads with fresh noise on the weights (Jim, Giles and Horne, 1996,
doi:10.1109/72.548170). Without it the loss is zero before the state is kept as it should be: what
loses 2 % with every symbol has 45 % left after 40, enough to be read, and 0.6 % after 256.
"""

import dataclasses
from functools import partial
from pathlib import Path

import arguments
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import training
from jax import lax
from matplotlib.figure import Figure

from discretax.models import Backbone
from discretax.sequence_mixers import (
    GatedDeltaNetSequenceMixer,
    GatedDeltaProductSequenceMixer,
    LRUSequenceMixer,
    Mamba2SequenceMixer,
    MambaSequenceMixer,
)

HEADS = {"num_heads": 2, "head_dim": 16, "value_dim": 16, "conv_width": None}
MIXERS = {
    "lru": LRUSequenceMixer,
    "mamba": partial(MambaSequenceMixer, conv_width=1),
    "mamba2": partial(Mamba2SequenceMixer, head_dim=16, state_dim=16, conv_width=1),
    "gated_delta_net": partial(GatedDeltaNetSequenceMixer, **HEADS),
    "gated_delta_net_negative": partial(
        GatedDeltaNetSequenceMixer, negative_eigenvalues=True, **HEADS
    ),
    "gated_delta_product_negative": partial(
        GatedDeltaProductSequenceMixer, negative_eigenvalues=True, **HEADS
    ),
}
MODULUS = 5
PLUS, MINUS, TIMES = MODULUS, MODULUS + 1, MODULUS + 2  # the symbols after the numbers
GROUP = 8  # lengths that share a point in the figure


@dataclasses.dataclass(frozen=True)
class Config:
    train_length: int = 40
    test_length: int = 256
    hidden_dim: int = 32
    num_blocks: int = 2
    steps: int = 500
    every: int = 250
    batch_size: int = 16
    learning_rate: float = 5e-3
    weight_noise: float = 0.05  # standard deviation, in training only


def parity(length: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = jr.bernoulli(key, shape=(length,)).astype(int)
    return bits, jnp.cumsum(bits) % 2


def arithmetic(length: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers and operators in turn; the value modulo 5 of what ends with the last number."""
    number_key, operator_key = jr.split(key)
    pairs = (length + 1) // 2
    numbers = jr.randint(number_key, (pairs,), 0, MODULUS)
    operators = jr.randint(operator_key, (pairs,), PLUS, TIMES + 1)
    before = jnp.concatenate([jnp.full(1, PLUS, operators.dtype), operators[:-1]])
    symbols = jnp.stack([numbers, operators], axis=1).reshape(-1)[:length]
    return symbols, jnp.repeat(values(before, numbers), 2)[:length]


def values(operators: jax.Array, numbers: jax.Array) -> jax.Array:
    """Modulo 5, after each number, whose operator stands before it."""

    def extend(terms, symbols):
        total, term = terms  # of the terms that are finished, and the one that may grow
        operator, number = symbols
        is_factor = operator == TIMES
        signed = jnp.where(operator == MINUS, -number, number)
        total = jnp.where(is_factor, total, total + term) % MODULUS
        term = jnp.where(is_factor, term * number, signed) % MODULUS
        return (total, term), (total + term) % MODULUS

    zero = jnp.zeros_like(numbers[0])
    return lax.scan(extend, (zero, zero), (operators, numbers))[1]


TASKS = {"parity": (parity, 2, 2), "arithmetic": (arithmetic, TIMES + 1, MODULUS)}
"""What makes a sequence and its answers, how many symbols there are, and how many answers."""


def make_batch(task: str, length: int, size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(partial(TASKS[task][0], length))(jr.split(key, size))


def make_model(task: str, name: str, config: Config, key: jax.Array):
    _, symbols, answers = TASKS[task]
    backbone = partial(
        Backbone,
        sequence_mixer=MIXERS[name],
        num_blocks=config.num_blocks,
        norm="rms",
        drop_rate=0.0,
    )
    return training.make_model(backbone, symbols, answers, config.hidden_dim, key)


def with_noise(model, deviation: float, key: jax.Array):
    """The model with normal noise added to every parameter."""
    noise = optax.tree.random_like(key, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, optax.tree.scale(deviation, noise))


def loss_fn(task: str, config: Config, model, state, key: jax.Array):
    data_key, noise_key = jr.split(key)
    x, answers = make_batch(task, config.train_length, config.batch_size, data_key)
    log_p, state = training.read(with_noise(model, config.weight_noise, noise_key), state, x)
    return training.loss_of(log_p, answers), state


@eqx.filter_jit
def accuracies(model, state, task: str, config: Config, key: jax.Array) -> jax.Array:
    """By length, (test_length,), the fraction of 500 fresh sequences whose state is told right."""
    x, answers = make_batch(task, config.test_length, 500, key)
    log_p, _ = training.read(eqx.nn.inference_mode(model), state, x)
    return (log_p.argmax(-1) == answers).mean(0)


def train(task: str, config: Config, name: str, seed: int):
    """The trained model, and its accuracies by length."""
    make = partial(make_model, task, name, config)
    loss = jax.tree_util.Partial(loss_fn, task, config)
    model, state, _ = training.train(name, config, seed, make, loss)
    *_, test_key = jr.split(jr.key(seed), 4)  # the training has used the first three
    return model, np.asarray(accuracies(model, state, task, config, test_key))


def longer(config: Config, histories) -> list[float]:
    """Of each seed, the mean over the lengths from the longest trained with to the longest."""
    return [float(curve[config.train_length - 1 :].mean()) for curve in histories]


def table(results: dict, config: Config) -> str:
    """Accuracies, mean and standard deviation over the seeds."""
    lines = [f"{'model':28}{'parameters':>10}{'accuracy':>15} {'CPU, s':>8}"]
    for name, result in results.items():
        accuracy = f"{training.percent(longer(config, result['histories']))} %"
        sizes = f"{result['parameters']:>10}{accuracy:>15} {result['cpu_seconds']:>8.0f}"
        lines.append(f"{name:28}{sizes}")
    return "\n".join(lines)


def draw(path: Path, results: dict, title: str, guess: float, config: Config) -> None:
    """Accuracy against length, the mean over the seeds."""
    figure = Figure(figsize=(drawing.WIDTH, 3.6))
    figure.suptitle(title)
    axes, groups = figure.subplots(), config.test_length // GROUP
    lengths = GROUP * np.arange(groups) + (GROUP + 1) / 2
    trained = f"symbols read; grey: up to {config.train_length}, as in training"
    axes.set(ylabel="states right, %", xlabel=trained, ylim=(0, 104), xlim=(0, config.test_length))
    axes.axhline(100 * guess, **drawing.GUESS)
    axes.axvspan(0, config.train_length, color="0.93")
    lines = [("a guess", 100 * guess, drawing.GUESS["color"])]
    for (name, result), color in zip(results.items(), drawing.COLORS, strict=False):
        curve = 100 * np.mean(result["histories"], axis=0)
        points = curve[: groups * GROUP].reshape(groups, GROUP).mean(1)
        axes.plot(lengths, points, color=color)
        lines.append((name, points[-1], color))
    drawing.name_lines(axes, lines)
    drawing.save(figure, path)


def rules(config: Config, given: dict):
    positive = dataclasses.asdict(config).keys() - {"weight_noise"}
    yield from arguments.above_zero(given, ("seeds", *sorted(positive)))
    yield "weight_noise", config.weight_noise >= 0, "at least 0"
    longer_than = f"above --train-length, {config.train_length}, and at least {GROUP}"
    yield "test_length", config.test_length > max(config.train_length, GROUP - 1), longer_than
    yield "steps", config.steps % config.every == 0, f"a multiple of {config.every}"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="parity")
    add("--model", choices=(*MIXERS, "all"), default="all")
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--out", type=Path, default=Path("runs/state_tracking"), help="folder for the figure")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    task = options["task"]
    names = list(MIXERS) if options["model"] == "all" else [options["model"]]
    results = training.compare(names, options["seeds"], partial(train, task, config))
    guess = 1 / TASKS[task][2]
    figure = options["out"] / f"{task}.png"
    draw(figure, results, f"{task}, trained for {config.steps} steps", guess, config)
    print(
        f"{task} after {config.train_length} to {config.test_length} symbols, trained with "
        f"{config.train_length}, {config.steps} steps; a guess: {guess:.0%}\n"
        f"{table(results, config)}\nfigure {figure}"
    )
    return results


if __name__ == "__main__":
    main()
