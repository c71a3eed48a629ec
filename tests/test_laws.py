"""The laws of `discretax.testing`, each a test over `cases.CASES`."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from cases import CASES, FEATURES

from discretax.testing import mixer_laws
from discretax.testing._refusals import UNFIT, unfit_call

# One compiled function or two, and most of what can go wrong; the rest is for those with more time.
FAST = (
    "whole_is_chunks_is_steps_in_single_precision-chunks",
    "whole_is_chunks_is_steps_in_single_precision-steps",
    "length_ends_the_sequence-5",
    "resets_are_separate_runs-(1, 2, 7, 8)",
    "timesteps",
)
# What is mostly a matter of the code that mixers share: tried on one mixer of each mechanism, and on
# all of them with `--thorough`. Other options of the same class have the laws of `FAST`.
SHARED = (
    "whole_is_chunks_is_steps-chunks",  # whose outputs and caches are those of `FAST`
    "resets_gradients",
    "narrow_parameters-bfloat16",
    "batched_cache_is_for_vmap",
    "length_ends_the_sequence-0",
    "length_ends_the_sequence-1",
    "length_ends_the_sequence-13",
    "length_ends_the_gradients",
    "resets_are_separate_runs-(0,)",
    "jit_is_eager",
    "vmap_is_a_loop",
    "checkpoint_and_scan",
    "second_order_in_reverse",
    "bfloat16_activations",
    "narrow_parameters-float16",
    "gradients_of_narrow_parameters",
    "a_stream_goes_on_with_x64",
    "one_key_one_mixer",
)


def grouped(case, *values, id):
    """Grouped by case: one worker runs a case's laws, and compiles its mixer once."""
    marks = [pytest.mark.xdist_group(str(case))]
    if id not in FAST:
        marks.append(pytest.mark.slow)
    is_shared = id in SHARED and not case.is_one_of_each
    if is_shared or (case.has_another_of_its_class and id not in FAST):
        marks.append(pytest.mark.thorough)
    return pytest.param(*values, id=f"{case}-{id}", marks=marks)


LAWS = [(case, law) for case in CASES for law in mixer_laws(case.make, **case.options)]


@pytest.mark.parametrize("law", [grouped(case, law, id=law.name) for case, law in LAWS])
def test_law(law):
    with jax.numpy_rank_promotion("raise"):
        law()


# What the laws leave to a mixer's author: how the library words its refusals.
WORDS = {
    "one sample": r"one sequence, .*got \(4,\).*`x\[None\]`",
    "a batch": r"one sequence, .*got \(2, 13, 4\).*`jax.vmap`",
    "too wide": r"last axis has size 4; got float32\(13, 5\)",
    "whole numbers": r"floating arrays.*got int32\(13, 4\)\. Convert it: `\.astype\(float\)`",
    "length below 0": "between 0 and .*13; got -1",
    "length beyond": "between 0 and .*13; got 14",
    "length not whole": "whole number.*got float",
    "lengths": r"got int32\(3,\).*`jax.vmap`",
    "short resets": r"booleans, one per sample: shape \(13,\); got bool\(12,\)",
    "floating resets": r"got float32\(13,\)",
    "short timesteps": r"one per sample: shape \(13,\); got float32\(12,\)",
    "negative timesteps": "must not be negative; got -1.0",
}


every_case = pytest.mark.parametrize("case", [grouped(case, case, id="words") for case in CASES])


@every_case
def test_unfit_input_is_refused_in_the_words_of_the_house(case):
    mixer, x = case.make(jr.key(0)), jnp.ones((13, FEATURES))
    assert WORDS.keys() == UNFIT.keys()
    for name, message in WORDS.items():
        change, options, _ = UNFIT[name]
        unfit, options = unfit_call(x, change, options)
        with pytest.raises(ValueError, match=message):
            mixer(unfit, **options)


@every_case
def test_what_it_cannot_is_refused_in_the_words_of_the_house(case):
    mixer, x = case.make(jr.key(0)), jnp.ones((13, FEATURES))
    streams, takes_timesteps = (
        case.options.get(name, default)
        for name, default in (("streams", True), ("takes_timesteps", False))
    )
    refusals = []
    if not streams:
        refusals += [
            (mixer.allocate_inference_cache, "cannot stream"),
            (lambda: mixer.step(x[0], None), "cannot stream"),
            (lambda: mixer(x, jnp.zeros(3)), "cannot stream"),
        ]
    if not takes_timesteps:
        timesteps = lambda: mixer(x, integration_timesteps=jnp.ones(13))
        refusals.append((timesteps, "takes no integration timesteps"))
    if streams:
        cache, batched = (mixer.allocate_inference_cache(batch_size=size) for size in (None, 2))
        of_shapes = r"takes a cache of shapes .*; got .*2.*vmap"
        one_sample = r"one floating sample of shape \(4,\); got float32\(13"
        at_least_one = r"`batch_size` must be None .* at least 1; got 0"
        refusals += [
            (lambda: mixer(x, batched), of_shapes),
            (lambda: mixer.step(x[0], batched), of_shapes),
            (lambda: mixer.step(x, cache), one_sample),
            (lambda: mixer.allocate_inference_cache(batch_size=0), at_least_one),
        ]
        if not takes_timesteps:
            timestep = lambda: mixer.step(x[0], cache, integration_timestep=1.0)
            refusals.append((timestep, "takes no integration timesteps"))
    for attempt, message in refusals:
        with pytest.raises(ValueError, match=message):
            attempt()
