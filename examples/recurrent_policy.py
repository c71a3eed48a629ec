"""Teaches agents to act on what they have seen before: PPO with policies that remember.

    python examples/recurrent_policy.py                       # three that remember, one that cannot
    python examples/recurrent_policy.py --model lru --seeds 3
    python examples/recurrent_policy.py --resume              # same settings, from the checkpoints on

A deck of 52 cards is dealt one by one. The agent sees the suit of each, and names the suit of the
card that was dealt three cards before:

    seen    ♠ ♥ ♥ ♦ ♣ ♠ ♥
    right         ♠ ♥ ♥ ♦

It is RepeatPrevious of POPGym, whose k counts the present card: 4 by default. A right answer is
worth 1/48, a wrong one -1/48, so that the best return of an episode is 1. An agent that remembers
nothing does best to name another suit than the one it sees: of the other 51 cards, 13 are of that
one, and its return is 2 * 13/51 - 1 = -0.49.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import arguments
import checkpoints
import drawing
import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import ppo
import training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from repeat_previous import RepeatPrevious
from tqdm import tqdm

import discretax
from discretax.encoder import EmbeddingEncoder
from discretax.heads import RegressionHead
from discretax.sequence_mixers import (
    GatedDeltaNetSequenceMixer,
    IdentitySequenceMixer,
    LRUSequenceMixer,
    S5SequenceMixer,
)

MIXERS = {
    "lru": partial(LRUSequenceMixer, state_dim=32),
    "s5": partial(S5SequenceMixer, state_dim=32, dt_min=0.1, dt_max=1.0),  # a few samples
    "gated_delta_net": partial(GatedDeltaNetSequenceMixer, num_heads=2, head_dim=8),
    "mlp": IdentitySequenceMixer,  # remembers nothing
}
SUITS = "♠♥♦♣"


@dataclasses.dataclass(frozen=True)
class Config:
    decks: int = 1
    k: int = 4
    hidden_dim: int = 32
    num_blocks: int = 1
    environments: int = 32
    rollout: int = 64  # steps
    updates: int = 100
    every: int = 10
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 3e-3
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01
    max_norm: float = 0.5

    @property
    def task(self) -> RepeatPrevious:
        return RepeatPrevious(self.decks, self.k)


@eqx.nn.make_with_state
def make_policy(name: str, config: Config, key: jax.Array) -> discretax.Sequential:
    """From the suit of every card to a logit for each suit, and a value."""
    keys, width = jr.split(key, 3), config.hidden_dim
    return discretax.Sequential(
        encoder=EmbeddingEncoder(4, width, key=keys[0]),
        model=training.residual_stack(MIXERS[name], config.num_blocks, keys[1], hidden_dim=width),
        head=RegressionHead(width, 4 + 1, reduce=False, key=keys[2]),
    )


@eqx.filter_jit
def start(name: str, config: Config, key: jax.Array):
    """A policy that streams and learns, its optimiser's state, and streams and environments."""
    policy_key, env_key = jr.split(key)
    policy, state = make_policy(name, config, policy_key)
    policy = discretax.streaming_mode(policy)  # and so it stays while it is trained
    opt_state = ppo.make_optimiser(config).init(eqx.filter(policy, eqx.is_inexact_array))
    return policy, opt_state, *ppo.begin(policy, state, config.task, config.environments, env_key)


def train(name: str, config: Config, seed: int, file: Path, resume: bool):
    """What was trained, and the mean return of the episodes that ended on the way."""
    start_key, train_key = jr.split(jr.key(seed))
    trees = start(name, config, start_key)
    settings, history = {"model": name, "seed": seed, **dataclasses.asdict(config)}, []
    if resume and file.exists():
        history, trees = checkpoints.load(file, settings, trees)
    policy, opt_state, stream, envs = trees

    bar = tqdm(total=config.updates, initial=len(history) * config.every, ncols=100)
    bar.set_description(f"{name}, seed {seed}")
    for start_at in range(len(history) * config.every, config.updates, config.every):
        scores = []
        for update in range(start_at, start_at + config.every):
            # All randomness follows from seed and update: a resumed run repeats an unbroken one.
            act_key, learn_key = jr.split(jr.fold_in(train_key, update))
            rollout, last_values, after, envs = ppo.act(
                policy, stream, envs, act_key, config.task, config.rollout
            )
            policy, opt_state = ppo.learn(
                policy, opt_state, stream, rollout, last_values, learn_key, config
            )
            stream = after
            scores.append(np.asarray(rollout.scores)[np.asarray(rollout.ends)])
            bar.update()
        steps = (start_at + config.every) * config.environments * config.rollout
        history.append({"steps": steps, "return": float(np.concatenate(scores).mean())})
        bar.set_postfix(history[-1])
        trees = policy, opt_state, stream, envs
        checkpoints.save(file, settings, history, trees)
    bar.close()
    return trees, history


