"""mamba.py 1.2.0 of the package index (`mambapy`): its Mamba, with an embedding around it."""

import json
import pathlib
import platform

import torch
import torch.nn.functional as F  # noqa: N812
from job import Job
from mambapy.mamba import Mamba, MambaConfig, RMSNorm
from safetensors.torch import load_file
from torch_training import training_job

__all__ = ["prepare", "versions"]


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), "torch": f"{torch.__version__} on cpu"}


class LanguageModel(torch.nn.Module):
    """The logits' weight is the embedding, as in the checkpoint."""

    def __init__(self, folder: pathlib.Path):
        super().__init__()
        entries = json.loads((folder / "config.json").read_text())
        config = MambaConfig(
            d_model=entries["hidden_size"],
            n_layers=entries["num_hidden_layers"],
            d_state=entries["state_size"],
            rms_norm_eps=entries["layer_norm_epsilon"],
        )
        self.embeddings = torch.nn.Embedding(entries["vocab_size"], config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps)
        tensors = load_file(folder / "model.safetensors")
        names = {name: name.removeprefix("backbone.") for name in tensors}
        self.load_state_dict(
            {names[name].replace("layers.", "mamba.layers.", 1): t for name, t in tensors.items()}
        )

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embeddings

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm_f(self.mamba(self.embeddings(tokens)))
        return F.linear(hidden, self.embeddings.weight)


def loss(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def prepare(case: dict, arrays: dict) -> Job:
    folder = pathlib.Path(str(arrays["checkpoint"]))
    return training_job(lambda: LanguageModel(folder), loss, arrays)
