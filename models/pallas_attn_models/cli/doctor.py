"""``pallas-attn doctor``: checks which implementations run on this machine, and whether their numbers are right.

With ``--model``, it checks a checkpoint instead.
"""

import argparse
import functools
import importlib.metadata
import platform

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pallas_attn as pa
from pallas_attn_models.cli import checkpoint_report
from pallas_attn_models.cli.options import add_model_option
from pallas_attn_models.decoder import FLOAT_DTYPES

_SELF_CHECK_TOLERANCE = 1e-5  # absolute, float32, outputs of size about 1

_HELP = """\
Show versions, devices and attention implementations, with the reason if one cannot run on this machine, and compare the
others with the reference. With --model, say instead what a checkpoint is, what it takes in memory, and whether it can
be loaded; only its config.json and the headers of its weights are read."""
_EXAMPLES = """\
examples:
  pallas-attn doctor
  pallas-attn doctor --model ./Llama-3.2-1B --dtype float32
  pallas-attn doctor --model openai/gpt-oss-20b"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the ``doctor`` command."""
    parser = commands.add_parser(
        "doctor",
        help="check what runs on this machine, or a checkpoint",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    add_model_option(parser, help="directory of a checkpoint, or org/name on the Hugging Face Hub")
    help = "of weights and caches in memory, with --model; default %(default)s"
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="bfloat16", help=help)


def run(args: argparse.Namespace) -> int:
    """Prints three tables, or a checkpoint's; the exit code is 1 if a number is wrong or the checkpoint is refused."""
    if args.model is not None:
        return checkpoint_report.run(args)
    console = Console(highlight=False)
    versions = Table("package", "version")
    versions.add_row("python", platform.python_version())
    for package in ("pallas-attn", "jax", "jaxlib", "flax"):
        versions.add_row(package, _version(package))
    console.print(versions)

    devices = Table("device", "platform")
    for device in jax.devices():
        devices.add_row(Text(device.device_kind), device.platform)
    console.print(devices)

    table = Table("implementation", "can run", "largest error in a small causal attention")
    healthy = True
    for name, reason in pa.implementations().items():
        if reason is not None:
            table.add_row(name, Text(f"no: {reason}"), "")
            continue
        right, finding = _self_check(name)
        healthy &= right
        table.add_row(name, "yes", Text(finding))
    console.print(table)
    return 0 if healthy else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _self_check(implementation: str) -> tuple[bool, str]:
    """Whether an implementation agrees with the reference, and the finding in words."""
    if implementation == "reference":
        return True, "the others are compared with it"
    try:
        error = float(jnp.abs(_small_attention(implementation) - _small_attention("reference")).max())
    except Exception as error:  # the rest of the report still helps
        return False, f"FAILED: {error}"
    right = error <= _SELF_CHECK_TOLERANCE  # False for NaN
    return right, f"{error:.1e} ({'right' if right else 'WRONG'})"


@functools.partial(jax.jit, static_argnames="implementation")
def _small_attention(implementation: str) -> jax.Array:
    """Causal float32 attention with partial blocks, two query heads per KV head, and nine padding tokens in one row."""
    key_q, key_k, key_v = jax.random.split(jax.random.key(0), 3)
    positions = jnp.arange(53, dtype=jnp.int32)[None] - jnp.array([[0], [9]], jnp.int32)
    positions = jnp.maximum(positions, -1)
    out = pa.attention(
        jax.random.normal(key_q, (2, 37, 4, 32), jnp.float32),
        jax.random.normal(key_k, (2, 53, 2, 32), jnp.float32),
        jax.random.normal(key_v, (2, 53, 2, 32), jnp.float32),
        pa.masks.causal(),
        q_positions=positions[:, -37:],
        kv_positions=positions,
        implementation=implementation,
    )
    return jnp.asarray(out)
