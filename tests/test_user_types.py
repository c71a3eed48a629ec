"""What users write, read by a type checker: it has nothing to say, and needs no comment to be silent."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from test_docs import BLOCK, ROOT

pytestmark = pytest.mark.slow

PYRIGHT = shutil.which("pyright")
PAGES = ("README.md", "docs/index.md", "docs/getting-started.md", "docs/missing-values.md")
TYPICAL = """
import discretax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from discretax import Timeseries
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU


def make_model(key: jax.Array) -> discretax.Sequential:
    encoder_key, lru_key, head_key = jr.split(key, 3)
    return discretax.Sequential(
        encoder=LinearEncoder(in_features=1, out_features=8, key=encoder_key),
        model=LRU(hidden_dim=8, key=lru_key),
        head=ClassificationHead(in_features=8, out_features=2, key=head_key),
    )


def in_a_list(key: jax.Array):
    return discretax.Sequential([LinearEncoder(1, 8, key=key), LRU(hidden_dim=8, key=key)])


model, state = eqx.nn.make_with_state(make_model)(jr.key(0))
model, state = eqx.nn.make_with_state(in_a_list)(jr.key(0))
key = jr.key(1)
for x in (jnp.zeros((5, 1)), np.zeros((5, 1)), Timeseries(np.zeros((5, 1)), length=3)):
    y, state = model(x, state)
    y, state = model(x, state, key)
    y, state = model(x, state, key=key)
    print(y.shape, y[0])
front: discretax.Sequential = model[:2]
print(model["head"].pooled_linear, model[0].linear, model.layers[1].blocks, len(front))
model = eqx.tree_at(lambda model: model["encoder"].linear.weight, model, jnp.zeros((8, 1)))


def loss(
    model: discretax.Sequential, state: eqx.nn.State, x: Timeseries | jax.Array, labels: jax.Array
) -> tuple[jax.Array, eqx.nn.State]:
    log_probs, state = discretax.batched(model)(x, state, key=key)
    return -log_probs[jnp.arange(len(x)), labels].mean(), state


batch = discretax.pad([np.zeros((5, 1)), np.zeros((3, 1))], multiple_of=8)
(value, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(
    model, state, batch, jnp.zeros(len(batch), int)
)
by_hand = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
y, state = by_hand(batch, state, key=jr.split(key, len(batch)))
first: Timeseries = batch[0]
shuffled: Timeseries = batch[jr.permutation(key, len(batch))]
lengths = [one.length for one in batch]
for indices, bucket in discretax.bucket_by_length([np.zeros((5, 1))], batch_size=1):
    print(indices.tolist(), bucket.values.shape)
series = Timeseries.from_timestamps(np.zeros((3, 1)), np.array([0, 1, 4]), interval=1)
print(series.map_values(jnp.negative).values, discretax.drop_missing(series).length)

evaluate = eqx.nn.inference_mode(model)
live = discretax.streaming_mode(evaluate)
stream = discretax.inference_state(model, state, batch_size=2)
answer, stream = discretax.batched(live)(jnp.zeros((2, 5, 1)), stream)
print(answer.argmax(axis=1))

lru, lru_state = eqx.nn.make_with_state(LRU)(hidden_dim=8, key=key)
y, lru_state = lru(jnp.zeros((5, 8)), lru_state)
z, lru_state = lru(Timeseries(jnp.zeros((5, 8)), length=3), lru_state, key)
print(y.shape, z.values)
"""
WRONG = TYPICAL.replace("front:", "model('five samples', state)\nmodel(x)\nfront:")


@pytest.mark.skipif(PYRIGHT is None, reason="pyright is not installed")
def test_types_of_what_users_write(tmp_path):
    files = {"typical": TYPICAL, "wrong": WRONG}
    for page in PAGES:
        blocks = BLOCK.findall((ROOT / page).read_text())
        files[page.replace("/", "_").replace("-", "_").removesuffix(".md")] = "\n".join(blocks)
    for name, code in files.items():
        assert "# type:" not in code and "# pyright:" not in code
        (tmp_path / f"{name}.py").write_text(code)
    config = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [str(PYRIGHT), "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files)
    found = {name: [] for name in files}
    for problem in report["generalDiagnostics"]:
        line = problem["range"]["start"]["line"] + 1
        name = pathlib.Path(problem["file"]).stem
        found[name].append(f"line {line}: {problem['message']}")
    wrong = found.pop("wrong")
    assert not any(found.values()), found
    assert len(wrong) == 2, wrong  # it does read the types
