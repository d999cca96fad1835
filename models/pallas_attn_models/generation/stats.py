"""Resources that generation used: time, KV blocks, steps."""

import dataclasses
from typing import Any, NamedTuple


class UsageStats(NamedTuple):
    """Running totals of a Generator.

    Attributes:
      prefill_seconds, decode_seconds: time in prefill (and score) calls, and in decode calls.
      kv_blocks_visited: KV blocks that attention read, over all layers.
      kv_blocks_total: KV blocks that attention without block lists would have read in the same rows and steps.
      row_steps: decode steps, summed over the running rows; without speculation one per sampled token, two if guided.
      drafted, accepted: draft tokens, and those of them that were accepted.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_blocks_visited: int = 0
    kv_blocks_total: int = 0
    row_steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def since(self, before: "UsageStats") -> "UsageStats":
        """The totals minus those of ``before``."""
        return UsageStats._make(now - then for now, then in zip(self, before, strict=True))

    def of_run(self, **fields: Any) -> "GenerationStats":
        """These totals as those of one run, with the remaining fields of :class:`GenerationStats`."""
        totals = self._asdict()
        return GenerationStats(turns=totals.pop("row_steps"), **totals, **fields)


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """Resources that one run used.

    Attributes:
      prompt_tokens, new_tokens: totals; each prompt counts once, negative prompts included, and the tokens of a stop
        sequence do not count.
      compile_seconds: time spent compiling in this run; 0 in every run of a Generator but its first.
      executables: compiled by the Generator so far.
      prefill_seconds, decode_seconds, kv_blocks_visited, kv_blocks_total, drafted, accepted: see :class:`UsageStats`;
        including other requests served during the run.
      turns: the ``row_steps`` of :class:`UsageStats`.
    """

    prompt_tokens: int
    new_tokens: int
    compile_seconds: float
    executables: int
    prefill_seconds: float
    decode_seconds: float
    kv_blocks_visited: int
    kv_blocks_total: int
    turns: int
    drafted: int
    accepted: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of prefill and decode."""
        return self.new_tokens / (self.prefill_seconds + self.decode_seconds)
