"""The example, run small, and what its figures are made by."""

import wave

import jax
import numpy as np
import pytest
from helpers import imported_example, interrupted_at_the_first

pytestmark = pytest.mark.slow

SMALL = (
    "--mixer=lru",
    "--filters=4",
    "--width=2",
    "--steps=2",
    "--every=1",
    "--batch-size=1",
    "--seconds=0.6",
)


@pytest.fixture(scope="module")
def example():
    with imported_example("denoise_audio") as module:
        yield module


@pytest.fixture(scope="module")
def audio(example):
    return example.audio


def tone(rate, frequency, seconds=1.0):
    time = np.arange(int(seconds * rate)) / rate
    return np.sin(2 * np.pi * frequency * time) * np.sin(np.pi * time / seconds) ** 2


@pytest.fixture(scope="module")
def data(example):
    """Tones that swell and fade, to train and to test with, and white noise."""
    rate, noise = example.RATE, np.random.default_rng(0).normal(size=(3, 6 * example.RATE))
    speech = [tone(rate, f) / tone(rate, f).std() for f in (200, 350, 500, 650)]
    return speech[:2], speech[2:], dict(zip(example.PLACES, noise, strict=True))


@pytest.fixture(scope="module")
def unbroken(example, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # for Optax
        patch.setattr(example, "load", lambda: data)
        return out, example.main([*SMALL, f"--out={out}"])


def test_writes_checkpoint_figure_and_sound(example, audio, unbroken):
    out, result = unbroken
    written = sorted(path.name for path in out.iterdir())
    sounds = ["clean.wav", "model.wav", "noisy.wav", "wiener.wav"]
    assert written == sorted(["checkpoint.eqx", "spectrograms.png", *sounds])
    assert (out / "spectrograms.png").read_bytes().startswith(b"\x89PNG")
    clean, noisy = (audio.read_wave(out / name) for name in ("clean.wav", "noisy.wav"))
    lead = example.LEAD
    assert len(noisy) == -(-(lead + audio.RATE) // example.HOP) * example.HOP
    assert clean[:lead].std() < 1e-3 < 0.1 < noisy[:lead].std()
    # Noise and speech are not quite uncorrelated.
    spoken = slice(lead, lead + audio.RATE)
    np.testing.assert_allclose(audio.si_snr(noisy[spoken], clean[spoken]), 5, atol=0.5)
    assert len(result["history"]) == 2


def test_streamed_is_the_whole(unbroken):
    assert unbroken[1]["stream_error"] < 1e-5


def test_every_method_is_tested_at_every_level(unbroken, example):
    scores = unbroken[1]["scores"]
    kinds = ("steady", *example.PLACES)
    assert list(scores) == [(kind, level) for kind in kinds for level in (0, 5, 10)]
    for (kind, level), methods in scores.items():
        assert list(methods) == [*example.METHODS, "model"]
        assert all(len(ratios) == 2 for ratios in methods.values())
        np.testing.assert_allclose(methods["noisy"], level, atol=0.7)
        # Speech is a tone here, and of the three places the noise is white: easily told apart.
        gain = 5 if kind == "steady" else 12
        assert min(methods["Wiener"] + methods["best fixed filter"]) > level + gain


def test_interrupted_and_resumed_equals_unbroken(example, data, unbroken, tmp_path):
    speech, _, noises = data
    voices, noises = example.joined(speech), list(example.makers(noises, test=False).values())
    file = tmp_path / "checkpoint.eqx"
    _, config = example.parse([*SMALL])

    with jax.numpy_dtype_promotion("standard"):
        with interrupted_at_the_first(example.checkpoints):
            example.train(config, voices, noises, file, resume=False)
        halfway = file.read_bytes()
        *_, history = example.train(config, voices, noises, file, resume=True)
    out, result = unbroken
    assert history == result["history"]
    assert file.read_bytes() == (out / "checkpoint.eqx").read_bytes() != halfway


def test_noise_to_test_with_is_not_trained_on(example, data):
    noises = {place: np.arange(30000.0) for place in data[2]}
    rng = np.random.default_rng(0)
    for place in noises:
        trained, tested = (example.makers(noises, test)[place] for test in (False, True))
        assert max(trained(rng, 1000).max() for _ in range(100)) < 20000
        assert min(tested(rng, 1000).min() for _ in range(100)) >= 20000


def test_files_of_any_rate_are_read_alike(audio, tmp_path):
    expected = tone(audio.RATE, 440) / tone(audio.RATE, 440).std()
    for rate, channels in ((8000, 1), (44100, 2)):
        with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
            file.setparams((channels, 2, rate, 0, "NONE", ""))
            samples = np.repeat(1000 + 10000 * tone(rate, 440)[:, None], channels, axis=1)
            samples[:, 1:] = 0
            file.writeframes(samples.astype("<i2").tobytes())
        read = audio.read_wave(tmp_path / "tone.wav")
        inside = slice(200, -200)  # the constant rings at the ends
        np.testing.assert_allclose(read[inside], expected[inside], atol=0.02)


def test_a_piece_is_up_to_a_fifth_faster_or_slower(audio):
    rng, samples = np.random.default_rng(0), np.arange(2000.0)
    pieces = np.array([audio.piece(samples, rng, 1000) for _ in range(300)])
    assert pieces.min() >= 0 and pieces.max() <= 1999
    speeds = pieces[:, 1] - pieces[:, 0]
    np.testing.assert_allclose(np.diff(pieces), np.broadcast_to(speeds[:, None], (300, 999)))
    np.testing.assert_allclose([speeds.min(), speeds.max()], [1 / 1.2, 1.2], rtol=0.02)


def test_mixtures_have_exactly_the_level_that_is_asked_for(audio):
    speech, noise = np.random.default_rng(0).normal(size=(2, 1000)) * [[3], [0.1]]
    speech[:400] = 0
    for level in (-7.5, 0, 10):
        rest = audio.mix(speech, noise, level, slice(400, 1000)) - speech
        ratio = (speech[400:] ** 2).mean() / (rest[400:] ** 2).mean()
        np.testing.assert_allclose(10 * np.log10(ratio), level, atol=1e-9)
        np.testing.assert_allclose(rest / noise, rest[0] / noise[0])  # in the lead, too


def test_si_snr_is_that_of_an_orthogonal_error_at_any_loudness(audio):
    speech, error = np.random.default_rng(0).normal(size=(2, 1000))
    error -= error @ speech / (speech @ speech) * speech
    error *= np.sqrt((speech @ speech) / (error @ error)) / 10**0.5  # 10 dB below
    for loudness in (0.01, 1, -7):
        np.testing.assert_allclose(audio.si_snr(loudness * (speech + error), speech), 10, rtol=1e-9)


def power(samples):
    """dB"""
    return 10 * np.log10((samples**2).mean())


@pytest.mark.parametrize("follow", [False, True])
def test_wiener_filter_keeps_bursts_of_a_tone_and_takes_white_noise_away(audio, follow):
    rate, lead = audio.RATE, audio.RATE // 2
    noise = np.random.default_rng(0).normal(size=3 * rate)
    time = np.arange(3 * rate) / rate
    bursts = 3 * np.sin(2 * np.pi * 1000 * time) * ((2.5 * time) % 1 < 0.5)
    bursts[:lead] = 0
    np.testing.assert_allclose(audio.filtered(noise, np.ones((129, 1))), noise, atol=1e-12)

    assert power(audio.wiener(noise, lead, follow)[rate:-rate]) < -20
    answer = audio.wiener(bursts + noise, lead, follow)
    heard = slice(lead, -rate // 4)
    before, after = (audio.si_snr(x[heard], bursts[heard]) for x in (bursts + noise, answer))
    # The window spreads a tone over three of 129 frequencies, where noise remains: 16 dB less of it.
    assert 13 < after - before < 16
    np.testing.assert_allclose(power(answer[heard]), power(bursts[heard]), atol=0.3)
    assert power(answer[: lead // 2]) < -20


def test_following_takes_noise_away_that_grows(audio):
    rate = audio.RATE
    noise = np.random.default_rng(0).normal(size=4 * rate)
    noise[rate:] *= 10**0.5  # by 10 dB
    fixed, following = (audio.wiener(noise, rate // 2, follow)[-rate:] for follow in (False, True))
    assert power(following) < -5 < 5 < power(fixed)


def test_best_fixed_filter_parts_what_lies_apart(audio):
    time = np.arange(2 * audio.RATE) / audio.RATE
    low, high = np.sin(2 * np.pi * 500 * time), np.sin(2 * np.pi * 3000 * time)
    assert audio.si_snr(audio.best_fixed(low + high, low), low) > 40


@pytest.mark.parametrize(
    "option, rule",
    [
        ("--mixer=s6", "--mixer must be one of s5, lru, mamba; got s6"),
        ("--steps=70", "--steps must be a multiple of --every, 50; got 70"),
        ("--seconds=0.5", "--seconds must be above 0.5, the silence between recordings; got 0.5"),
        ("--batch-size=0", "--batch-size must be above 0; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(example, tmp_path, capsys, option, rule):
    with pytest.raises(SystemExit):
        example.main([option, f"--out={tmp_path / 'out'}"])
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
