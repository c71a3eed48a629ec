"""This library's mixers and ops."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from job import Job
from measuring import (
    adam_step,
    calling_job,
    classifier_job,
    compiled_with_facts,
    decoding_job,
    load,
    parameters,
    step_job,
    training_job,
    versions,
)

from discretax import generate, models, ops, pretrained
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.sequence_mixers import (
    Discretized,
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    RGLRUSequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
)

__all__ = ["prepare", "rates", "versions"]

MIXERS = {
    "LRU": LRUSequenceMixer,
    "S5": S5SequenceMixer,
    "S4D": S4DSequenceMixer,
    "S4": S4SequenceMixer,
    "LinOSS": LinOSSSequenceMixer,
}
# What makes the mixer that of discretax 0.3.0, which has neither convolutions nor a norm.
ALIKE = {"conv_width": None, "shared_beta": True, "activation": None, "output_norm": False}


def prepare(case: dict, arrays: dict) -> Job:
    if "tokens" in arrays:
        return language_model_job(arrays)
    if "labels" in arrays:
        return classifier_job(lambda key: model(case, key), arrays)
    if case["op"].startswith(("generate ", "read ")):
        return generation_job(case, arrays)
    params = parameters(arrays)
    match case["op"]:
        case "linear_recurrence":
            return training_job(lambda _, x: ops.linear_recurrence(*x), None, arrays, case)
        case "selective_scan":
            scan = lambda p, x: ops.selective_scan(x[0], x[1], p["A"], x[2], x[3])[0]
            return training_job(scan, params, arrays, case)
        case "ssd":
            scan = lambda p, x: ops.ssd(x[0], x[1], p["A"], x[2], x[3])[0]
            return training_job(scan, params, arrays, case)
        case "trapezoidal_ssd" | "trapezoidal_ssd, rank 4":

            def trapezoidal(p, inputs):
                x, dt, B, C, trapezoid = inputs
                return ops.trapezoidal_ssd(x, dt, dt * p["A"], trapezoid, B, C)[0]

            return training_job(trapezoidal, params, arrays, case)
        case "gated_linear_attention":
            q_k_v_decay = lambda _, x: ops.gated_linear_attention(*x[:3], None, x[3])[0]
            return training_job(q_k_v_decay, None, arrays, case)
        case "delta_rule" | "delta_rule per channel":
            return training_job(lambda _, x: ops.delta_rule(*x)[0], None, arrays, case)
        case "delta_rule, no decay":
            each = lambda beta, v: jnp.broadcast_to(beta[:, None], v.shape[:2])
            rule = lambda _, x: ops.delta_rule(*x[:3], each(x[3], x[2]))[0]
            return training_job(rule, None, arrays, case)
        case "RG-LRU":
            heads = params["a_weight"].shape[0]
            mixer = RGLRUSequenceMixer(case["features"], jr.key(0), num_heads=heads)
        case name:
            make = MIXERS[name.removeprefix("step ").split(",")[0]]
            mixer = make(case["features"], jr.key(0), state_dim=case["state"])
    params.pop("truncated_C", None)
    mixer = load(mixer, params)
    if case["op"].startswith("step "):
        if "discretized" in case["op"]:
            mixer = Discretized(mixer)
        cache = mixer.allocate_inference_cache()
        if "call by call" in case["op"]:
            params, static = eqx.partition(mixer, eqx.is_array)
            step = lambda params, x, cache: eqx.combine(params, static).step(x, cache)
            return calling_job(step, params, cache, jnp.asarray(arrays["x"][0]), case["time"])
        return decoding_job(mixer.step, cache, jnp.asarray(arrays["x"][0]), case["time"])
    return training_job(lambda mixer, x: mixer(x)[0], mixer, arrays, case)


def model(case: dict, key: jax.Array):
    """Encoder, a model of so many blocks, head; with the blocks in a loop where the case says so."""
    _, name, *options = case["op"].split()
    keys = jr.split(key, 3)
    width = case["features"]
    sizes = {"DeltaNet": ALIKE, "GatedDeltaNet": {}}.get(name, {"state_dim": case["state"]})
    backbone = getattr(models, name)(keys[1], hidden_dim=width, num_blocks=case["blocks"], **sizes)
    if "scan" in options:
        backbone = models.scan_blocks(backbone)
    if "remat" in options:
        backbone = models.remat_blocks(backbone)
    encoder = LinearEncoder(3, keys[0], out_features=width)
    return eqx.nn.Sequential([encoder, backbone, ClassificationHead(width, 10, keys[2])])


def language_model_job(arrays: dict) -> Job:
    """A training step: the mean cross-entropy of the next tokens."""

    def loss(model, state, tokens):
        losses, state = jax.vmap(model.loss, (0, None), (0, None))(tokens, state)
        return losses.total.sum() / losses.count.sum(), state

    def make():
        model, state = pretrained.load(str(arrays["checkpoint"]))
        step, args = adam_step(model, state, loss)
        return step, (*args, jnp.asarray(arrays["tokens"]))

    def outcome(results):
        *_, (adam, *_), value = results
        moment = adam.mu.encoder.embedding.weight
        return {"loss": np.asarray(value), "moment": np.asarray(moment)}

    return step_job(make, outcome)


def generation_job(case: dict, arrays: dict) -> Job:
    model, state = pretrained.load(str(arrays["checkpoint"]))
    prompt = jnp.asarray(arrays["prompt"])
    params, static = eqx.partition(model, eqx.is_array)

    @jax.jit
    def write(params, prompt):
        model = eqx.combine(params, static)
        return generate(model, state, prompt, case["time"], temperature=0.0).tokens

    compiled, facts = compiled_with_facts(write, params, prompt)

    def outcome() -> dict[str, np.ndarray]:
        logits = jax.jit(jax.vmap(lambda tokens: model(tokens, state)[0]))(prompt)
        return {"tokens": np.asarray(compiled(params, prompt)), "logits": np.asarray(logits)}

    return Job(lambda: jax.block_until_ready(compiled(params, prompt)), outcome, facts)


def rates() -> dict[str, float]:
    """What this machine does per second at best.

    Products, exponentials, bytes copied (each counts twice, read and written) and bytes read.
    """
    a, long = jnp.ones((2048, 2048)), jnp.ones(2**25)

    def best(f, *args):
        f = jax.jit(f)
        times = []
        for _ in range(11):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            times.append(time.perf_counter() - start)
        return min(times)

    return {
        "products": 2 * 2048**3 / best(jnp.matmul, a, a),
        "exponentials": long.size / best(lambda v: jnp.exp(v).sum(), long),
        "bytes": 2 * long.nbytes / best(lambda v: v + 1, long),
        "read": long.nbytes / best(jnp.max, long),
    }
