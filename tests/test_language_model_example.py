"""The examples of language models, run small."""

import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import imported_example

import discretax

pytestmark = pytest.mark.slow

SMALL = (
    "--pattern=griffin",
    "--hidden-dim=16",
    "--num-blocks=3",
    "--length=32",
    "--steps=40",
    "--learning-rate=0.02",
    "--write=12",
    "--temperature=0",
)


@pytest.fixture(scope="module")
def example():
    with imported_example("language_model") as module:
        yield module


@pytest.fixture(scope="module")
def generating():
    with imported_example("generate_pretrained") as module:
        yield module


def test_topics_are_split_and_none_is_a_section_of_another(example):
    texts = example.distinct_topics()
    train, validation = (bytes(part).decode() for part in example.load())
    assert train[0] == validation[0] == "\0"
    assert validation[1:].split("\0") == texts[::8]
    assert sorted(train[1:].split("\0") + texts[::8]) == sorted(texts)
    lines = [{line for line in text.splitlines() if len(line) > 40} for text in texts]
    for i, section in enumerate(lines):
        for whole in lines[:i] + lines[i + 1 :]:
            assert len(section & whole) <= len(section) / 2
    # What was left out is there all the same.
    missing = set(example.topics) - {n for n, text in example.topics.items() if text in texts}
    assert {"while", "sequence-types", "naming"} <= missing


def test_floors_of_known_texts(example):
    train, validation = (example.packed([text]) for text in ("ab" * 4, "aac"))
    expected = -(2 * math.log2(5 / 264) + math.log2(1 / 264)) / 3  # each byte counts once more
    assert example.floors(train, validation)["frequencies"] == pytest.approx(expected)

    # Random letters cost what they are worth, unless the training text had them.
    letters = "".join(chr(ord("a") + i) for i in np.random.default_rng(0).integers(16, size=20000))
    seen, new = (example.packed([part]) for part in (letters[:10000], letters[10000:]))
    for name in ("lzma", "bz2"):
        assert 4 < example.floors(seen, new)[name] < 4.6
    assert example.floors(seen, seen[3000:4000])["lzma"] < 0.3


def test_each_byte_is_predicted_once_in_a_round(example):
    config = example.Config(length=5, batch_size=3)
    windows = example.batches(jnp.arange(40), config, seed=0)  # 9 windows of 4 and one before
    for _ in range(3):
        batch = np.concatenate([next(windows) for _ in range(3)])
        assert batch.shape == (9, 5)
        assert (np.diff(batch, axis=1) == 1).all()
        assert len(set(batch[:, 1:].ravel())) == 36
        assert (np.diff(batch[:, 0]) != 4).any()
    with pytest.raises(SystemExit, match="--length must be at most 4, half of the text; got 5"):
        next(example.batches(jnp.arange(9), config, seed=0))


def test_bits_per_byte_of_known_models(example):
    """All bytes alike cost 8 bits each; and a byte is predicted from those of its own topic alone."""
    config = example.Config(hidden_dim=8, num_blocks=1)
    model, state = example.make_model("rglru", config, jr.key(0))
    texts = ["one topic", "two"]
    whole = example.bits_per_byte(model, state, example.packed(texts))
    alone = [float(example.bits_per_byte(model, state, example.packed([t]))) for t in texts]
    assert whole == pytest.approx((9 * alone[0] + 3 * alone[1]) / 12, rel=1e-5)
    model = eqx.tree_at(lambda m: m.encoder.embedding.weight, model, replace_fn=jnp.zeros_like)
    assert example.bits_per_byte(model, state, example.packed(texts)) == pytest.approx(8)


