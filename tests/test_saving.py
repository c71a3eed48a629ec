"""A folder that is saved to holds the old model or the new one, whatever becomes of the saving."""

import functools as ft
import json
import os
import subprocess
import sys
import threading

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from discretax.architectures import LanguageModel
from discretax.pretrained import _files, load, save
from discretax.sequence_mixers import MambaSequenceMixer

pytestmark = pytest.mark.slow

WEIGHTS, CONFIG, PARTIAL = "model.safetensors", "config.json", ".partial"


@ft.cache
def build(eps=1e-5, seed=0):
    return LanguageModel(
        jr.key(seed),
        vocab_size=7,
        hidden_dim=4,
        num_blocks=1,
        pattern=(ft.partial(MambaSequenceMixer, state_dim=2),),
        norm=ft.partial(eqx.nn.RMSNorm, eps=eps, use_bias=False),
    )


def assert_holds(folder, model):
    loaded, _ = load(folder)
    assert loaded.norm.eps == model.norm.eps
    np.testing.assert_array_equal(loaded.encoder.embedding.weight, model.encoder.embedding.weight)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def change_config(folder, **entries):
    config = json.loads((folder / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))


def cut_short(monkeypatch, name, after):
    """The next call of what `os` or safetensors has by this name fails, `after` so many."""
    module = os if name == "replace" else pytest.importorskip("safetensors.numpy")
    function, calls = getattr(module, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == after + 1:
            raise OSError("no space left")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)


def test_what_a_killed_save_left_is_removed(tmp_path):
    (tmp_path / PARTIAL).mkdir()
    for name in ("lock", ".tmpEl9x", WEIGHTS, CONFIG):
        (tmp_path / PARTIAL / name).write_bytes(bytes(100))
    save(build(), tmp_path)
    assert_holds(tmp_path, build())


@pytest.mark.parametrize(("name", "after"), [("save_file", 0), ("replace", 0)])
def test_a_save_that_fails_changes_nothing(name, after, tmp_path, monkeypatch):
    save(build(), tmp_path)
    with monkeypatch.context() as patch:
        cut_short(patch, name, after)
        with pytest.raises(OSError, match="no space left"):
            save(build(eps=1e-3, seed=1), tmp_path)
    assert_holds(tmp_path, build())


def test_new_weights_with_the_old_configuration_are_refused(tmp_path, monkeypatch):
    save(build(), tmp_path)
    with monkeypatch.context() as patch:
        cut_short(patch, "replace", after=1)
        with pytest.raises(OSError, match="no space left"):
            save(build(eps=1e-3, seed=1), tmp_path)
    message = (
        r"config.json is not .* that model.safetensors was saved with, as when a save was cut "
        r"short.*\n(.*\n)*norm.eps: 1e-05 by config.json, 0.001 when the weights were saved\nSave"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    save(build(eps=1e-3, seed=1), tmp_path)
    assert_holds(tmp_path, build(eps=1e-3, seed=1))


def test_a_configuration_that_was_edited(tmp_path):
    """What does not change the model may be changed, and the model may not."""
    save(build(), tmp_path)
    change_config(tmp_path, eos_token_id=3, transformers_version="5.0")
    assert_holds(tmp_path, build())
    change_config(tmp_path, layer_norm_epsilon=1e-3)
    with pytest.raises(
        ValueError, match=r"or it was changed since:.*\n.*0.001 by config.json, 1e-05"
    ):
        load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"model_type": "llama"}'])
def test_hostile_metadata(content, tmp_path):
    save(build(), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"discretax.config": content})
    with pytest.raises(ValueError, match=r"the metadata of .*model.safetensors"):
        load(tmp_path)


def test_weights_of_others_say_nothing_of_a_configuration(tmp_path):
    save(build(), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="numpy") as file:
        assert file.metadata() == {
            "format": "pt",  # transformers reads nothing without it
            "discretax.config": (tmp_path / CONFIG).read_text(),
        }
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {"format": "pt"})
    assert_holds(tmp_path, build())
    change_config(tmp_path, layer_norm_epsilon=1e-3)
    assert load(tmp_path)[0].norm.eps == 1e-3


HOLD_THE_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_saves_at_a_time(tmp_path):
    """The others wait, but not for one that is killed."""
    pytest.importorskip("fcntl")
    save(build(), tmp_path)
    (tmp_path / PARTIAL).mkdir()
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path / PARTIAL / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        (tmp_path / PARTIAL / WEIGHTS).touch()
        saving = threading.Thread(target=save, args=(build(eps=1e-3, seed=1), tmp_path))
        saving.start()
        saving.join(timeout=0.5)
        assert saving.is_alive() and (tmp_path / PARTIAL / WEIGHTS).exists()
        other.kill()
    saving.join()
    assert_holds(tmp_path, build(eps=1e-3, seed=1))


def test_many_saves_at_once(tmp_path):
    """Each is whole; the last one stays."""
    models = [build(eps=10.0**-n, seed=n) for n in (3, 4, 5)]
    run = lambda model: [save(model, tmp_path) for _ in range(20)]
    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eps = load(tmp_path)[0].norm.eps
    assert_holds(tmp_path, next(model for model in models if model.norm.eps == eps))


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "fcntl", None)
    save(build(), tmp_path)
    assert_holds(tmp_path, build())


def test_entries_of_numpy(tmp_path):
    save(build(), tmp_path, entries={"eos_token_id": np.int64(3)})
    assert json.loads((tmp_path / CONFIG).read_text())["eos_token_id"] == 3
    with pytest.raises(TypeError, match=r"`entries` must hold what JSON can; got \{3\}"):
        save(build(), tmp_path, entries={"eos_token_id": {3}})