def test(policy, state, config: Config, key: jax.Array) -> dict:
    """The return of 256 fresh episodes, by the likeliest action, and what was thought in the first."""
    start_key, act_key = jr.split(key)
    stream, envs = ppo.begin(policy, state, config.task, 256, start_key)
    steps = config.task.episode
    rollout, *_ = ppo.act(policy, stream, envs, act_key, config.task, steps, ppo.likeliest)
    log_p, values, _ = eqx.filter_jit(ppo.read)(policy, rollout.seen, rollout.begins, stream)
    pairs = (ppo.of_actions(log_p, rollout.actions), rollout.log_p), (values, rollout.values)
    difference = max(float(abs(parallel - acted).max()) for parallel, acted in pairs)
    if not difference <= 1e-3:  # so that NaN does not pass
        raise RuntimeError(f"a parallel pass must give what acting gave; off by {difference}")
    return {
        "return": float(rollout.scores[:, -1].mean()),
        "difference": difference,
        "cards": np.asarray(rollout.seen[0]),
        "probabilities": np.exp(log_p[0]),
    }


def measure(trees, config: Config, key: jax.Array) -> dict:
    """CPU seconds of a step of one environment, and of learning from one rollout."""
    policy, opt_state, stream, envs = trees
    act = partial(ppo.act, policy, stream, envs, key, config.task, config.rollout)
    rollout, last_values, *_ = act()
    learn = partial(ppo.learn, policy, opt_state, stream, rollout, last_values, key, config)
    steps = config.environments * config.rollout
    return {"step_seconds": seconds(act) / steps, "update_seconds": seconds(learn)}


def seconds(function) -> float:
    """The median of five calls, of all cores together, after one that may compile."""
    passed = []
    for _ in range(6):
        start = time.process_time()
        jax.block_until_ready(jax.tree.leaves(function()))
        passed.append(time.process_time() - start)
    return float(np.median(passed[1:]))


def checkpoint(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}_{seed}.eqx"


def run(config: Config, out: Path, resume: bool, name: str, seed: int):
    """The trained policy, and what is told of it."""
    trees, history = train(name, config, seed, checkpoint(out, name, seed), resume)
    policy, _, stream, _ = trees
    test_key, time_key = jr.split(jr.key(2**31 - 1))  # the same episodes for every policy
    told = test(policy, stream, config, test_key) | measure(trees, config, time_key)
    return policy, {"history": history, **told}


def right(returns) -> np.ndarray:
    """The fraction of right answers that gives such returns."""
    return (np.asarray(returns) + 1) / 2


def table(results: dict, config: Config) -> str:
    """Of the likeliest actions in fresh episodes, mean and standard deviation over the seeds."""
    sizes = f"{'parameters':>10}{'right, %':>15}{'return':>9}"
    lines = [f"{'model':16}{sizes}{'step, µs':>10}{'update, ms':>12}"]
    for name, result in results.items():
        told = {key: [one[key] for one in result["histories"]] for key in result["histories"][0]}
        right_answers, mean = training.percent(right(told["return"])), np.mean(told["return"])
        step, update = np.mean(told["step_seconds"]), np.mean(told["update_seconds"])
        lines.append(
            f"{name:16}{result['parameters']:>10}{right_answers:>15}{mean:>9.3f}"
            f"{1e6 * step:>10.2f}{1e3 * update:>12.1f}"
        )
    best = config.task.memoryless
    lines.append(f"{'without memory':16}{'':10}{100 * right(best):>15.1f}{best:>9.3f}")
    return "\n".join(lines)


