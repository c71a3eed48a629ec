"""Tests that need eight devices, which `test_sharding.py` runs with as many made of the CPU."""

import functools as ft
import math
import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, draw, parameters
from jax.sharding import NamedSharding, PartitionSpec as P

import discretax
from discretax.architectures import LanguageModel
from discretax.channel_mixers import SwiGLU
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import LRU
from discretax.ops import (
    delta_rule,
    diagonal_ssm,
    gated_linear_attention,
    linear_recurrence,
    mlstm,
    oscillator_ssm,
    selective_scan,
    ssd,
)
from discretax.ops._attention import masked_attention
from discretax.sequence_mixers import (
    AttentionSequenceMixer,
    GriffinSequenceMixer,
    MambaSequenceMixer,
)
from discretax.sharding import (
    gather_model,
    make_mesh,
    parameter_sharding,
    shard_batch,
    shard_model,
)

MIN_SIZE = 128
BATCH, TIME = 16, 6


class Collective(NamedTuple):
    kind: str
    in_loop: bool
    shapes: list[tuple[int, ...]]  # of what each device has of it afterwards

    @property
    def size(self):
        return sum(map(math.prod, self.shapes))


def collectives(compiled_text):
    found = []
    for line in compiled_text.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
            r"(?:-start)?\(",
            line,
        )
        if match:
            shapes = [
                tuple(int(n) for n in shape.split(",") if n)
                for shape in re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            ]
            found.append(Collective(match[2], "/while/" in line, shapes))
    return found


@eqx.nn.make_with_state
def classifier(key):
    """With batch norm, whose mean is that of all devices."""
    encoder_key, model_key, head_key = jr.split(key, 3)
    return eqx.nn.Sequential(
        [
            LinearEncoder(1, encoder_key, out_features=16),
            LRU(model_key, hidden_dim=16, num_blocks=1, state_dim=16, drop_rate=0.0),
            ClassificationHead(16, 2, head_key),
        ]
    )


def classifier_loss(model, state, batch):
    log_p, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        batch["x"], state
    )
    return -jnp.take_along_axis(log_p, batch["label"][:, None], 1).mean(), state


recurrent = ft.partial(GriffinSequenceMixer, num_heads=2)
attention = ft.partial(AttentionSequenceMixer, num_heads=2, window=4)


def language_model(pattern, channel_mixer=None):
    return eqx.nn.make_with_state(
        lambda key: LanguageModel(
            key,
            vocab_size=24,
            hidden_dim=16,
            num_blocks=len(pattern),
            pattern=pattern,
            channel_mixer=channel_mixer,
        )
    )


def language_loss(model, state, batch):
    losses, state = jax.vmap(model.loss, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
        batch["tokens"], state
    )
    return losses.total.sum() / losses.count.sum(), state


MODELS = {
    "lru": (classifier, classifier_loss),
    "mamba": (language_model((MambaSequenceMixer,)), language_loss),
    "griffin": (
        language_model((recurrent, attention), ft.partial(SwiGLU, intermediate_dim=32)),
        language_loss,
    ),
}
make_mamba = MODELS["mamba"][0]


def batches(steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield {
            "x": rng.normal(size=(BATCH, TIME, 1)).astype(np.float32),
            "label": rng.integers(2, size=BATCH),
            "tokens": rng.integers(24, size=(BATCH, TIME)),
        }


def train(name, mesh):
    """Losses of three steps, what is trained, and what the compiler made of the step."""
    make, loss_fn = MODELS[name]
    optimiser = optax.adam(1e-2)
    model, state = make(jr.key(0))
    trained = (model, state, optimiser.init(eqx.filter(model, eqx.is_inexact_array)))
    place = lambda tree: shard_model(tree, mesh, min_size=MIN_SIZE)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, trained):
        model, state, opt_state = trained
        gathered = lambda model, *args: loss_fn(gather_model(model, mesh, min_size=MIN_SIZE), *args)
        (loss, state), grads = eqx.filter_value_and_grad(gathered, has_aux=True)(
            model, state, batch
        )
        updates, opt_state = optimiser.update(grads, opt_state)
        return place((eqx.apply_updates(model, updates), state, opt_state)), loss

    trained, losses, text = place(trained), [], None
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        for batch in batches(3):
            batch = shard_batch(batch, mesh)
            if text is None:
                text = step.lower(batch, trained).compile().compiled.as_text()
            trained, loss = step(batch, trained)
            losses.append(float(loss))
    return losses, trained, collectives(text)


