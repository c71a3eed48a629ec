"""Looks up which value stood beside a key: how many pairs does a state of one size hold?

    python examples/associative_recall.py                 # six models
    python examples/associative_recall.py --model gla --seeds 3

Multi-query associative recall (arXiv:2312.04927). Pairs of a key and a value are read, then every
key once more, in another order, and after each the model writes the value that stood beside it:

    read     b 7  d 2  a 7  c 4    d b c a
    written                        2 7 4 7

Keys, of which none stands twice in a sequence, and values are drawn evenly. In the paper other
tokens stand between the keys that are asked for; here nothing does, and sequences are short.

The recurrent models have a state of the same size, in each block two matrices of 8 x 32 numbers,
keys by values (Mamba: 8 numbers for each of 64 features), and differ in how they write to it. It is
counted without the three samples that their short convolutions see. Attention keeps two numbers for
each feature of every token, and so more with every pair; it has no convolution.
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
import training
from matplotlib.figure import Figure

from discretax import Timeseries
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    GatedDeltaNetSequenceMixer,
    GLASequenceMixer,
    KimiDeltaAttentionSequenceMixer,
    Mamba2SequenceMixer,
    MambaSequenceMixer,
)

MIXERS = {
    "mamba": MambaSequenceMixer,
    "mamba2": Mamba2SequenceMixer,
    "gla": GLASequenceMixer,
    "gated_delta_net": GatedDeltaNetSequenceMixer,
    "kimi_delta_attention": KimiDeltaAttentionSequenceMixer,
    "attention": AttentionSequenceMixer,
}
NUM_HEADS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    num_pairs: int = 16
    num_keys: int = 32
    num_values: int = 32
    hidden_dim: int = 64
    key_dim: int = 8
    num_blocks: int = 2
    steps: int = 3000
    every: int = 500
    batch_size: int = 16
    learning_rate: float = 5e-3


def mixer(name: str, config: Config):
    """Of a matrix of `key_dim` x `hidden_dim / 2` numbers in each of two heads."""
    value_dim = config.hidden_dim // NUM_HEADS
    heads = {"num_heads": NUM_HEADS, "head_dim": config.key_dim, "value_dim": value_dim}
    options = {
        "mamba": {"expand": 1, "state_dim": config.key_dim},
        "mamba2": {
            "expand": 1,
            "state_dim": config.key_dim,
            "head_dim": value_dim,
            "num_groups": NUM_HEADS,
        },
        "attention": {"num_heads": NUM_HEADS},
    }
    return partial(MIXERS[name], **options.get(name, {**heads, "conv_width": 4}))


def make_sequence(config: Config, key: jax.Array, pairs: jax.Array | int):
    """What is read, (3 * num_pairs,), of which the first `3 * pairs` are valid, and the answers."""
    key_key, value_key, order_key = jr.split(key, 3)
    most = config.num_pairs
    keys = jr.permutation(key_key, config.num_keys)[:most]
    values = jr.randint(value_key, (most,), 0, config.num_values)
    # In random order, those that are not among the pairs last.
    order = jnp.argsort(jnp.where(jnp.arange(most) < pairs, jr.uniform(order_key, (most,)), 2.0))
    told = jnp.stack([keys, config.num_keys + values], axis=1).reshape(-1)
    place = jnp.arange(3 * most)
    asked = order[jnp.clip(place - 2 * pairs, 0, most - 1)]
    is_told, is_valid = place < 2 * pairs, place < 3 * pairs
    x = jnp.where(is_told, told[jnp.minimum(place, 2 * most - 1)], keys[asked])
    return x, jnp.where(is_valid & ~is_told, values[asked], training.UNASKED)


def make_batch(config: Config, key: jax.Array, pairs: jax.Array) -> tuple[Timeseries, jax.Array]:
    """A sequence for each of `pairs`, padded to the longest that there are."""
    keys = jr.split(key, len(pairs))
    x, answers = jax.vmap(partial(make_sequence, config))(keys, pairs)
    return Timeseries(x, length=3 * pairs), answers


def make_model(name: str, config: Config, key: jax.Array):
    backbone = partial(training.residual_stack, mixer(name, config), config.num_blocks)
    symbols = config.num_keys + config.num_values
    return training.make_model(backbone, symbols, config.num_values, config.hidden_dim, key)


def loss_fn(config: Config, model, state, key: jax.Array):
    """Of sequences of any number of pairs, up to the most that there are."""
    pairs_key, batch_key = jr.split(key)
    pairs = jr.randint(pairs_key, (config.batch_size,), 1, config.num_pairs + 1)
    x, answers = make_batch(config, batch_key, pairs)
    log_p, state = training.read(model, state, x)
    return training.loss_of(log_p, answers), state


@eqx.filter_jit
def accuracy(model, state, config: Config, pairs: jax.Array, key: jax.Array) -> jax.Array:
    """The fraction of values told right in 200 fresh sequences of so many pairs."""
    x, answers = make_batch(config, key, jnp.full(200, pairs))
    log_p, _ = training.read(eqx.nn.inference_mode(model), state, x)
    return (log_p.argmax(-1) == answers).mean(where=answers != training.UNASKED)


def tested(config: Config) -> list[int]:
    """Powers of two, up to the most pairs."""
    return [2**i for i in range(1, config.num_pairs.bit_length())]


def test(config: Config, model, state, key: jax.Array) -> dict:
    counts = tested(config)
    return {str(n): accuracy(model, state, config, jnp.array(n), key) for n in counts}


def train(config: Config, name: str, seed: int):
    """The trained model, and its losses and accuracies on the way."""
    make, loss = partial(make_model, name, config), jax.tree_util.Partial(loss_fn, config)
    model, _, history = training.train(name, config, seed, make, loss, partial(test, config))
    return model, history


def state_size(name: str, config: Config) -> int:
    """Numbers that all blocks keep of the longest sequence, without those for the convolutions."""
    made = eqx.filter_eval_shape(mixer(name, config), config.hidden_dim, key=jr.key(0))
    cache = made.allocate_inference_cache(max_seqlen=3 * config.num_pairs)
    kept = (cache.keys, cache.values) if name == "attention" else (cache.state,)
    return config.num_blocks * sum(array.size for array in kept)


def table(results: dict, config: Config) -> str:
    """Accuracies after the last step, mean and standard deviation over the seeds."""
    counts = [str(n) for n in tested(config)]
    header = "".join(f"{n + ' pairs, %':>13}" for n in counts)
    lines = [f"{'model':22}{'parameters':>10}{'state':>7}{header} {'CPU, s':>8}"]
    for name, result in results.items():
        ends = [history[-1] for history in result["histories"]]
        cells = "".join(f"{training.percent([end[n] for end in ends]):>13}" for n in counts)
        sizes = f"{result['parameters']:>10}{state_size(name, config):>7}"
        lines.append(f"{name:22}{sizes}{cells} {result['cpu_seconds']:>8.0f}")
    return "\n".join(lines)


def draw(path: Path, results: dict, config: Config) -> None:
    """Accuracy against the number of pairs: a line for the mean, a dot per seed."""
    figure = Figure(figsize=(drawing.WIDTH, 3.6))
    axes, counts = figure.subplots(), tested(config)
    axes.set(title="values told right, %", xlabel="pairs read", xscale="log", ylim=(0, 104))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    guess = [100 / n for n in counts]
    axes.plot(counts, guess, **drawing.GUESS)
    lines = [("a guess", guess[-1], drawing.GUESS["color"])]
    for (name, result), color in zip(results.items(), drawing.COLORS, strict=False):
        ends = [history[-1] for history in result["histories"]]
        percent = 100 * np.array([[end[str(n)] for end in ends] for n in counts])
        axes.plot(counts, percent, "o", color=color, alpha=0.4, markersize=4)
        axes.plot(counts, percent.mean(1), color=color)
        lines.append((name, percent[-1].mean(), color))
    drawing.name_lines(axes, lines)
    drawing.save(figure, path)


def rules(config: Config, given: dict):
    yield from arguments.above_zero(given, ("seeds", *dataclasses.asdict(config)))
    most = f"at least 2 and at most --num-keys, {config.num_keys}"
    yield "num_pairs", 2 <= config.num_pairs <= config.num_keys, most
    rule = "a multiple of 4: attention turns the features of its two heads in pairs"
    yield "hidden_dim", config.hidden_dim % (2 * NUM_HEADS) == 0, rule
    yield "steps", config.steps % config.every == 0, f"a multiple of {config.every}"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=(*MIXERS, "all"), default="all")
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--out", type=Path, default=Path("runs/associative_recall"), help="folder for the figure")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    names = list(MIXERS) if options["model"] == "all" else [options["model"]]
    results = training.compare(names, options["seeds"], partial(train, config))
    figure = options["out"] / "accuracy.png"
    draw(figure, results, config)
    print(
        f"values told right, by the number of pairs, after {config.steps} steps; a guess among "
        f"those read: one in so many\n"
        f"{table(results, config)}\nfigure {figure}"
    )
    return results


if __name__ == "__main__":
    main()
