"""``pallas-attn show-mask``: shows the live blocks of a mask, in characters or as a picture."""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from pallas_attn import tuning
from pallas_attn_models.cli import mask_expression
from pallas_attn_models.cli.options import int32
from pallas_attn_models.cli.output import status

_HELP = f"""\
Show the blocks of a mask: full blocks, which a kernel computes without evaluating the mask, partial blocks, and empty
blocks, which it never reads. A mask is an expression of

  {"  ".join(mask_expression.FORMS.values())}

combined by & (and), | (or), ~ (not) and parentheses; ~ binds tightest, then &, then |. segments packs documents of
these lengths one after the other; the remaining tokens form one more document."""
_EXAMPLES = """\
examples:
  pallas-attn show-mask "causal & sliding_window(256) | sink(4)" --q 2048
  pallas-attn show-mask "causal & sliding_window(256) | sink(4)" --q 2048 --left-pad 300 --out mask.png
  pallas-attn show-mask "causal & segments([700, 300, 1048])" --q 2048 --block-q 64 --block-kv 64
  pallas-attn show-mask "causal" --q 1 --kv 16384"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``show-mask`` command."""
    parser = commands.add_parser(
        "show-mask",
        help="show the live blocks of a mask",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    parser.add_argument("mask", metavar="MASK", help="an expression, in quotes")
    parser.add_argument("--q", type=int32, required=True, metavar="N", help="number of queries")
    parser.add_argument(
        "--kv", type=int32, metavar="N", help="number of keys; the queries are the last tokens; default --q"
    )
    parser.add_argument(
        "--left-pad", type=int32, default=0, metavar="N", help="number of leading keys that are padding; default 0"
    )
    parser.add_argument("--block-q", type=int32, metavar="N", help="queries per block; default: as in the kernels")
    parser.add_argument("--block-kv", type=int32, metavar="N", help="keys per block; default: as in the kernels")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw a .png or .svg instead of printing")


def run(args: argparse.Namespace) -> int:
    """Prints or draws the mask; returns the exit code."""
    q_len, kv_len = args.q, args.q if args.kv is None else args.kv
    if q_len < 1:
        raise ValueError(f"--q: expected at least 1, got {q_len}")
    if kv_len < q_len:
        raise ValueError(f"--kv: expected at least as many keys as queries ({q_len}), got {kv_len}")
    if not 0 <= args.left_pad < kv_len:
        raise ValueError(f"--left-pad: expected at least 0 and less than the {kv_len} keys, got {args.left_pad}")
    kv_positions = np.maximum(np.arange(kv_len, dtype=np.int32) - args.left_pad, -1)
    q_positions = kv_positions[kv_len - q_len :]
    mask = mask_expression.parse(args.mask, q_positions, kv_positions)
    default = tuning.default_block_sizes(q_len, kv_len, fine=mask.has_fine_edges())
    sizes = pa.BlockSizes(
        default.q if args.block_q is None else args.block_q, default.kv if args.block_kv is None else args.block_kv
    )
    block_mask = pa.BlockMask.from_mask(mask, jnp.asarray(q_positions[None]), jnp.asarray(kv_positions[None]), sizes)
    if args.out is None:
        print(block_mask)
    else:
        pa.save_picture(block_mask, args.out, title=" ".join(args.mask.split()))
        status(f"wrote {args.out}")
    return 0
