"""GPT-NeoX (arXiv:2204.06745) and Pythia (arXiv:2304.01373)."""

from pallas_attn_models.checkpoints.families.names import PRE_NORMS
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
    equal_to,
    flag,
    head_size,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.transforms import linear, norm, same

FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        Derived("num_kv_heads", equal_to("num_heads")),
        Derived("head_dim", head_size),
        positions(2048),
        epsilon("layer_norm_eps", 1e-5),
        Rope(partial=0.25, theta_name="rotary_emb_base", partial_name="rotary_pct"),
        Choice("use_parallel_residual", "norm_position", {True: "parallel_two", False: "pre"}, True),
        flag("attention_bias", "qkv_bias output_bias", True),
        activation(default="gelu"),
        tied(False),
        eos(2),
    ),
    constants={"norm": "layer", "mlp_bias": True, "mlp_gated": False},
    tensors=(
        *same("gpt_neox.embed_in.weight", "embedding.table"),
        *norm("gpt_neox.final_layer_norm", "norm"),
        *linear("embed_out", "head"),
    ),
    layer_prefix="gpt_neox.layers",
    layer_tensors=(
        *PRE_NORMS,
        *linear(
            "attention.query_key_value", "attention.query", "attention.key", "attention.value", split="by key head"
        ),
        *linear("attention.dense", "attention.output"),
        *linear("mlp.dense_h_to_4h", "mlp.up"),
        *linear("mlp.dense_4h_to_h", "mlp.down"),
    ),
    redundant=(r"gpt_neox\.layers\.[0-9]+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
