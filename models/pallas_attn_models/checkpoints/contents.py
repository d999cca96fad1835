"""What a checkpoint holds, checked against its config before any tensor is read."""

import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pallas_attn_models.checkpoints.families import FAMILIES
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.files import CONFIG, OpenCheckpoint
from pallas_attn_models.checkpoints.hf_config import config_from_hf
from pallas_attn_models.checkpoints.mxfp4 import DequantizedTensor, dequantized
from pallas_attn_models.checkpoints.safetensors_file import StoredTensor
from pallas_attn_models.checkpoints.tensors import Layout
from pallas_attn_models.checks import listed
from pallas_attn_models.decoder import DecoderConfig
from pallas_attn_models.text_files import read_json

Stored = StoredTensor | DequantizedTensor

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_EMBEDDING = "embedding.table"
_SHOWN = 5
_MOST_FURTHER = 100  # published models have one
_COMPARED = 2**22  # numbers at a time

_logger = logging.getLogger(__name__)


class Contents(NamedTuple):
    """The contents of an open checkpoint.

    Attributes:
      config: of the decoder.
      layout: names and shapes of its tensors.
      tensors: by the names of the layout; and a tied head that the file holds, too.
    """

    config: DecoderConfig
    layout: Layout
    tensors: dict[str, Stored]

    def check_tied_head(self) -> None:
        """Raises ValueError if the file holds the head of a tied model, and it differs from the embedding."""
        head, embedding = self.layout.head, self.layout.tensor_of(_EMBEDDING)
        if not self.config.tie_word_embeddings or head not in self.tensors:
            return
        pair = self.tensors[head], self.tensors[embedding]
        if pair[0] is pair[1]:
            return
        a, b = (tensor.read().reshape(-1) for tensor in pair)
        for start in range(0, a.size, _COMPARED):
            piece = slice(start, start + _COMPARED)
            if not np.array_equal(a[piece], b[piece]):
                expected = f"expected the values of {embedding}, because tie_word_embeddings is true"
                raise ValueError(f"{pair[0].path}: {head}: {expected}, got different ones")
        for tensor in pair:
            tensor.release()


def read_config(directory: Path) -> DecoderConfig:
    """The configuration of a checkpoint, from ``config.json`` alone.

    Raises:
      FileNotFoundError, ValueError: as :func:`~pallas_attn_models.checkpoints.load_hf`.
    """
    return _config(directory / CONFIG, dequantized(read_json(directory / CONFIG), {})[0])


def check_contents(directory: Path, checkpoint: OpenCheckpoint) -> Contents:
    """Checks names, shapes and dtypes of all tensors, by the headers of the files.

    Raises:
      ValueError: as :func:`~pallas_attn_models.checkpoints.load_hf`.
    """
    fields, stored = dequantized(checkpoint.fields, checkpoint.tensors)
    config = _config(checkpoint.config_path, fields)
    family = FAMILIES[config.family]
    layout = Layout(family, config)
    ignored = [*family.redundant, *family.other_parts, *_further_layers(family, config, fields)]
    tensors = _by_our_names(directory, family, layout, stored, ignored)
    _check_tensors(directory, layout, tensors, config.tie_word_embeddings)
    return Contents(config, layout, tensors)


def _config(path: Path, fields: Mapping[str, Any]) -> DecoderConfig:
    try:
        return config_from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _further_layers(family: Family, config: DecoderConfig, fields: Mapping[str, Any]) -> Iterator[str]:
    """Patterns of the layers after the last one that predict further tokens, as the config counts them."""
    number = fields.get("num_nextn_predict_layers") if "num_nextn_predict_layers" in family.irrelevant else None
    number = number if isinstance(number, int) and number < _MOST_FURTHER else 0
    for layer in range(config.num_layers, config.num_layers + number):
        yield re.escape(f"{family.layer_prefix}.{layer}.") + ".*"


def _by_our_names(
    directory: Path, family: Family, layout: Layout, tensors: Mapping[str, Stored], patterns: list[str]
) -> dict[str, Stored]:
    """The tensors by the names in the tables of the family, without those that match a pattern.

    Published files often leave out the first part of the names, or have another one.
    """
    ignored = [re.compile(pattern) for pattern in patterns]
    base = family.layer_prefix.split(".")[0]
    renamed: dict[str, Stored] = {}
    redundant = []
    for name, tensor in tensors.items():
        candidates = [name, *_other_names(name, {**family.prefixes, "": f"{base}."})]
        if any(pattern.fullmatch(one) for pattern in ignored for one in candidates):
            redundant.append(name)
            continue
        ours = next((one for one in candidates if one in layout), name)
        if ours in renamed:
            raise ValueError(f"{directory}: expected {ours} once, got it as {renamed[ours].name} and {name}")
        renamed[ours] = tensor
    if redundant:
        reason = "redundant with the config, or of other parts of the model"
        _logger.info("%s: %d tensors ignored, %s: %s", directory, len(redundant), reason, listed(redundant))
    return renamed


def _other_names(name: str, prefixes: Mapping[str, str]) -> Iterator[str]:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            yield ours + name.removeprefix(theirs)


def _check_tensors(directory: Path, layout: Layout, tensors: dict[str, Stored], is_tied: bool) -> None:
    """Raises ValueError unless the tensors are exactly those of the layout; adds a missing table of a tied head."""
    embedding, head = layout.tensor_of(_EMBEDDING), layout.head
    if is_tied and head in tensors:
        # A head beside the table must be equal to it. Some files hold only the head.
        tensors.setdefault(embedding, tensors[head])
    used = {name for name in tensors if name in layout}
    if missing := len(layout) - len(used):
        first = itertools.islice((name for name in layout.names() if name not in tensors), _SHOWN)
        names = listed(first, total=missing)
        expected = f"all {len(layout)} tensors of {layout.num_layers} layers"
        raise ValueError(f"{directory}: expected {expected}, got all but {missing} of them: missing {names}")
    tied_head = {head} & tensors.keys() - used if is_tied else set()
    if extra := tensors.keys() - used - tied_head:
        raise ValueError(f"{directory}: expected only tensors of the model, got also {listed(extra)}")

    wrong = []
    for name in [*sorted(used), *tied_head]:
        tensor, shape = tensors[name], layout.shape_of(name if name in layout else embedding)
        if tensor.dtype not in DTYPES:
            wrong.append(f"{tensor.path}: {name}: expected one of {', '.join(DTYPES)}, got {tensor.dtype}")
        elif tensor.shape != shape:
            wrong.append(f"{tensor.path}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if wrong:
        more = f"; and {len(wrong) - 1} more tensors have the wrong shape or dtype" if len(wrong) > 1 else ""
        raise ValueError(wrong[0] + more)
