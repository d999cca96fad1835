"""The tensors of a checkpoint: their names and shapes, and the parameters that they hold.

Everything follows from the tables of the family and the shapes of the parameters: a tensor exists if the decoder has
its parameters.
"""

import functools
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import nnx

from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.transforms import Shape, Tensor
from pallas_attn_models.checks import listed
from pallas_attn_models.decoder import Decoder, DecoderConfig, LayerConfig, layer_shapes, outer_shapes


class Place(NamedTuple):
    """A tensor of a checkpoint, or several with an index in their name.

    Attributes:
      tensor: its entry in the tables of the family.
      names: all names, in order.
      shape: of each.
      parameters: paths of the parameters, from the decoder.
      shapes: of the parameters.
      layer: the configuration of its layer, or None.
    """

    tensor: Tensor
    names: tuple[str, ...]
    shape: Shape
    parameters: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layer: LayerConfig | None


class _Kind:
    """The tensors of the layers of one kind, or those outside the layers, by names relative to the layer."""

    def __init__(self, family: Family, tensors: tuple[Tensor, ...], shapes: Mapping[str, Shape]) -> None:
        used = [tensor for tensor in tensors if all(path in shapes for path in tensor.parameters)]
        covered = [path for tensor in used for path in tensor.parameters]
        if missing := shapes.keys() - covered:
            raise ValueError(f"family {family.name}: its checkpoints have no place for {listed(missing)}")
        assert len(covered) == len({*covered}), f"{family.name}: {covered}"
        self.shapes = shapes
        self.tensors = {
            tensor: [tensor.name] if count is None else [tensor.name.format(index) for index in range(count)]
            for tensor in used
            for count in [tensor.count([shapes[path] for path in tensor.parameters])]
        }
        self.by_name = {name: tensor for tensor, names in self.tensors.items() for name in names}

    def place(self, tensor: Tensor, layer: int | None, config: LayerConfig | None, prefix: str) -> Place:
        shapes = tuple(self.shapes[path] for path in tensor.parameters)
        paths = tensor.parameters if layer is None else tuple(f"layers.{layer}.{path}" for path in tensor.parameters)
        names = tuple(prefix + name for name in self.tensors[tensor])
        return Place(tensor, names, tensor.shape(shapes), paths, shapes, config)


class Layout:
    """The tensors of a decoder. Construction time depends on the number of kinds of layers, not on that of layers.

    Args:
      family: of the checkpoint.
      config: of the decoder.

    Attributes:
      num_layers: of the decoder.
      head: the name of the output head, which a tied decoder lacks.

    Raises:
      ValueError: checkpoints of this family cannot hold some parameter.
    """

    def __init__(self, family: Family, config: DecoderConfig) -> None:
        self._prefix = family.layer_prefix
        self._pattern = re.compile(re.escape(family.layer_prefix) + r"\.(0|[1-9][0-9]{0,8})\.(.+)")
        self._config = config
        self._outer = _Kind(family, family.tensors, outer_shapes(config))
        self.head = next(tensor.name for tensor in family.tensors if "head.kernel" in tensor.parameters)
        tensors = family.tensors_of(config)
        self._kind_of = functools.cache(lambda layer: _Kind(family, tensors, layer_shapes(config, layer)))
        self._layer = functools.cache(config.layer)
        self.num_layers = config.num_layers

    def __len__(self) -> int:
        """The number of tensors."""
        counts: dict[LayerConfig, int] = {}
        for index in range(self.num_layers):
            layer = self._layer(index)
            counts[layer] = counts.get(layer, 0) + 1
        return len(self._outer.by_name) + sum(len(self._kind_of(kind).by_name) * n for kind, n in counts.items())

    def places(self) -> Iterator[Place]:
        """All tensors, in the order of the decoder."""
        for tensor in self._outer.tensors:
            yield self._outer.place(tensor, None, None, "")
        for index in range(self.num_layers):
            layer = self._layer(index)
            kind = self._kind_of(layer)
            for tensor in kind.tensors:
                yield kind.place(tensor, index, layer, f"{self._prefix}.{index}.")

    def names(self) -> Iterator[str]:
        """The names of all tensors."""
        for place in self.places():
            yield from place.names

    def __contains__(self, name: str) -> bool:
        if match := self._pattern.fullmatch(name):
            index = int(match[1])
            return index < self.num_layers and match[2] in self._kind_of(self._layer(index)).by_name
        return name in self._outer.by_name

    def shape_of(self, name: str) -> Shape:
        """The shape of a tensor in the file."""
        if match := self._pattern.fullmatch(name):
            kind, name = self._kind_of(self._layer(int(match[1]))), match[2]
        else:
            kind = self._outer
        tensor = kind.by_name[name]
        return tensor.shape([kind.shapes[path] for path in tensor.parameters])

    def tensor_of(self, parameter: str) -> str:
        """The name of the tensor that holds a parameter outside the layers."""
        return next(tensor.name for tensor in self._outer.tensors if parameter in tensor.parameters)


def parameter(model: Decoder, path: str) -> nnx.Param:
    """The parameter of a decoder at a path, as in ``layers.3.mlp.up.kernel``."""
    owner: Any = model
    if path.startswith("layers."):
        _, layer, path = path.split(".", 2)
        owner = model.layers[int(layer)]
    return operator.attrgetter(path)(owner)
