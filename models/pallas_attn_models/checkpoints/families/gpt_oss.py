"""gpt-oss (arXiv:2508.10925): attention sinks, alternating windows, experts with clamped SwiGLU."""

from pallas_attn_models.checkpoints.families.names import ATTENTION, OUTER, PRE_NORMS
from pallas_attn_models.checkpoints.family import Family
from pallas_attn_models.checkpoints.ropes import Rope
from pallas_attn_models.checkpoints.settings import SIZES, Derived, Field, eos, epsilon, flag, kv_heads, positions, tied
from pallas_attn_models.checkpoints.transforms import Tensor, linear, same
from pallas_attn_models.checkpoints.windows import Windows, sliding_except_every

# The settings of a config.json without any, in transformers.
_ROPE = {
    "type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    settings=(
        *SIZES,
        kv_heads(8),
        Field("head_dim", "head_dim", 64),
        positions(131072),
        epsilon("rms_norm_eps", 1e-5),
        Windows(128, sliding_except_every(2)),
        Rope(theta=150000.0, parameters=_ROPE),
        flag("attention_bias", "qkv_bias output_bias", True),
        tied(False),
        eos(None),
        Field("intermediate_size", "intermediate_size experts.intermediate_size"),
        Field("num_local_experts num_experts", "experts.num_experts", 128),
        Field("num_experts_per_tok experts_per_token", "experts.experts_per_token", 4),
        Field("swiglu_limit", "experts.clamp", 7.0),
        Field("swiglu_alpha", "experts.alpha", 1.702),
        Derived("experts.bias", lambda known: True),
        Derived("experts.router_bias", lambda known: True),
    ),
    constants={"norm": "rms_float32", "attention_sinks": True},
    supported={"hidden_act": ("silu",)},
    irrelevant={"initial_context_length": "repeats the context of the rotary settings"},
    tensors=OUTER,
    layer_tensors=(
        *PRE_NORMS,
        *ATTENTION,
        *same("self_attn.sinks", "attention.sinks"),
        *linear("mlp.router", "mlp.router"),
        Tensor("mlp.experts.gate_up_proj", ("mlp.expert_gate.kernel", "mlp.expert_up.kernel"), split="alternating"),
        Tensor("mlp.experts.gate_up_proj_bias", ("mlp.expert_gate.bias", "mlp.expert_up.bias"), split="alternating"),
        Tensor("mlp.experts.down_proj", ("mlp.expert_down.kernel",)),
        Tensor("mlp.experts.down_proj_bias", ("mlp.expert_down.bias",)),
    ),
)
