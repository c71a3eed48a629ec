"""Folders with config.json and safetensors: no other kind of file is opened."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

try:
    import fcntl
except ImportError:  # where there is none, two processes must not save into one folder at once
    fcntl = None

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAVED_WITH = "discretax.config"  # in the metadata of weights saved here: their configuration
PARTIAL = ".partial"
# As the files call them; jax.numpy's names are numpy's with ml_dtypes, which JAX brings along.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def locate(source: str | os.PathLike[str]) -> pathlib.Path:
    """The folder, downloaded if `source` is none but may be a name on the hub."""
    folder = pathlib.Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}, and it is no name on the Hugging Face hub either, "
            "such as 'state-spaces/mamba-130m-hf'. Give the folder with config.json."
        )
    if folder.exists():
        raise ValueError(f"{source!r} is a file. Give the folder with config.json in it.")
    hub = optional("huggingface_hub", f"there is no folder {source!r}, and to download it")
    # Only these: some repositories hold the same weights again in other files.
    wanted = [CONFIG, INDEX, "model.safetensors", "model-*.safetensors"]
    return pathlib.Path(hub.snapshot_download(source, allow_patterns=wanted))


def optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose}, the package `{module}` is needed: `pip install 'discretax-zoo[pretrained]'`."
        ) from error


def parsed(text: str, where: Any) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a JSON object; got {type(content).__name__}.")
    return content


def read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def read_config(folder: pathlib.Path, *, is_needed: bool) -> str:
    """Its text; that of no entries if there is none and none is needed."""
    path = folder / CONFIG
    if not path.is_file():
        if not is_needed:
            return "{}"
        raise FileNotFoundError(f"{folder} has no {CONFIG}, which says what the weights belong to.")
    return read_text(path)


class Tensors:
    """The tensors of a folder by name: what their headers say at once, their numbers one by one."""

    def __init__(self, files: Mapping[str, Any]):
        self.file_of = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118
        if len(self.file_of) < sum(len(file.keys()) for file in files.values()):
            raise ValueError(f"a tensor stands in more than one of the files {', '.join(files)}.")
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self.file_of.items()
        }
        self.names = {name: name for name in self.shapes}
        metadata = [file.metadata() or {} for file in files.values()]
        self.config = next((m[SAVED_WITH] for m in metadata if SAVED_WITH in m), None)

    def rename(self, names: Mapping[str, str]) -> None:
        """Each tensor goes by another name, and those that `names` leaves out are none."""
        self.names = {name: self.names[known_as] for name, known_as in names.items()}
        self.shapes = {name: self.shapes[known_as] for name, known_as in names.items()}

    def dtype(self, name: str) -> np.dtype:
        name = self.names[name]
        stored = self.file_of[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(
                f"tensor {name!r} is of type {stored}; supported are {', '.join(DTYPES)}. Quantised "
                "checkpoints must be written out in one of these first."
            )
        return np.dtype(DTYPES[stored])

    def read(self, name: str) -> np.ndarray:
        self.dtype(name)  # refuses what NumPy may not have
        name = self.names[name]
        return self.file_of[name].get_tensor(name)


@contextlib.contextmanager
def open_tensors(folder: pathlib.Path) -> Iterator[Tensors]:
    """Opens the file, or all shards; refuses what is cut off or lies about its contents."""
    safetensors = optional("safetensors", "to read weights")
    with contextlib.ExitStack() as stack:
        files = {}
        for name in shards(folder):
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{folder} lacks {name}, which {INDEX} names.")
            try:
                files[name] = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is no whole safetensors file: {error}. Fetch or save it again."
                ) from error
        yield Tensors(files)


def shards(folder: pathlib.Path) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}. Pickled weights, such as "
            "a .pth or pytorch_model.bin, are not opened, because they may run any code. Let "
            "transformers write safetensors, `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`, "
            "where you trust the file, or, as for mamba_ssm's and RWKV's, PyTorch and safetensors "
            "alone: "
            "`weights = torch.load('pytorch_model.bin', map_location='cpu', weights_only=True)`, "
            "`safetensors.torch.save_file({k: v.clone() for k, v in weights.items()}, "
            "'model.safetensors')`."
        )
    weight_map = parsed(read_text(folder / INDEX), folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name)
        for name in weight_map.values()
    ):
        raise ValueError(
            f"{folder / INDEX} must have a `weight_map` from tensors to .safetensors files beside it."
        )
    return sorted(set(weight_map.values()))


def write(folder: pathlib.Path, config: str, tensors: dict[str, np.ndarray]) -> None:
    """The two files, each whole or not at all: a model may be saved over the one that it was loaded
    from. Both hold the configuration, so that one beside an older other is recognised."""
    safetensors = optional("safetensors.numpy", "to write weights")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder / PARTIAL) as partial:
        # transformers reads nothing without the first entry.
        metadata = {"format": "pt", SAVED_WITH: config}
        safetensors.save_file(tensors, partial / WEIGHTS, metadata=metadata)
        (partial / CONFIG).write_text(config)
        # safetensors writes for the owner alone.
        shutil.copymode(partial / CONFIG, partial / WEIGHTS)
        # Between the two replacements nothing is to be written out or freed, which takes a while.
        with contextlib.suppress(OSError):  # nothing there, or a file system without links
            os.link(folder / WEIGHTS, partial / "old")
        for name in (WEIGHTS, CONFIG):
            with (partial / name).open("r+b") as file:
                os.fsync(file.fileno())
        for name in (WEIGHTS, CONFIG):
            os.replace(partial / name, folder / name)


@contextlib.contextmanager
def _alone_in(place: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for one process at a time, empty at first and gone in the end; others wait.

    The system takes the lock from a process that is killed. What that one left is removed here.
    """
    lock = place / "lock"
    while True:
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        try:
            file = lock.open("a")
        except FileNotFoundError:  # whoever was here has just removed the folder
            continue
        _wait_for(file)
        if _is_at(lock, file):
            break
        file.close()
    with file:
        try:
            _empty(place, lock)
            yield place
        finally:
            _empty(place, lock)
            lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the next one is in already
                place.rmdir()


def _is_at(path: pathlib.Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait_for(file: IO[str]) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)


def _empty(place: pathlib.Path, lock: pathlib.Path) -> None:
    for path in place.iterdir():
        if path != lock:
            path.unlink()
