"""How many tokens of how many prompts a prefill call processes, unless the user says."""

from typing import Any

# Queries in a tile of the attention kernel, and the most that one prompt contributes to a call: decoding rows wait for
# the call, and a sliding-window layer has slots for it.
_TILE, _LONGEST = 128, 512


def multiprocessors(device: Any) -> int | None:
    """Multiprocessors of a ``jax.Device`` that is a GPU, or None."""
    return getattr(device, "core_count", None) if device.platform in ("gpu", "cuda", "rocm") else None


def default_chunk(num_heads: int, cores: int | None) -> int:
    """Tokens per prompt: a tile without a GPU; else the least power of two with a program for each multiprocessor."""
    chunk = _TILE
    while cores is not None and chunk < _LONGEST and num_heads * (chunk // _TILE) < cores:
        chunk *= 2
    return chunk


def default_rows(chunk: int, num_heads: int, cores: int | None) -> int:
    """Prompts per call: as many as give at most one attention program to each multiprocessor."""
    return max(1, (cores or 1) // (num_heads * -(-chunk // _TILE)))
