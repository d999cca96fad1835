"""A model family: what is special about its checkpoints, as data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pallas_attn_models.checkpoints.settings import Setting
from pallas_attn_models.checkpoints.transforms import Tensor
from pallas_attn_models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      name: ``model_type`` in ``config.json``.
      architectures: ``architectures`` there; the first is written.
      settings: the fields of ``config.json`` that say something, in the order in which they are read.
      constants: arguments of :class:`DecoderConfig` that are the same for the whole family.
      supported: other fields, and the values that this library implements; the first is written if it is not None.
      irrelevant: further fields that cannot affect the logits, and the reason.
      tensors: those outside the layers, by their full names.
      layer_tensors: those of a layer, by their names after ``layer_prefix`` and its index.
      layer_prefix: of the names of a layer's tensors.
      variants: layer tensors that depend on the configuration, in addition to ``layer_tensors``.
      prefixes: starts of names in published files -> ours. A missing first part of the names is known anyway.
      redundant: patterns of tensors that follow from the configuration, such as causal masks.
      within: ``model_type`` of models with images whose ``text_config`` is of this family.
      other_parts: patterns of the tensors of their other parts.
    """

    name: str
    architectures: tuple[str, ...]
    settings: tuple[Setting, ...]
    tensors: tuple[Tensor, ...]
    layer_tensors: tuple[Tensor, ...]
    layer_prefix: str = "model.layers"
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    supported: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    irrelevant: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variants: Callable[[DecoderConfig], tuple[Tensor, ...]] | None = None
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    redundant: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()

    def tensors_of(self, config: DecoderConfig) -> tuple[Tensor, ...]:
        """The tensors that a layer may have."""
        return self.layer_tensors + (() if self.variants is None else self.variants(config))
