"""Tensor names that many families share."""

from pallas_attn_models.checkpoints.transforms import Tensor, linear, norm, same

OUTER: tuple[Tensor, ...] = (
    *same("model.embed_tokens.weight", "embedding.table"),
    *norm("model.norm", "norm"),
    *linear("lm_head", "head"),
)
ATTENTION = (
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
    *linear("self_attn.o_proj", "attention.output"),
)
QK_NORM = (
    *norm("self_attn.q_norm", "attention.query_norm"),
    *norm("self_attn.k_norm", "attention.key_norm"),
)
GATED_MLP = (
    *linear("mlp.gate_proj", "mlp.gate"),
    *linear("mlp.up_proj", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)
JOINT_GATED_MLP = (
    *linear("mlp.gate_up_proj", "mlp.gate", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)
PRE_NORMS = (
    *norm("input_layernorm", "attention_norm"),
    *norm("post_attention_layernorm", "mlp_norm"),
)
POST_NORMS = (
    *norm("post_attention_layernorm", "attention_out_norm"),
    *norm("post_feedforward_layernorm", "mlp_out_norm"),
)
LLAMA_LAYER = (*PRE_NORMS, *ATTENTION, *GATED_MLP)


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """One linear map per expert: ``PREFIX.3.GATE.weight``."""
    return (
        *linear(f"{prefix}.{{}}.{gate}", "mlp.expert_gate"),
        *linear(f"{prefix}.{{}}.{up}", "mlp.expert_up"),
        *linear(f"{prefix}.{{}}.{down}", "mlp.expert_down"),
    )


def shared_expert(name: str) -> tuple[Tensor, ...]:
    """The MLP that every token passes."""
    return (
        *linear(f"{name}.gate_proj", "mlp.shared.gate"),
        *linear(f"{name}.up_proj", "mlp.shared.up"),
        *linear(f"{name}.down_proj", "mlp.shared.down"),
    )
