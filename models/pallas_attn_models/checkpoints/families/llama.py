"""Llama 1 to 3 (arXiv:2302.13971, arXiv:2407.21783), and the many models that share its architecture."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    activation,
    eos,
    epsilon,
    flag,
    kv_heads,
    positions,
    tied,
)

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-6),
        Rope(),
        flag("attention_bias", "qkv_bias output_bias", False),
        flag("mlp_bias", "mlp_bias", False),
        activation(),
        tied(False),
        eos(2),
    ),
    supported={"sliding_window": (None,), "use_sliding_window": (False, None), "rope_interleaved": (False, None)},
    tensors=OUTER,
    layer_tensors=LLAMA_LAYER,
    redundant=(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq",),
)
