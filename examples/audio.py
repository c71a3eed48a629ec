"""Sound: files of it, pieces and noises drawn at random, and the Wiener filter to compare with."""

import wave
from pathlib import Path

import numpy as np
from scipy import signal

RATE = 8000  # samples a second, of everything here
WINDOW, HOP = 256, 64  # samples of the Wiener filter's windows, and from one to the next


def read_wave(path: Path) -> np.ndarray:
    """The first channel, (time,), at `RATE`, of mean zero and power one."""
    with wave.open(str(path)) as file:
        channels, rate, width = file.getnchannels(), file.getframerate(), file.getsampwidth()
        data = file.readframes(file.getnframes())
    if width != 2:
        raise SystemExit(f"Samples must have 16 bits; got {8 * width} in {path}. Convert the file.")
    samples = signal.resample_poly(np.frombuffer(data, "<i2")[::channels].astype(float), RATE, rate)
    return (samples - samples.mean()) / samples.std()


def write_wave(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((32767 * samples / np.abs(samples).max()).astype("<i2").tobytes())


def piece(samples: np.ndarray, rng: np.random.Generator, time: int) -> np.ndarray:
    """From anywhere, up to a fifth faster or slower, which makes it higher or lower as well."""
    speed = 1.2 ** rng.uniform(-1, 1)
    start = rng.uniform(0, len(samples) - 1 - speed * (time - 1))
    return np.interp(start + speed * np.arange(time), np.arange(len(samples)), samples)


def mix(speech: np.ndarray, noise: np.ndarray, level: float, spoken: slice = slice(None)):
    """Both together, (time,), the speech `level` dB above the noise by their powers while `spoken`."""
    ratio = (speech[spoken] ** 2).mean() / (noise[spoken] ** 2).mean()
    return speech + noise * (ratio / 10 ** (level / 10)) ** 0.5


def steady(rng: np.random.Generator, time: int) -> np.ndarray:
    """Noise of a random colour: up to 6 dB less with every octave, and hills and valleys."""
    frequency, waves = np.linspace(0, 1, time // 2 + 1), np.arange(1, 7)
    phase, height = rng.uniform(0, 2 * np.pi, 6), rng.normal(0, 0.4, 6)
    hills = np.cos(np.pi * frequency[:, None] * waves + phase) @ height
    gain = np.exp(hills) / (frequency + 0.02) ** rng.uniform()
    return np.fft.irfft(gain * np.fft.rfft(rng.normal(size=time)), time)


def transform(samples: np.ndarray) -> np.ndarray:
    """(frequency, windows): a short-time Fourier transform."""
    return signal.stft(samples, nperseg=WINDOW, noverlap=WINDOW - HOP)[2]


def filtered(samples: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """`samples` (time,), their transform multiplied by `gain`."""
    y = signal.istft(gain * transform(samples), nperseg=WINDOW, noverlap=WINDOW - HOP)[1]
    return y[: len(samples)]


def wiener(noisy: np.ndarray, lead: int, follow: bool) -> np.ndarray:
    """The Wiener filter, which does not know the speech, window by window: $\\xi / (1 + \\xi)$.

    The spectrum of the noise is measured in the first `lead` samples, in which nobody speaks, and, to
    `follow` it, from then on wherever speech is unlikely (Gerkmann and Hendriks, 2012). The ratio
    $\\xi$ of speech to noise is decided by the last window's answer (Ephraim and Malah, 1984).
    """
    power = np.abs(transform(noisy)) ** 2
    noise = power[:, 2 : lead // HOP - 1].mean(1) + 1e-12
    clean, likely, gain = np.zeros_like(noise), np.zeros_like(noise), np.ones_like(power)
    loud = 10 ** (15 / 10)  # the ratio that is expected of speech
    for t, now in enumerate(power.T):
        if follow:
            spoken = 1 / (1 + (1 + loud) * np.exp(-now / noise * loud / (1 + loud)))
            likely = 0.9 * likely + 0.1 * spoken
            spoken = np.where(likely > 0.99, np.minimum(spoken, 0.99), spoken)
            noise = 0.8 * noise + 0.2 * (spoken * noise + (1 - spoken) * now)
        ratio = 0.98 * clean / noise + 0.02 * np.maximum(now / noise - 1, 0)
        ratio = np.maximum(ratio, 10 ** (-25 / 10))
        gain[:, t] = ratio / (1 + ratio)
        clean = gain[:, t] ** 2 * now
    return filtered(noisy, gain)


def best_fixed(noisy: np.ndarray, speech: np.ndarray) -> np.ndarray:
    """The Wiener filter that stays the same, told the spectra of this very speech and noise."""
    clean, noise = ((np.abs(transform(x)) ** 2).mean(1) for x in (speech, noisy - speech))
    return filtered(noisy, (clean / (clean + noise + 1e-12))[:, None])


def si_snr(estimate: np.ndarray, speech: np.ndarray) -> float:
    """dB by which what is `speech` in the estimate, at whatever loudness, exceeds the rest of it."""
    part = estimate @ speech / (speech @ speech) * speech
    rest = estimate - part
    return float(10 * np.log10((part @ part) / (rest @ rest)))
