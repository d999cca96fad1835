"""StableLM (arXiv:2402.17834)."""

from pallas_attn_models.checkpoints.families.names import LLAMA_LAYER, OUTER
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import (
    INTERMEDIATE,
    SIZES,
    Choice,
    Derived,
    activation,
    eos,
    epsilon,
    flag,
    head_size,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import Tensor

FAMILY = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(32),
        Derived("head_dim", head_size),
        positions(4096),
        epsilon("layer_norm_eps", 1e-5),
        Rope(partial=0.25),
        flag("use_qkv_bias", "qkv_bias", False),
        Choice("qk_layernorm", "qk_norm", {False: None, True: "heads"}, False),
        Choice("use_parallel_residual", "norm_position", {False: "pre", True: "parallel"}, False),
        activation(),
        tied(False),
        eos(0),
    ),
    constants={"norm": "layer", "qk_norm_kind": "layer_scale"},
    irrelevant={"norm_eps": "an older synonym of layer_norm_eps", "rotary_scaling_factor": "not used by transformers"},
    tensors=OUTER,
    layer_tensors=(
        *LLAMA_LAYER,
        Tensor("self_attn.q_layernorm.norms.{}.weight", ("attention.query_norm.scale",)),
        Tensor("self_attn.k_layernorm.norms.{}.weight", ("attention.key_norm.scale",)),
    ),
)
