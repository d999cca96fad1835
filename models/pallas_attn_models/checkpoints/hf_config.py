"""Converts between ``config.json`` and :class:`DecoderConfig` by the tables of the model families.

Every field must be used, have a value that the family supports, or be known to be without effect. Any other field is
an error: better not to run a model than to run it with other weights or another formula than in training.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.families import FAMILIES, MISSING
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.irrelevant import IRRELEVANT, SUPPORTED
from pallas_attn_models.checkpoints.settings import Source
from pallas_attn_models.checks import MAX_INT32, is_int, listed, require_size, shown
from pallas_attn_models.decoder import DecoderConfig, ExpertsConfig

_logger = logging.getLogger(__name__)


def config_from_hf(fields: Mapping[str, Any]) -> DecoderConfig:
    """Converts the parsed ``config.json`` of a checkpoint of any family in ``families/``.

    Absent fields get transformers' defaults, except for sizes, which are required. Rotary settings may be spelled
    ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``. Of a model with images, the text part is taken.

    Raises:
      ValueError: a field that is unknown or missing, or has an unsupported value.
      TypeError: ``fields`` is not a mapping.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"fields: expected the mapping in config.json, got {type(fields).__name__}")
    family, fields = family_of(fields)
    source = Source(fields)
    _check_constant_fields(family, source)
    for setting in family.settings:
        source.known |= setting.read(source)
    if source.left:
        raise ValueError(f"fields: expected only known fields, got {listed(map(str, source.left))}")
    arguments = {**family.constants, **source.known}
    experts = {name.removeprefix("experts."): arguments.pop(name) for name in [*arguments] if "experts." in name}
    if experts:
        arguments["experts"] = ExpertsConfig(**experts)
    arguments["eos_token_ids"] = _in_vocabulary(arguments["eos_token_ids"], arguments["vocab_size"])
    return DecoderConfig(family=family.name, **arguments)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` that :func:`config_from_hf` converts back to an equal config.

    The family is that of the checkpoint from which the config came, if it can still express it, or else the first that
    can. Rotary settings are spelled as transformers 4 and 5 both read them.

    Raises:
      ValueError: a config that no family can express.
    """
    first = [FAMILIES[config.family]] if config.family in FAMILIES else []
    for family in first + [family for family in FAMILIES.values() if family not in first]:
        if (fields := _written(family, config)) is not None:
            return fields
    name = first[0].name if first else "llama"
    raise ValueError(f"config: expected what a model family can express, got {_difference(FAMILIES[name], config)}")


def family_of(fields: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of a ``config.json``, and its fields without those of other parts of the model.

    Raises:
      ValueError: an unknown family; says what is missing if it is one that is known to need more.
    """
    fields = dict(fields)
    model_type = fields.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.within:
            text = fields.get("text_config")
            if not isinstance(text, Mapping):
                raise ValueError(f"text_config: expected an object, got {shown(text)}")
            fields = _text_part(fields, text)
            model_type = fields.setdefault("model_type", family.name)
    if isinstance(model_type, str) and model_type in MISSING:
        raise ValueError(f"model_type: {model_type!r} is not supported, because it needs {MISSING[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type: expected one of {', '.join(sorted(FAMILIES))}, got {shown(model_type)}")
    return FAMILIES[model_type], fields


def _text_part(fields: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text part; end tokens and tied embeddings may be given for the whole model only."""
    shared = {name: fields[name] for name in ("eos_token_id", "tie_word_embeddings") if name in fields}
    _logger.info("config.json: only the text part of a %s is loaded", shown(fields.get("model_type")))
    return {**shared, **text}


def _check_constant_fields(family: Family, source: Source) -> None:
    """Takes the fields that must have one value, and those without effect."""
    supported = {
        "model_type": (family.name,),
        "architectures": (*([name] for name in family.architectures), None),
        **SUPPORTED,
        **family.supported,
    }
    for name, allowed in supported.items():
        if name in source.left:
            value = source.left.pop(name)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {shown(value)}")
    used = {name for setting in family.settings for name in getattr(setting, "name", "").split()}
    for name in {**IRRELEVANT, **family.irrelevant}:
        if name not in used:
            source.left.pop(name, None)


def _in_vocabulary(tokens: Any, vocab_size: Any) -> Any:
    """End tokens without those that the model cannot produce, as in random checkpoints with a small vocabulary."""
    require_size("vocab_size", vocab_size)
    beyond = [token for token in tokens if is_int(token) and vocab_size <= token <= MAX_INT32]
    if beyond:
        _logger.warning("eos_token_id: %s ignored, beyond the vocabulary of %d tokens", shown(beyond), vocab_size)
    return tuple(token for token in tokens if token not in beyond)


def _written(family: Family, config: DecoderConfig) -> dict[str, Any] | None:
    """The fields, or None if they would not read back as an equal config."""
    try:
        fields = _fields(family, config)
        return fields if config_from_hf(fields) == config else None
    except (ValueError, AttributeError):
        return None


def _fields(family: Family, config: DecoderConfig) -> dict[str, Any]:
    """What the family writes for a config, even if that loses something; AttributeError if it cannot write."""
    fields: dict[str, Any] = {"model_type": family.name, "architectures": [family.architectures[0]]}
    # Unless these are null, transformers takes defaults, which may be outside the vocabulary.
    fields |= {"bos_token_id": None, "pad_token_id": None}
    fields |= {name: allowed[0] for name, allowed in family.supported.items() if allowed[0] is not None}
    for setting in family.settings:
        fields |= setting.write(config)
    return fields


def _difference(family: Family, config: DecoderConfig) -> str:
    """Names the fields that a family cannot express."""
    try:
        read = config_from_hf(_fields(family, config))
    except (ValueError, AttributeError) as error:
        return f"one that {family.name} cannot: {error}"
    names = [
        field.name
        for field in dataclasses.fields(config)
        if field.compare and getattr(config, field.name) != getattr(read, field.name)
    ]
    values = ", ".join(f"{name}={shown(getattr(config, name))}" for name in names)
    return f"{values}, which {family.name} cannot"
