"""discretax 0.3.0 of the package index: the mixers that both have."""

import equinox as eqx
import jax.random as jr
from job import Job
from measuring import classifier_job, load, parameters, training_job, versions

import discretax.models.deltanet
import discretax.models.linoss
import discretax.models.lru
import discretax.models.s5
from discretax.encoder import LinearEncoder
from discretax.heads import ClassificationHead
from discretax.sequence_mixers.deltanet import chunk_delta_rule
from discretax.sequence_mixers.linoss import LinOSSSequenceMixer
from discretax.sequence_mixers.lru import LRUSequenceMixer
from discretax.sequence_mixers.s4d import S4DSequenceMixer
from discretax.sequence_mixers.s5 import S5SequenceMixer

__all__ = ["prepare", "versions"]

MODELS = {
    "LRU": discretax.models.lru.LRU,
    "S5": discretax.models.s5.S5,
    "LinOSS": discretax.models.linoss.LinOSS,
    "DeltaNet": discretax.models.deltanet.DeltaNet,
}
MIXERS = {
    "LRU": LRUSequenceMixer,
    "S5": S5SequenceMixer,
    "S4D": S4DSequenceMixer,
    "LinOSS": LinOSSSequenceMixer,
}


def prepare(case: dict, arrays: dict) -> Job:
    if "labels" in arrays:
        return classifier_job(lambda key: model(case, key), arrays)
    if case["op"] == "delta_rule, no decay":
        chunk_size = 64  # the mixer's
        rule = lambda _, x: chunk_delta_rule(*x, chunk_size)
        return training_job(rule, None, arrays, case)
    params = parameters(arrays)
    key = jr.key(0)
    mixer = MIXERS[case["op"]](case["features"], key, state_dim=case["state"])
    if case["op"] == "S4D":
        params = {
            "C": params["C"][0, ..., 0] + 1j * params["C"][0, ..., 1],
            "log_dt": params["inv_dt"][:, 0],
            "log_a_real": params["A_real"],
            "A_imag": -params["A_imag"],  # in the paper's code too, A is -re - i im or -re + i im
        }
        mixer = eqx.tree_at(lambda m: m.kernel, mixer, load(mixer.kernel, params))
    else:
        mixer = load(mixer, params)
    return training_job(lambda mixer, x: mixer(x, key=key), mixer, arrays, case)


def model(case: dict, key):
    keys = jr.split(key, 3)
    width, name = case["features"], case["op"].split()[1]
    sizes = {} if name == "DeltaNet" else {"state_dim": case["state"]}
    backbone = MODELS[name](keys[1], hidden_dim=width, num_blocks=case["blocks"], **sizes)
    encoder = LinearEncoder(in_features=3, key=keys[0], out_features=width)
    head = ClassificationHead(in_features=width, out_features=10, key=keys[2])
    return eqx.nn.Sequential([encoder, backbone, head])
