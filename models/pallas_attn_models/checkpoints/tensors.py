"""Maps the tensors of a checkpoint, whose names and shapes follow from its config, to the parameters of a decoder."""

import operator
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from flax import nnx

from pallas_attn_models.decoder import Decoder, DecoderConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)")


class Place(NamedTuple):
    """The parameter and shape of a tensor.

    Attributes:
      parameter: path of the parameter from the decoder, or from one of its layers.
      shape: on disk, where a linear map is ``[out, in]``; the kernel of an ``nnx.Linear`` is ``[in, out]``.
    """

    parameter: str
    shape: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        return self.parameter.endswith("kernel")


class Layout:
    """The tensors of a decoder by name. Construction time does not depend on the number of layers.

    Args:
      config: of the decoder.
    """

    def __init__(self, config: DecoderConfig) -> None:
        hidden, mlp = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.num_layers = config.num_layers
        self.others = {
            EMBEDDING: Place("embedding.table", (config.vocab_size, hidden)),
            "model.norm.weight": Place("norm.scale", (hidden,)),
        }
        if not config.tie_word_embeddings:
            self.others[HEAD] = Place("head.kernel", (config.vocab_size, hidden))
        self.of_layer = {
            "input_layernorm.weight": Place("attention_norm.scale", (hidden,)),
            "self_attn.q_proj.weight": Place("attention.query.kernel", (queries, hidden)),
            "self_attn.k_proj.weight": Place("attention.key.kernel", (keys, hidden)),
            "self_attn.v_proj.weight": Place("attention.value.kernel", (keys, hidden)),
            "self_attn.o_proj.weight": Place("attention.output.kernel", (hidden, queries)),
            "post_attention_layernorm.weight": Place("mlp_norm.scale", (hidden,)),
            "mlp.gate_proj.weight": Place("mlp.gate.kernel", (mlp, hidden)),
            "mlp.up_proj.weight": Place("mlp.up.kernel", (mlp, hidden)),
            "mlp.down_proj.weight": Place("mlp.down.kernel", (hidden, mlp)),
        }

    def __len__(self) -> int:
        return len(self.others) + self.num_layers * len(self.of_layer)

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for layer in range(self.num_layers):
            for name in self.of_layer:
                yield f"model.layers.{layer}.{name}"

    def __contains__(self, name: str) -> bool:
        if match := _LAYER.fullmatch(name):
            return int(match[1]) < self.num_layers and match[2] in self.of_layer
        return name in self.others

    def __getitem__(self, name: str) -> Place:
        """The place of a tensor, with the path from the decoder: ``layers.3.mlp.up.kernel``."""
        if match := _LAYER.fullmatch(name):
            place = self.of_layer[match[2]]
            return place._replace(parameter=f"layers.{match[1]}.{place.parameter}")
        return self.others[name]


def parameter(model: Decoder, place: Place) -> nnx.Param:
    """The parameter of a decoder at a place of its :class:`Layout`."""
    owner: Any = model
    path = place.parameter
    if path.startswith("layers."):
        _, layer, path = path.split(".", 2)
        owner = model.layers[int(layer)]
    return operator.attrgetter(path)(owner)