def draw(path: Path, results: dict, config: Config) -> None:
    """Returns while learning, a thin line per seed, and what two policies answer in one episode."""
    shown = [name for name in results if name != "mlp"][:1] + [n for n in results if n == "mlp"]
    colors = dict(zip(results, drawing.COLORS, strict=False))
    figure = Figure(figsize=(drawing.WIDTH, 3.4 + 1.2 * len(shown)))
    top, *episodes = figure.subplots(1 + len(shown), height_ratios=(3.4, *[1.2] * len(shown)))
    ends = []
    for name, color in colors.items():
        histories = [told["history"] for told in results[name]["histories"]]
        steps = [row["steps"] / 1000 for row in histories[0]]
        returns = np.array([[row["return"] for row in history] for history in histories])
        top.plot(steps, returns.T, color=color, alpha=0.35, linewidth=1)
        top.plot(steps, returns.mean(0), color=color)
        ends.append((name, returns.mean(0)[-1], color))
    best = config.task.memoryless
    for limit, said in ((1.0, "best possible"), (best, "best without memory")):
        top.axhline(limit, **drawing.GUESS)
        ends.append((said, limit, drawing.GUESS["color"]))
    top.set(title="mean return of an episode", ylim=(-0.65, 1.1))
    top.set(xlabel="steps of all environments, thousands")
    top.set_xlim(0, config.updates * config.environments * config.rollout / 1000)
    drawing.name_lines(top, ends)
    for axes, name in zip(episodes, shown, strict=True):
        draw_episode(axes, results[name]["histories"][0], config)
        told = (name, colors[name], 0.85), ("the darker, the surer;", "0.35", 0.5)
        for text, color, place in (*told, ("framed: the right one", "0.35", 0.2)):
            axes.text(1.02, place, text, color=color, va="center", transform=axes.transAxes)
    episodes[0].set_title(f"what suit was dealt {config.k - 1} cards before?")
    episodes[-1].set_xlabel("cards as they are dealt")
    drawing.save(figure, path)


def draw_episode(axes: Axes, told: dict, config: Config) -> None:
    """How probable each answer is at each card, and a frame around the right one."""
    first = max(0, config.k - 8)  # where it is not asked yet, there is little to see
    place = np.arange(first, min(first + 26, len(told["cards"])))
    asked = place[place >= config.k - 1]
    axes.imshow(told["probabilities"][place].T, "Blues", vmin=0, vmax=1, aspect="auto")
    frame = {"facecolors": "none", "edgecolors": drawing.COLORS[1], "linewidths": 1.6}
    axes.scatter(asked - first, told["cards"][asked - config.k + 1], s=110, marker="s", **frame)
    axes.set_xticks(range(len(place)), [SUITS[card] for card in told["cards"][place]])
    axes.set_yticks(range(4), list(SUITS))
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_color("#c01020" if label.get_text() in "♥♦" else "black")
    axes.tick_params(length=0)
    axes.grid(False)


def rules(config: Config, given: dict):
    weights = "discount", "gae_lambda", "value_weight", "entropy_weight"
    some = [option for option in dataclasses.asdict(config) if option not in weights]
    yield from arguments.above_zero(given, ("seeds", *some))
    yield (
        "k",
        2 <= config.k < config.task.cards,
        f"at least 2 and below the {config.task.cards} cards",
    )
    for option in weights:
        yield option, given[option] >= 0, "at least 0"
    for option in ("discount", "gae_lambda"):
        yield option, given[option] <= 1, "at most 1"
    fits = config.environments % config.minibatches == 0
    yield "environments", fits, f"a multiple of --minibatches, {config.minibatches}"
    yield "updates", config.updates % config.every == 0, f"a multiple of --every, {config.every}"
    enough = -(-config.task.episode // config.rollout)
    rule = f"at least {enough}, so that episodes of {config.task.episode} steps end"
    yield "every", config.every >= enough, rule


def parse(argv: list[str] | None):
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--model", choices=(*MIXERS, "all"), nargs="+", default=["all"])
    add("--seeds", type=int, default=1, help="how many times to train each model")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add(
        "--out", type=Path, default=Path("runs/recurrent_policy"), help="for checkpoints and figure"
    )
    return arguments.parse(parser, argv, Config, rules)


def main(argv: list[str] | None = None) -> dict:
    options, config = parse(argv)
    out, seeds, resume = options["out"], options["seeds"], options["resume"]
    names = list(MIXERS) if "all" in options["model"] else options["model"]
    if resume:
        checkpoints.require([checkpoint(out, name, i) for name in names for i in range(seeds)])
    results = training.compare(names, seeds, partial(run, config, out, resume))
    figure = out / "returns.png"
    draw(figure, results, config)
    difference = max(told["difference"] for r in results.values() for told in r["histories"])
    print(
        f"naming the card {config.k - 1} before, after {config.updates} updates of "
        f"{config.environments} x {config.rollout} steps\n{table(results, config)}\n"
        f"a parallel pass gives what acting gave, to {difference:.1e}\n"
        f"figure {figure}, checkpoints beside it"
    )
    return results


if __name__ == "__main__":
    main()