@pytest.mark.parametrize(
    "name, axes",
    [("lru", {"data": 4, "model": 2}), ("mamba", {"data": 8}), ("griffin", {"model": 2})],
)
def test_training_gives_the_same_numbers_on_any_mesh(name, axes):
    losses, alone, sent_alone = train(name, make_mesh(devices=jax.devices()[:1]))
    assert not sent_alone
    mesh = make_mesh(**axes)
    sharded_losses, trained, sent = train(name, mesh)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    # The running statistics of batch norm among them. Adam divides small gradients by themselves.
    assert_close(trained[1], alone[1])
    assert_close(trained[0], alone[0], rtol=2e-4)

    assert not any(c.in_loop for c in sent)
    if name == "mamba":
        # Every parameter that is split is gathered once, and every gradient summed once, with the
        # loss and the number of tokens; that of the embedding twice: it is the logits' weight too.
        sizes = [leaf.size for leaf in parameters(alone[0]).values()]
        params = parameters(trained[0]).values()
        split = sum(leaf.size for leaf in params if not leaf.sharding.is_fully_replicated)
        assert sum(c.size for c in sent if c.kind == "all-gather") == split
        reduced = sum(c.size for c in sent if c.kind == "all-reduce")
        embedding = alone[0].encoder.embedding.weight.size
        assert sum(sizes) <= reduced <= sum(sizes) + embedding + 2
        assert {c.kind for c in sent} == {"all-gather", "all-reduce"}

    if name == "griffin":
        # Sums over "model": forward after each of the four maps back to the residual stream,
        # backward before each of the nine from it, linear_x and _y, gate and up, q, k and v.
        stream = (BATCH // mesh.shape["data"], TIME, 16)
        sums = [shape for c in sent if c.kind == "all-reduce" for shape in c.shapes]
        assert sums.count(stream) == 4 + 9

    params, moments = parameters(trained[0]), parameters(trained[2])
    split = {path for path, leaf in params.items() if leaf.size >= MIN_SIZE}
    assert len(split) >= 5
    for path in split:
        for leaf in (params[path], *(m for name, m in moments.items() if name.endswith(path))):
            (part,) = {shard.data.size for shard in leaf.addressable_shards}
            whole = "A_log" in path
            assert part <= (leaf.size if whole else leaf.size // mesh.shape["data"])
    wide = [path for path in split if re.search(r"w1|gate_proj|q_proj|linear_x|linear_out", path)]
    for path in wide:
        assert params[path].addressable_shards[0].data.size == params[path].size // 8


def shared(*shape, seed=9):
    return jnp.abs(draw(*shape, seed=seed))


OPS = {
    "selective_scan": (
        lambda A, x: selective_scan(x[0], jnp.abs(x[0]), -A, x[1], x[1], chunk_size=3)[0],
        shared(4, 2),
        (draw(8, TIME, 4), draw(8, TIME, 2)),
    ),
    "linear_recurrence": (lambda a, x: linear_recurrence(a, x), shared(4), draw(8, TIME, 4)),
    "linear_recurrence, associative": (
        lambda a, x: linear_recurrence(a[None] + x, x, implementation="associative"),
        shared(4),
        draw(8, TIME, 4),
    ),
    "diagonal_ssm": (
        lambda p, x: diagonal_ssm(*p, x, jnp.zeros((2, 3)))[0],
        (shared(2, 3) / 2, shared(2, 3, 4), shared(4, 2, 3)),
        draw(8, TIME, 4),
    ),
    "oscillator_ssm": (
        lambda p, x: oscillator_ssm(*p, x, jnp.zeros((2, 2, 3)))[0],
        (shared(2, 2, 3) / 2, shared(2, 3), shared(2, 3, 4), shared(4, 2, 3)),
        draw(8, TIME, 4),
    ),
    "attention": (
        lambda W, x: masked_attention(
            *((x @ w).reshape(TIME, 2, 2) for w in W), jnp.tri(TIME, dtype=bool), 2**-0.5
        ),
        shared(3, 4, 4),
        draw(8, TIME, 4),
    ),
    "ssd": (
        lambda A, x: ssd(x[0], jnp.abs(x[0][..., 0]), -A, x[1], x[1], chunk_size=3)[0],
        shared(2),
        (draw(8, TIME, 2, 2), draw(8, TIME, 1, 2)),
    ),
    "gated_linear_attention": (
        lambda a, x: gated_linear_attention(x, x, x, None, -a, chunk_size=3)[0],
        shared(2),
        draw(8, TIME, 2, 4),
    ),
    "delta_rule": (
        lambda a, x: delta_rule(x, x, x, None, -a * jnp.abs(x), chunk_size=4)[0],
        shared(1, 2, 4),
        draw(8, TIME, 2, 4) / 2,
    ),
    "mlstm": (
        lambda a, x: mlstm(x, x, x, x[..., 0], a - x[..., 1], chunk_size=3)[0],
        shared(1, 2),
        draw(8, TIME, 2, 4),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_recurrences_send_nothing_over_the_data(name):
    """Forward and backward: but for the sum of the shared parameters' gradients, at the end."""
    apply, params, x = OPS[name]
    mesh = make_mesh()

    def gradients(params, x):
        total = lambda params, x: sum(
            (leaf**2).sum() for leaf in jax.tree.leaves(jax.vmap(apply, (None, 0))(params, x))
        )
        return jax.grad(total, argnums=(0, 1))(params, x)

    split = shard_batch(x, mesh)
    whole = shard_model(params, mesh)
    spread = jax.tree.map(lambda leaf: leaf.sharding, (whole, split))
    compiled = jax.jit(gradients, out_shardings=spread).lower(whole, split).compile()
    sent = collectives(compiled.as_text())
    assert {c.kind for c in sent} == {"all-reduce"}
    in_loops = sum(c.size for c in sent if c.in_loop)
    assert in_loops <= (len(params) if name == "ssd" else 0)  # ssd sums that of A chunk by chunk
    # Matrices and forces of oscillators are summed for both parts of the complex numbers.
    twice = params[:2] if name == "oscillator_ssm" else ()
    due = sum(leaf.size for leaf in jax.tree.leaves((params, twice)))
    assert sum(c.size for c in sent) == due
    assert_close(compiled(whole, split), jax.jit(gradients)(params, x))


WIDE = 16  # channels, of which each of two devices takes half


@pytest.mark.parametrize("name", ["linear_recurrence", "selective_scan"])
def test_channels_split_over_the_model_send_sums_alone(name):
    """Forward nothing. Backward the cotangents of what all channels or all examples share."""
    mesh = make_mesh(model=2)
    if name == "linear_recurrence":
        apply = linear_recurrence
        params, inputs = (shared(WIDE),), (draw(8, TIME, WIDE),)
        of_params, of_inputs, sums = (P("model"),), (P("data", None, "model"),), WIDE // 2
    else:
        apply = lambda A, x, B: selective_scan(x, jnp.abs(x), -A, B, B)[0]
        params, inputs = (shared(WIDE, 2),), (draw(8, TIME, WIDE), draw(8, TIME, 2))
        of_params = (P("model"),)
        of_inputs = P("data", None, "model"), P("data")
        # Of the gradient of A on its half of the channels, and of two examples' B and C.
        sums = WIDE + 2 * 2 * TIME * 2

    def forward(params, inputs):
        return jax.vmap(lambda *x: apply(*params, *x))(*inputs)

    def gradients(params, inputs):
        return jax.grad(lambda *x: (forward(*x) ** 2).sum(), argnums=(0, 1))(params, inputs)

    put = lambda values, specs: jax.device_put(values, [NamedSharding(mesh, s) for s in specs])
    arguments = tuple(put(list(params), of_params)), tuple(put(list(inputs), of_inputs))
    assert not collectives(jax.jit(forward).lower(*arguments).compile().as_text())
    spread = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    compiled = jax.jit(gradients, out_shardings=spread).lower(*arguments).compile()
    sent = collectives(compiled.as_text())
    assert {c.kind for c in sent} == {"all-reduce"} and not any(c.in_loop for c in sent)
    assert sum(c.size for c in sent) == sums
    assert_close(compiled(*arguments), jax.jit(gradients)(params, inputs))


@pytest.mark.parametrize(
    ("name", "vector", "per_key"),
    [
        ("gated_linear_attention", False, 2),
        ("delta_rule", False, 1),
        ("delta_rule", True, 2),
    ],
)
def test_heads_split_over_the_model_send_nothing(name, vector, per_key):
    """Nor do examples, forward and backward."""
    mesh = make_mesh(data=4, model=2)
    heads = 4
    of_keys = draw(8, TIME, heads // per_key, 4) / 2
    values, decay = draw(8, TIME, heads, 3), shared(8, TIME, heads, *((4,) if vector else ()))
    rule = {"gated_linear_attention": gated_linear_attention, "delta_rule": delta_rule}[name]
    one = lambda k, v, decay: rule(k, k, v, None, -decay, chunk_size=4)[0]

    def gradients(*arrays):
        return jax.grad(lambda arrays: (jax.vmap(one)(*arrays) ** 2).sum())(arrays)

    spread = NamedSharding(mesh, P("data", None, "model"))
    arrays = jax.device_put((of_keys, values, decay), spread)
    for run in (jax.vmap(one), gradients):
        compiled = jax.jit(run, out_shardings=spread).lower(*arrays).compile()
        assert not collectives(compiled.as_text())
        assert_close(compiled(*arrays), jax.jit(run)(of_keys, values, decay))


@pytest.mark.parametrize("shared_state", [False, True])
def test_in_a_shard_map_that_checks_what_varies(shared_state):
    """A state, or a transition, that all devices share is one for all, and so is its gradient."""
    mesh = make_mesh()
    a, b, h0 = shared(4), draw(8, TIME, 4), draw(4) if shared_state else None
    run = jax.vmap(linear_recurrence, in_axes=(None, 0, None))
    specs = (P(), P("data"), P())
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"))
    gradients = lambda run: jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), argnums=(0, 1)))
    assert_close(gradients(split)(a, b, h0), gradients(run)(a, b, h0))


def test_pretrained_weights_go_straight_to_their_places(tmp_path):
    model, _ = make_mamba(jr.key(0))
    discretax.pretrained.save(model, tmp_path)
    mesh = make_mesh(data=4, model=2)
    rules = [(r"embeddings?\.weight$", P("model", None))]
    sharding = parameter_sharding(mesh, rules, min_size=MIN_SIZE)
    loaded, _ = discretax.pretrained.load(tmp_path, sharding=sharding)
    assert_equal(loaded, model)
    rules = [(r"embedding\.weight$", P("model", None))]
    placed = shard_model(model, mesh, rules, min_size=MIN_SIZE)
    assert loaded.encoder.embedding.weight.sharding.spec == P("model", None)
    assert loaded.backbone.blocks[0].sequence_mixer.in_proj.weight.sharding.spec == P("data", None)
    for path, leaf in parameters(loaded).items():
        assert leaf.sharding.is_equivalent_to(parameters(placed)[path].sharding, leaf.ndim), path


def test_a_model_is_made_in_its_place():
    mesh = make_mesh()
    place = lambda key: shard_model(make_mamba(key), mesh, min_size=MIN_SIZE)
    made, _ = eqx.filter_jit(place)(jr.key(0))
    expected, _ = place(jr.key(0))
    assert_close(made, expected, rtol=1e-6)
    for path, leaf in parameters(made).items():
        assert leaf.sharding.is_equivalent_to(parameters(expected)[path].sharding, leaf.ndim), path


def test_batches_are_split_over_the_data_alone():
    mesh = make_mesh(data=2, seq=2, model=2)
    x = draw(4, 3)
    batch = shard_batch(discretax.Timeseries(x, length=jnp.arange(4)), mesh)
    assert batch.values.sharding == NamedSharding(mesh, P("data"))
    assert batch.timesteps is None
    for shard in batch.values.addressable_shards:
        np.testing.assert_array_equal(shard.data, x[shard.index])
        assert shard.data.shape == (2, 3)
    assert_equal(shard_batch(jr.key_data(jr.key(0))[None].repeat(2, 0), mesh).shape, (2, 2))


@pytest.mark.parametrize("shape", [(3, 2), ()])
def test_batches_that_do_not_divide_are_refused(shape):
    with pytest.raises(ValueError, match=r"'data' of size 8; got shape .* at \['x'\]"):
        shard_batch({"x": jnp.zeros(shape)}, make_mesh())


def test_meshes():
    assert dict(make_mesh(model=2).shape) == {"data": 4, "seq": 1, "model": 2}
    assert dict(make_mesh(devices=jax.devices()[:3]).shape) == {"data": 3, "seq": 1, "model": 1}
    with pytest.raises(ValueError, match=r"got 3 \* 1 \* 2 = 6 for 8"):
        make_mesh(data=3, model=2)
    with pytest.raises(ValueError, match=r"got 2 \* 1 \* 3 = 6 for 8"):
        make_mesh(model=3)
    with pytest.raises(ValueError, match="`seq` must be a whole number"):
        make_mesh(seq=0)
