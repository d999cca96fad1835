"""How the tensors of a checkpoint become parameters, and back: a few invertible transforms.

A parameter ends in ``[.., in, out]``, or in ``[.., out]`` for a bias. A tensor may be transposed, may hold several
parameters along its last axis once it is not, and may be one of many that are stacked along the first axis of a
parameter.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pallas_attn_models.decoder import LayerConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor, or several with an index in their name, and the parameters that they hold.

    Attributes:
      name: in the checkpoint, from the layer; ``{}`` stands for an index: one tensor for each entry along the first
        axis of the parameter.
      parameters: their paths, from the decoder or from one of its layers.
      transposed: whether the last two axes are swapped, ``[.., out, in]``, as in PyTorch's linear maps.
      split: how several parameters share the last axis: one after the other, alternating, or by groups: for each key
        head its queries, then the key, then the value.
    """

    name: str
    parameters: tuple[str, ...]
    transposed: bool = False
    split: Literal["in turn", "alternating", "by key head"] = "in turn"

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of a tensor with this name, from those of the parameters."""
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        if "{}" in self.name:
            shape = shape[1:]
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def count(self, shapes: Sequence[Shape]) -> int | None:
        """How many tensors have this name; None if it has no index."""
        return shapes[0][0] if "{}" in self.name else None

    def to_parameters(
        self, tensors: Sequence[np.ndarray], shapes: Sequence[Shape], layer: LayerConfig | None
    ) -> list[np.ndarray]:
        """The parameters, from all tensors of this name."""
        whole = np.stack(tensors) if "{}" in self.name else tensors[0]
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        if len(shapes) == 1:
            return [whole]
        if self.split == "alternating":
            return [whole[..., index :: len(shapes)] for index in range(len(shapes))]
        if self.split == "by key head":
            assert layer is not None
            heads = whole.reshape(*whole.shape[:-1], layer.num_kv_heads, -1, layer.head_dim)
            parts = heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return np.split(whole, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)

    def to_tensors(self, parameters: Sequence[np.ndarray], layer: LayerConfig | None) -> list[np.ndarray]:
        """The inverse of :meth:`to_parameters`."""
        if len(parameters) == 1:
            whole = parameters[0]
        elif self.split == "alternating":
            whole = np.stack(parameters, axis=-1).reshape(*parameters[0].shape[:-1], -1)
        elif self.split == "by key head":
            assert layer is not None
            split = (layer.num_kv_heads, -1, layer.head_dim)
            heads = [one.reshape(*one.shape[:-1], *split) for one in parameters]
            whole = np.concatenate(heads, axis=-2).reshape(*parameters[0].shape[:-1], -1)
        else:
            whole = np.concatenate(parameters, axis=-1)
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        return [*whole] if "{}" in self.name else [whole]


def same(name: str, parameter: str) -> tuple[Tensor, ...]:
    """A tensor that is a parameter as it is."""
    return (Tensor(name, (parameter,)),)


def norm(name: str, parameter: str) -> tuple[Tensor, ...]:
    """A norm, with its bias if it has one."""
    return Tensor(f"{name}.weight", (f"{parameter}.scale",)), Tensor(f"{name}.bias", (f"{parameter}.bias",))


def linear(
    name: str,
    *parameters: str,
    transposed: bool = True,
    split: Literal["in turn", "alternating", "by key head"] = "in turn",
) -> tuple[Tensor, ...]:
    """A linear map that holds one or several of ours, with its bias if it has one."""
    kernels, biases = (tuple(f"{one}.{kind}" for one in parameters) for kind in ("kernel", "bias"))
    return (
        Tensor(f"{name}.weight", kernels, transposed, split),
        Tensor(f"{name}.bias", biases, split=split),
    )
