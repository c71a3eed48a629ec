"""Subjects in processes of their own, some in environments of their own."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
WORKERS = HERE / "workers"
ENVIRONMENTS = HERE / ".environments"

# What a peer needs that cannot live beside this library, and the Python it asks for.
JAX = f"jax=={importlib.metadata.version('jax')}"
REQUIREMENTS = {
    "discretax_0_3": ("python3.12", ["discretax==0.3.0", "optax", JAX]),
    "memax_0_1": (None, ["memax[equinox]==0.1.1", JAX]),
    "mamba2_jax_1_1": (None, ["mamba2-jax==1.1.2", "equinox", JAX]),
    "ejkernel_0_0_78": (None, ["equinox", JAX]),
    "transformers_torch": (None, ["torch==2.14.1", "transformers==5.24.0"]),
    "mambapy_1_2": (None, ["torch==2.14.1", "mambapy==1.2.0", "safetensors", "numpy"]),
}
# Asks for another version of JAX, but what is measured here runs with this one.
WITHOUT_DEPENDENCIES = {"ejkernel_0_0_78": ["ejkernel==0.0.78"]}


class UnavailableError(Exception):
    """A subject cannot run on this machine; the message says why."""


class Subject:
    """A worker process, which lives no longer than this one."""

    def __init__(self, name: str):
        self.name = name
        self._process = subprocess.Popen(
            [_python(name), str(WORKERS / "run.py"), name],
            env=_environment(name),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, do: str, **arguments) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UnavailableError(f"{self.name} has died, at `{do}`")
        answer = json.loads(line)
        if "failed" in answer:
            raise UnavailableError(f"{self.name}: {answer['failed']}")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def ask_anew(name: str, script: str, **arguments) -> dict:
    """What a script says that a subject's interpreter runs once, knowing nothing yet."""
    done = subprocess.run(
        [_python(name), str(WORKERS / script), name, json.dumps(arguments)],
        env=_environment(name),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UnavailableError(f"{name}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def _environment(name: str) -> dict[str, str]:
    """Without what would have a peer import this library, or have others find less or more compiled
    than a user does."""
    left_out = ["JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"]
    left_out += ["PYTHONPATH"] if name in REQUIREMENTS else []
    return {key: value for key, value in os.environ.items() if key not in left_out}


def _python(name: str) -> str:
    """The interpreter of a subject's environment, which is made if it is not there."""
    if name not in REQUIREMENTS:
        return sys.executable
    wanted, packages = REQUIREMENTS[name]
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return str(python)
    base = shutil.which(wanted) if wanted else sys.executable
    if base is None:
        raise UnavailableError(f"{name} needs {wanted}, which is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    commands = [[base, "-m", "venv", str(folder)], [*install, *packages]]
    if name in WITHOUT_DEPENDENCIES:
        commands.append([*install, "--no-deps", *WITHOUT_DEPENDENCIES[name]])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    (folder / "complete").touch()
    return str(python)


def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="discretax-benchmarks-")
