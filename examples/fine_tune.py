"""Teaches a trained language model a new text, by a low-rank part beside its weights (LoRA).

    python examples/language_model.py --text source --save runs/source   # a model of Python's source
    python examples/fine_tune.py runs/source                             # learns its documentation
    python examples/fine_tune.py ~/mamba-130m-hf --batch-size 1          # or a published one

The weights W of the maps within the blocks stay as they are; beside each, two thin matrices are
trained, W + U V (arXiv:2106.09685). `--rank 0` trains all weights instead, for comparison. The text
is that of Python's `help("topics")`, of which every eighth topic is held out; reported are the bits
that a byte of those costs, the memory and the time of a step. The low-rank part alone is saved, in
`factors.eqx`, and the whole model with it, in Hugging Face's layout.

FOLDER is in Hugging Face's layout. Its `tokenizer.json` is used if there is one (`pip install
tokenizers`); without it, a model of 256 tokens reads bytes. With `--resume`, a run goes on from
where it was interrupted.
"""

import dataclasses
import functools as ft
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import arguments
import checkpoints
import equinox as eqx
import generate_pretrained
import jax
import jax.numpy as jnp
import jax.random as jr
import language_model
import numpy as np
import optax
import training
from jaxtyping import Array
from tqdm import tqdm

import discretax
from discretax import pretrained

LoRA = list[tuple[Array, Array]]
"""A pair (out, rank), (rank, in) for each weight."""


@dataclasses.dataclass(frozen=True)
class Config:
    rank: int = 8
    steps: int = 300
    batch_size: int = 4
    length: int = 256
    learning_rate: float = 5e-3


class Text(NamedTuple):
    """Tokens of several texts one after the other, and how many bytes they are."""

    tokens: Array
    begins: Array
    bytes: int

    def window(self, where: np.ndarray, length: int) -> discretax.Timeseries:
        """(batch, time): a text knows nothing of the one before it."""
        rows = np.add.outer(where, np.arange(length))
        return discretax.Timeseries(self.tokens[rows], resets=self.begins[rows])


def read_text(texts: list[str], tokenizer: Any) -> Text:
    rows = [tokenizer.encode(text) for text in texts]
    starts = np.cumsum([0, *map(len, rows)])
    begins = np.isin(np.arange(starts[-1]), starts[:-1])
    size = sum(len(text.encode()) for text in texts)
    return Text(jnp.array(np.concatenate(rows), int), jnp.array(begins), size)


def load_texts(tokenizer: Any) -> tuple[Text, Text]:
    """To train with, and every eighth to validate with."""
    train, validation = language_model.parted(language_model.distinct_topics())
    return read_text(train, tokenizer), read_text(validation, tokenizer)


def maps(model) -> list[Array]:
    """The weights of all linear maps within the blocks, (out, in)."""
    is_linear = lambda node: isinstance(node, eqx.nn.Linear)
    nodes = jax.tree.leaves(model.backbone.blocks, is_leaf=is_linear)
    return [node.weight for node in nodes if is_linear(node)]


def start_lora(model, rank: int, key: Array) -> LoRA:
    """Products that are zero, so that the model starts as it is."""
    weights = maps(model)
    keys = jr.split(key, len(weights))

    def pair(weight, key):
        down = jr.normal(key, (rank, weight.shape[1]), weight.dtype) / weight.shape[1] ** 0.5
        return jnp.zeros((weight.shape[0], rank), weight.dtype), down

    return [pair(*each) for each in zip(weights, keys, strict=True)]


def with_lora(model, lora: LoRA):
    """The model whose weights are the sums: one like any other."""
    sums = [weight + up @ down for weight, (up, down) in zip(maps(model), lora, strict=True)]
    return eqx.tree_at(maps, model, sums)


def with_all(model, parameters):
    return eqx.combine(parameters, model)


@eqx.filter_jit
def nats(model, state, text: Text) -> Array:
    loss, _ = eqx.nn.inference_mode(model).loss(
        discretax.Timeseries(text.tokens, resets=text.begins), state
    )
    return loss.total


def bits_per_byte(model, state, text: Text) -> float:
    return float(nats(model, state, text) / jnp.log(2) / text.bytes)


def make_optimiser(config: Config) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        discretax.optim.adamw_cosine(config.learning_rate, config.steps, weight_decay=0.0),
    )


def train_step(put_in, config: Config, trained, opt_state, model, state, window):
    """One step of `trained`, which `put_in(model, trained)` puts into the model, and the loss."""

    def loss_fn(trained):
        losses, _ = discretax.batched(put_in(model, trained).loss)(window, state)
        return losses.total.sum() / losses.count.sum()

    loss, grads = jax.value_and_grad(loss_fn)(trained)
    updates, opt_state = make_optimiser(config).update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state, loss


