"""The example on several meshes: the same losses, killed, resumed and in two processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import imported_example

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def example():
    with imported_example("train_sharded") as module:
        yield module


def start(*options):
    return subprocess.Popen(
        [sys.executable, str(PATH), *SMALL, *map(str, options)],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_both(*options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ("--processes=2", f"--coordinator=127.0.0.1:{port}", *options)
    return [start(f"--process={process}", *shared) for process in range(2)]


def losses(process, returncode=0):
    """By step, and all that was printed."""
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == returncode, printed
    steps = re.findall(r"^step (\d+) loss (\d+\.\d+)$", printed, re.MULTILINE)
    return {int(step): float(loss) for step, loss in steps}, printed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    found, printed = losses(start("--devices=1", f"--out={out}"))
    assert (out / "mesh.png").read_bytes().startswith(b"\x89PNG")
    assert f"figure {out / 'mesh.png'}\n" in printed
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

    both = start_both("--devices=2", f"--save={tmp_path}")
    (first, printed), (second, _) = (losses(process) for process in both)
    assert "4 data x 1 seq x 1 model" in printed
    assert first == second
    # What was saved after step 4 may have been cut off when the run was killed.
    assert list(first) in ([3, 4, 5, 6], [5, 6])
    assert_same(first, alone)


def test_sequences_split_over_devices_and_resumed_on_another_mesh(alone, tmp_path):
    killed, printed = losses(
        start("--devices=8", "--seq=4", "--kill=5", f"--save={tmp_path}"), returncode=1
    )
    assert "2 data x 4 seq x 1 model" in printed
    assert list(killed) == [1, 2, 3, 4, 5]
    assert_same(killed, alone)

    resumed, printed = losses(start("--devices=4", "--seq=2", "--model=2", f"--save={tmp_path}"))
    assert "1 data x 2 seq x 2 model" in printed
    assert list(resumed) in ([3, 4, 5, 6], [5, 6])
    assert_same(resumed, alone)


def test_two_processes_share_a_sequence(alone):
    both = start_both("--devices=1", "--seq=2")
    (first, printed), (second, _) = map(losses, both)
    assert "1 data x 2 seq x 1 model" in printed
    assert first == second
    assert_same(first, alone)


def test_mamba_split_over_devices():
    """Whose convolution needs samples of the device before."""
    both = [
        start(*options, "--mixer=mamba")
        for options in (["--devices=1"], ["--devices=8", "--seq=4"])
    ]
    (expected, _), (found, _) = map(losses, both)
    assert list(found) == list(expected)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--seq=5", "--seq must be a divisor of the 12 samples of a sequence; got 5"),
        ("--model=0", "--model must be above 0; got 0"),
        ("--steps=-1", "--steps must be above 0; got -1"),
        ("--out=x --processes=2", "--processes must be 1 with --out"),
        ("--process=1", "--process must be below --processes, 1; got 1"),
        (
            "--mixer=griffin --seq=4",
            "--seq must be 1 for griffin: attention cannot be split in time yet, lru and mamba can",
        ),
    ],
)
def test_settings_out_of_range_are_refused(example, capsys, option, rule):
    with pytest.raises(SystemExit, match="2"):
        example.main([*SMALL, *option.split()])
    assert rule in capsys.readouterr().err
