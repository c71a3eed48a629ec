"""Folders with config.json and safetensors: no other kind of file is opened."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
            f"{purpose}, the package `{module}` is needed: `pip install 'discretax[pretrained]'`."
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}.")
    return content


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, which says what the weights belong to.")
    return read_json(path)


class Tensors:
    """The tensors of a folder by name: what their headers say at once, their numbers one by one."""

    def __init__(self, files: Mapping[str, Any]):
        self.file_of = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118
        if len(self.file_of) < sum(len(file.keys()) for file in files.values()):
            raise ValueError(f"a tensor stands in more than one of the files {', '.join(files)}.")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        stored = self.file_of[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(
                f"tensor {name!r} is of type {stored}; supported are {', '.join(DTYPES)}. Quantised "
                "checkpoints must be written out in one of these first."
            )
        return np.dtype(DTYPES[stored])

    def read(self, name: str) -> np.ndarray:
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
            "pytorch_model.bin, are not opened, because they may run any code: let transformers "
            "write safetensors, `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`, "
            "where you trust the file."
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name)
        for name in weight_map.values()
    ):
        raise ValueError(
            f"{folder / INDEX} must have a `weight_map` from tensors to .safetensors files beside it."
        )
    return sorted(set(weight_map.values()))


def write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Each file whole or not at all: a model may be saved over the one that it was loaded from."""
    safetensors = optional("safetensors.numpy", "to write weights")
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f"{name}.partial" for name in (WEIGHTS, CONFIG)}
    # transformers reads nothing without this entry.
    safetensors.save_file(tensors, partial[WEIGHTS], metadata={"format": "pt"})
    partial[CONFIG].write_text(json.dumps(config, indent=2) + "\n")
    # safetensors writes for the owner alone.
    shutil.copymode(partial[CONFIG], partial[WEIGHTS])
    for name, path in partial.items():
        os.replace(path, folder / name)
