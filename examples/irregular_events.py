"""Draws a gun or points a finger? Told from what is left when most samples of the motion are lost.

    python examples/irregular_events.py                    # S5
    python examples/irregular_events.py --model mamba
    python examples/irregular_events.py --dataset JapaneseVowels --dropped 0.5
    python examples/irregular_events.py --validate --seeds 5

A model in continuous time can be told how much time passed before each sample:
`Timeseries(values, timesteps=gaps, length=length)`. This shows what that is worth. Samples are
dropped at random, and the model is told the true gaps between those that are left, or their mean,
which tells the rate but not when, or nothing, and takes them for one interval each. It is trained
on thinned series, or on whole ones and meets thinned ones only in the test.

GunPoint: where a hand is, 150 steps of one channel, 50 motions to train with and 150 to test with;
a guess is right half the time. An S5 trained on whole series needs the gaps: without them it
guesses, the mean repairs most of that, and the true ones are better still. One trained on thinned
series has learned their rate, and what the gaps then gain is within the spread of the seeds.
JapaneseVowels, which `classify_timeseries.py` describes, is the counterexample: a vowel sounds the
same throughout, and the gaps gain next to nothing. So it is with `mamba` on GunPoint, where only
the decay sees the gaps, and the convolution and the input's steps do not.

Both sets come with `pip install -e ".[examples]"`. `--validate` holds out a fifth of the
training set, by seed, and does not look at the test set: by it GunPoint and the settings were
chosen, for S5. `s4d`, whose system is made anew for every feature and gap, takes ten times as long.
"""

import dataclasses
import functools as ft
from pathlib import Path

import arguments
import classify_timeseries
import drawing
import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import training
from classify_timeseries import Config, make_optimiser, predict, train_step
from matplotlib.figure import Figure
from series import load
from tqdm import tqdm

from discretax import Sequential, Timeseries, drop_missing
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import S4D, S5, Mamba

MODELS = {
    "s5": S5,
    "s4d": S4D,
    "mamba": ft.partial(Mamba, event=True),  # otherwise the input chooses the steps
}
DEFAULTS = {
    "GunPoint": Config(32, 2, 32, 0.1, epochs=100, batch_size=10, learning_rate=1e-2),
    "JapaneseVowels": classify_timeseries.DEFAULTS["JapaneseVowels"],
}
TRAINED_ON = ("thinned", "whole")
GAPS = ("true", "mean", "none")
FRACTIONS = (0.0, 0.3, 0.5, 0.7, 0.9)

Results = dict[tuple[str, str], dict[float, list[float]]]
"""By what the model was trained on, the gaps it was told and the fraction dropped in the test: the
accuracies, one per seed."""


def thin(x: Timeseries, dropped: float, rng: np.random.Generator) -> Timeseries:
    """Drops each sample with probability `dropped`; one at least is kept of every series.

    A series begins one interval before its first sample: with nothing dropped every gap is one,
    which is what a model takes them for that is told nothing. Counted from the first sample
    instead, its gap would be zero, and the zero-order hold, which holds a sample over the gap
    before it, would lose it.
    """
    lost = np.ones(x.values.shape[:2], bool)
    for row, length in zip(lost, np.asarray(x.length), strict=True):
        kept = np.flatnonzero(rng.random(length) >= dropped)
        row[kept if len(kept) else rng.integers(length, size=1)] = False
    return drop_missing(x, lost)


def tell(x: Timeseries, gaps: str) -> Timeseries:
    """`x` with its true gaps, with their mean in each place, or with none."""
    timesteps = None
    if gaps == "true":
        timesteps = x.timesteps
    elif gaps == "mean":
        true, length = np.asarray(x.timesteps), np.asarray(x.length)
        valid = np.arange(true.shape[1]) < length[:, None]
        mean = (true * valid).sum(1) / length
        timesteps = np.broadcast_to(mean[:, None], true.shape).astype(np.float32)
    return Timeseries(x.values, timesteps, x.length)


@eqx.nn.make_with_state
def make_model(name: str, config: Config, channels: int, classes: int, key: jax.Array):
    width, keys = config.hidden_dim, jr.split(key, 3)
    encoder = LinearEncoder(in_features=channels, out_features=width, key=keys[0])
    model = MODELS[name](
        keys[1],
        hidden_dim=width,
        num_blocks=config.num_blocks,
        state_dim=config.state_dim,
        drop_rate=config.drop_rate,
    )
    head = ClassificationHead(in_features=width, out_features=classes, key=keys[2])
    return Sequential(encoder=encoder, model=model, head=head)


def train(name: str, config: Config, seed: int, x: Timeseries, labels: jax.Array):
    """The trained model, its state, and the training loss of every epoch."""
    steps, losses = len(labels) // config.batch_size, []
    model_key, train_key = jr.split(jr.key(seed))
    channels, classes = x.values.shape[-1], int(labels.max()) + 1
    model, state = make_model(name, config, channels, classes, model_key)
    opt_state = make_optimiser(config, len(labels)).init(eqx.filter(model, eqx.is_inexact_array))
    for epoch_key in jr.split(train_key, config.epochs):
        shuffle_key, *step_keys = jr.split(epoch_key, steps + 1)
        order = jr.permutation(shuffle_key, len(labels))[: steps * config.batch_size]
        epoch = []
        for batch, key in zip(order.reshape(steps, -1), step_keys, strict=True):
            model, state, opt_state, loss = train_step(
                model, state, opt_state, (x, labels), batch, key, config
            )
            epoch.append(loss)
        losses.append(float(np.mean(epoch)))
    return model, state, losses


