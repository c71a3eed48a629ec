"""How the examples keep a training that may be interrupted: settings, history and arrays in a file."""

import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx


def save(path: Path, settings: dict[str, Any], history: list, trees: Any) -> None:
    """A line of JSON, then the arrays."""
    header = {"config": settings, "history": history}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        eqx.tree_serialise_leaves(file, trees)
    os.replace(unfinished, path)  # in one go: an interruption leaves the old file or the new one


def load(path: Path, settings: dict[str, Any], trees: Any) -> tuple[list, Any]:
    """History and arrays of a run of these settings; `trees` say how the arrays are arranged."""
    require([path])
    with open(path, "rb") as file:
        header = json.loads(file.readline())
        saved = header["config"]
        changed = [k for k in settings if settings[k] != saved.get(k)]
        if changed:
            changes = ", ".join(f"{k}={settings[k]} for {k}={saved.get(k)}" for k in changed)
            raise SystemExit(
                f"--resume needs the settings of the checkpoint {path}; got {changes}. Give the "
                "same ones, or leave --resume out to start anew."
            )
        return header["history"], eqx.tree_deserialise_leaves(file, trees)


def require(paths: list[Path]) -> None:
    """Ends the program if none of them is there."""
    if not any(path.exists() for path in paths):
        raise SystemExit(
            f"--resume needs a checkpoint; found none at {paths[0]}. Leave --resume out to start "
            "anew, or name the folder of the earlier run with --out."
        )
