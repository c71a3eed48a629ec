"""Where parameters go; and, in another process, training on eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

from discretax.sharding import parameter_sharding, shard_model

pytestmark = pytest.mark.slow

MESH = AbstractMesh((4, 1, 2), ("data", "seq", "model"))
HERE = Path(__file__).parent


def spec(path, shape, rules=(), mesh=MESH, min_size=1):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    return parameter_sharding(mesh, rules, min_size=min_size)(path, leaf).spec


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        # Out of the residual stream along outputs, back along inputs.
        (".blocks[0].channel_mixer.gate_proj.weight", (24, 8), P("model", "data")),
        (".blocks[0].channel_mixer.down_proj.weight", (8, 24), P("data", "model")),
        (".blocks[0].sequence_mixer.B_re", (16, 8), P("model", "data")),
        (".blocks[0].sequence_mixer.C", (8, 16, 2), P("data", "model", None)),
        ("backbone.layers.0.mlp_block.up_proj.weight", (24, 8), P("model", "data")),
        # The largest axis that divides.
        (".encoder.embedding.weight", (50, 8), P(None, "data")),
        (".encoder.embedding.weight", (52, 8), P("data", None)),
        (".head.weight", (8, 8), P("data", None)),
        (".norm.weight", (8,), P("data")),
        # What does not divide stays whole.
        (".norm.weight", (6,), P(None)),
        (".blocks[0].channel_mixer.gate_proj.weight", (9, 8), P(None, "data")),
        ("[0].count", (), P()),
        # What every sample reads.
        (".blocks[0].sequence_mixer.A_log", (8, 16), P(None, None)),
        (".blocks[0].sequence_mixer.rg_lru.Lambda", (8,), P(None)),
    ],
)
def test_the_places_of_parameters(path, shape, expected):
    assert spec(path, shape) == expected
    moments = f"[0].inner_states['regular'].inner_state[0].mu{path}"
    assert spec(moments, shape) == expected


def test_small_parameters_stay_whole():
    assert spec("w1.weight", (8, 8), min_size=65) == P(None, None)
    assert spec("w1.weight", (8, 8), min_size=64) == P("model", "data")


def test_a_mesh_of_data_alone():
    assert spec("w1.weight", (8, 12), mesh=AbstractMesh((4,), ("data",))) == P(None, "data")


def test_the_first_rule_that_is_found_decides():
    rules = [
        (r"embedding\.weight$", P(("data", "model"), None)),
        (r"w1", P()),
        (r"weight", P("model")),
    ]
    assert spec(".encoder.embedding.weight", (16, 4), rules) == P(("data", "model"), None)
    assert spec(".w1.weight", (16, 4), rules) == P()
    assert spec(".w2.weight", (16, 4), rules, min_size=10**6) == P("model")
    assert spec(".w2.bias", (16,), rules) == P("data")


@pytest.mark.parametrize(
    "rule, message",
    [
        (P("data", "tensor"), r"'w1' splits over 'tensor'; the mesh has the axes 'data', 'seq', "),
        (P(None, "data"), r"axis 1 of \.w1, of size 6, does not divide over 'data' of size 4"),
        (P(("model", "data")), r"axis 0 of \.w1, of size 12, .* 'model' and 'data' of size 8"),
        (P(None, None, "data"), r"the rule for \.w1 splits 3 axes, .* shape \(12, 6\)"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        spec(".w1", (12, 6), [("w1", rule)])


def test_leaves_that_are_no_arrays_stay():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"rate": 0.1, "name": "x", "none": None}
    assert shard_model(tree, mesh) == tree


def test_on_eight_devices():
    flags = os.environ.get("XLA_FLAGS", "")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "eight_devices.py"],
        cwd=HERE,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
