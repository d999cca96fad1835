"""Every tolerance of the test suite, with the reason for its size. Tests hold no numbers of their own."""

# --- attention ---

# The error of an implementation, against float64, relative to that of plain attention in the same dtype.
ATTENTION_FACTOR = 2
# Relative to the largest value: sixteen float32 roundings, for where plain attention happens to be exact.
ATTENTION_FLOOR = 2.0**-20
# Relative to the largest derivative: float32 against float64 differences.
ATTENTION_GRADIENT = 1e-5

# --- models ---

# Absolute, float32, against PyTorch's logits of size about 2.
LOGITS_TRANSFORMERS = 1e-4
# Absolute, float32: the same tokens with other padding, or packed with other documents.
PADDED_LOGITS = 1e-5
# Absolute, float32: the same tokens through a cache, in chunks.
CACHED_LOGITS = 1e-5
# Root mean square error relative to the float32 logits: a few roundings to 8 or 11 bits per layer.
HALF_LOGITS_RELATIVE = {"bfloat16": 0.03, "float16": 0.006}
# Relative: a gradient with and without padding.
GRADIENTS_RTOL = 1e-4
# Absolute: a logit of two vectors of size 4 at angles up to 220, whose float32 rounding is 8e-6.
ROTATION = 2e-4
