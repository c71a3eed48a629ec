"""What the workers share that train with torch."""

import time
from collections.abc import Callable

import torch
from job import Job, peak_bytes


def training_job(make: Callable[[], torch.nn.Module], loss: Callable, arrays: dict) -> Job:
    """A training step: `loss(model, tokens)`, gradients and Adam, on all cores.

    `model.get_input_embeddings()` is the layer whose first moment says what the gradient was.
    """
    start = time.perf_counter()
    model = make().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    build_seconds = time.perf_counter() - start
    tokens = torch.tensor(arrays["tokens"], dtype=torch.long)

    def step() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss(model, tokens)
        value.backward()
        optimiser.step()
        return value.detach()

    first = step().numpy()
    moment = optimiser.state[model.get_input_embeddings().weight]["exp_avg"].numpy().copy()
    facts = {"build_seconds": build_seconds, **peak_bytes(step)}
    return Job(step, lambda: {"loss": first, "moment": moment}, facts)
