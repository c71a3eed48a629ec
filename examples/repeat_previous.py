"""RepeatPrevious of POPGym (arXiv:2303.01859) in JAX: an environment that asks for what was seen before.

Cards are dealt one by one from shuffled decks of 52, and the suit of each is seen. The action is a
suit, and right if it is that of the card k - 1 before. With n the number of cards, a right action is
rewarded by 1 / (n - k), a wrong one by -1 / (n - k), and the first k - 1 by nothing, so that the best
return of an episode is 1. It ends before the last card, after n - 1 steps.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr


class Env(NamedTuple):
    left: jax.Array  # cards of each suit that are still in the decks
    last: jax.Array  # suits of the last k cards, the oldest first
    score: jax.Array  # rewards of the episode so far


@dataclasses.dataclass(frozen=True)
class RepeatPrevious:
    decks: int
    k: int  # counts the present card

    @property
    def cards(self) -> int:
        return 52 * self.decks

    @property
    def episode(self) -> int:
        return self.cards - 1  # steps

    @property
    def memoryless(self) -> float:
        """The best return of who sees the present card alone.

        The card to name is any of the others, each as likely as the next. Of a suit that is not the
        present one there are 13 a deck among them, and one less of the same suit.
        """
        return 2 * 13 * self.decks / (self.cards - 1) - 1

    def begin(self, key: jax.Array) -> Env:
        return _deal(self._full(), key)

    def observe(self, env: Env) -> tuple[jax.Array, jax.Array]:
        """The suit of the present card, and whether it is the first of its episode."""
        return env.last[-1], env.left.sum() == self.cards - 1

    def advance(self, env: Env, action: jax.Array, key: jax.Array):
        """The environment at the next card, the reward, and whether the episode has ended.

        If it has, the next card is the first of another one.
        """
        dealt = self.cards - env.left.sum()
        worth = jnp.where(action == env.last[0], 1.0, -1.0) / (self.cards - self.k)
        reward = jnp.where(dealt >= self.k, worth, 0.0)
        ends = dealt == self.episode
        env = env._replace(score=env.score + reward)
        env = jax.tree.map(partial(jnp.where, ends), self._full(), env)
        return _deal(env, key), reward, ends

    def _full(self) -> Env:
        return Env(jnp.full(4, 13 * self.decks), jnp.zeros(self.k, int), jnp.zeros(()))


def _deal(env: Env, key: jax.Array) -> Env:
    """Any of the cards that are left: the same as a deck that was shuffled before."""
    suit = jr.categorical(key, jnp.log(env.left)).astype(env.last.dtype)
    return Env(env.left.at[suit].add(-1), jnp.append(env.last[1:], suit), env.score)
