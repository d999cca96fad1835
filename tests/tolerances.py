"""All tolerances of the test suite, with the reason for each. Tests contain no other tolerances."""

import jax.numpy as jnp
import numpy as np

# --- attention ---


def attention_limit(plain_error: float, largest: float, dtype) -> float:
    """The largest error allowed, against float64, where plain attention in the same dtype has ``plain_error``.

    Twice that error; at least the last bit of the ``largest`` value, because plain attention may round the right way by
    luck; plus sixteen float32 roundings, in case it is exact.
    """
    return max(2 * plain_error, float(jnp.finfo(dtype).eps) * largest) + 2.0**-20 * largest


def gradient_limit(plain_error: float, largest: float, dtype) -> float:
    """The limit for derivatives; FlashAttention's tests allow three times plain attention's error too."""
    return max(3 * plain_error, float(jnp.finfo(dtype).eps) * largest) + 2.0**-20 * largest


def recomputed_limit(largest_logit: float) -> float:
    """Relative to the largest gradient, for kernels that recompute float32 probabilities from logits and lse.

    Both are rounded to 24 bits: the difference of two of size 1e4 is off by 1e-3, and so is its exponential.
    """
    return 2.0**-21 * largest_logit


def large_logits_limit(magnitude: float) -> float:
    """Relative, for results of float32 logits of this size that are sums of dozens of products.

    Logits of 1e4 are off by 1e-3, and so are probabilities. From 1e6 on, each row of the tests has one dominant logit,
    or all are equal, so rounding changes no probability.
    """
    return 2.0**-20 * max(1.0, magnitude if magnitude < 1e6 else 1.0)


def summed_limit(summed: float, dtype) -> float:
    """For a sum that may cancel, relative to the sum of its terms' magnitudes: plain attention may be exact by luck.

    Eight float32 roundings (with a single key, plain attention's probability is exactly 1); for shorter output dtypes,
    an eighth of the last bit, because ``d_out . out`` uses the rounded output.
    """
    return max(2.0**-21, float(jnp.finfo(dtype).eps) / 8) * summed


def key_weights_limit(rounded_error: float, largest: float) -> float:
    """Absolute, for sums of up to a hundred float32 probabilities, of which the ``largest`` may be dozens.

    Keys of few bits times their scales are rounded to the dtype of the query; with that alone, in float64, weights have
    ``rounded_error``.
    """
    return KEY_WEIGHTS * max(1.0, largest) + 2 * rounded_error


# --- quantized arrays ---


def quantization_limit(magnitudes, kind: str):
    """The largest error of each element of groups ``[.., group]``: half a quantum plus some float32 roundings.

    Scales are at least the smallest normal float32, since subnormals may be flushed to zero.
    """
    largest = magnitudes.max(-1, keepdims=True)
    scale = np.maximum(largest / {"int8": 127, "float8_e4m3fn": 448, "int4": 7}[kind], np.finfo(np.float32).tiny)
    # A normal float8 has three mantissa bits; below 2^-6 the step is 2^-9.
    half = np.maximum(magnitudes * 2.0**-4, scale * 2.0**-10) if kind == "float8_e4m3fn" else scale / 2
    half = half * (1 + 2.0**-16) + largest * 2.0**-22 + np.finfo(np.float32).tiny
    return np.broadcast_to(half, magnitudes.shape)


# --- caches ---

# Relative: a score, the float32 sum of dozens of weights.
CACHE_SCORE = 1e-5
# Scores closer than this may be in another order in float32: the error of an int8 token is the difference of numbers
# about a hundred times as large.
CACHE_NEAR_TIE = 1e-4

# Relative to the largest gradient, against float32 without a cache. A key's gradient is a sum over chunks, rounded to
# the cache's dtype after each: four roundings, also of outputs and their products.
CACHE_GRADIENT = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}

# --- gradients ---

# Relative to the largest derivative: float32 against float64 differences.
ATTENTION_GRADIENT = 1e-5
# Absolute: sums of dozens of float32 probabilities.
KEY_WEIGHTS = 1e-5
# Relative and absolute: float32 against float32 differences with a step of 1e-2, whose own error is about 1e-3.
CHECK_GRADS = 1e-2
CHECK_GRADS_STEP = 1e-2
# Relative to the largest gradient: float64 against central float64 differences with a step of 1e-5.
ORACLE_GRADIENT = 1e-7

# --- models ---

# Absolute, float32, against PyTorch's logits of size about 2.
LOGITS_TRANSFORMERS = 1e-4
# Relative to the largest logit, float32: against PyTorch's logits of every model family.
FAMILY_LOGITS_RELATIVE = 1e-4
# Float32, relative and absolute: PyTorch's logits with the same weights loaded again.
RELOADED_LOGITS = 1e-5
# Relative to the largest output, float32: a mixture of experts.
EXPERTS_RELATIVE = 1e-5
# Absolute, float32: the same tokens with other padding, or packed with other documents.
PADDED_LOGITS = 1e-5
# Absolute, float32: the same tokens through a cache, in chunks.
CACHED_LOGITS = 1e-5
# Absolute: a log-probability, the difference of a logit and a logarithm of a sum over all of them.
LOGPROBS = 1e-4
# Root mean square error relative to the float32 logits: a few roundings to 8 or 11 bits per layer.
HALF_LOGITS_RELATIVE = {"bfloat16": 0.03, "float16": 0.006}
# Relative: a gradient with and without padding.
GRADIENTS_RTOL = 1e-4
# Absolute: a logit of two vectors of size 4 at angles up to 220, whose float32 rounding is 8e-6.
ROTATION = 2e-4
# Share of held-out prompts of each task that the shipped checkpoint answers exactly.
EXACT_ANSWERS = 0.95

# Absolute, nats: the loss of every training step, with the kernels and with the reference.
TRAINING_LOSS = 1e-3

# --- sampling ---

# A correct sampler fails a chi-square test at this level for one in a thousand seeds; the tests' seeds are fixed.
CHI_SQUARE_LEVEL = 1e-3
# Absolute, float32: logits of size about 10 after a few products and sums, against float64 or PyTorch.
PROCESSED_LOGITS = 1e-5

# --- benchmarks ---

# A peer's error may be this many times ours: it only has to compute the same function.
BENCH_PEER = 8
# Relative, by the norm: a kernel in other blocks rounds bfloat16 results and sums differently.
BENCH_SAME_KERNEL = 1e-2
