"""Rotary settings in a ``config.json``.

transformers 5 writes ``rope_parameters``, which may hold settings per type of layer. Published files have
``rope_theta`` with ``rope_scaling``, and fields beside them. Both are read, and may be present together if they agree.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from pallas_attn_models.checkpoints.settings import Source
from pallas_attn_models.checkpoints.windows import FULL, SLIDING
from pallas_attn_models.checks import is_int, listed, shown
from pallas_attn_models.decoder import ROPE_FIELDS, DecoderConfig, RopeConfig

_logger = logging.getLogger(__name__)

# Other names of our fields and types.
_NAMES = {"rope_type": "type", "rope_theta": "theta"}
_TYPES = {"su": "longrope", "mrope": "default"}
_OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary settings, the same for all layers that have any.

    Attributes:
      theta: if absent.
      partial: the part of a head that is rotated, if absent. None: the family knows whole heads only.
      interleaved: whether pairs are neighbors.
      parameters: settings if there is nothing about rotation at all.
      theta_name, partial_name: names of the fields in published files.
      has_original: whether ``original_max_position_embeddings`` is beside the other settings.
      without: which layers have no rotation, from the windows of the layers; None: all have it.
    """

    theta: float = 10000.0
    partial: float | None = None
    interleaved: bool = False
    parameters: Mapping[str, Any] | None = None
    theta_name: str = "rope_theta"
    partial_name: str = "partial_rotary_factor"
    has_original: bool = False
    without: Callable[[Source], list[bool]] | None = None

    def read(self, source: Source) -> Mapping[str, Any]:
        settings = self._settings(source)
        if not settings and self.parameters is not None:
            settings = dict(self.parameters)
        rope = self._rope(settings, source.known)
        if self.without is None:
            return {"rope": rope}
        return _canonical(rope, [None if without else rope for without in self.without(source)])

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        rope = config.rope or next(filter(None, config.layer_ropes), None)
        if rope is None:
            return {}
        scaling = _scaling(rope)
        fields = {self.theta_name: rope.theta, "rope_scaling": scaling or None}
        if self.partial is not None:
            fields[self.partial_name] = rope.partial_rotary_factor
        if self.has_original:
            fields["original_max_position_embeddings"] = scaling.get(
                "original_max_position_embeddings", config.max_position_embeddings
            )
        return fields

    def _settings(self, source: Source) -> dict[str, Any]:
        """Both spellings, merged; by the names of :class:`RopeConfig` where it has one."""
        settings: dict[str, Any] = {}
        for name in ("rope_parameters", "rope_scaling"):
            _merge(settings, name, _as_mapping(name, source.take(name, default=None)))
        beside = {self.theta_name: "theta", self.partial_name: "partial_rotary_factor"}
        for name, ours in beside.items():
            if (value := source.take(name, default=None)) is not None:
                _merge(settings, name, {ours: value})
        if self.has_original:
            # It counts more than the one among the settings, as in transformers.
            original = source.take("original_max_position_embeddings", default=None)
            if original is not None and settings.get("type", "default") not in ("default", "linear", "dynamic"):
                settings["original_max_position_embeddings"] = original
        return settings

    def _part(self, part: Any) -> Any:
        if self.partial is None and (isinstance(part, bool) or part not in (None, 1.0)):
            raise ValueError(f"{self.partial_name}: expected 1.0, got {shown(part)}")
        return 1.0 if part is None else part

    def _rope(self, settings: Mapping[str, Any], known: Mapping[str, Any]) -> RopeConfig:
        """The settings of one kind of layer."""
        settings = {name: value for name, value in settings.items() if value is not None}
        kind = settings.pop("type", "default")
        kind = _TYPES.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in ROPE_FIELDS:
            raise ValueError(f"rope type: expected one of {sorted(ROPE_FIELDS)}, got {shown(kind)}")
        common = {
            "theta": settings.pop("theta", self.theta),
            "partial_rotary_factor": self._part(settings.pop("partial_rotary_factor", self.partial)),
            "interleaved": self.interleaved,
        }
        context = known["max_position_embeddings"]
        used = {*ROPE_FIELDS[kind]}
        if kind == "dynamic":
            settings.setdefault("original_max_position_embeddings", context)
            if settings["original_max_position_embeddings"] != context:
                got = shown(settings["original_max_position_embeddings"])
                expected = f"max_position_embeddings={context}, from which transformers scales"
                raise ValueError(f"rope original_max_position_embeddings: expected {expected}, got {got}")
        elif "original_max_position_embeddings" in used:
            settings.setdefault("original_max_position_embeddings", context)
        if kind in ("yarn", "longrope"):
            settings.setdefault("factor", _ratio(context, settings["original_max_position_embeddings"]))
        if kind == "proportional":
            settings.setdefault("factor", 1.0)
        if kind == "yarn":
            used |= {"mscale", "mscale_all_dim"}
            for name in ("beta_fast", "beta_slow"):  # 0 means absent in transformers
                if settings.get(name) == 0:
                    del settings[name]
        given = {*settings}
        if given - used or {*used} - given - {*_OPTIONAL}:
            expected = f"the fields {sorted({*ROPE_FIELDS[kind]} - {*_OPTIONAL})}"
            optional = sorted(used & {*_OPTIONAL})
            more = f" and perhaps {optional}" if optional else ""
            raise ValueError(f"rope type {kind!r}: expected {expected}{more}, got [{listed(map(repr, settings))}]")
        for name in ("short_factor", "long_factor"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        if kind == "yarn":
            scale, all_dim = settings.pop("mscale", None), settings.pop("mscale_all_dim", None)
            if scale and all_dim and "attention_factor" not in settings:
                factor = settings["factor"]
                settings["attention_factor"] = mscale(factor, scale) / mscale(factor, all_dim)
        return RopeConfig(type=kind, **common, **settings)


@dataclasses.dataclass(frozen=True)
class RopeByLayerType(Rope):
    """Rotary settings that differ between layers with a sliding window and those without one.

    Attributes:
      local_theta: theta of layers with a window, if absent.
      local_name: its name in published files; None: the same theta for both.
    """

    local_theta: float = 10000.0
    local_name: str | None = None

    def read(self, source: Source) -> Mapping[str, Any]:
        parameters = _as_mapping("rope_parameters", source.take("rope_parameters", default=None))
        nested = {name: parameters[name] for name in (FULL, SLIDING) if name in parameters}
        if nested and len(parameters) > len(nested):
            names = listed(parameters.keys() - nested.keys())
            _logger.warning("rope_parameters: %s ignored, because there are settings per type of layer", names)
        theta = source.take(self.theta_name, default=None)
        scaling = _as_mapping("rope_scaling", source.take("rope_scaling", default=None))
        local = None if self.local_name is None else source.take(self.local_name, default=None)
        if not nested:
            nested = {FULL: {**parameters, **scaling}}
        full: dict[str, Any] = {}
        _merge(full, "rope_parameters", _as_mapping("rope_parameters", nested.get(FULL)))
        _merge(full, "rope_scaling", scaling)
        sliding: dict[str, Any] = {}
        _merge(sliding, "rope_parameters", _as_mapping("rope_parameters", nested.get(SLIDING)))
        full.setdefault("theta", self.theta if theta is None else theta)
        inherited = full["theta"] if self.local_name is None else self.local_theta
        sliding.setdefault("theta", inherited if local is None else local)
        ropes = self._rope(full, source.known), self._rope(sliding, source.known)
        windows = source.known["sliding_windows"] or (None,) * source.layers()
        return _canonical(ropes[0], [ropes[0] if window is None else ropes[1] for window in windows])

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        ropes = [config.layer(index).rope for index in range(config.num_layers)]
        windows = config.sliding_windows or (None,) * config.num_layers
        full = next((rope for rope, window in zip(ropes, windows, strict=True) if window is None), config.rope)
        sliding = next((rope for rope, window in zip(ropes, windows, strict=True) if window is not None), full)
        return {"rope_parameters": {FULL: _parameters(full), SLIDING: _parameters(sliding)}}


def no_rope_without_window(source: Source) -> list[bool]:
    """Layers without a sliding window have no rotation."""
    windows = source.known["sliding_windows"] or (None,) * source.layers()
    return [window is None for window in windows]


def no_rope_without_window_if_any(source: Source) -> list[bool]:
    """The same, in a model that has layers with a window."""
    windows = source.known["sliding_windows"] or (None,) * source.layers()
    return [window is None and bool(source.known["sliding_windows"]) for window in windows]


def _canonical(rope: RopeConfig, layers: list[RopeConfig | None]) -> dict[str, Any]:
    """One way to say it: no list if all layers agree."""
    if all(one == layers[0] for one in layers):
        return {"rope": layers[0]}
    return {"rope": rope, "layer_ropes": tuple(layers)}


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    """``rope_scaling``; empty for the default."""
    fields = {name: getattr(rope, name) for name in ROPE_FIELDS[rope.type]}
    fields = {name: [*value] if isinstance(value, tuple) else value for name, value in fields.items()}
    if rope.type == "dynamic":  # transformers takes max_position_embeddings
        del fields["original_max_position_embeddings"]
    if fields.get("attention_factor", 0) is None:
        del fields["attention_factor"]
    return {} if rope.type == "default" else {"rope_type": rope.type, **fields}


def _parameters(rope: RopeConfig | None) -> dict[str, Any]:
    """One entry of ``rope_parameters``."""
    if rope is None:
        raise AttributeError("a layer without rotation")
    fields = {"rope_type": "default", "rope_theta": rope.theta, **_scaling(rope)}
    return (
        fields if rope.partial_rotary_factor == 1 else {**fields, "partial_rotary_factor": rope.partial_rotary_factor}
    )


def _as_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{name}: expected an object, got {shown(value)}")
    return value or {}


def _merge(settings: dict[str, Any], source: str, more: Mapping[str, Any]) -> None:
    """Adds settings; two values of one must be equal."""
    for name, value in more.items():
        name = _NAMES.get(name, name)
        first = settings.setdefault(name, value)
        if name == "type" and isinstance(first, str) and isinstance(value, str):
            first, value = _TYPES.get(first, first), _TYPES.get(value, value)
        if first is not value and first != value:
            raise ValueError(f"{source}: expected {name}={shown(first)} as in another field, got {shown(value)}")


def _ratio(context: Any, original: Any) -> float:
    if not is_int(context) or not is_int(original) or original < 1:
        raise ValueError(f"rope original_max_position_embeddings: expected a positive int, got {shown(original)}")
    return context / original


def mscale(factor: float, scale: float) -> float:
    """YaRN's factor of cosines and sines (arXiv:2309.00071, section 3.4), with the logarithm scaled."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