def test_a_few_steps_teach_something_and_the_weights_write(
    example, generating, tmp_path, capsys, monkeypatch
):
    """The text that the trained model writes is the one that its saved weights write."""
    text = "the cat sat on the mat. " * 20
    data = example.packed([text, text]), example.packed([text[:100]])
    monkeypatch.setattr(example, "load", lambda _: data)
    saved = tmp_path / "weights"
    with jax.numpy_dtype_promotion("standard"):  # which Optax relies on
        results = example.main([*SMALL, "--prompt=the cat", f"--out={tmp_path}", f"--save={saved}"])
    history = results["griffin"]["history"]
    assert [row["step"] for row in history] == list(range(1, 41, 3))
    assert 8 > history[3]["training"] > history[-1]["training"]
    assert history[-1]["validation"] < 2

    printed = capsys.readouterr().out
    assert "960 bytes to train with, 100 to validate with" in printed
    row = re.search(r"^griffin +(\d+\.\d+) +(\d+) +\d+$", printed, re.MULTILINE)
    assert float(row[1]) == pytest.approx(history[-1]["validation"], abs=5.1e-4)
    assert int(row[2]) == results["griffin"]["parameters"]
    for name, bits in example.floors(*data).items():
        assert re.search(rf"^{name} +{bits:.3f}$", printed, re.MULTILINE)
    assert (tmp_path / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")

    model, state = discretax.pretrained.load(saved)
    bits = example.bits_per_byte(model, state, data[1])
    assert float(bits) == pytest.approx(history[-1]["validation"], rel=1e-5)
    new = generating.main(
        [
            *(str(saved), "--prompt=the cat", "--max-new-tokens=12", "--temperature=0"),
            f"--out={tmp_path}",
        ]
    )
    assert len(new) == 12
    assert f"----- written by griffin -----\nthe cat{new}\n-----\n" in printed
    told = capsys.readouterr().out
    assert f"no {saved / 'tokenizer.json'}: 256 tokens are taken for bytes" in told
    assert re.search(rf"\nthe cat{new}\n\nfirst token after .* s, .*, then .* tokens/s\n", told)
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")

    tokens = list(example.packed(["the cat" + new]))
    costs = generating.surprise(model, state, tokens)
    assert len(costs) == 19
    assert costs.mean() == pytest.approx(
        float(example.bits_per_byte(model, state, jnp.array(tokens))), rel=1e-5
    )


def test_every_pattern_can_be_trained(example):
    """By shapes alone, which compiles nothing."""
    config = example.Config(hidden_dim=32, num_blocks=3, drop_rate=0.1)
    optimiser = example.make_optimiser(config)
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.uint8)
    for name in example.PATTERNS:
        model, state = eqx.filter_eval_shape(example.make_model, name, config, jr.key(0))
        with jax.numpy_dtype_promotion("standard"):
            opt_state = eqx.filter_eval_shape(
                lambda model: optimiser.init(eqx.filter(model, eqx.is_inexact_array)), model
            )
            trained, *_, loss = eqx.filter_eval_shape(
                example.train_step, model, state, opt_state, tokens, jr.key(0), config
            )
        assert jax.tree.structure(trained) == jax.tree.structure(model), name
        assert loss.shape == (), name


@pytest.mark.parametrize("name", ["rglru", "griffin", "mamba", "mamba2"])
def test_models_that_can_be_saved(example, name, tmp_path):
    assert name in example.SAVED
    model, _ = example.make_model(name, example.Config(hidden_dim=32, num_blocks=3), jr.key(0))
    discretax.pretrained.save(model, tmp_path)
    loaded, _ = discretax.pretrained.load(tmp_path)
    leaves = [jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (model, loaded)]
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_table_of_given_numbers(example):
    result = {
        "parameters": 1234,
        "history": [{"validation": 3.0}, {"validation": 2.0, "seconds": 59.6}],
    }
    assert example.table({"frequencies": 4.75, "bz2": 1.9996}, {"lru": result}) == (
        "             bits per byte parameters  seconds\n"
        "frequencies          4.750\n"
        "bz2                  2.000\n"
        "lru                  2.000       1234       60"
    )


@pytest.mark.parametrize(
    "options, rule",
    [
        (["--pattern=lstm"], r"'lstm' \(choose from '?rglru'?, "),
        (["--steps=0"], "--steps must be above 0; got 0"),
        (["--length=1"], "--length must be at least 2, a byte and the next; got 1"),
        (["--write=0"], "--write must be above 0; got 0"),
        (["--pattern=lru", "--save=x"], "--save must be with one --pattern of rglru, .*; got x"),
        (["--pattern", "rglru", "mamba", "--save=x"], "--save must be with one --pattern"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, options, rule):
    with pytest.raises(SystemExit):
        example.main([*SMALL, *options, f"--out={tmp_path}"])
    assert re.search(rule, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_bytes_of_a_character_are_written_together(generating):
    tokenizer = generating.Bytes(start=0)
    assert tokenizer.encode("é") == [0, 0xC3, 0xA9]
    assert [tokenizer.decode(token) for token in (0xC3, 0xA9, 0x41)] == ["", "é", "A"]


def test_tokens_as_numbers(generating, tmp_path, capsys):
    tokenizer = generating.make_tokenizer(tmp_path, {"vocab_size": 300})
    assert (
        f"no {tmp_path / 'tokenizer.json'}: tokens are written as numbers"
        in capsys.readouterr().out
    )
    assert tokenizer.encode("510 14") == [510, 14]
    assert tokenizer.decode(7) == " 7"
    with pytest.raises(SystemExit, match=r"numbers of tokens.*got 'a cat'"):
        tokenizer.encode("a cat")


def test_stop_tokens(generating):
    configs = {"eos_token_id": 5}, {"eos_token_id": [1, 2]}, {"eos_token_id": None}, {}
    assert [generating.stop_tokens(config) for config in configs] == [[5], [1, 2], [], []]
