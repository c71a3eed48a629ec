"""Remembers a few tokens among noise: what a transition that depends on the input is good for.

    python examples/selective_copying.py                 # LRU, S5, Mamba and RG-LRU
    python examples/selective_copying.py --model rglru --num-tokens 8
    python examples/selective_copying.py --seeds 3

The selective copying of the Mamba paper (arXiv:2312.00752, section 4.1.1):

    read     . . c . a . . . b . c . > > > >
    written                          c a b c

Data tokens stand at random places among noise, a fresh draw for every sequence. Then come markers,
at which the model writes the data tokens in order.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

import discretax
from discretax.encoder import EmbeddingEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU, RGLRU, S5, S7, Mamba

# LRU begins with longer memories than it would by default: the sequence is long.
MODELS = {
    "lru": partial(LRU, r_min=0.9, r_max=0.999),
    "s5": S5,
    "mamba": Mamba,
    "rglru": RGLRU,
    "s7": S7,
}
COMPARED = ("lru", "s5", "mamba", "rglru")
NOISE = 0  # the last token of the vocabulary is the marker, and those between are data


@dataclasses.dataclass(frozen=True)
class Config:
    length: int = 64
    num_tokens: int = 4
    vocabulary: int = 16
    hidden_dim: int = 64
    num_blocks: int = 2
    steps: int = 2000
    every: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-3


def make_sequence(config: Config, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is read, (length + num_tokens,), and what is to be written at the markers."""
    place_key, token_key = jr.split(key)
    marker = config.vocabulary - 1
    tokens = jr.randint(token_key, (config.num_tokens,), NOISE + 1, marker)
    places = jr.choice(place_key, config.length, (config.num_tokens,), replace=False)
    noise = jnp.full(config.length, NOISE, tokens.dtype)
    body = noise.at[jnp.sort(places)].set(tokens)
    return jnp.concatenate([body, jnp.full_like(tokens, marker)]), tokens


def make_batch(config: Config, key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(partial(make_sequence, config))(jr.split(key, size))


@eqx.nn.make_with_state
def make_model(name: str, config: Config, key: jax.Array):
    width, keys = config.hidden_dim, jr.split(key, 3)
    encoder = EmbeddingEncoder(keys[0], num_classes=config.vocabulary, out_features=width)
    model = MODELS[name](
        keys[1], hidden_dim=width, num_blocks=config.num_blocks, drop_rate=0.0, norm="rms"
    )
    head = ClassificationHead(width, config.vocabulary, keys[2], reduce=False)
    return eqx.nn.Sequential([encoder, model, head])


def make_optimiser(config: Config) -> optax.GradientTransformation:
    # No sequence is seen twice: there is nothing for weight decay to prevent.
    return discretax.optim.adamw_cosine(config.learning_rate, config.steps, weight_decay=0.0)


def written(model, state, x: jax.Array, num_tokens: int):
    """Log-probabilities at the markers, (batch, num_tokens, vocabulary), and the state."""
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    log_p, state = batched(x, state)
    return log_p[:, -num_tokens:], state


def loss_of(log_p: jax.Array, tokens: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1).mean()


def accuracies(log_p: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fractions of tokens, and of whole sequences, that are written right."""
    right = log_p.argmax(-1) == tokens
    return right.mean(), right.all(-1).mean()


@eqx.filter_jit
def test(model, state, config: Config, key: jax.Array):
    """Accuracies on 1000 fresh sequences."""
    model = eqx.nn.inference_mode(model)
    x, tokens = make_batch(config, key, 1000)
    log_p, _ = written(model, state, x, config.num_tokens)
    return accuracies(log_p, tokens)


@eqx.filter_jit
def train_steps(model, state, opt_state, keys: jax.Array, config: Config):
    """One step for each key, with a batch of its own, and the mean loss."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = make_optimiser(config)

    def loss_fn(params, state, x, tokens):
        log_p, state = written(eqx.combine(params, static), state, x, config.num_tokens)
        return loss_of(log_p, tokens), state

    def step(carry, key):
        params, state, opt_state = carry
        batch = make_batch(config, key, config.batch_size)
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, *batch)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), loss

    (params, state, opt_state), losses = lax.scan(step, (params, state, opt_state), keys)
    return eqx.combine(params, static), state, opt_state, losses.mean()


