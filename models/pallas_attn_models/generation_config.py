"""What a checkpoint asks for itself: the ``generation_config.json`` beside its weights."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_attn_models.checkpoint import read_json

_NAME = "generation_config.json"
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Fields that ask for nothing that a row of new tokens could show.
_IRRELEVANT = {
    *("_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id", "do_sample"),
    *("eos_token_id", "max_length", "pad_token_id", "return_dict_in_generate", "transformers_version", "use_cache"),
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Settings to use where a user has none.

    Attributes:
      settings: of :class:`~pallas_attn_models.sampling.Sampling`, by name: those that the file gives. A file whose
        ``do_sample`` is not true wants the most likely token, whatever its temperature, as in transformers.
      eos_token_ids: the tokens that end a text, besides those of the model's config.
      unused: fields that ask for something that has no counterpart here.
    """

    settings: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "GenerationDefaults":
        """What the directory of a checkpoint says; nothing if it has no such file.

        Raises:
          ValueError: a file that is no JSON object, or a field of the wrong kind; named.
        """
        path = Path(directory) / _NAME
        if not path.is_file():
            return GenerationDefaults()
        fields = {name: value for name, value in read_json(path).items() if value is not None}
        settings = {name: _number(path, name, fields[name]) for name in _SETTINGS if name in fields}
        if fields.get("do_sample", False):
            settings = {"temperature": 1.0} | settings
        else:
            settings |= {"temperature": 0.0}
        return GenerationDefaults(
            settings=settings,
            eos_token_ids=_tokens(path, fields.get("eos_token_id", [])),
            unused=tuple(sorted(fields.keys() - _IRRELEVANT - {*_SETTINGS})),
        )

    def __str__(self) -> str:
        said = [f"{name} {value:g}" for name, value in self.settings.items()]
        if self.eos_token_ids:
            said.append(f"end tokens {' '.join(map(str, self.eos_token_ids))}")
        if self.unused:
            said.append(f"not used: {' '.join(self.unused)}")
        return f"{_NAME}: {', '.join(said)}"


def _number(path: Path, name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {name}: expected a number, got {value!r}")
    return value


def _tokens(path: Path, value: Any) -> tuple[int, ...]:
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{path}: eos_token_id: expected token ids, got {value!r}")
    return tuple(tokens)
