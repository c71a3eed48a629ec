"""Writes text with the weights of a published model, token by token.

    python examples/generate_pretrained.py ~/mamba-130m-hf --prompt "Mamba is"
    python examples/language_model.py --save runs/griffin     # or with weights of one's own
    python examples/generate_pretrained.py runs/griffin --prompt "The"

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

import jax.numpy as jnp
import jax.random as jr

import discretax
from discretax import pretrained


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--prompt", required=True)
    add("--max-new-tokens", type=int, default=100)
    add("--temperature", type=float, default=0.8, help="0 for the likeliest token each time")
    add("--top-k", type=int)
    add("--top-p", type=float)
    add("--seed", type=int, default=0)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in")
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
    written, times = "", [time.perf_counter()]
    for token in map(int, tokens):
        times.append(time.perf_counter())
        if token not in stops:
            text = tokenizer.decode(token)
            written += text
            print(text, end="", flush=True)
    begin, first, *_, last = times
    count = len(times) - 2
    speed = f", then {count / (last - first):.1f} tokens/s" if count else ""
    print(f"\n\nfirst token after {first - begin:.1f} s, compilation included{speed}")
    return written


if __name__ == "__main__":
    main()
