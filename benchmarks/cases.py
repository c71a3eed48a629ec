"""What is compared: ops, sizes, their numbers, and the least that computing them takes."""

import dataclasses
import math
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from benchmarks import language_model
from discretax.sequence_mixers import (
    LinOSSSequenceMixer,
    LRUSequenceMixer,
    RGLRUSequenceMixer,
    S4DSequenceMixer,
    S4SequenceMixer,
    S5SequenceMixer,
)

HEADS = 4  # blocks of RG-LRU's gates
HEAD_DIM = 64  # of a matrix state
PROMPT = 16
READ = 2048  # tokens of a long prompt
BYTES = 256  # that a language model which is trained knows
# Whether it erases, and the kind of its decay.
MATRIX_OPS = {
    "gated_linear_attention": (False, "vector"),
    "delta_rule": (True, "scalar"),
    "delta_rule per channel": (True, "vector"),
    "delta_rule, no decay": (True, None),
}


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    time: int
    features: int
    state: int
    batch: int | None  # None: one sequence, without `jax.vmap`
    blocks: int | None = None  # of a whole model
    other: tuple[str, int] | None = None  # the threshold that makes this library take the other way
    decay: float | None = None  # the transition, where all have one
    exact: bool = False  # to be compared with double precision

    @property
    def subjects(self) -> tuple[str, ...]:
        """Who can run it, the one to compare with first and this library last."""
        if self.other is not None:
            return "ours_other", "ours"
        peers = {
            "LRU": ("usual", "discretax_0_3", "memax_0_1"),
            "S5": ("usual", "discretax_0_3"),
            "S4D": ("usual", "discretax_0_3"),
            "LinOSS": ("discretax_0_3",),
            "ssd": ("usual", "mamba2_jax_1_1"),
            "delta_rule": ("usual", "ejkernel_0_0_78"),
            "delta_rule, no decay": ("usual", "discretax_0_3"),
            "train Mamba": ("transformers_torch", "mambapy_1_2"),
            "train Mamba-2": ("transformers_torch",),
            "start LRU": ("discretax_0_3",),
            "start S5": ("discretax_0_3",),
        }
        if self.op.startswith(("generate ", "read ")):
            return "transformers_torch", "ours"
        others = {"train": ("discretax_0_3",), "start": (), "grow": ()}
        others = others.get(self.op.split()[0], ("usual",))
        return (*(() if self.time == 2**20 else peers.get(self.op, others)), "ours")

    @property
    def sequences(self) -> int:
        return self.batch or 1

    @property
    def rank(self) -> int:
        """Inputs and outputs of a head at a time."""
        return 4 if self.op.endswith("rank 4") else 1

    @property
    def model(self) -> language_model.Sizes | str:
        """Of the language model that generates or is trained, or the name of a published one."""
        name = self.op.split(" ", 1)[1]
        if self.blocks is None:
            return name
        sizes = name, self.features, self.state, self.blocks
        if self.op.startswith("train "):
            return language_model.Sizes(*sizes, vocab_size=BYTES)
        return language_model.Sizes(*sizes)

    def __str__(self) -> str:
        return f"{self.op} {self.time}x{self.features}x{self.state} batch {self.batch}"


def training_cases() -> list[Case]:
    """Whole training steps of classifiers, one of them deep, and of language models."""
    classifiers = [("LRU", 4), ("S5", 4), ("LinOSS", 4), ("DeltaNet", 4), ("LRU", 24)]
    cases = [Case(f"train {name}", 1024, 64, 64, 8, blocks=depth) for name, depth in classifiers]
    language_models = {"Mamba": 16, "Mamba-2": 64}
    return cases + [
        Case(f"train {name}", 512, 64, state, 2, blocks=4)
        for name, state in language_models.items()
    ]


def growth_cases() -> list[Case]:
    """Training steps of this library for longer and longer sequences, and for deeper models."""
    longer = [
        Case(f"grow {name}", 2**power, 64, state, 1, blocks=4)
        for name, state in (("LRU", 64), ("Mamba", 16))
        for power in (10, 12, 14, 16, 17)
    ]
    ways = {"": (4, 12, 24), " scan": (4, 12, 24, 48), " scan remat": (4, 24, 48)}
    return longer + [
        Case(f"grow LRU{way}", 1024, 64, 64, 8, blocks=depth)
        for way, depths in ways.items()
        for depth in depths
    ]


def first_use_cases() -> list[Case]:
    sizes = {"LRU": 64, "S5": 64, "Mamba": 16, "GatedDeltaNet": 16}
    return [Case(f"start {name}", 1024, 64, state, 8, blocks=4) for name, state in sizes.items()]


def generation_cases() -> list[Case]:
    """64 tokens from models of 130 million parameters."""
    return [
        Case(f"generate {model}", 64, 768, state, batch, blocks=24)
        for model, state in (("Mamba", 16), ("Mamba-2", 128))
        for batch in (1, 4)
    ]


