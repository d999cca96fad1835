"""Sliding windows in a ``config.json``: ``sliding_window`` with, where layers differ, ``layer_types``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pallas_attn_models.checkpoints.settings import Source
from pallas_attn_models.checks import is_int, require_size, shown
from pallas_attn_models.decoder import DecoderConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Windows:
    """The sliding window of each layer.

    Attributes:
      default: the window if ``sliding_window`` is absent; null always means none.
      pattern: which layers have it, if ``layer_types`` is absent: a function of the fields and the number of layers
        that returns one bool per layer. None: all layers, and no ``layer_types``.
      has_flag: whether ``use_sliding_window`` must be true, too.
      extra: fields written for ``pattern``, which ``layer_types`` makes redundant.
    """

    default: int | None
    pattern: Callable[[Source, int], list[bool]] | None = None
    has_flag: bool = False
    extra: Callable[[DecoderConfig], Mapping[str, Any]] | None = None

    def read(self, source: Source) -> Mapping[str, Any]:
        window = source.take("sliding_window", default=self.default, null=None)
        if self.has_flag and not _flag(source):
            window = None
        layers = source.layers()
        slides = [True] * layers if self.pattern is None else self.pattern(source, layers)
        if self.pattern is not None and (types := source.take("layer_types", default=None)) is not None:
            slides = _by_type(types, layers)
            if window is None and any(slides):
                raise ValueError(f"sliding_window: expected a value for {SLIDING!r} in layer_types, got None")
        if window is None:
            return {"sliding_windows": ()}
        require_size("sliding_window", window)
        windows = tuple(window if slide else None for slide in slides)
        return {"sliding_windows": windows if any(slides) else ()}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        used = {window for window in config.sliding_windows if window is not None}
        fields: dict[str, Any] = {"sliding_window": max(used, default=None)}
        if self.has_flag:
            fields["use_sliding_window"] = bool(used)
        if self.pattern is not None:
            windows = config.sliding_windows or (None,) * config.num_layers
            fields["layer_types"] = [FULL if window is None else SLIDING for window in windows]
        return fields if self.extra is None else {**fields, **self.extra(config)}


def sliding_except_every(
    period: int | None, name: str = "sliding_window_pattern"
) -> Callable[[Source, int], list[bool]]:
    """A pattern: every ``period``-th layer has no window. The field ``name`` may hold another period or null."""

    def pattern(source: Source, layers: int) -> list[bool]:
        given = source.take(name, f"_{name}", default=period)
        if isinstance(given, str):  # EXAONE: "LLLG", local and global
            return [given[layer % len(given)] == "L" for layer in range(layers)]
        if given is None or given == 0:
            return [False] * layers
        require_size(name, given)
        return [bool((layer + 1) % given) for layer in range(layers)]

    return pattern


def from_layer(name: str, default: int) -> Callable[[Source, int], list[bool]]:
    """A pattern: layers from the one in the field ``name`` on."""

    def pattern(source: Source, layers: int) -> list[bool]:
        first = source.take(name, default=default)
        if not is_int(first) or first < 0:
            raise ValueError(f"{name}: expected an int of at least 0, got {shown(first)}")
        return [layer >= first for layer in range(layers)]

    return pattern


def _flag(source: Source) -> bool:
    used = source.take("use_sliding_window", default=False)
    if not isinstance(used, bool):
        raise ValueError(f"use_sliding_window: expected a bool, got {shown(used)}")
    return used


def _by_type(types: Any, layers: int) -> list[bool]:
    if not isinstance(types, list) or len(types) != layers or not all(one in (SLIDING, FULL) for one in types):
        raise ValueError(f"layer_types: expected {layers} of {SLIDING!r} or {FULL!r}, got {shown(types)}")
    return [one == SLIDING for one in types]
