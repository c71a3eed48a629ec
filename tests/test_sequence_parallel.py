"""Sequences split along time over devices: the tests of `split_in_time.py`, on eight of them."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parent


def test_on_eight_devices():
    """In a process of their own: how many devices the CPU is taken for is fixed when JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "split_in_time.py"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
