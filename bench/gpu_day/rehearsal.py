"""Compiles everything that the GPU suite runs, by XLA for an H200 that need not be there.

What compiles here does not fail to compile there for the first time; and the seconds, on which ``--plan`` relies, are
known before the day. ``rehearsal.json`` keeps them, with registers and spills of our kernels, and with the physics of
the cases.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from flax import nnx

from bench.gpu_day import block_sizes, decoding, efforts, smoke
from bench.machine_code import generator_steps, xla_gpu
from bench.machine_code.gpus import GPUS
from bench.times.cases import Case, named
from bench.times.measure import number_of_sets
from bench.times.peers import all_peers
from bench.times.timing import Contender, carrying_over_sets, over_sets
from bench.times.workloads import Append, Attention, Generation, MaskBuild
from pallas_attn_models import Decoder, DecoderConfig, Generator

GPU = "H200"
RECORD = Path(__file__).with_name("rehearsal.json")
# The peer with kernels that compile without a GPU. cuDNN's need its library; PyTorch and tokamax look for a GPU.
_PEERS = ("jax.pallas",)

Lower = Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that a step runs.

    Attributes:
      step: the step's name.
      part: which of its programs: "ours", a peer, "decode", block sizes.
      lower: traces and lowers it.
      required: whether the step is nothing without it.
    """

    step: str
    part: str
    lower: Lower
    required: bool = True


def programs(only: tuple[str, ...] = ()) -> Iterator[Program]:
    """Everything of ours that both calls compile, step by step; or only steps whose names begin so.

    Of the headline cases also the making of the inputs, and peers.
    """

    def wanted(step: str) -> bool:
        return step.startswith(only or "")

    for check in smoke.CHECKS:
        if wanted(step := f"smoke/{check.name}"):
            yield Program(step, "ours", _of_contender(lambda check=check: check.build(False).ours(), 1))
    for entry in block_sizes.entries().values():
        if wanted(step := f"sweep/{entry.name}"):
            for name, sizes in entry.candidates.items():
                yield Program(step, name, _of_candidate(entry, sizes))
    for name in decoding.STORAGES:
        if wanted(step := f"generator/{name}"):
            for which in ("prefill", "decode"):
                yield Program(step, which, _of_decoding(name, which))
    for name in (*efforts.HEADLINES, *efforts.others()):
        if wanted(step := f"case/{name}"):
            yield from _of_case(step, named("gpu")[name])
    for name in efforts.HEADLINES:
        if wanted(step := f"case/{name}"):
            yield from _around_case(step, named("gpu")[name])


def _of_case(step: str, case: Case) -> Iterator[Program]:
    """Our side of a case."""
    workload = case.build(case.size("gpu"))
    if isinstance(workload, Generation):
        for which in ("prefill", "decode"):
            yield Program(step, which, _of_generation(workload, which))
        return
    sets = number_of_sets(workload, by_device=True, toy=False)
    yield Program(step, "ours", _of_contender(lambda: workload.ours(sets=sets), sets))


def _around_case(step: str, case: Case) -> Iterator[Program]:
    """The making of the inputs, and peers."""
    workload = case.build(case.size("gpu"))
    if not isinstance(workload, Attention):
        return
    sets = number_of_sets(workload, by_device=True, toy=False)
    yield Program(step, "inputs", lambda: xla_gpu.lower(lambda: workload.make(0)[:3], gpu=GPU))
    for name, peer in all_peers().items():
        if name in _PEERS:
            lower = _of_contender(lambda peer=peer: peer.contender(workload, sets), sets)
            yield Program(step, name, lower, required=False)


def _of_contender(make: Callable[[], Contender], sets: int) -> Lower:
    """The program that times a contender, whose inputs are never made."""

    def lower() -> jax.stages.Lowered:
        made: list[Contender] = []

        def inputs():
            made.append(make())
            return made[0].inputs

        shapes = jax.eval_shape(inputs)
        function = made[0].function
        if made[0].carries:
            state, rest = shapes[0][0], [one[1:] for one in shapes]
            return xla_gpu.lower(jax.jit(carrying_over_sets(function), donate_argnums=0), state, rest, gpu=GPU)
        return xla_gpu.lower(over_sets(function), shapes[:sets], gpu=GPU)

    return lower


def _of_candidate(entry: block_sizes.Entry, sizes) -> Lower:
    workload = entry.workload(False)
    sets = number_of_sets(workload, by_device=True, toy=False)
    make = lambda: block_sizes.contender(entry, workload, sizes, sets=sets, interpret=False)  # noqa: E731
    return _of_contender(make, sets)


def _of_decoding(name: str, which: Any) -> Lower:
    def lower() -> jax.stages.Lowered:
        model = nnx.eval_shape(lambda: decoding.model(decoding.SCALE.config))
        return generator_steps.lower_step(decoding.generator(model, name, decoding.SCALE), which, gpu=GPU)

    return lower


