"""Writes documentation, byte by byte: a language model of the text that comes with Python.

    python examples/language_model.py                           # RG-LRU
    python examples/language_model.py --pattern mamba rglru     # compared
    python examples/language_model.py --prompt "The lambda expression" --save runs/rglru
    python examples/language_model.py --text source --save runs/source   # for fine_tune.py

The text is that of Python's `help("topics")`. Topics that are sections of longer ones are left out;
of the others, every eighth is held out for validation. With `--text source` it is the source of the
standard library's modules, those below 20 kB. The bits that a byte of the held-out part costs are
reported beside what simple models of bytes need: their frequencies, and the compressors of the
standard library, which read the training text first.
"""

import bz2
import dataclasses
import lzma
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import arguments
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import training
from matplotlib.figure import Figure

import discretax
from discretax.architectures import LanguageModel
from discretax.blocks import OffsetRMSNorm
from discretax.channel_mixers import SwiGLU
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    GatedDeltaNetSequenceMixer,
    GriffinSequenceMixer,
    LRUSequenceMixer,
    Mamba2SequenceMixer,
    MambaSequenceMixer,
)

recurrent = partial(GriffinSequenceMixer, num_heads=2)
attention = partial(
    AttentionSequenceMixer, num_heads=2, window=128, rotary_fraction=0.5, out_bias=True
)
delta = partial(GatedDeltaNetSequenceMixer, num_heads=2)
PATTERNS = {
    "rglru": (recurrent,),
    "griffin": (recurrent, recurrent, attention),
    "lru": (partial(LRUSequenceMixer, state_dim=128, r_min=0.5, r_max=0.999),),
    "mamba": (MambaSequenceMixer,),
    "mamba2": (partial(Mamba2SequenceMixer, state_dim=64, norm_eps=1e-6),),
    "gated_delta_net": (delta,),
    "hybrid": (delta, delta, delta, attention),
}
MAMBAS = ("mamba", "mamba2")  # whose mixers are blocks of their own
SAVED = ("rglru", "griffin", "mamba", "mamba2")  # in the formats of published models
START = 0  # the byte before every topic, which is in none


@dataclasses.dataclass(frozen=True)
class Config:
    hidden_dim: int = 128
    num_blocks: int = 3
    steps: int = 1600
    batch_size: int = 4
    length: int = 256
    learning_rate: float = 6e-3
    drop_rate: float = 0.1


def distinct_topics() -> list[str]:
    """Those of which half or more can not be found in longer ones, in the order of their names."""
    kept, seen = [], set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        lines = {line for line in topics[name].splitlines() if len(line) > 40}
        if 2 * len(lines & seen) <= len(lines):
            kept.append(name)
        seen |= lines
    return [topics[name] for name in sorted(kept)]


