"""Settings and tensor names of multi-head latent attention (DeepSeek-V2 and V3)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from pallas_attn_models.checkpoints.ropes import Rope, mscale
from pallas_attn_models.checkpoints.settings import Source
from pallas_attn_models.checkpoints.transforms import Tensor, linear, norm
from pallas_attn_models.checks import require_size
from pallas_attn_models.decoder import DecoderConfig, LatentConfig, RopeConfig

_HEAD = "follows from the parts of a head"
_FURTHER = "layers that predict further tokens, which generation here does not use"
_TRAINING = "for training in PyTorch"
IRRELEVANT: dict[str, str] = {
    "aux_loss_alpha": _TRAINING,
    "ep_size": _TRAINING,
    "head_dim": _HEAD,
    "num_mtp_layers": _FURTHER,
    "num_nextn_predict_layers": _FURTHER,
    "qk_head_dim": _HEAD,
    "seq_aux": _TRAINING,
}
LATENT_ATTENTION = (
    *linear("self_attn.q_a_proj", "attention.query_down"),
    *norm("self_attn.q_a_layernorm", "attention.query_down_norm"),
    *linear("self_attn.kv_a_proj_with_mqa", "attention.key_value_down"),
    *norm("self_attn.kv_a_layernorm", "attention.key_value_down_norm"),
    *linear("self_attn.kv_b_proj", "attention.key_value"),
    *linear("self_attn.o_proj", "attention.output"),
)


def query_tensors(config: DecoderConfig) -> tuple[Tensor, ...]:
    """The projection of queries, which is called otherwise if they pass through a narrow vector."""
    is_plain = config.latent is None or config.latent.query_rank is None
    return linear("self_attn.q_proj" if is_plain else "self_attn.q_b_proj", "attention.query")


@dataclasses.dataclass(frozen=True)
class Latent:
    """The sizes of latent attention."""

    def read(self, source: Source) -> Mapping[str, Any]:
        names = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        rank, own, rotated, value = (source.take(name, default=default) for name, default in names.items())
        query_rank = source.take("q_lora_rank", default=1536, null=None)
        for name, size in zip(names, (rank, own, rotated, value), strict=True):
            require_size(name, size)
        return {"head_dim": own + rotated, "latent": LatentConfig(query_rank, rank, rotated, value)}

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        latent, head_dim = config.latent, config.head_dim
        if latent is None or not isinstance(head_dim, int):
            raise AttributeError("no latent attention")
        return {
            "q_lora_rank": latent.query_rank,
            "kv_lora_rank": latent.key_value_rank,
            "qk_nope_head_dim": head_dim - latent.rope_dim,
            "qk_rope_head_dim": latent.rope_dim,
            "v_head_dim": latent.value_dim,
        }


@dataclasses.dataclass(frozen=True)
class LatentRope(Rope):
    """Rotary settings whose ``mscale_all_dim`` scales the logits, and ``rope_interleave`` says what the pairs are."""

    def read(self, source: Source) -> Mapping[str, Any]:
        interleaved = source.take("rope_interleave", default=True)
        settings = self._settings(source)
        all_dim = settings.get("mscale_all_dim")
        rope = dataclasses.replace(self._rope(settings, source.known), interleaved=interleaved)
        found: dict[str, Any] = {"rope": rope}
        if all_dim and rope.type != "default":
            found["attention_scale"] = _scale(rope, source.known["head_dim"], all_dim)
        return found

    def write(self, config: DecoderConfig) -> Mapping[str, Any]:
        fields = super().write(config)
        rope, scale, head_dim = config.rope, config.attention_scale, config.head_dim
        if rope is None or not isinstance(head_dim, int):
            raise AttributeError("no rotation")
        fields = {**fields, "rope_interleave": rope.interleaved}
        if scale is None:
            return fields
        all_dim = (math.sqrt(scale * math.sqrt(head_dim)) - 1) / (0.1 * math.log(rope.factor))
        near = (round(all_dim, 6), all_dim, math.nextafter(all_dim, 0), math.nextafter(all_dim, math.inf))
        exact = next((one for one in near if _scale(rope, head_dim, one) == scale), all_dim)
        return {**fields, "rope_scaling": {**fields["rope_scaling"], "mscale_all_dim": exact}}


def _scale(rope: RopeConfig, head_dim: int, all_dim: float) -> float:
    """The scale of the logits, for heads of this size."""
    factor = mscale(rope.factor, all_dim)
    return head_dim**-0.5 * factor * factor
