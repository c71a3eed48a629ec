"""Learned positions of tokens, and dropout on them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close, assert_equal, numbers

from discretax import Timeseries, inference_state, streaming_mode
from discretax.encoder import EmbeddingEncoder
from discretax.testing import check_streaming

TOKENS = jnp.array([2, 0, 6, 6, 1, 2, 5])
ROOM = 9


def make(**options):
    return eqx.nn.make_with_state(EmbeddingEncoder)(7, 3, key=jr.key(0), **options)


def looked_up(encoder, positions):
    tokens, places = encoder.embedding.weight, encoder.positions.embedding.weight
    return numbers(tokens)[np.asarray(TOKENS)] + numbers(places)[np.asarray(positions)]


def test_tokens_and_places_are_added():
    encoder, state = make(max_position_embeddings=ROOM)
    y, _ = encoder(TOKENS, state)
    assert_close(y, looked_up(encoder, range(7)))
    resets = jnp.array([False, False, True, False, True, False, True])
    y, _ = encoder(Timeseries(TOKENS, length=6, resets=resets), state)
    assert_close(y.values[:6], looked_up(encoder, [0, 1, 0, 1, 0, 1, 0])[:6])
    both = encoder.embedding.weight[:3], encoder.positions.embedding.weight[:3]
    assert (both[0] != both[1]).all()  # by keys of their own


def test_a_stream_goes_on_where_it_was():
    encoder, state = make(max_position_embeddings=ROOM)
    check_streaming(encoder, state, TOKENS)


def test_more_samples_than_positions():
    encoder, state = make(max_position_embeddings=5)
    message = "sequences of at most 5 samples; got one of at least 7"
    run = lambda x: encoder(x, state)[0]
    for called in (run, jax.jit(run)):
        with pytest.raises(ValueError, match=message):
            called(TOKENS)
    y = run(Timeseries(TOKENS, resets=jnp.arange(7) == 4)).values
    assert_close(y, looked_up(encoder, [0, 1, 2, 3, 0, 1, 2]))
    # Where the length is not known, what has no position is NaN.
    y = jax.jit(lambda length: run(Timeseries(TOKENS, length=length)).values)(jnp.asarray(6))
    assert_close(y[:5], looked_up(encoder, [0, 1, 2, 3, 4, 4, 4])[:5])
    assert jnp.isnan(y[5]).all()
    assert jnp.isfinite(y[6]).all()

    live = streaming_mode(eqx.nn.inference_mode(encoder))
    with pytest.raises(ValueError, match=r"`max_seqlen` must be at most the 5 positions .*; got 6"):
        inference_state(live, state, max_seqlen=6)
    _, stream = live(TOKENS[:4], inference_state(live, state, max_seqlen=5))
    with pytest.raises(ValueError, match="at most 5 samples; got one of at least 6"):
        live(TOKENS[4:6], stream)
    y, stream = eqx.filter_jit(live)(TOKENS[4:], stream)
    assert_equal(jnp.isnan(y).all(1), jnp.arange(3) > 0)
    assert_equal(stream.get(live.positions.cache_index), 5)


def test_dropout():
    encoder, state = make(drop_rate=0.5)
    plain, _ = make()
    expected = plain(TOKENS, state)[0]
    assert_equal(eqx.nn.inference_mode(encoder)(TOKENS, state)[0], expected)
    y = np.stack([encoder(TOKENS, state, jr.key(i))[0] for i in range(8)])
    kept = (y != 0).all(1)
    assert_close(y, numbers(expected) * 2 * kept[:, None])  # one mask for all samples
    assert 0 < kept.mean() < 1
    with pytest.raises(ValueError, match=r"`EmbeddingEncoder` drops features .*got no key"):
        encoder(TOKENS, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_position_embeddings": 0}, "`max_position_embeddings` must be .*; got 0"),
        ({"drop_rate": 1.0}, r"`drop_rate` must lie in \[0, 1\); got 1.0"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
