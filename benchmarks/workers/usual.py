"""The usual way to write each recurrence in JAX, with nothing but JAX."""

import jax
import jax.numpy as jnp
from job import Job
from measuring import calling_job, decoding_job, parameters, training_job, versions

__all__ = ["prepare", "versions"]


def prepare(case: dict, arrays: dict) -> Job:
    params = parameters(arrays)
    if case["op"].startswith("step "):
        h = jnp.zeros(case["state"], complex)
        x = jnp.asarray(arrays["x"][0])
        if "call by call" in case["op"]:
            return calling_job(lru_step, params, h, x, case["time"])
        return decoding_job(lambda x, h: lru_step(params, x, h), h, x, case["time"])
    return training_job(FORMS[case["op"]], params, arrays, case)


def scan(a, b):
    def combine(earlier, later):
        (a_i, b_i), (a_j, b_j) = earlier, later
        return a_j * a_i, a_j * b_i + b_j

    return jax.lax.associative_scan(combine, (a, b))[1]


def diagonal(A, B, C, D, x):
    """Complex, the transition repeated along time."""
    h = scan(jnp.repeat(A[None], x.shape[0], axis=0), jax.vmap(lambda u: B @ u)(x))
    return jax.vmap(lambda h, u: (C @ h).real + D * u)(h, x)


def lru_system(p):
    A = jnp.exp(-jnp.exp(p["nu_log"]) + 1j * jnp.exp(p["theta_log"]))
    B = (p["B_re"] + 1j * p["B_im"]) * jnp.exp(p["gamma_log"])[:, None]
    return A, B, p["C_re"] + 1j * p["C_im"], p["D"]


def lru(p, x):
    return diagonal(*lru_system(p), x)


def lru_step(p, x, h):
    A, B, C, D = lru_system(p)
    h = A * h + B @ x
    return (C @ h).real + D * x, h


def s5(p, x):
    Lambda = jnp.clip(p["Lambda_re"], None, -1e-4) + 1j * p["Lambda_im"]
    A = jnp.exp(Lambda * jnp.exp(p["log_step"][:, 0]))
    B = ((A - 1) / Lambda)[:, None] * (p["B"][..., 0] + 1j * p["B"][..., 1])
    return diagonal(A, B, 2 * (p["C"][..., 0] + 1j * p["C"][..., 1]), p["D"], x)


def s4d(p, x):
    """The whole kernel from a Vandermonde matrix, and a convolution by FFT."""
    dt = jnp.exp(p["inv_dt"])
    A = -jnp.exp(p["A_real"]) - 1j * p["A_imag"]
    C = 2 * (p["C"][0, ..., 0] + 1j * p["C"][0, ..., 1]) * (jnp.exp(dt * A) - 1) / A
    powers = jnp.exp((dt * A)[:, :, None] * jnp.arange(x.shape[0]))
    return fft_convolution(jnp.einsum("hn,hnl->hl", C, powers).real, x)


