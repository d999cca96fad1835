"""Generation defaults of a checkpoint: its ``generation_config.json``."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pallas_attn_models.generation import Sampling
from pallas_attn_models.text_files import read_json

_NAME = "generation_config.json"
_HUGE = float(np.finfo(np.float32).max)
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ONLY_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Fields that do not affect the new tokens.
_IRRELEVANT = {
    *("_commit_hash", "_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id"),
    *("do_sample", "eos_token_id", "max_length", "output_attentions", "output_hidden_states", "output_logits"),
    *("output_scores", "pad_token_id", "return_dict_in_generate", "transformers_version", "use_cache"),
}
# Values with which a field has no effect.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("typical_p", "length_penalty", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("early_stopping", "remove_invalid_values", "renormalize_logits", "token_healing"), False),
}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Settings to use where the user gives none.

    Attributes:
      settings: fields of :class:`~pallas_attn_models.generation.Sampling` that the file sets, by name. Unless
        ``do_sample`` is true, decoding is greedy, whatever the file's temperature, as in transformers.
      eos_token_ids: end tokens, in addition to those of the model's config.
      unused: fields that have no counterpart here, or that are out of range and irrelevant for greedy decoding.
    """

    settings: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    unused: tuple[str, ...] = ()

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "GenerationDefaults":
        """Reads the defaults in a checkpoint directory; empty without the file.

        Raises:
          ValueError: not a JSON object, or a field of the wrong kind, or a relevant field out of range; named.
        """
        path = Path(directory) / _NAME
        if not path.exists():
            return GenerationDefaults()
        fields = {name: value for name, value in read_json(path).items() if value is not None}
        sample = fields.get("do_sample", False)
        if not isinstance(sample, bool):
            raise ValueError(f"{path}: do_sample: expected true or false, got {sample!r}")
        settings: dict[str, Any] = {}
        unused = {name for name in fields if not _has_no_effect(name, fields[name])}
        for name in _SETTINGS:
            if name in fields:
                setting: dict[str, Any] = {name: _number(path, name, fields[name])}
                try:
                    Sampling(**setting)
                    settings |= setting
                except ValueError as error:
                    if sample or name not in _ONLY_FOR_SAMPLING:
                        raise ValueError(f"{path}: {error}") from error
                    unused.add(name)
        settings = {"temperature": 1.0} | settings if sample else settings | {"temperature": 0.0}
        return GenerationDefaults(settings, _tokens(path, fields.get("eos_token_id", [])), tuple(sorted(unused)))

    def __str__(self) -> str:
        parts = [f"{name} {value:g}" for name, value in self.settings.items()]
        if self.eos_token_ids:
            parts.append(f"end tokens {' '.join(map(str, self.eos_token_ids))}")
        if self.unused:
            parts.append(f"not used: {' '.join(self.unused)}")
        return f"{_NAME}: {', '.join(parts)}"


def _has_no_effect(name: str, value: Any) -> bool:
    return name in _IRRELEVANT or name in _SETTINGS or (name in _NEUTRAL and value == _NEUTRAL[name])


def _number(path: Path, name: str, value: Any) -> int | float:
    """A number, normalized to the conventions of ``Sampling``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {name}: expected a number, got {value!r}")
    if not abs(value) <= _HUGE:
        raise ValueError(f"{path}: {name}: expected a finite number that fits float32, got {value}")
    if name == "top_k":
        value = int(value) if value == int(value) else value
        return 0 if value == -1 else value  # -1 and 0 are off
    if name == "top_p" and value == 0:
        return float(np.finfo(np.float32).tiny)  # keeps only the most likely token
    return value


def _tokens(path: Path, value: Any) -> tuple[int, ...]:
    """Token ids without negative ones, which transformers ignores."""
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token >= 2**31:
            raise ValueError(f"{path}: eos_token_id: expected token ids, got {value!r}")
    return tuple(token for token in tokens if token >= 0)
