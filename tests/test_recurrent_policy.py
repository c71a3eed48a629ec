"""The example of policies that remember, and what it is made of, run small."""

import dataclasses
import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, imported_example, interrupted_at_the_first
from jax import lax

pytestmark = pytest.mark.slow

SMALL = (
    "--model=lru",
    "--hidden-dim=8",
    "--environments=4",
    "--rollout=60",
    "--updates=2",
    "--every=1",
    "--epochs=2",
    "--minibatches=2",
)
OTHERS = "s5", "gated_delta_net"


@pytest.fixture(scope="module")
def example():
    with imported_example("recurrent_policy") as module:
        yield module


@pytest.fixture(scope="module")
def config(example):
    return example.parse([*SMALL])[1]


@pytest.fixture(scope="module")
def acted(example, config):
    """Two rollouts of an LRU, the second from where the first ends, in which episodes end."""
    policy, _, stream, envs = example.start("lru", config, jr.key(0))
    return policy, stream, envs, *two_rollouts(example, config, policy, stream, envs)


def two_rollouts(example, config, policy, stream, envs):
    act = lambda stream, envs, key: example.ppo.act(policy, stream, envs, key, config.task, 60)
    first, following, between, envs = act(stream, envs, jr.key(1))
    second, *_ = act(between, envs, jr.key(2))
    assert_close(following, second.values[:, 0])  # the values of what comes after the first
    return first, between, second


@pytest.fixture(scope="module")
def read(example):
    return eqx.filter_jit(example.ppo.read)


def test_the_rewards_of_a_game_played_by_hand(example):
    task = example.RepeatPrevious(decks=1, k=4)

    def play(key, errors):
        def step(env, key_and_error):
            key, error = key_and_error
            card, begins = task.observe(env)
            action = (env.last[0] + error) % 4
            score = env.score
            env, reward, ends = task.advance(env, action, key)
            return env, (card, begins, action, reward, ends, score)

        start_key, key = jr.split(key)
        return lax.scan(step, task.begin(start_key), (jr.split(key, len(errors)), errors))[1]

    # The first never errs, the second always, the others as it happens; two episodes.
    errors = np.random.default_rng(0).integers(4, size=(6, 102))
    errors[:2] = [[0], [1]]
    games = jax.jit(jax.vmap(play))(jr.split(jr.key(0), 6), jnp.asarray(errors))
    for cards, begins, actions, rewards, ends, scores in zip(*map(np.asarray, games), strict=True):
        assert np.flatnonzero(begins).tolist() == [0, 51]
        assert np.flatnonzero(ends).tolist() == [50, 101]
        for episode in (slice(0, 51), slice(51, 102)):
            dealt = cards[episode]
            assert sorted(np.bincount(dealt, minlength=4)) == [12, 13, 13, 13]  # one is not seen
            expected = np.zeros(51)
            for t in range(3, 51):
                expected[t] = 1 / 48 if actions[episode][t] == dealt[t - 3] else -1 / 48
            np.testing.assert_allclose(rewards[episode], expected, rtol=1e-6)
            before = np.cumsum(expected) - expected
            np.testing.assert_allclose(scores[episode], before, atol=1e-5)
    totals = np.asarray(games[3]).reshape(6, 2, 51).sum(-1)
    np.testing.assert_allclose(totals[:2], [[1, 1], [-1, -1]], rtol=1e-5)
    assert (abs(totals[2:]) < 1).all()


@pytest.mark.parametrize("decks", [1, 3])
def test_the_best_return_without_memory_by_counting(example, decks):
    """Every pair of two cards of the decks: the one that is seen, and the one to be named."""
    deck = np.arange(52 * decks) % 4
    pairs = np.zeros((4, 4))
    for i, j in itertools.permutations(range(52 * decks), 2):
        pairs[deck[i], deck[j]] += 1
    right = pairs.max(1).sum() / pairs.sum()
    assert example.RepeatPrevious(decks, k=9).memoryless == pytest.approx(2 * right - 1, abs=1e-12)


def test_advantages_are_those_of_a_loop(example, config):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 9))
    ends, last = np.isin(np.arange(9), [2, 7]), 0.7
    expected, after = np.zeros(9), 0.0
    for t in reversed(range(9)):
        following = last if t == 8 else values[t + 1]
        goes_on = 0.0 if ends[t] else 1.0
        error = rewards[t] + 0.99 * goes_on * following - values[t]
        after = error + 0.99 * 0.95 * goes_on * after
        expected[t] = after
    arrays = map(jnp.asarray, (rewards, values, ends, last))
    assert_close(example.ppo.advantages_of(*arrays, config), expected)


@pytest.mark.parametrize(
    "name", ["lru", "mlp", *(pytest.param(n, marks=pytest.mark.thorough) for n in OTHERS)]
)
def test_a_parallel_pass_gives_what_acting_gave(example, config, read, name):
    policy, _, stream, envs = example.start(name, config, jr.key(0))
    first, between, second = two_rollouts(example, config, policy, stream, envs)
    for rollout, beginning in ((first, stream), (second, between)):
        log_p, values, _ = read(policy, rollout.seen, rollout.begins, beginning)
        of_actions = example.ppo.of_actions(log_p, rollout.actions)
        assert_close((of_actions, values), (rollout.log_p, rollout.values))
        # What is remembered tells one moment from another at which the same card is seen.
        spread = max(np.ptp(values[rollout.seen == suit]) for suit in range(4))
        assert spread == 0 if name == "mlp" else spread > 1e-3