def s4(p, x):
    """The generating function at the roots of unity, through Cauchy sums and Woodbury's identity.

    Its parameter is C (I - A^L), the matrix power being left out of the time.
    """
    length = x.shape[0]
    pair = lambda v: jnp.concatenate([v, v.conj()], axis=-1)
    number = lambda v: v[..., 0] + 1j * v[..., 1]
    dt = jnp.exp(p["inv_dt"])
    A = pair(-jnp.exp(p["A_real"]) - 1j * p["A_imag"])
    B, P, C = pair(number(p["B"])), pair(number(p["P"][0])), pair(number(p["truncated_C"]))
    omega = jnp.exp(-2j * jnp.pi / length * jnp.arange(length // 2 + 1))
    z = 2 * (1 - omega) / (1 + omega)
    resolvent = dt[..., None] / (z - (dt * A)[..., None])
    k00, k01, k10, k11 = (
        jnp.einsum("hn,hnf->hf", left * right, resolvent)
        for left in (C, P.conj())
        for right in (B, P)
    )
    spectrum = (k00 - k01 * k10 / (1 + k11)) * 2 / (1 + omega)
    return fft_convolution(jnp.fft.irfft(spectrum, length), x)


def fft_convolution(kernel, x):
    size = 2 * x.shape[0]
    spectrum = jnp.fft.rfft(x.T, size) * jnp.fft.rfft(kernel, size)
    return jnp.fft.irfft(spectrum, size)[:, : x.shape[0]].T


def rg_lru(p, x):
    heads = x.reshape(x.shape[0], p["a_weight"].shape[0], -1)
    gate = lambda w, b: jax.nn.sigmoid(jnp.einsum("thi,hij->thj", heads, w) + b).reshape(x.shape)
    log_a = -8 * gate(p["a_weight"], p["a_bias"]) * jax.nn.softplus(p["Lambda"])
    first = (jnp.arange(x.shape[0]) == 0)[:, None]
    share = jnp.where(first, 1, jnp.sqrt(-jnp.expm1(2 * log_a)))
    return scan(jnp.exp(log_a), share * gate(p["input_weight"], p["input_bias"]) * x)


def recurrence(p, inputs):
    return scan(*inputs)


def selective_scan(p, inputs):
    x, dt, B, C = inputs
    drive = (dt * x)[:, :, None] * B[:, None, :]
    h = scan(jnp.exp(dt[:, :, None] * p["A"]), drive)
    return jnp.einsum("ldn,ln->ld", h, C)


def ssd(p, inputs):
    """Step by step; B and C are those of one group."""

    def step(h, inputs):
        x, dt, B, C = inputs
        h = jnp.exp(dt * p["A"])[:, None, None] * h + (dt[:, None] * x)[:, :, None] * B[0]
        return h, h @ C[0]

    _, heads, head_dim = inputs[0].shape
    h0 = jnp.zeros((heads, head_dim, inputs[2].shape[-1]))
    return jax.lax.scan(step, h0, inputs)[1]


def matrix_state(inputs, *, erases=True, decays=True):
    """Step by step."""
    q, k, v, *others = inputs
    time, heads, key = k.shape
    beta = others.pop(0) if erases else jnp.ones(time)
    beta = jnp.broadcast_to(beta.reshape(time, -1), (time, heads))
    log_decay = others.pop(0) if decays else jnp.zeros((time, heads))

    def step(S, inputs):
        q, k, v, beta, log_decay = inputs
        S = jnp.exp(log_decay).reshape(heads, -1, 1) * S
        w = v - jnp.einsum("hk,hkv->hv", k, S) if erases else v
        S = S + k[:, :, None] * (beta[:, None] * w)[:, None]
        return S, jnp.einsum("hk,hkv->hv", q, S)

    S0 = jnp.zeros((heads, key, v.shape[-1]))
    return jax.lax.scan(step, S0, (q, k, v, beta, log_decay))[1]


def trapezoidal_ssd(p, inputs):
    """Step by step."""
    x, _, B, _, _ = inputs

    def step(carry, inputs):
        h, before = carry
        x, dt, B, C, trapezoid = inputs
        write = jnp.einsum("rhp,rhn->hpn", x, B)
        h = h + ((1 - trapezoid) * dt)[:, None, None] * before
        h = jnp.exp(dt * p["A"])[:, None, None] * h + (trapezoid * dt)[:, None, None] * write
        return (h, write), jnp.einsum("hpn,rhn->rhp", h, C)

    zero = jnp.zeros((*x.shape[2:], B.shape[-1]))
    return jax.lax.scan(step, (zero, zero), inputs)[1]


FORMS = {
    "trapezoidal_ssd": trapezoidal_ssd,
    "trapezoidal_ssd, rank 4": trapezoidal_ssd,
    "LRU": lru,
    "S5": s5,
    "S4D": s4d,
    "S4": s4,
    "RG-LRU": rg_lru,
    "linear_recurrence": recurrence,
    "selective_scan": selective_scan,
    "ssd": ssd,
    "gated_linear_attention": lambda _, inputs: matrix_state(inputs, erases=False),
    "delta_rule": lambda _, inputs: matrix_state(inputs),
    "delta_rule per channel": lambda _, inputs: matrix_state(inputs),
    "delta_rule, no decay": lambda _, inputs: matrix_state(inputs, decays=False),
}
