"""Generation from a random Llama by our Generator and by transformers' ``generate``.

Both have a cache of the same capacity, the same float32 weights, and greedy sampling, so they must produce the same
tokens. The prompts are left-padded for transformers; ours needs no padding.
"""

# PyTorch and transformers are not dependencies.
# pyright: reportMissingImports=false

import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.times.timing import Contender
from bench.times.workloads import Generation


def unavailable() -> str | None:
    """Why the comparison cannot run here, or None."""
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ImportError:
            return f"{package} is not installed, so the tokens cannot be checked"
    try:
        import pallas_attn_models  # noqa: F401
    except ImportError:
        return "pallas_attn_models is not installed (pip install '.[models]', or put models/ on PYTHONPATH)"
    return None


def our_contender(workload: Generation) -> Contender:
    """Our Generator; the function returns the new tokens, int ``[B, new]``."""
    from pallas_attn_models import Generator, Sampling, load_hf

    with tempfile.TemporaryDirectory() as directory:
        _llama(workload).save_pretrained(directory)
        model = load_hf(Path(directory), dtype="float32")
    size = workload.size
    generator = Generator(model, batch_size=size.batch, capacity=size.kv_len)
    prompts = workload.prompts()
    sampling = Sampling(max_new_tokens=size.new)

    def generate():
        # TF32, JAX's default for float32 products on a GPU, would change tokens.
        with jax.default_matmul_precision("highest"):
            return np.array(generator.generate(prompts, sampling).tokens)

    return Contender(generate, [()], "host")


def transformers_contender(workload: Generation) -> Contender:
    """transformers with a static cache of the same capacity, float32."""
    import torch
    from transformers import StaticCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = _llama(workload).to(device).eval()
    size, prompts = workload.size, workload.prompts()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    # Newer versions of transformers have renamed it.
    cache_argument: Any = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @torch.inference_mode()
    def generate():
        cache = StaticCache(config=model.config, max_cache_len=size.kv_len)
        out = model.generate(
            tokens,
            attention_mask=real,
            **{cache_argument: cache},
            max_new_tokens=size.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, longest:].cpu().numpy()

    return Contender(generate, [()], "host")


@functools.lru_cache(maxsize=1)
def _llama(workload: Generation) -> Any:
    """The same random weights every time, without a token that ends a row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    torch.manual_seed(0)
    config = LlamaConfig(**workload.llama, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM(config).float()