def published_cases() -> list[Case]:
    """Models as they are published: 64 tokens of one text and of four, and a long prompt."""
    names = ("Falcon-H1-Tiny-90M", "LFM2.5-230M", "Qwen3.5-0.8B")
    return [
        Case(f"{what} {name}", time, 0, 0, batch)
        for name in names
        for what, time, batch in (("generate", 64, 1), ("generate", 64, 4), ("read", 1, 1))
    ]


def choice_cases() -> list[Case]:
    """The way chosen and the other one, on both sides of each size from which on another is taken."""
    never, always = 0, 2**40
    diagonal = [
        Case("LRU", time, 64, 64, batch, other=("WHOLE", threshold))
        for batch in (None, 8)
        for time, threshold in ((4096, never), (8192, always))
    ]
    diagonal += [
        Case("LRU", 4096, 64, 256, 8, other=("HEAVY", never)),
        Case("LRU", 4096, 64, 1024, 8, other=("HEAVY", always)),
    ]
    thresholds = [("STEPS", 32, never), ("STEPS", 64, always)]
    thresholds += [("LARGE_BEYOND", 4096, never), ("LARGE_BEYOND", 8192, always)]
    thresholds += [("LONG", 128, never), ("LONG", 256, always)]
    depthwise = [
        Case("S4D", time, 256, 64, None, other=(name, threshold))
        for name, time, threshold in thresholds
    ]
    gated = [
        Case("RG-LRU", 4096, width, 1, None, other=("CHUNK", numbers))
        for width in (256, 1024)
        for numbers in (2**16, 2**20)
    ]
    return diagonal + depthwise + gated


def long_cases() -> list[Case]:
    sizes = {"LRU": 64, "S5": 64, "S4D": 64, "selective_scan": 16}
    return [Case(op, 2**20, 64, state, None, exact=True) for op, state in sizes.items()]


def accuracy_cases() -> list[Case]:
    return [
        Case("linear_recurrence", time, 64, 1, None, decay=decay, exact=True)
        for time in (1024, 65536)
        for decay in (0.9, 0.999, 0.99999)
    ]


def step_cases() -> list[Case]:
    ways = [("", 10_000), (", call by call", 1000), (", call by call, discretized", 1000)]
    return [
        Case(f"step LRU{how}", tokens, width, width, None)
        for width in (64, 256)
        for how, tokens in ways
    ]


def mixer_cases() -> list[Case]:
    lengths, widths = (1024, 4096, 16384), (64, 256)
    cases = [
        Case("LRU", time, width, width, batch)
        for width in widths
        for time in lengths
        for batch in (1, 8)
        if width * time * batch < 2**25  # the usual way would need several gigabytes
    ]
    cases += [Case("S5", time, width, width, 1) for width in widths for time in lengths]
    cases += [Case("S4D", time, 256, 64, batch) for batch in (None, 1) for time in lengths]
    cases += [Case("S4", time, 256, 64, None) for time in lengths[:2]]
    cases += [Case("selective_scan", time, 256, 16, None) for time in (2048, *lengths)]
    cases += [
        Case("selective_scan", time, 256, 16, batch)
        for time, batch in ((1024, 1), (1024, 4), (2048, 1), (4096, 1), (4096, 4))
    ]
    cases += [Case("selective_scan", 1024, 1024, 16, None)]
    cases += [Case("ssd", time, 8 * HEAD_DIM, 64, None) for time in lengths[:2]]
    for op in ("linear_recurrence", "RG-LRU"):
        cases += [Case(op, time, width, 1, None) for width in (256, 1024) for time in lengths[:2]]
    return cases


def oscillator_cases() -> list[Case]:
    sizes = ((1024, 1), (4096, 1), (16384, 1), (4096, 8))
    return [Case("LinOSS", time, 64, 64, batch) for time, batch in sizes]


def matrix_cases() -> list[Case]:
    """A matrix of 64 x 64 for each of 8 heads, which decays by a number per sample or by one per key
    channel, and may erase before it writes. The peer without a decay has one beta for all heads."""
    lengths = {"delta_rule, no decay": (512, 4096)}
    ops = ("gated_linear_attention", "delta_rule", "delta_rule per channel", *lengths)
    return [
        Case(op, time, 8 * HEAD_DIM, HEAD_DIM, None)
        for op in ops
        for time in lengths.get(op, (1024, 4096))
    ]


def mamba3_cases() -> list[Case]:
    """8 heads of 64 x 64, with one input and output of a head at a time or four."""
    return [
        Case(op, time, 8 * HEAD_DIM, HEAD_DIM, None)
        for op in ("trapezoidal_ssd", "trapezoidal_ssd, rank 4")
        for time in (1024, 4096)
    ]


