"""Reading the configurations of published checkpoints (`published/`)."""

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "published"


def published(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())