def test_an_episode_begins_anew(example, config, acted, read):
    policy, stream, envs, _, between, second = acted
    act = lambda stream: example.ppo.act(policy, stream, envs, jr.key(3), config.task, 60)
    assert_equal(act(between), act(stream))  # every environment is at its first card

    (begins,) = np.flatnonzero(second.begins[0])  # the same for all
    others = second.seen.at[:, :begins].set((second.seen[:, :begins] + 1) % 4)
    told, changed = (
        read(policy, seen, second.begins, between)[:2] for seen in (second.seen, others)
    )
    rest = lambda outputs: [array[:, begins:] for array in outputs]
    assert_equal(rest(changed), rest(told))
    no_resets = jnp.zeros_like(second.begins)
    told, changed = (read(policy, seen, no_resets, between)[1] for seen in (second.seen, others))
    assert abs(changed[:, begins] - told[:, begins]).min() > 1e-5


def test_the_first_gradient_is_that_of_the_policy(example, config, acted):
    """The clipped objective's, in parallel; beside it that of the log-probabilities, step by step."""
    policy, _, _, _, between, rollout = acted
    ppo = example.ppo
    alone = dataclasses.replace(config, value_weight=0.0, entropy_weight=0.0)
    advantages = jnp.asarray(np.random.default_rng(0).normal(size=(4, 60)), jnp.float32)
    part = between, rollout, advantages, jnp.zeros_like(advantages)

    def by_steps(policy):
        def step(stream, sample):
            card, begins, action, advantage = sample
            log_p, _, stream = ppo.read(policy, card[:, None], begins[:, None], stream)
            return stream, advantage * ppo.of_actions(log_p[:, 0], action)

        samples = rollout.seen, rollout.begins, rollout.actions, advantages
        _, terms = lax.scan(step, between, jax.tree.map(jnp.transpose, samples))
        return -terms.mean()

    expected = eqx.filter_jit(eqx.filter_grad(by_steps))(policy)
    clipped = eqx.filter_jit(eqx.filter_grad(ppo.loss_fn))(policy, part, alone)
    assert_close(clipped, expected, rtol=1e-4)


def test_the_objective_is_clipped_on_the_side_of_gain(example, config, monkeypatch):
    """Ratios of 2 and 1/2 with advantages of either sign, by hand."""
    ppo = example.ppo
    log_p = jnp.log(jnp.array([[[0.8, 0.2], [0.2, 0.8]] * 2]))
    monkeypatch.setattr(ppo, "read", lambda *_: (log_p, jnp.ones((1, 4)), None))
    zeros = jnp.zeros((1, 4))
    rollout = ppo.Rollout(*[zeros] * 2, zeros.astype(int), zeros + jnp.log(0.4), *[zeros] * 4)
    part = None, rollout, jnp.array([[1.0, 1.0, -1.0, -1.0]]), zeros + 3
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    # 2 counts as 1.2 where it gains; 1/2 as 0.8 where it does.
    objective = (1.2 + 0.5 - 2 - 0.8) / 4
    expected = 0.5 * (1 - 3) ** 2 / 2 - 0.01 * entropy - objective
    assert float(ppo.loss_fn(None, part, config)) == pytest.approx(expected, rel=1e-5)


def test_it_tells_what_it_learned_and_goes_on_after_an_interruption(
    example, config, tmp_path, capsys
):
    run = lambda out, *more: example.main([*SMALL, *more, f"--out={out}"])
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        whole, broken = tmp_path / "whole", tmp_path / "broken.eqx"
        (told,) = run(whole)["lru"]["histories"]
        assert [row["steps"] for row in told["history"]] == [240, 480]
        assert all(-1 <= row["return"] <= 1 for row in told["history"])
        assert told["difference"] < 1e-5
        np.testing.assert_allclose(told["probabilities"].sum(-1), np.ones(51), rtol=1e-5)
        assert sorted(path.name for path in whole.iterdir()) == ["lru_0.eqx", "returns.png"]
        assert (whole / "returns.png").read_bytes().startswith(b"\x89PNG")
        assert f" {50 * told['return'] + 50:.1f} " in capsys.readouterr().out

        with interrupted_at_the_first(example.checkpoints):
            example.train("lru", config, 0, broken, resume=False)
        half = broken.read_bytes()
        assert json.loads(half.split(b"\n", 1)[0])["history"] == told["history"][:1]
        _, history = example.train("lru", config, 0, broken, resume=True)
        assert history == told["history"]
        # Policy, optimiser, streams and environments, bit for bit.
        assert broken.read_bytes() == (whole / "lru_0.eqx").read_bytes() != half

        with pytest.raises(SystemExit, match=r"got clip=0\.1 for clip=0\.2\. Give the same ones"):
            run(whole, "--resume", "--clip=0.1")
    with pytest.raises(SystemExit, match=r"found none at .*lru_0\.eqx\. Leave --resume out"):
        run(tmp_path / "nowhere", "--resume")


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--k=1", "--k must be at least 2 and below the 52 cards; got 1"),
        ("--k=52", "--k must be at least 2 and below the 52 cards; got 52"),
        ("--discount=1.5", "--discount must be at most 1; got 1.5"),
        ("--entropy-weight=-1", "--entropy-weight must be at least 0; got -1.0"),
        ("--minibatches=3", "--environments must be a multiple of --minibatches, 3; got 4"),
        ("--rollout=20", "--every must be at least 3, so that episodes of 51 steps end; got 1"),
        ("--every=4", "--updates must be a multiple of --every, 4; got 2"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([*SMALL, option, f"--out={tmp_path}"])
    assert rule in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