def sources() -> list[str]:
    """The standard library's modules that lie side by side and have less than 20 kB, by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text("utf-8") for file in files if file.stat().st_size < 20_000]


TEXTS = {"topics": distinct_topics, "source": sources}


def load(name: str = "topics") -> tuple[jax.Array, jax.Array]:
    """The texts to train with and those to validate with, as bytes, each after a `START`."""
    train, validation = parted(TEXTS[name]())
    return packed(train), packed(validation)


def parted(texts: list[str]) -> tuple[list[str], list[str]]:
    """Every eighth is to validate with."""
    return [text for i, text in enumerate(texts) if i % 8], texts[::8]


def packed(texts: list[str]) -> jax.Array:
    return jnp.array(list("".join(chr(START) + text for text in texts).encode()), jnp.uint8)


def floors(train: jax.Array, validation: jax.Array) -> dict[str, float]:
    """Bits per byte of the validation text, for models that no one trains."""
    known, whole = bytes(train), bytes(train) + bytes(validation)
    counts = np.bincount(train[train != START], minlength=256) + 1
    new = validation[validation != START]
    totals = {"frequencies": -np.log2(counts / counts.sum())[new].sum()}
    xz = partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME)
    for name, compress in (("lzma", xz), ("bz2", bz2.compress)):
        totals[name] = 8 * (len(compress(whole)) - len(compress(known)))
    return {name: float(total / len(new)) for name, total in totals.items()}


def batches(tokens: jax.Array, config: Config, seed: int) -> Iterator[jax.Array]:
    """Windows in random order, (batch, time). In each round, every byte is to be predicted once."""
    if len(tokens) < 2 * config.length:
        raise SystemExit(
            f"--length must be at most {len(tokens) // 2}, half of the text; got {config.length}."
        )

    def starts():
        rng = np.random.default_rng(seed)
        stride = config.length - 1  # a window's first byte is there to predict the others from
        while True:
            yield from rng.permutation(
                np.arange(rng.integers(stride), len(tokens) - stride, stride)
            )

    for each in zip(*[starts()] * config.batch_size, strict=True):
        yield tokens[np.add.outer(each, np.arange(config.length))]


@eqx.nn.make_with_state
def make_model(name: str, config: Config, key: jax.Array):
    width = config.hidden_dim
    mlp = partial(SwiGLU, intermediate_dim=2 * width, use_bias=True, non_linearity="gelu")
    recurrent_gemma: dict[str, Any] = {
        "channel_mixer": mlp,
        "norm": partial(OffsetRMSNorm, eps=1e-6),
        "embedding_scale": float(np.asarray(width**0.5).astype(jnp.bfloat16)),
        "soft_cap": 30.0,
    }
    return LanguageModel(
        key,
        vocab_size=256,
        hidden_dim=width,
        num_blocks=config.num_blocks,
        pattern=PATTERNS[name],
        drop_rate=config.drop_rate,
        **({} if name in MAMBAS else recurrent_gemma),
    )


def make_optimiser(config: Config) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        discretax.optim.adamw_cosine(config.learning_rate, config.steps),
    )


def documents(tokens: jax.Array) -> discretax.Timeseries:
    """A topic knows nothing of the one before it."""
    tokens = tokens.astype(int)
    return discretax.Timeseries(tokens, resets=tokens == START)


@eqx.filter_jit
def bits_per_byte(model, state, tokens: jax.Array) -> jax.Array:
    """Over whole topics: what a topic has said so far, however long, can help to predict."""
    loss, _ = eqx.nn.inference_mode(model).loss(documents(tokens), state)
    return loss.total / loss.count / jnp.log(2)


@eqx.filter_jit
def train_step(model, state, opt_state, tokens: jax.Array, key: jax.Array, config: Config):
    """One step, and the training loss in bits per byte."""

    def loss_fn(model, state):
        losses, state = discretax.batched(model.loss)(documents(tokens), state, key=key)
        return losses.total.sum() / losses.count.sum(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = make_optimiser(config).update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), state, opt_state, loss / jnp.log(2)


def train(name: str, config: Config, seed: int, data: tuple[jax.Array, jax.Array]):
    """The trained model, its state, and bits per byte on the way."""
    train_tokens, validation = data
    model_key, drop_key = jr.split(jr.key(seed))
    model, state = make_model(name, config, model_key)
    opt_state = make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    windows, losses, history = batches(train_tokens, config, seed), [], []
    line = "{:8} {:6} {:10.3f} {:10.3f} {:8.0f}"
    print(f"{'':8} {'step':>6} {'training':>10} {'validation':>10} {'seconds':>8}")
    start, every = time.perf_counter(), -(-config.steps // 16)
    for step in range(1, config.steps + 1):
        key = jr.fold_in(drop_key, step)
        model, state, opt_state, loss = train_step(
            model, state, opt_state, next(windows), key, config
        )
        losses.append(loss)
        if (config.steps - step) % every == 0:
            row = {
                "step": step,
                "training": float(np.mean(losses)),
                "validation": float(bits_per_byte(model, state, validation)),
                "seconds": time.perf_counter() - start,
            }
            print(line.format(name, *row.values()), flush=True)
            history.append(row)
            losses.clear()
    return model, state, history


def write(model, state, options: dict) -> str:
    """The prompt at the beginning of a topic, and what the model makes of it."""
    text = discretax.generate(
        model,
        state,
        packed([options["prompt"]]),
        options["write"],
        key=jr.key(options["seed"]),
        temperature=options["temperature"],
        stop_tokens=(START,),
    )
    new = bytes(text.tokens[: text.length].tolist()).rstrip(bytes([START]))
    return options["prompt"] + new.decode(errors="replace")


def table(bounds: dict[str, float], results: dict) -> str:
    """Bits per byte of the validation text, after the last step."""
    lines = [f"{'':12} {'bits per byte':>13} {'parameters':>10} {'seconds':>8}"]
    lines += [f"{name:12} {bits:13.3f}" for name, bits in bounds.items()]
    for name, result in results.items():
        last = result["history"][-1]
        bits, seconds = last["validation"], last["seconds"]
        lines.append(f"{name:12} {bits:13.3f} {result['parameters']:>10} {seconds:>8.0f}")
    return "\n".join(lines)


def draw(path: Path, bounds: dict[str, float], results: dict) -> None:
    """Bits per byte against training steps: thin for the text trained on."""
    figure = Figure(figsize=(drawing.WIDTH, 3.6))
    axes = figure.subplots()
    axes.set(title="bits that a byte of the text costs", xlabel="step", ylim=(0, 5))
    lines = []
    for name in ("frequencies", "lzma", "bz2"):
        axes.axhline(bounds[name], **drawing.GUESS)
        lines.append((name, bounds[name], drawing.GUESS["color"]))
    for (name, result), color in zip(results.items(), drawing.COLORS, strict=False):
        for key, width in (("training", 0.8), ("validation", 2.2)):
            steps, bits = zip(*((row["step"], row[key]) for row in result["history"]), strict=True)
            axes.plot(steps, bits, color=color, linewidth=width)
            lines.append((f"{name}, {key}", bits[-1], color))
    axes.set_xlim(0, None)
    axes.margins(x=0)
    drawing.name_lines(axes, lines)
    drawing.save(figure, path)


def rules(config: Config, given: dict):
    sizes = ("write", "hidden_dim", "num_blocks", "steps", "batch_size", "learning_rate")
    yield from arguments.above_zero(given, sizes)
    yield "length", config.length > 1, "at least 2, a byte and the next"
    is_saved = given["save"] is None or given["pattern"] in ([name] for name in SAVED)
    yield "save", is_saved, f"with one --pattern of {', '.join(SAVED)}, which others can read"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--pattern", choices=tuple(PATTERNS), nargs="+", default=["rglru"])
    add("--text", choices=tuple(TEXTS), default="topics")
    add("--seed", type=int, default=0)
    add("--prompt", default='The "match" statement\n', help="how the text to be written begins")
    add("--write", type=int, default=400, help="how many bytes to write at the end")
    add("--temperature", type=float, default=0.8, help="to write with; 0 for the likeliest byte")
    add("--save", type=Path, help="folder for the weights, in Hugging Face's layout")
    add("--out", type=Path, default=Path("runs/language_model"), help="folder for the figure")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    data, results = load(options["text"]), {}
    bounds = floors(*data)
    sizes = [int((part != START).sum()) for part in data]
    print("{} bytes to train with, {} to validate with".format(*sizes))
    for name in options["pattern"]:
        model, state, history = train(name, config, options["seed"], data)
        results[name] = {"parameters": training.count(model), "history": history}
        print(f"\n----- written by {name} -----\n{write(model, state, options)}\n-----\n")
        if options["save"] is not None:
            ends = {"bos_token_id": START, "eos_token_id": START}
            discretax.pretrained.save(model, options["save"], entries=ends)
    figure = options["out"] / "bits_per_byte.png"
    draw(figure, bounds, results)
    print(f"{table(bounds, results)}\nfigure {figure}")
    return results


if __name__ == "__main__":
    main()
