"""transformers of the package index on torch: generation and training, without the kernels for GPUs."""

import os
import platform
import time

import numpy as np
import torch
import transformers
from job import Job
from torch_training import training_job

__all__ = ["prepare", "versions"]


def versions() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} on cpu",
        "transformers": transformers.__version__,
    }


def load(arrays: dict) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(arrays["checkpoint"]), dtype=torch.float32
    )


def prepare(case: dict, arrays: dict) -> Job:
    if "tokens" in arrays:
        loss = lambda model, tokens: model(tokens, labels=tokens).loss
        return training_job(lambda: load(arrays), loss, arrays)
    model = load(arrays).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.tensor(arrays["prompt"], dtype=torch.long)

    @torch.inference_mode()
    def write(count: int = case["time"]) -> torch.Tensor:
        mask = torch.ones_like(prompt)
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return tokens[:, prompt.shape[1] :]

    @torch.inference_mode()
    def outcome() -> dict[str, np.ndarray]:
        return {"tokens": write().numpy(), "logits": model(prompt).logits.numpy()}

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        write(1)
        start = time.perf_counter()
        write(4)
        return time.perf_counter() - start

    # The ops are so short that one thread may be faster than several that wait for each other.
    threads = min((1, os.cpu_count() or 1), key=seconds)
    torch.set_num_threads(threads)
    return Job(write, outcome, {"threads": threads})