def draw(case: Case, key: jax.Array, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters `p.*`, inputs `x` or `x.*` and `weights` of the sum whose gradient is taken.

    For language models a prompt or text, and where in `folder` the checkpoint is.
    """
    mixer_key, weights_key, *keys = jr.split(key, 6)
    if case.op.startswith(("generate ", "read ")):
        checkpoint = folder / case.op.split(" ", 1)[1]
        language_model.save(checkpoint, case.model)
        length = READ if case.op.startswith("read ") else PROMPT
        tokens = language_model.vocabulary(case.model)
        prompt = jr.randint(keys[0], (case.sequences, length), 0, tokens)
        return {"prompt": np.asarray(prompt), "checkpoint": np.asarray(str(checkpoint))}
    if case.op.startswith("train ") and case.op.split()[1] in language_model.MIXERS:
        checkpoint = folder / f"{case}"
        language_model.save(checkpoint, case.model)
        tokens = jr.randint(keys[0], (case.sequences, case.time), 0, BYTES)
        return {"tokens": np.asarray(tokens), "checkpoint": np.asarray(str(checkpoint))}
    if case.op.startswith(("train ", "grow ")):
        x = jr.normal(keys[0], (case.sequences, case.time, 3))
        return {"x": np.asarray(x), "labels": np.arange(case.sequences) % 10}
    shape = (*(() if case.batch is None else (case.batch,)), case.time, case.features)
    arrays = {"weights": jr.normal(weights_key, shape), "x": jr.normal(keys[0], shape)}
    mixer = None
    match case.op:
        case op if op == "LRU" or op.startswith("step LRU"):
            mixer = LRUSequenceMixer(
                case.features, mixer_key, state_dim=case.state, r_min=0.9, r_max=0.999
            )
        case "S5":
            mixer = S5SequenceMixer(case.features, mixer_key, state_dim=case.state)
        case "LinOSS":
            # Beyond, in float32, the peer parts from its own double precision.
            mixer = LinOSSSequenceMixer(
                case.features, mixer_key, state_dim=case.state, theta_max=math.pi / 2
            )
        case "RG-LRU":
            mixer = RGLRUSequenceMixer(case.features, mixer_key, num_heads=HEADS)
        case "S4D":
            mixer = S4DSequenceMixer(case.features, mixer_key, state_dim=case.state)
        case "S4":
            mixer = S4SequenceMixer(case.features, mixer_key, state_dim=case.state)
            arrays["p.truncated_C"] = _truncated(mixer, case.time)
        case "linear_recurrence":
            low, high = (0.9, 0.999) if case.decay is None else (case.decay, case.decay)
            arrays["x.0"] = jr.uniform(keys[1], shape, minval=low, maxval=high)
            arrays["x.1"] = arrays.pop("x")
        case "selective_scan":
            arrays["x.0"] = arrays.pop("x")
            arrays["x.1"] = jax.nn.softplus(jr.normal(keys[1], shape) - 3)
            arrays["x.2"], arrays["x.3"] = (
                jr.normal(key, (*shape[:-1], case.state)) for key in keys[2:]
            )
            arrays["p.A"] = -jnp.tile(jnp.arange(1.0, case.state + 1), (case.features, 1))
        case "ssd":
            heads = case.features // HEAD_DIM
            of_heads = lambda array: array.reshape(*shape[:-1], heads, HEAD_DIM)
            arrays["weights"] = of_heads(arrays["weights"])
            arrays["x.0"] = of_heads(arrays.pop("x"))
            arrays["x.1"] = jax.nn.softplus(jr.normal(keys[1], (*shape[:-1], heads)) - 3)
            arrays["x.2"], arrays["x.3"] = (
                jr.normal(key, (*shape[:-1], 1, case.state)) for key in keys[2:]
            )
            arrays["p.A"] = -jnp.linspace(1, 16, heads)
        case op if op.startswith("trapezoidal_ssd"):
            heads, rank = case.features // HEAD_DIM, case.rank
            each = (case.time, rank, heads)
            arrays["weights"] = jr.normal(weights_key, (*each, HEAD_DIM))
            arrays["x.0"] = jr.normal(keys[0], (*each, HEAD_DIM))
            arrays["x.1"] = jax.nn.softplus(jr.normal(keys[1], (case.time, heads)) - 3)
            arrays["x.2"], arrays["x.3"] = (
                jr.normal(key, (*each, case.state)) / case.state**0.5 for key in keys[2:]
            )
            arrays["x.4"] = jr.uniform(jr.fold_in(mixer_key, 0), (case.time, heads))
            arrays["p.A"] = -jnp.linspace(1, 16, heads)
            del arrays["x"]
        case op if op in MATRIX_OPS:
            heads = case.features // HEAD_DIM
            of_heads = lambda array: array.reshape(case.time, heads, HEAD_DIM)
            unit = lambda array: array / jnp.linalg.norm(array, axis=-1, keepdims=True)
            arrays["weights"] = of_heads(arrays["weights"])
            arrays["x.0"] = of_heads(arrays.pop("x"))
            arrays["x.1"] = unit(of_heads(jr.normal(keys[1], shape)))
            arrays["x.2"] = of_heads(jr.normal(keys[2], shape))
            erases, decay = MATRIX_OPS[op]
            if erases:
                own = decay is not None
                arrays["x.3"] = jr.uniform(keys[3], (case.time, heads) if own else (case.time,))
            if decay is not None:
                per = (HEAD_DIM,) if decay == "vector" else ()
                steps = jr.normal(jr.fold_in(mixer_key, 0), (case.time, heads, *per))
                arrays["x.4"] = -jax.nn.softplus(steps - 3)
    for field in dataclasses.fields(mixer) if mixer is not None else ():
        if eqx.is_inexact_array(value := getattr(mixer, field.name)):
            arrays[f"p.{field.name}"] = value
    if case.op in ("S4D", "S4"):  # whose peers have no skip
        arrays["p.D"] = jnp.zeros_like(arrays["p.D"])
    return {name: np.asarray(value) for name, value in arrays.items()}


def _truncated(mixer: S4SequenceMixer, length: int) -> jax.Array:
    """C (I - A^L), from which the generating function makes the kernel of L samples."""
    A_bar, _, C = mixer.discretize()
    power = jnp.linalg.matrix_power(A_bar, length)
    C = (C - jnp.einsum("chm,hmn->chn", C, power))[0, :, : mixer.A_real.shape[1]]
    return jnp.stack([C.real, C.imag], axis=-1)


def floor_seconds(case: Case, rates: dict[str, float]) -> float | None:
    """The least that forward and backward, or all steps, can take here.

    The longest of: inputs, outputs and their gradients once through memory; the exponentials that
    differ from sample to sample; the matrix products, forward and twice as many backward. For
    generation: all weights read once per token; for a prompt: a product with each of the blocks' for
    every token.
    """
    if case.op.startswith(("train ", "grow ")):
        return None
    if case.op.startswith("generate "):
        return case.time * language_model.weight_bytes(case.model) / rates["read"]
    if case.op.startswith("read "):
        blocks = language_model.weight_bytes(case.model, of_blocks=True)
        return READ * 2 * blocks / 4 / rates["products"]
    numbers = case.sequences * case.time * case.features
    arrays = {"linear_recurrence": 3, "selective_scan": 3, **dict.fromkeys(MATRIX_OPS, 4)}
    arrays |= {"trapezoidal_ssd": 4, "trapezoidal_ssd, rank 4": 16}
    arrays = arrays.get(case.op, 2)
    traffic = 2 * 4 * arrays * numbers / rates["bytes"]
    products = exponentials = 0.0
    if case.op.startswith("step "):
        return case.time * 2 * 2 * case.features * 2 * case.state / rates["products"]
    if case.op in ("LRU", "S5", "LinOSS"):
        real_state = case.state if case.op == "S5" else 2 * case.state
        products = 3 * 2 * 2 * numbers * real_state
    elif case.op == "RG-LRU":
        products = 3 * 2 * 2 * numbers * case.features / HEADS
        exponentials = 9 * numbers
    elif case.op == "selective_scan":
        exponentials = 2 * numbers * case.state
    elif case.op == "ssd":
        products = 3 * 2 * 2 * numbers * case.state  # into the states and out of them
    elif case.op.startswith("trapezoidal_ssd"):
        products = 3 * 2 * 2 * numbers * case.rank * case.state
    elif case.op in MATRIX_OPS:
        erases, decay = MATRIX_OPS[case.op]
        products = 3 * 2 * (3 if erases else 2) * numbers * case.state  # and out to be erased
        exponentials = numbers if decay == "vector" else 0.0
    elif case.op in ("S4D", "S4"):
        # By chunks of c samples: a triangle of c x c, in and out of the states at their boundary.
        real_state = case.state
        chunk = math.sqrt(2 * real_state)
        products = 3 * 2 * numbers * (chunk / 2 + 2 * real_state / chunk)
    return max(traffic, products / rates["products"], exponentials / rates["exponentials"])


TABLES = {
    "mixers": mixer_cases,
    "matrix": matrix_cases,
    "oscillators": oscillator_cases,
    "mamba3": mamba3_cases,
    "choices": choice_cases,
    "steps": step_cases,
    "generation": generation_cases,
    "published": published_cases,
    "training": training_cases,
    "growth": growth_cases,
    "first_use": first_use_cases,
    "long": long_cases,
    "accuracy": accuracy_cases,
}