def _of_generation(workload: Generation, which: Any) -> Lower:
    """Our side of the case "generation"; the weights come from transformers there."""
    llama, size = workload.llama, workload.size
    config = DecoderConfig(
        vocab_size=llama["vocab_size"],
        hidden_size=llama["hidden_size"],
        intermediate_size=llama["intermediate_size"],
        num_layers=llama["num_hidden_layers"],
        num_heads=llama["num_attention_heads"],
        num_kv_heads=llama["num_key_value_heads"],
        head_dim=llama["head_dim"],
        max_position_embeddings=llama["max_position_embeddings"],
    )

    def lower() -> jax.stages.Lowered:
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        with jax.default_matmul_precision("highest"):
            generating = Generator(model, batch_size=size.batch, capacity=size.kv_len)
            return generator_steps.lower_step(generating, which, gpu=GPU)

    return lower


@contextlib.contextmanager
def _on_gpu() -> Iterator[None]:
    """Everything is made and traced as on the GPU: block sizes, chunks of a Generator, arrays as they are stored."""
    cores = GPUS[GPU].multiprocessors
    with (
        xla_gpu.assumed(GPU),
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch("pallas_attn_models.generation.generator.multiprocessors", return_value=cores),
    ):
        yield


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of ours as XLA makes it; bytes of stack hold spilled registers."""

    name: str
    registers: int
    stack_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled, or why not.

    Attributes:
      seconds: of CPU time on all threads.
      required: as in :class:`Program`; without it, the failure is a peer's.
    """

    step: str
    part: str
    seconds: float
    kernels: tuple[Kernel, ...] = ()
    failure: str | None = None
    required: bool = True


def compile_program(program: Program) -> Compiled:
    """Lowers and compiles a program; a failure is part of the result."""
    start = sum(os.times()[:4])  # of this process and of ptxas

    def seconds() -> float:
        return round(sum(os.times()[:4]) - start, 2)

    step, part, required = program.step, program.part, program.required
    with tempfile.TemporaryDirectory() as directory:
        try:
            with _on_gpu():
                lowered = program.lower()
            xla_gpu.compile(lowered, dump=Path(directory))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return Compiled(step, part, seconds(), failure=reason, required=required)
        taken = seconds()
        found = xla_gpu.assembled(Path(directory), "pallas_attn")
    kernels = {Kernel(x.name, x.registers, x.stack_bytes) for x in found}
    return Compiled(step, part, taken, tuple(sorted(kernels, key=lambda x: x.name)), required=required)


def line(compiled: Compiled) -> str:
    """A program in a line: seconds, and registers and bytes of stack of each kernel of ours; or the failure."""
    kernels = ", ".join(
        f"{x.name.removeprefix('pallas_attn_')} {x.registers}" + (f" SPILLS {x.stack_bytes} B" if x.stack_bytes else "")
        for x in compiled.kernels
    )
    word = "FAILS" if compiled.required else "the peer fails"
    about = f"{word}: {compiled.failure}" if compiled.failure else kernels
    return f"{compiled.seconds:6.1f} s  {compiled.step:28} {compiled.part:20} {about}"


def physics(step: str) -> dict[str, float] | None:
    """Operations and bytes of a case, and bytes of its inputs; None for other steps."""
    kind, _, which = step.partition("/")
    if kind != "case":
        return None
    case = named("gpu")[which]
    workload = case.build(case.size("gpu"))
    match workload:
        case Attention():
            work = workload.work
            sets = number_of_sets(workload, by_device=True, toy=False)
            return {"flops": work.flops, "bytes": work.nbytes, "input_bytes": workload.input_bytes, "sets": sets}
        case MaskBuild():
            pairs = workload.size.batch * workload.size.q_len * workload.size.kv_len
            return {"flops": 0, "bytes": pairs, "input_bytes": 0, "sets": 16}
        case Append():
            return {"flops": 0, "bytes": workload.nbytes, "input_bytes": 0, "sets": 16}
    return None


class Record:
    """The committed record, kept up to date program by program.

    Args:
      fresh: forget the programs of an earlier rehearsal.
    """

    def __init__(self, *, fresh: bool) -> None:
        before = {} if fresh or not RECORD.exists() else json.loads(RECORD.read_text())
        self._physics: dict[str, dict[str, float]] = before.get("physics", {})
        self._programs = {(x["step"], x["part"]): x for x in before.get("programs", [])}

    def add(self, compiled: Compiled) -> None:
        """Adds a program, in place of an earlier one, and writes the file."""
        step = compiled.step
        if step not in self._physics and (work := physics(step)) is not None:
            self._physics[step] = work
        self._programs[step, compiled.part] = dataclasses.asdict(compiled)
        head = {"gpu": GPU, "jax": jax.__version__, "plugin": xla_gpu.version(), "physics": self._physics}
        programs = ",\n  ".join(json.dumps(x) for x in self._programs.values())
        scratch = RECORD.with_name(f".{RECORD.name}.part")
        text = json.dumps(head, indent=1).removesuffix("\n}")
        scratch.write_text(f'{text},\n "programs": [\n  {programs}\n ]\n}}\n')
        os.replace(scratch, RECORD)
