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
KINDS = ("tokens", "sequences")  # what can be written right
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


def make_model(name: str, config: Config, key: jax.Array):
    backbone = partial(MODELS[name], num_blocks=config.num_blocks, drop_rate=0.0, norm="rms")
    symbols = config.vocabulary
    return training.make_model(backbone, symbols, symbols, config.hidden_dim, key)


def written(model, state, x: jax.Array, num_tokens: int):
    """Log-probabilities at the markers, (batch, num_tokens, vocabulary), and the state."""
    log_p, state = training.read(model, state, x)
    return log_p[:, -num_tokens:], state


def loss_of(log_p: jax.Array, tokens: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(log_p, tokens[..., None], axis=-1).mean()


def accuracies(log_p: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Fractions of tokens, and of whole sequences, that are written right."""
    right = log_p.argmax(-1) == tokens
    return right.mean(), right.all(-1).mean()


@eqx.filter_jit
def evaluate(model, state, config: Config, key: jax.Array):
    """Accuracies on 1000 fresh sequences."""
    model = eqx.nn.inference_mode(model)
    x, tokens = make_batch(config, key, 1000)
    log_p, _ = written(model, state, x, config.num_tokens)
    return accuracies(log_p, tokens)


def loss_fn(config: Config, model, state, key: jax.Array):
    x, tokens = make_batch(config, key, config.batch_size)
    log_p, state = written(model, state, x, config.num_tokens)
    return loss_of(log_p, tokens), state


def train(config: Config, name: str, seed: int):
    """The trained model, and its losses and accuracies on the way."""

    def test(model, state, key):
        return dict(zip(KINDS, evaluate(model, state, config, key), strict=True))

    make, loss = partial(make_model, name, config), jax.tree_util.Partial(loss_fn, config)
    model, _, history = training.train(name, config, seed, make, loss, test)
    return model, history


def table(results: dict) -> str:
    """Accuracies after the last step, mean and standard deviation over the seeds."""
    lines = [f"{'model':6} {'parameters':>10} {'tokens':>14} {'sequences':>14} {'seconds':>8}"]
    for name, result in results.items():
        ends = [history[-1] for history in result["histories"]]
        cells = [f"{training.percent([end[key] for end in ends])} %" for key in KINDS]
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


def rules(config: Config, given: dict):
    yield from arguments.above_zero(given, ("seeds", *dataclasses.asdict(config)))
    yield "num_tokens", config.num_tokens <= config.length, f"at most --length, {config.length}"
    yield "vocabulary", config.vocabulary >= 3, "at least 3: noise, marker and data"
    yield "steps", config.steps % config.every == 0, f"a multiple of {config.every}"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=(*MODELS, "all"), default="all", help=f"all: {', '.join(COMPARED)}")
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--out", type=Path, default=Path("runs/selective_copying"), help="folder for the figure")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    names = COMPARED if options["model"] == "all" else [options["model"]]
    results = training.compare(names, options["seeds"], partial(train, config))
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