def compare(
    name: str, dataset: str, config: Config, dropped: float, seeds: int, validate: bool
) -> Results:
    fractions = sorted({*FRACTIONS, dropped})
    results = {(on, gaps): {f: [] for f in fractions} for on in TRAINED_ON for gaps in GAPS}
    runs = [(seed, on) for seed in range(seeds) for on in TRAINED_ON]
    for seed, on in tqdm(runs, desc=name, ncols=100):
        (x, labels), test_data = load(dataset, held_out=seed if validate else None)
        rng = np.random.default_rng(seed)
        thinned = thin(x, dropped, rng)
        tests = {fraction: thin(test_data[0], fraction, rng) for fraction in fractions}
        # The gaps of whole series are all one, whether told or not.
        trained = train(name, config, seed, x, labels) if on == "whole" else None
        for gaps in GAPS:
            model, state, _ = trained or train(name, config, seed, tell(thinned, gaps), labels)
            for fraction, test_x in tests.items():
                answers = predict(model, state, tell(test_x, gaps)).argmax(1)
                accuracy = float((answers == test_data[1]).mean())
                results[on, gaps][fraction].append(accuracy)
    return results


def table(results: Results) -> str:
    """Accuracies in percent, mean and standard deviation over the seeds."""
    fractions = next(iter(results.values()))
    header = "".join(f"{f'{100 * fraction:.0f} % dropped':>15}" for fraction in fractions)
    lines = [f"{'trained on':10}  {'gaps':5}{header}"]
    for (on, gaps), accuracies in results.items():
        row = "".join(f"{training.percent(accuracies[fraction]):>15}" for fraction in fractions)
        lines.append(f"{on:10}  {gaps:5}{row}")
    return "\n".join(lines)


def gains(results: Results, dropped: float) -> str:
    """What the true gaps gain, in percentage points, seed by seed."""
    lines = [f"what the true gaps gain, {100 * dropped:.0f} % dropped, in points"]
    for on in TRAINED_ON:
        for gaps in GAPS[1:]:
            true, other = (np.array(results[on, told][dropped]) for told in ("true", gaps))
            gain = true - other
            lines.append(
                f"trained on {on:8} over {gaps:5}{training.percent(gain):>15}"
                f"   more in {(gain > 0).sum()} of {len(gain)} seeds"
            )
    return "\n".join(lines)


def draw(path: Path, results: Results, dropped: float, guess: float, title: str) -> None:
    """Accuracy against the fraction dropped in the test: a line for the mean, a dot per seed."""
    figure = Figure(figsize=(drawing.WIDTH, 3.6))
    figure.suptitle(title)
    titles = {
        "thinned": f"trained with {100 * dropped:.0f} % dropped",
        "whole": "trained on whole series",
    }
    labels = {"true": "true gaps", "mean": "mean gap", "none": "no gaps"}
    for axes, on in zip(figure.subplots(1, 2, sharey=True), ("whole", "thinned"), strict=True):
        axes.set(title=titles[on], xlabel="samples dropped in the test, %", ylim=(0, 104))
        axes.axhline(100 * guess, **drawing.GUESS)
        lines = []
        for gaps, color in zip(GAPS, drawing.COLORS, strict=False):
            fractions = list(results[on, gaps])
            percent = 100 * np.array([results[on, gaps][fraction] for fraction in fractions])
            dropped_percent = 100 * np.array(fractions)
            axes.plot(dropped_percent, percent, "o", color=color, alpha=0.4, markersize=4)
            axes.plot(dropped_percent, percent.mean(1), color=color)
            lines.append((labels[gaps], percent[-1].mean(), color))
        drawing.name_lines(axes, [*lines, ("a guess", 100 * guess, drawing.GUESS["color"])])
    figure.axes[0].set_ylabel("test accuracy, %")
    drawing.save(figure, path)


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=tuple(MODELS), default="s5")
    add("--dataset", choices=tuple(DEFAULTS), default="GunPoint")
    add("--dropped", type=float, default=0.7, help="fraction of the samples, in training")
    add("--seeds", type=int, default=3, help="how many times to thin and to train")
    add("--validate", action="store_true", help="hold out a fifth of the training set, by seed")
    add("--epochs", type=int, help="chosen for the dataset")
    add("--out", type=Path, default=Path("runs/irregular"), help="folder for the figure")
    options = parser.parse_args(argv)
    config = DEFAULTS[options.dataset]
    if options.epochs is not None:
        config = dataclasses.replace(config, epochs=options.epochs)
    given = {"seeds": options.seeds, "epochs": config.epochs, "dropped": options.dropped}
    fraction = ("dropped", 0 < options.dropped < 1, "in (0, 1)")
    rules = [*arguments.above_zero(given, ("seeds", "epochs")), fraction]
    arguments.refuse(parser, given, rules)
    return options, config


def main(argv: list[str] | None = None) -> Results:
    options, config = parse(argv)
    name, dataset, dropped, seeds = options.model, options.dataset, options.dropped, options.seeds
    results = compare(name, dataset, config, dropped, seeds, options.validate)
    test_set = "held-out fifths of its training set" if options.validate else "its test set"
    title = f"{name}, {dataset}, tested on {test_set}, seeds: {seeds}"
    figure = options.out / f"{dataset}_{name}.png"
    labels = load(dataset, held_out=0 if options.validate else None)[1][1]
    guess = float(np.bincount(labels).max() / len(labels))
    draw(figure, results, dropped, guess, title)
    print(f"{title}\n{table(results)}\n\n{gains(results, dropped)}\nfigure {figure}")
    return results


if __name__ == "__main__":
    main()
