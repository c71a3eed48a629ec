"""The linear recurrence's TPU kernel, interpreted, against a plain loop; its lowering for TPU."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, numbers

from discretax.ops._recurrence import tpu
from discretax.ops._recurrence.tpu import BUDGET, GROUP, states_tpu, tile_rows

pytestmark = pytest.mark.slow

BATCH, TIME, STATE = 2, 37, 3  # three tiles of one group, the last with five rows

planes = pytest.mark.parametrize("planes", [1, 2], ids=["real", "planes"])
varying = pytest.mark.parametrize("varying", [False, True], ids=["constant", "varying"])
with_resets = pytest.mark.parametrize("with_resets", [False, True], ids=["", "resets"])
reverse = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def interpreted(a, b, h0, resets, *, reverse, tile=16, group=16):
    run = ft.partial(states_tpu, reverse=reverse, tile=tile, interpret=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "GROUP", group)  # a small one compiles fast
        return jax.jit(run)(a, b, h0, resets)


def loop(a, b, h0, resets, reverse):
    """The definition, sample by sample, in double precision."""
    to_numbers = lambda x: x[..., 0, :] + 1j * x[..., 1, :] if x.shape[-2] == 2 else x[..., 0, :]
    a, b, h = (to_numbers(np.asarray(x, np.float64)) for x in (a, b, h0))
    a = np.broadcast_to(a, b.shape)
    states = np.empty_like(b)
    order = range(b.shape[1])
    for t in reversed(order) if reverse else order:
        past = a[:, t] * h
        if resets is not None:
            past = np.where(np.asarray(resets)[:, t, None], 0, past)
        h = states[:, t] = past + b[:, t]
    return np.stack([states.real, states.imag][: h0.shape[-2]], axis=2)


def draw(planes, varying, time=TIME, state=STATE, dtype="float32", shared=False):
    rng = np.random.default_rng(time + state)
    batch = 1 if shared else BATCH
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    a = normal(batch, time if varying else 1, planes, state) * 0.6
    resets = jnp.asarray(rng.random((batch, time)) < 0.2)
    return a, normal(BATCH, time, planes, state), normal(batch, planes, state), resets


@reverse
@with_resets
@varying
@planes
def test_states(planes, varying, with_resets, reverse):
    a, b, h0, resets = draw(planes, varying)
    resets = resets if with_resets else None
    h = interpreted(a, b, h0, resets, reverse=reverse)
    assert_close(h, loop(a, b, h0, resets, reverse), 1e-6)


@pytest.mark.parametrize(
    ("time", "state", "tile", "reverse"),
    [(1, 5, None, False), (7, 5, None, True), (50, 130, 32, True)],
    ids=["one", "less than a register", "wider than a register"],
)
def test_shapes(time, state, tile, reverse):
    a, b, h0, resets = draw(2, time > 1, time, state, shared=True)
    h = interpreted(a, b, h0, resets, reverse=reverse, tile=tile, group=GROUP)
    assert_close(h, loop(a, b, h0, resets, reverse), 1e-6)


@planes
def test_more_states_than_a_tile_holds(planes, monkeypatch):
    """Columns of 4 lanes, tiles of 6, states of 8: with planes 2, 3 and 4 of them."""
    monkeypatch.setattr(tpu, "WIDTH", 4)
    monkeypatch.setattr(tpu, "WIDEST", 6)
    a, b, h0, _ = draw(planes, False, time=3, state=8 // planes)
    assert_close(interpreted(a, b, h0, None, reverse=False), loop(a, b, h0, None, False), 1e-6)


@reverse
def test_what_is_not_selected_has_no_influence(reverse):
    a, b, h0, _ = draw(2, True)
    poisoned, reset = (30, 11) if reverse else (6, 25)
    resets = jnp.zeros((1, TIME), jnp.int32).at[0, reset].set(1)
    expected = loop(a, b, h0, resets, reverse)
    bad = lambda x: x.at[:, poisoned].set(jnp.array([[jnp.nan], [jnp.inf]]))
    h = interpreted(bad(a), bad(b), h0, resets, reverse=reverse)
    lost = slice(reset + 1, poisoned + 1) if reverse else slice(poisoned, reset)
    assert not np.isfinite(h[:, lost]).any()
    assert_close(np.delete(h, lost, axis=1), np.delete(expected, lost, axis=1), 1e-6)


def test_narrow_inputs_are_accumulated_in_float32():
    # In bfloat16 one plus this is one, however often.
    small = jnp.full((1, TIME, 1, STATE), 2.0**-10, jnp.bfloat16)
    one = jnp.ones((1, 1, 1, STATE), jnp.bfloat16)
    h = interpreted(one, small, one[0], None, reverse=False)
    assert (h[:, -1] == jnp.asarray(1 + TIME * 2.0**-10, jnp.bfloat16)).all()


def test_narrow_states():
    a, b, h0, resets = draw(2, True, dtype="bfloat16")
    h = interpreted(a, b, h0, resets, reverse=True)
    assert_close(numbers(h), loop(a, b, h0, resets, True), rtol=2**-8)


@dtypes
@reverse
@with_resets
@varying
@planes
def test_lowers_for_tpu(planes, varying, with_resets, reverse, dtype):
    a, b, h0, resets = draw(planes, varying, dtype=dtype)
    run = ft.partial(states_tpu, reverse=reverse)
    traced = jax.jit(run).trace(a, b, h0, resets if with_resets else None)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_lowers_for_tpu_with_x64():
    a, b, h0, resets = draw(2, True)
    with jax.enable_x64(True):
        traced = jax.jit(ft.partial(states_tpu, reverse=True)).trace(a, b, h0, resets)
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("lanes", [5, 128, 400, 4096])
@pytest.mark.parametrize("time", [1, 37, 1000, 10**6])
def test_tiles_keep_within_the_budget(time, lanes, itemsize, varying):
    rows = tile_rows(time, lanes, itemsize, varying)
    arrays = 2 + varying
    assert rows % GROUP == 0
    assert GROUP <= rows < time + GROUP
    # A tile of each array in use and another on its way; registers are 128 lanes wide.
    occupied = 2 * arrays * rows * itemsize * -(-lanes // 128) * 128
    assert occupied <= BUDGET
    assert rows >= time or 2 * occupied > BUDGET
