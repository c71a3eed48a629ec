"""`scaled` against the plain product: values and derivatives of both modes, alone and in a batch."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from helpers import assert_close

from discretax.ops._scaled import scaled


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_derivatives_are_those_of_the_product(axis, batch):
    with jax.enable_x64(True):
        keys = jr.split(jr.key(0), 5)
        lead = () if batch is None else (batch,)
        shape = (4, 3, 5)
        values, d_values, weights = (jr.normal(key, (*lead, *shape)) for key in keys[:3])
        factor, d_factor = (
            jr.normal(key, tuple(n for i, n in enumerate(shape) if i != axis)) for key in keys[3:]
        )

        def outcome(product):
            run = product if batch is None else jax.vmap(product, (0, None))
            y, tangent = jax.jvp(run, (values, factor), (d_values, d_factor))
            gradients = jax.grad(lambda *args: jnp.vdot(run(*args), weights), (0, 1))(
                values, factor
            )
            return y, tangent, gradients

        plain = lambda values, factor: values * jnp.expand_dims(factor, axis)
        assert_close(outcome(lambda values, factor: scaled(values, factor, axis)), outcome(plain))
