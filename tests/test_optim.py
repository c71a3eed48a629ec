import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import FEATURES, STATE, TIME, assert_close, assert_equal, draw, parameters

from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.models import HGRN2, LRU, Backbone
from discretax.optim import adamw_cosine, recurrent_labels
from discretax.sequence_mixers import Bidirectional, LRUSequenceMixer

pytestmark = pytest.mark.slow

MIXER = {
    ".nu_log": "recurrent",
    ".theta_log": "recurrent",
    ".gamma_log": "recurrent",
    ".B_re": "recurrent",
    ".B_im": "recurrent",
    ".C_re": "regular",
    ".C_im": "regular",
    ".D": "regular",
}
BLOCK = {
    ".norm.weight": "regular",
    ".norm.bias": "regular",
    ".channel_mixer.w1.weight": "regular",
    ".channel_mixer.w1.bias": "regular",
    ".channel_mixer.w2.weight": "regular",
    ".channel_mixer.w2.bias": "regular",
}
STATISTICS = {f".norm.statistics.init[{i}]": "state" for i in range(3)}
ENDS = {
    ".layers[0].linear.weight": "regular",
    ".layers[2].pooled_linear.linear.weight": "regular",
    ".layers[2].pooled_linear.linear.bias": "regular",
}


def under(prefix, labels):
    return {prefix + path: label for path, label in labels.items()}


def labels_of(tree):
    """The label at the path of every parameter, `tree` being a model or its parameters."""
    leaves, _ = jax.tree.flatten_with_path(recurrent_labels(eqx.filter(tree, eqx.is_inexact_array)))
    return {jax.tree_util.keystr(path): label for path, label in leaves}


def make_model():
    encoder_key, model_key, head_key = jr.split(jr.key(0), 3)
    return eqx.nn.Sequential(
        [
            LinearEncoder(FEATURES, encoder_key, out_features=FEATURES),
            LRU(model_key, hidden_dim=FEATURES, num_blocks=2, state_dim=STATE),
            ClassificationHead(FEATURES, 3, head_key),
        ]
    )


def small_lru(in_features, *, key):
    return LRUSequenceMixer(in_features, key, state_dim=STATE)


def bidirectional(in_features, *, key):
    return Bidirectional(*(small_lru(in_features, key=k) for k in jr.split(key)))


def make_backbone(sequence_mixer=small_lru, norm=None):
    return eqx.nn.make_with_state(Backbone)(
        jr.key(0), hidden_dim=FEATURES, sequence_mixer=sequence_mixer, num_blocks=1, norm=norm
    )


def expected_labels(with_initial_state):
    block = under(".sequence_mixer", MIXER) | BLOCK | (STATISTICS if with_initial_state else {})
    blocks = [under(f".layers[1].blocks[{i}]", block) for i in range(2)]
    return ENDS | blocks[0] | blocks[1]


def test_labels_of_a_model_made_with_its_state():
    model, _ = eqx.nn.make_with_state(make_model)()
    assert labels_of(model) == expected_labels(with_initial_state=False)


def test_labels_of_a_model_that_still_holds_its_initial_state():
    model = make_model()
    assert labels_of(model) == expected_labels(with_initial_state=True)
    eqx.nn.State(model)
    deleted = eqx.nn.delete_init_state(model)
    assert labels_of(deleted) == expected_labels(with_initial_state=False)


def test_labels_inside_bidirectional():
    model, _ = make_backbone(bidirectional)
    found = {path: label for path, label in labels_of(model).items() if "sequence_mixer" in path}
    mixer = ".blocks[0].sequence_mixer"
    assert found == under(f"{mixer}.forward", MIXER) | under(f"{mixer}.backward", MIXER)


def test_labels_inside_containers():
    mixer = small_lru(FEATURES, key=jr.key(0))
    tree = {"main": [mixer, (jnp.ones(2),)], "other": mixer}
    expected = (
        under("['main'][0]", MIXER) | {"['main'][1][0]": "regular"} | under("['other']", MIXER)
    )
    assert labels_of(tree) == expected


def test_a_model_may_name_what_acts_inside_its_recurrences():
    model, _ = eqx.nn.make_with_state(HGRN2)(jr.key(0), hidden_dim=FEATURES, num_heads=1)
    named = {path for path, label in labels_of(model).items() if label == "recurrent"}
    assert named == {".lower_bounds"}


def test_labels_of_the_model_are_those_of_its_parameters():
    model, _ = make_backbone(norm="batch")
    params = eqx.filter(model, eqx.is_inexact_array)
    labels, is_kept = recurrent_labels(model), jax.tree.map(eqx.is_inexact_array, model)
    kept = jax.tree.map(lambda label, keep: label if keep else None, labels, is_kept)
    assert jax.tree.leaves(kept) == jax.tree.leaves(recurrent_labels(params))


# Through optax, which is not written for strict promotion.


def updates_of(optimiser, params, grads, steps=1):
    """The updates of every step, stacked, by path; the parameters stay where they are."""

    def step(opt_state, _):
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return opt_state, updates

    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda: jax.lax.scan(step, optimiser.init(params), length=steps)[1])
        return parameters(run())


