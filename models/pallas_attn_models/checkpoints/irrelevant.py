"""Fields of a ``config.json`` that any family may have: those that must have one value, and those without effect."""

from typing import Any

# Field -> values that the decoder implements.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "chunk_size_feed_forward": (0, None),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
}

_CODE = "says where transformers finds code; this library has its own"
_DROPOUT = "dropout, which only training in PyTorch applies"
_DTYPE = "the caller of load_hf chooses the dtype"
_GENERATION = "a sampling default; Sampling decides"
_IDENTITY = "origin of the checkpoint"
_KERNEL = "selects a PyTorch kernel"
_LABELS = "class names; a language model has none"
_OUTPUT = "selects the outputs of a PyTorch call"
_TOKENIZER = "for the tokenizer"
_TRAINING = "for training in PyTorch"

# Field -> reason why it cannot affect the logits.
IRRELEVANT: dict[str, str] = {
    "_attn_implementation": _KERNEL,
    "_attn_implementation_autoset": _KERNEL,
    "_commit_hash": _IDENTITY,
    "_flash_attn_2_enabled": _KERNEL,
    "_model_name_or_path": _IDENTITY,
    "_name_or_path": _IDENTITY,
    "attention_dropout": _DROPOUT,
    "attn_implementation": _KERNEL,
    "auto_map": _CODE,
    "bad_words_ids": _GENERATION,
    "begin_suppress_tokens": _GENERATION,
    "bos_token_id": _TOKENIZER,
    "cache_implementation": "the caller chooses the caches",
    "cls_token_id": _TOKENIZER,
    "classifier_dropout": _DROPOUT,
    "decoder_start_token_id": _TOKENIZER,
    "diversity_penalty": _GENERATION,
    "do_sample": _GENERATION,
    "dtype": _DTYPE,
    "early_stopping": _GENERATION,
    "embd_pdrop": _DROPOUT,
    "embedding_dropout": _DROPOUT,
    "encoder_no_repeat_ngram_size": _GENERATION,
    "exponential_decay_length_penalty": _GENERATION,
    "finetuning_task": _LABELS,
    "forced_bos_token_id": _GENERATION,
    "forced_eos_token_id": _GENERATION,
    "gradient_checkpointing": _TRAINING,
    "hidden_dropout": _DROPOUT,
    "id2label": _LABELS,
    "initializer_range": _TRAINING,
    "is_decoder": "every model here is a decoder",
    "is_llama_config": _IDENTITY,
    "keys_to_ignore_at_inference": _OUTPUT,
    "mask_token_id": _TOKENIZER,
    "label2id": _LABELS,
    "length_penalty": _GENERATION,
    "max_length": _GENERATION,
    "max_sequence_length": "an older synonym of max_position_embeddings",
    "min_length": _GENERATION,
    "model_max_length": _TOKENIZER,
    "no_repeat_ngram_size": _GENERATION,
    "num_beam_groups": _GENERATION,
    "num_beams": _GENERATION,
    "num_labels": _LABELS,
    "num_return_sequences": _GENERATION,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_router_logits": _OUTPUT,
    "output_scores": _OUTPUT,
    "pad_token_id": _TOKENIZER,
    "prefix": _TOKENIZER,
    "problem_type": _LABELS,
    "remove_invalid_values": _GENERATION,
    "repetition_penalty": _GENERATION,
    "resid_pdrop": _DROPOUT,
    "residual_dropout": _DROPOUT,
    "return_dict": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "router_aux_loss_coef": _TRAINING,
    "sep_token_id": _TOKENIZER,
    "suppress_tokens": _GENERATION,
    "task_specific_params": _GENERATION,
    "temperature": _GENERATION,
    "tf_legacy_loss": _TRAINING,
    "tokenizer_class": _TOKENIZER,
    "top_k": _GENERATION,
    "top_p": _GENERATION,
    "torch_dtype": _DTYPE,
    "torchscript": _OUTPUT,
    "transformers.js_config": "for another runtime",
    "transformers_version": _IDENTITY,
    "typical_p": _GENERATION,
    "unk_token_id": _TOKENIZER,
    "unsloth_fixed": _IDENTITY,
    "unsloth_version": _IDENTITY,
    "use_bfloat16": _DTYPE,
    "use_cache": "the caller decides by passing caches",
}
