"""When a draft pays: the time per token with and without one, for drafts that agree more or less.

    python -m benchmarks.speculative
    python -m benchmarks.speculative --blocks 24 --draft-blocks 4 --ahead 2 4 8

Weights are random, so that the sizes alone matter, and how often the two models agree is laid down: a
table is added to their logits by which each token has one successor, in the draft another one for so
many of the tokens. Run it on an otherwise idle machine.
"""

import argparse
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from benchmarks.language_model import VOCABULARY, Sizes, build
from discretax import Timeseries, generate

PROMPT = 16


class WithSuccessors(eqx.Module):
    """A language model that writes, after each token, the one of the table."""

    model: Any
    successors: jax.Array

    def __call__(self, x, state, *, key=None):
        tokens = x.values if isinstance(x, Timeseries) else x
        logits, state = self.model(x, state, key=key)
        at = jnp.arange(len(tokens)), self.successors[tokens]
        return logits.at[at].add(1e4), state


def make(sizes: Sizes, successors: np.ndarray, key: jax.Array) -> tuple[WithSuccessors, Any]:
    model, state = eqx.nn.make_with_state(build)(sizes, key)
    return WithSuccessors(model, jnp.asarray(successors)), state


def milliseconds(write, tokens: int, runs: int) -> tuple[float, np.ndarray]:
    """The median per token, after a first run that compiles, and the text."""
    text = np.asarray(write())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(write())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times) / tokens, text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--mixer", default="Mamba", choices=("Mamba", "Mamba-2"))
    add("--blocks", type=int, default=24)
    add("--width", type=int, default=768)
    add("--draft-blocks", type=int, default=4)
    add("--draft-width", type=int, default=256)
    add("--tokens", type=int, default=64)
    add("--batch", type=int, nargs="+", default=[1, 4])
    add("--ahead", type=int, nargs="+", default=[2, 4, 8])
    add("--agree", type=float, nargs="+", default=[0.5, 0.7, 0.9, 1.0])
    add("--runs", type=int, default=5)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    state_dim = 16 if options.mixer == "Mamba" else 128
    sizes = Sizes(options.mixer, options.width, state_dim, options.blocks)
    draft_sizes = Sizes(options.mixer, options.draft_width, state_dim, options.draft_blocks)
    random = np.random.default_rng(0)
    successors = random.permutation(VOCABULARY)
    model, state = make(sizes, successors, jr.key(0))
    draft, draft_state = make(draft_sizes, successors, jr.key(1))
    print("| batch | agree | ahead | ms per token | without a draft | faster |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch in options.batch:
        prompt = jnp.asarray(random.integers(0, VOCABULARY, (batch, PROMPT)))
        count = batch * options.tokens

        def write(**how):
            return generate(model, state, prompt, options.tokens, temperature=0, **how).tokens  # noqa: B023

        alone, expected = milliseconds(write, count, options.runs)
        for agree in options.agree:
            differs = random.random(VOCABULARY) >= agree
            others = jnp.asarray(np.where(differs, (successors + 1) % VOCABULARY, successors))
            of_draft = eqx.tree_at(lambda draft: draft.successors, draft, others), draft_state
            for ahead in options.ahead:
                drafted, text = milliseconds(
                    lambda: write(draft=of_draft, ahead=ahead),  # noqa: B023
                    count,
                    options.runs,
                )
                assert (text == expected).all(), "a draft changes no text"
                cells = f"{drafted:.2f} | {alone:.2f} | {alone / drafted:.2f}x"
                print(f"| {batch} | {agree} | {ahead} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