def params_of(model, value=None):
    params = eqx.filter(model, eqx.is_inexact_array)
    return params if value is None else jax.tree.map(lambda p: jnp.full_like(p, value), params)


@pytest.mark.parametrize("with_initial_state", [False, True])
def test_multi_transform_takes_a_callable_model(with_initial_state):
    model = make_model()
    assert callable(model)
    if not with_initial_state:
        model = eqx.nn.delete_init_state(model)
    optimiser = optax.multi_transform(
        {"regular": optax.sgd(1.0), "recurrent": optax.sgd(0.25), "state": optax.set_to_zero()},
        recurrent_labels,
    )
    rate = {"regular": -1.0, "recurrent": -0.25, "state": 0.0}
    updates = updates_of(optimiser, params_of(model), params_of(model, 1.0))
    assert {path: rate[label] for path, label in expected_labels(with_initial_state).items()} == {
        path: float(np.unique(update).item()) for path, update in updates.items()
    }


def cosine(step, peak, warmup, total, end):
    if step < warmup:
        return peak * step / warmup
    progress = min((step - warmup) / (total - warmup), 1)
    return end + (peak - end) * (1 + np.cos(np.pi * progress)) / 2


@pytest.mark.parametrize(
    "options, warmup, factor, fraction",
    [
        ({}, 2, 0.25, 0.0),
        ({"warmup_steps": 5, "recurrent_factor": 0.5, "final_fraction": 0.1}, 5, 0.5, 0.1),
        ({"warmup_steps": 0}, 0, 0.25, 0.0),
    ],
)
def test_both_groups_follow_their_schedule(options, warmup, factor, fraction):
    """Of a constant gradient Adam makes the learning rate; of parameters at zero nothing decays."""
    model, _ = make_backbone(norm="layer")
    total, peak = 20, 1e-2
    with jax.enable_x64(True):  # in float32 Adam's own 1 - 0.999^t is wrong in the fifth digit
        wide = jax.tree.map(lambda p: jnp.zeros(p.shape, float), params_of(model))
        optimiser = adamw_cosine(peak, total, **options)
        updates = updates_of(optimiser, wide, jax.tree.map(jnp.ones_like, wide), total + 2)
    expected = {
        label: -np.array([cosine(t, p, warmup, total, fraction * p) for t in range(total + 2)])
        for label, p in (("regular", peak), ("recurrent", factor * peak))
    }
    labels = labels_of(model)
    assert set(labels.values()) == set(expected)
    for path, label in labels.items():
        rates = updates[path].reshape(total + 2, -1)
        assert_close(rates, np.repeat(expected[label][:, None], rates.shape[1], 1), rtol=1e-7)


@pytest.mark.parametrize("options, decay", [({}, 0.05), ({"weight_decay": 0.3}, 0.3)])
def test_weight_decay_is_for_regular_parameters(options, decay):
    """Without a gradient, what moves a parameter is its decay."""
    model, _ = make_backbone()
    params = params_of(model)
    optimiser = adamw_cosine(1e-2, 20, warmup_steps=0, **options)
    updates = updates_of(optimiser, params, params_of(model, 0.0))
    for path, label in labels_of(model).items():
        expected = -1e-2 * decay * parameters(params)[path] if label == "regular" else 0
        assert_close(updates[path][0], np.broadcast_to(expected, updates[path][0].shape))


@pytest.mark.parametrize("with_initial_state", [False, True])
def test_training_changes_every_parameter_and_no_initial_state(with_initial_state):
    model = make_model()
    state = eqx.nn.State(model)
    if not with_initial_state:
        model = eqx.nn.delete_init_state(model)
    x = draw(2, TIME, FEATURES)
    optimiser = adamw_cosine(1e-2, 20, warmup_steps=0)

    def loss(model, state, keys):
        run = lambda x, state, key: model(x, state, key=key)
        y, state = jax.vmap(run, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(
            x, state, keys
        )
        return -y[:, 0].mean(), state

    @eqx.filter_jit
    def step(model, state, opt_state, keys):
        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state, keys)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimiser.update(grads, opt_state, params_of(model))
        return eqx.apply_updates(model, updates), state, opt_state

    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimiser.init(params_of(model))
    trained = model
    for seed in range(2):
        trained, state, opt_state = step(trained, state, opt_state, jr.split(jr.key(seed), 2))
    before, after = parameters(model), parameters(trained)
    labels = expected_labels(with_initial_state)
    assert set(before) == set(labels)
    for path, label in labels.items():
        if label == "state":
            assert_equal(after[path], before[path])
        else:
            assert not np.array_equal(after[path], before[path]), path


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"total_steps": 0}, ValueError, "`total_steps` must be a whole number .* got 0"),
        ({"total_steps": 10.0}, ValueError, "`total_steps` must be a whole number .* got 10.0"),
        ({"warmup_steps": 20}, ValueError, r"`warmup_steps` .*\[0, total_steps\); got 20 of 20"),
        ({"warmup_steps": -1}, ValueError, r"`warmup_steps` .*\[0, total_steps\); got -1 of 20"),
        ({"warmup": 2}, TypeError, "warmup"),
    ],
)
def test_options_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        adamw_cosine(**{"learning_rate": 1e-2, "total_steps": 20} | options)
