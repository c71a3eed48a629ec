"""The example on several meshes: the same losses, killed, resumed and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "examples" / "train_sharded.py"
SMALL = (
    "--mixer=lru",
    "--num-blocks=1",
    "--hidden-dim=16",
    "--batch-size=8",
    "--period=4",
    "--vocabulary=8",
    "--steps=6",
    "--every=2",
    "--min-size=128",
    "--learning-rate=0.02",
)


def start(*options):
    return subprocess.Popen(
        [sys.executable, str(PATH), *SMALL, *map(str, options)],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(process, returncode=0):
    """By step, and all that was printed."""
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == returncode, printed
    steps = re.findall(r"^step (\d+) loss (\d+\.\d+)$", printed, re.MULTILINE)
    return {int(step): float(loss) for step, loss in steps}, printed


@pytest.fixture(scope="module")
def alone():
    found, printed = losses(start("--devices=1"))
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < 0.97 * found[1]
    total, held = re.search(r"model: (\d+) parameters, (\d+) on each device", printed).groups()
    assert total == held
    return found


def assert_same(found, alone):
    expected = [alone[step] for step in found]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)


def test_a_killed_run_goes_on_in_two_processes_on_another_mesh(alone, tmp_path):
    killed, printed = losses(
        start("--devices=8", "--model=2", "--kill=5", f"--save={tmp_path}"), returncode=1
    )
    assert list(killed) == [1, 2, 3, 4, 5]
    assert_same(killed, alone)
    found = re.search(
        r"^4 data x 1 seq x 2 model: (\d+) parameters, (\d+) on each device", printed, re.MULTILINE
    )
    assert int(found[2]) < int(found[1]) / 2

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        start(
            "--devices=2",
            "--processes=2",
            f"--process={process}",
            f"--coordinator=127.0.0.1:{port}",
            f"--save={tmp_path}",
        )
        for process in range(2)
    ]
    (first, printed), (second, _) = (losses(process) for process in both)
    assert "4 data x 1 seq x 1 model" in printed
    assert first == second
    # What was saved after step 4 may have been cut off when the run was killed.
    assert list(first) in ([3, 4, 5, 6], [5, 6])
    assert_same(first, alone)


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--model=0", "--model must be above 0; got 0"),
        ("--steps=-1", "--steps must be above 0; got -1"),
        ("--process=1", "--process must be below --processes, 1; got 1"),
    ],
)
def test_settings_out_of_range_are_refused(option, rule):
    printed = losses(start(option), returncode=2)[1]
    assert rule in printed