def train(name: str, config: Config, seed: int):
    """The trained model, its state, and losses and accuracies on the way."""
    model_key, train_key, test_key = jr.split(jr.key(seed), 3)
    model, state = make_model(name, config, model_key)
    opt_state = make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    rounds = jr.split(train_key, (config.steps // config.every, config.every))
    history = []
    with tqdm(total=config.steps, desc=f"{name}, seed {seed}", ncols=100) as bar:
        for keys, fresh_key in zip(rounds, jr.split(test_key, len(rounds)), strict=True):
            model, state, opt_state, loss = train_steps(model, state, opt_state, keys, config)
            tokens, sequences = test(model, state, config, fresh_key)
            row = {"loss": loss, "tokens": tokens, "sequences": sequences}
            history.append({key: float(value) for key, value in row.items()})
            bar.set_postfix(history[-1])
            bar.update(config.every)
    return model, state, history


def compare(names: Sequence[str], config: Config, seeds: int) -> dict:
    """For every model: number of parameters, histories (one per seed) and seconds."""
    results = {}
    for name in names:
        start, histories = time.perf_counter(), []
        for seed in range(seeds):
            model, _, history = train(name, config, seed)
            histories.append(history)
        params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        results[name] = {
            "parameters": sum(leaf.size for leaf in params),
            "histories": histories,
            "seconds": time.perf_counter() - start,
        }
    return results


def table(results: dict) -> str:
    """Accuracies after the last step, mean and standard deviation over the seeds."""
    lines = [f"{'model':6} {'parameters':>10} {'tokens':>14} {'sequences':>14} {'seconds':>8}"]
    for name, result in results.items():
        cells = []
        for key in ("tokens", "sequences"):
            last = np.array([100 * history[-1][key] for history in result["histories"]])
            spread = f" ± {last.std(ddof=1):.1f}" if len(last) > 1 else ""
            cells.append(f"{last.mean():.1f}{spread} %")
        lines.append(
            f"{name:6} {result['parameters']:>10} {cells[0]:>14} {cells[1]:>14} "
            f"{result['seconds']:>8.0f}"
        )
    return "\n".join(lines)


def draw(path: Path, results: dict, title: str, config: Config) -> None:
    """Accuracies against training steps, a line per seed."""
    figure = Figure(figsize=(drawing.WIDTH, 3.6))
    figure.suptitle(title)
    guesses = {"tokens": guess(config), "sequences": guess(config) ** config.num_tokens}
    steps = np.arange(config.every, config.steps + 1, config.every)
    for (key, chance), axes in zip(
        guesses.items(), figure.subplots(1, 2, sharey=True), strict=True
    ):
        axes.set(title=f"{key} written right, %", xlabel="step", ylim=(-2, 102))
        axes.axhline(100 * chance, **drawing.GUESS)
        lines = [("a guess", 100 * chance, drawing.GUESS["color"])]
        for (name, result), color in zip(results.items(), drawing.COLORS, strict=False):
            percent = 100 * np.array([[row[key] for row in h] for h in result["histories"]])
            axes.plot(steps, percent.T, color=color, alpha=0.8)
            lines.append((name, percent[:, -1].mean(), color))
        drawing.name_lines(axes, lines)
    drawing.save(figure, path)


def guess(config: Config) -> float:
    """The accuracy, per token, of one who knows the vocabulary."""
    return 1 / (config.vocabulary - 2)


def parse(argv: list[str] | None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=(*MODELS, "all"), default="all", help=f"all: {', '.join(COMPARED)}")
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--out", type=Path, default=Path("runs/selective_copying"), help="folder for the figure")
    for field in dataclasses.fields(Config):
        add("--" + field.name.replace("_", "-"), type=field.type, default=field.default)
    options = vars(parser.parse_args(argv))
    config = Config(**{f.name: options.pop(f.name) for f in dataclasses.fields(Config)})
    given = {"seeds": options["seeds"], **dataclasses.asdict(config)}
    rules = [(option, value > 0, "above 0") for option, value in given.items()]
    rules += [
        ("num_tokens", config.num_tokens <= config.length, f"at most --length, {config.length}"),
        ("vocabulary", config.vocabulary >= 3, "at least 3: noise, marker and data"),
        ("steps", config.steps % max(config.every, 1) == 0, f"a multiple of {config.every}"),
    ]
    for option, holds, rule in rules:
        if not holds:
            name = "--" + option.replace("_", "-")
            parser.error(f"{name} must be {rule}; got {given[option]}. Change or omit it.")
    return options, config


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    names = COMPARED if options["model"] == "all" else [options["model"]]
    results = compare(names, config, options["seeds"])
    title = (
        f"{config.num_tokens} tokens among {config.length}, after {config.steps} steps; "
        f"a guess: {guess(config):.1%} of the tokens"
    )
    figure = options["out"] / "accuracy.png"
    draw(figure, results, title, config)
    print(f"{title}\n{table(results)}\nfigure {figure}")
    return results


if __name__ == "__main__":
    main()