def windows(text: Text, config: Config, step: int) -> discretax.Timeseries:
    """Drawn anew in every step, so that a resumed run sees what an uninterrupted one does."""
    last = len(text.tokens) - config.length
    if last < 0:
        raise SystemExit(
            f"--length must be at most {len(text.tokens)}, the tokens of the text; got "
            f"{config.length}."
        )
    where = np.random.default_rng(step).integers(last + 1, size=config.batch_size)
    return text.window(where, config.length)


def train(model, state, config: Config, seed: int, text: Text, file: Path, resume: bool):
    """The trained part, and what is told of the run: parameters, bytes and seconds of a step."""
    # Nothing is drawn in inference mode, and dropout is of no use to so few numbers.
    model = eqx.nn.inference_mode(model)
    if config.rank > 0:
        put_in, trained = with_lora, start_lora(model, config.rank, jr.key(seed))
    else:
        put_in, trained = with_all, eqx.filter(model, eqx.is_inexact_array)
    opt_state = make_optimiser(config).init(trained)
    settings, losses = {**dataclasses.asdict(config), "seed": seed}, []
    if resume:
        losses, (trained, opt_state) = checkpoints.load(file, settings, (trained, opt_state))
    first = len(losses)
    arrays, static = eqx.partition(model, eqx.is_array)

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def run(trained, opt_state, arrays, state, window):
        whole = eqx.combine(arrays, static)
        return train_step(put_in, config, trained, opt_state, whole, state, window)

    rest = arrays, state, windows(text, config, 0)
    step = run.lower(trained, opt_state, *rest).compile()
    memory = getattr(step.memory_analysis(), "temp_size_in_bytes", 0) + sum(
        leaf.nbytes for leaf in jax.tree.leaves((trained, opt_state))
    )
    seconds, every = [], -(-config.steps // 6)
    with tqdm(total=config.steps, initial=first, ncols=100) as bar:
        for i in range(first, config.steps):
            window, start = windows(text, config, i), time.perf_counter()
            trained, opt_state, loss = step(trained, opt_state, arrays, state, window)
            losses.append(float(loss))
            seconds.append(time.perf_counter() - start)
            bar.update()
            if (i + 1) % every == 0 or i + 1 == config.steps:
                bar.set_postfix(loss=np.mean(losses[-every:]))
                checkpoints.save(file, settings, losses, (trained, opt_state))
    told = {
        "parameters": training.count(trained),
        "megabytes": memory / 1e6,
        "seconds": float(np.median(seconds)) if seconds else 0.0,
    }
    return put_in(model, trained), trained, told


def rules(config: Config, given: dict):
    yield from arguments.above_zero(given, ("steps", "batch_size", "learning_rate"))
    yield "length", config.length > 1, "at least 2, a token and the next"
    yield "rank", config.rank >= 0, "0, for all weights, or more"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune"))
    return arguments.parse(parser, argv, Config, rules)


def make_tokenizer(folder: Path) -> Any:
    tokenizer = generate_pretrained.make_tokenizer(
        folder, json.loads((folder / "config.json").read_text())
    )
    if isinstance(tokenizer, generate_pretrained.Numbers):
        raise SystemExit(
            f"{folder} must hold tokenizer.json, to make tokens of a text; got none. Download it "
            "with the weights, and `pip install tokenizers`."
        )
    return tokenizer


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    model, state = pretrained.load(options["folder"], dtype=jnp.float32)
    train_text, validation = load_texts(make_tokenizer(options["folder"]))
    before = bits_per_byte(model, state, validation)
    tuned, trained, told = train(
        model,
        state,
        config,
        options["seed"],
        train_text,
        options["out"] / "checkpoint.eqx",
        options["resume"],
    )
    told |= {"before": before, "after": bits_per_byte(tuned, state, validation)}
    eqx.tree_serialise_leaves(options["out"] / "factors.eqx", trained)
    pretrained.save(tuned, options["out"] / "model")
    again, state = pretrained.load(options["out"] / "model")
    assert bits_per_byte(again, state, validation) == told["after"], "not what was saved"
    kind = f"rank {config.rank}" if config.rank else "all weights"
    print(
        f"{kind}: {told['parameters']} of {training.count(model)} parameters trained\n"
        f"bits per byte of the held-out text: {before:.3f} before, {told['after']:.3f} after\n"
        f"a step takes {told['seconds']:.3f} s, and {told['megabytes']:.0f} MB beside the model\n"
        f"saved in {options['out'] / 'model'}"
    )
    return told


if __name__ == "__main__":
    main()
