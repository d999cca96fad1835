"""PyTorch's attention as a peer: ``scaled_dot_product_attention`` and FlexAttention.

Data transfer, and anything that PyTorch's users prepare once for many calls (its layout, a boolean mask,
FlexAttention's block mask), happen before the clock starts.
"""
# PyTorch is not a dependency; the peers report if it is missing.
# pyright: reportMissingImports=false

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.times.timing import Contender
from bench.times.workloads import Attention, BlockClasses, MaskBuild
from pallas_attn import masks


def _to_torch(x) -> Any:
    """Copies through the host, which works for every dtype, to PyTorch's counterpart of JAX's device."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    x = np.array(x)
    if x.dtype == jnp.bfloat16:
        x = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    else:
        x = torch.from_numpy(x)
    return x.to(_torch_device())


def _from_torch(x) -> np.ndarray:
    """``[B, N, T, D]`` to ``[B, T, N, D]``, bfloat16 widened."""
    x = x.detach().transpose(1, 2).cpu()
    return (x.float() if x.dtype.itemsize == 2 else x).numpy()


def _torch_contender(workload: Attention, sets: int, attend: Callable) -> Contender:
    """A contender for ``attend(query, key, value)`` on ``[B, N, T, D]``, or for its gradients."""
    import torch

    inputs = [[_to_torch(x).transpose(1, 2).contiguous() for x in workload.arrays(seed)] for seed in range(sets)]
    if not workload.backward:

        @torch.no_grad()
        def forward(query, key, value):
            return attend(query, key, value)

        return Contender(forward, [tuple(one[:3]) for one in inputs], "torch", as_result=_from_torch)

    graphs = []
    for query, key, value, cotangent in inputs:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        graphs.append((attend(*leaves), leaves, cotangent))

    def backward(out, leaves, cotangent):
        return torch.autograd.grad(out, leaves, cotangent, retain_graph=True)

    return Contender(backward, graphs, "torch", as_result=lambda gradients: tuple(_from_torch(x) for x in gradients))


def sdpa(workload: Attention, sets: int) -> Contender:
    import torch

    options: dict[str, Any] = {"enable_gqa": workload.size.q_heads != workload.size.kv_heads}
    if isinstance(workload.mask, masks.Causal) and workload.plain:
        options["is_causal"] = True
    elif not bool(workload.boolean_mask.all()):
        options["attn_mask"] = _to_torch(workload.boolean_mask)
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, **options)
    return _torch_contender(workload, sets, attend)


def flex_attention(workload: Attention, sets: int) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attention

    # Otherwise the ninth mask would exceed the limit of recompilations and run uncompiled.
    torch.compiler.reset()
    block_mask = create_block_mask(*_flex_arguments(workload), device=_torch_device())
    attend = functools.partial(
        torch.compile(attention, dynamic=False),
        block_mask=block_mask,
        enable_gqa=workload.size.q_heads != workload.size.kv_heads,
    )
    return _torch_contender(workload, sets, attend)


def flex_mask(workload: MaskBuild, sets: int) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    torch.compiler.reset()
    arguments = _flex_arguments(workload.attention)
    build = functools.partial(torch.compile(create_block_mask), *arguments, device=_torch_device())
    return Contender(build, [()] * sets, "torch", as_result=_flex_classes)


def _flex_classes(built) -> BlockClasses:
    """The block classes of a FlexAttention block mask's first batch row and head."""
    q_block, kv_block = built.BLOCK_SIZE
    columns = built.kv_indices.shape[-1]
    classes = np.zeros((built.kv_indices.shape[-2], columns), np.uint8)
    for counts, indices, kind in (
        (built.kv_num_blocks, built.kv_indices, 1),
        (built.full_kv_num_blocks, built.full_kv_indices, 2),
    ):
        counts, indices = counts[0, 0].cpu().numpy(), indices[0, 0].cpu().numpy()
        for row, number in enumerate(counts):
            classes[row, indices[row, :number]] = kind
    return BlockClasses(q_block, kv_block, classes)


def _torch_device() -> str:
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def _flex_arguments(workload: Attention) -> tuple:
    """Arguments of ``create_block_mask``: the mask as a function of indices, B, H, T and S."""
    batch = max(x.shape[0] for x in (workload.q_positions, workload.kv_positions, *masks.operands(workload.mask)))
    return _mask_mod(workload), None if batch == 1 else batch, None, workload.size.q_len, workload.size.kv_len


def _mask_mod(workload: Attention) -> Callable:
    """The mask for FlexAttention: elementwise, from indices of batch row, head, query and key."""
    relation = _relation(workload.mask)
    if workload.plain:  # an index is a position
        return lambda b, h, q, k: relation(b, q, k, q, k)
    q_positions, kv_positions = _to_torch(workload.q_positions), _to_torch(workload.kv_positions)

    def mask_mod(b, h, q, k):
        q_position, kv_position = _at(q_positions, b, q), _at(kv_positions, b, k)
        return relation(b, q, k, q_position, kv_position) & (q_position >= 0) & (kv_position >= 0)

    return mask_mod


def _at(x, b, i):
    """Element i of row b of ``[B|1, L]``."""
    return x[b, i] if x.shape[0] > 1 else x[0, i]


def _relation(mask: masks.Mask) -> Callable:
    """Our mask algebra in PyTorch: ``allowed(b, query index, key index, query position, key position)``."""
    match mask:
        case masks.Full():
            return lambda b, i, j, q, k: q >= -1
        case masks.Causal():
            return lambda b, i, j, q, k: k <= q
        case masks.SlidingWindow(left=left, right=right):
            return lambda b, i, j, q, k: (k - q > -left) & (k - q <= right)
        case masks.Prefix(lengths=lengths):
            ends = _to_torch(lengths)[:, :, 0, 0]
            return lambda b, i, j, q, k: k < _at(ends, b, 0)
        case masks.Segments(q_ids=q_ids, kv_ids=kv_ids):
            q_ids, kv_ids = _to_torch(q_ids)[:, 0, :, 0], _to_torch(kv_ids)[:, 0, 0, :]
            return lambda b, i, j, q, k: _at(q_ids, b, i) == _at(kv_ids, b, j)
        case masks.Dense(array=array) if array.shape[:2] == (1, 1):
            array = _to_torch(array)[0, 0]
            return lambda b, i, j, q, k: array[i, j]
        case masks.And(left=left, right=right):
            left, right = _relation(left), _relation(right)
            return lambda *at: left(*at) & right(*at)
        case masks.Or(left=left, right=right):
            left, right = _relation(left), _relation(right)
            return lambda *at: left(*at) | right(*at)
    raise NotImplementedError(f"no translation of {type(mask).__name__} masks")
