"""EXAONE 4 (arXiv:2507.11407): windows with rotation, and layers without either."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, GATED_MLP, OUTER, POST_NORMS, QK_NORM
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope, no_rope_without_window_if_any
from pallas_attn_models.checkpoints.settings import (
    HEAD_DIM,
    INTERMEDIATE,
    SIZES,
    activation,
    eos,
    epsilon,
    kv_heads,
    positions,
    tied,
)
from pallas_attn_models.checkpoints.windows import Windows, sliding_except_every

FAMILY = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    settings=(
        *SIZES,
        INTERMEDIATE,
        kv_heads(32),
        HEAD_DIM,
        positions(2048),
        epsilon("rms_norm_eps", 1e-5),
        Windows(4096, sliding_except_every(4)),
        Rope(without=no_rope_without_window_if_any),
        activation(),
        tied(False),
        eos(2),
    ),
    constants={"norm_position": "post", "qk_norm": "head"},
    tensors=OUTER,
    layer_tensors=(*POST_NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
)
