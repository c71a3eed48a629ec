"""From an interpreter that knows nothing to the end of a first training step, in stages.

`python first_use.py SUBJECT '{"op": "start LRU", ...}'` prints the seconds of each as JSON; SUBJECT is a
module beside this file with a `model(case, key)`.
"""

import contextlib
import importlib
import json
import sys
import time


def main() -> None:
    name, case = sys.argv[1], json.loads(sys.argv[2])
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str):
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with stage("others"):
        import equinox as eqx  # noqa: F401
        import jax
        import numpy as np
        import optax  # noqa: F401
    with stage("library"):
        subject = importlib.import_module(name)
    from measuring import classifier_step

    x = np.random.default_rng(0).normal(size=(case["batch"], case["time"], 3))
    labels = np.arange(case["batch"]) % 10
    with stage("build"):
        make = lambda key: subject.model(case, key)
        step, args = jax.block_until_ready(classifier_step(make, x.astype("float32"), labels))
    with stage("trace"):
        traced = step.trace(*args)
    with stage("lower"):
        lowered = traced.lower()
    with stage("compile"):
        compiled = lowered.compile()
    with stage("run"):
        jax.block_until_ready(compiled(*args))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
