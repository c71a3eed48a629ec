"""Writes text with the weights of a published model, token by token.

    python examples/generate_pretrained.py ~/mamba-130m-hf --prompt "Mamba is"
    python examples/language_model.py --save runs/griffin     # or with weights of one's own
    python examples/generate_pretrained.py runs/griffin --prompt "The" --out runs/generated

FOLDER is in Hugging Face's layout: `config.json`, `model.safetensors` or shards of it, and
`tokenizer.json`, which `pip install tokenizers` reads. Without it a model of 256 tokens takes bytes,
and any other takes the numbers of tokens: `--prompt "510 1457 310"`.
"""

import argparse
import codecs
import importlib
import importlib.util
import json
import time
from pathlib import Path

import arguments
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import discretax
from discretax import pretrained

GROUNDS = ("white", drawing.COLORS[4])  # of what was sure, of what came as a surprise


class Tokenizer:
    """That of `tokenizer.json`."""

    def __init__(self, path: Path):
        tokenizers = importlib.import_module("tokenizers")
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self.stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)

    def encode(self, prompt: str) -> list[int]:
        tokens = self.tokenizer.encode(prompt).ids
        for token in tokens:  # what a token is as text depends on those before it
            self.decode(token)
        return tokens

    def decode(self, token: int) -> str:
        """Nothing, for a token that ends amid a character."""
        return self.stream.step(self.tokenizer, token) or ""


class Bytes:
    """Each byte of the text is a token; a text begins with the token `start`, if there is one."""

    def __init__(self, start: int | None):
        self.start = [] if start is None else [start]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, prompt: str) -> list[int]:
        return self.start + list(prompt.encode())

    def decode(self, token: int) -> str:
        return self.decoder.decode(bytes([token]))


class Numbers:
    """Tokens as they are, for want of a tokenizer."""

    def encode(self, prompt: str) -> list[int]:
        try:
            return [int(number) for number in prompt.split()]
        except ValueError:
            raise SystemExit(
                "without a tokenizer, --prompt must be numbers of tokens, such as '510 1457'; got "
                f"{prompt!r}. Put tokenizer.json into the folder and `pip install tokenizers`."
            ) from None

    def decode(self, token: int) -> str:
        return f" {token}"


def make_tokenizer(folder: Path, config: dict) -> Tokenizer | Bytes | Numbers:
    path = folder / "tokenizer.json"
    if path.exists() and importlib.util.find_spec("tokenizers") is not None:
        return Tokenizer(path)
    reason = f"`pip install tokenizers` to read {path}" if path.exists() else f"no {path}"
    if config["vocab_size"] == 256:
        print(f"{reason}: 256 tokens are taken for bytes")
        return Bytes(config.get("bos_token_id"))
    print(f"{reason}: tokens are written as numbers")
    return Numbers()


def stop_tokens(config: dict) -> list[int]:
    """`eos_token_id`, which may be a number, a list or missing."""
    stop = config.get("eos_token_id")
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def surprise(model, state, tokens: list[int]) -> np.ndarray:
    """The bits that each token but the first costs, all read at once."""
    logits, _ = eqx.nn.inference_mode(model)(jnp.array(tokens), state)
    log_p = jax.nn.log_softmax(logits[:-1].astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, jnp.array(tokens[1:])[:, None], axis=1)[:, 0]
    return np.asarray(-chosen / jnp.log(2))


def draw(path: Path, prompt: str, pieces: list[str], bits: np.ndarray, columns: int = 72) -> None:
    """The text, the ground of each token the darker the less the model expected it."""
    letters, row, column = [], 0, 0
    for text, cost in [(prompt, None), *zip(pieces, bits, strict=True)]:
        for letter in text:
            if letter == "\n" or column == columns:
                row, column = row + 1, 0
            if letter != "\n":
                letters.append((letter, row, column, cost))
                column += 1
    figure = Figure(figsize=(drawing.WIDTH, 1 + 0.21 * (row + 1)))
    axes = figure.subplots()
    colors = ScalarMappable(Normalize(0, 8), LinearSegmentedColormap.from_list("", GROUNDS))
    for letter, row, column, cost in letters:
        if cost is not None:
            ground = colors.to_rgba(cost)
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=ground, linewidth=0))
        place, weight = (column + 0.5, row + 0.5), "bold" if cost is None else "normal"
        text = axes.text(*place, letter, size=9.5, family="monospace", weight=weight)
        text.set(ha="center", va="center")
    axes.set(xlim=(0, columns), ylim=(row + 1, 0))
    axes.axis("off")
    label = "bits: how little each token was expected (bold: the prompt)"
    figure.colorbar(colors, ax=axes, location="bottom", label=label, aspect=50, extend="max")
    drawing.save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path)
    add("--prompt", required=True)
    add("--max-new-tokens", type=int, default=100)
    add("--temperature", type=float, default=0.8, help="0 for the likeliest token each time")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
    add("--out", type=Path, help="folder for a figure of what the model was sure of")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> str:
    options = parse(argv)
    start = time.perf_counter()
    model, state = pretrained.load(options.folder, dtype=options.dtype)
    config = json.loads((options.folder / "config.json").read_text())
    tokenizer = make_tokenizer(options.folder, config)
    prompt = tokenizer.encode(options.prompt)
    print(f"{config['model_type']}, loaded in {time.perf_counter() - start:.1f} s\n")

    stops = stop_tokens(config)
    tokens = discretax.stream_tokens(
        model,
        state,
        jnp.array(prompt, int),
        options.max_new_tokens,
        key=jr.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=stops,
    )
    print(options.prompt, end="", flush=True)
    new, pieces, times = [], [], [time.perf_counter()]
    for token in map(int, tokens):
        times.append(time.perf_counter())
        if token not in stops:
            new.append(token)
            pieces.append(tokenizer.decode(token))
            print(pieces[-1], end="", flush=True)
    begin, first, *_, last = times
    count = len(times) - 2
    speed = f", then {count / (last - first):.1f} tokens/s" if count else ""
    print(f"\n\nfirst token after {first - begin:.1f} s, compilation included{speed}")
    if options.out is not None:
        figure = options.out / "text.png"
        bits = surprise(model, state, [*prompt, *new])[len(prompt) - 1 :]
        draw(figure, options.prompt, pieces, bits)
        print(f"figure {figure}")
    return "".join(pieces)


if __name__ == "__main__":
    main()
