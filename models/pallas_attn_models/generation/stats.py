"""What generation takes: time, KV blocks, steps."""

import dataclasses
from typing import NamedTuple


class Spent(NamedTuple):
    """What was spent so far.

    Attributes:
      prefill_seconds, decode_seconds: on reading prompts, and on drawing tokens.
      kv_blocks_visited: KV blocks that attention read, over all layers.
      kv_blocks_total: KV blocks that attention would have read in the same rows and steps without block lists.
      turns: how often a row was fed by decode; without speculation, once for each token drawn, twice if guided.
      drafted, accepted: tokens that were drafted by speculation, and that were right.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_blocks_visited: int = 0
    kv_blocks_total: int = 0
    turns: int = 0
    drafted: int = 0
    accepted: int = 0

    def since(self, before: "Spent") -> "Spent":
        """The difference."""
        return Spent._make(now - then for now, then in zip(self, before, strict=True))


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a run took.

    Attributes:
      prompt_tokens, new_tokens: of all prompts together, negative ones too, each prompt once; tokens that end a row are
        in neither.
      compile_seconds: spent compiling in this run; 0 in every run of a Generator but its first.
      executables: how many the Generator has compiled in its life.
      prefill_seconds, decode_seconds, kv_blocks_visited, kv_blocks_total, turns, drafted, accepted: see :class:`Spent`;
        with what other requests took meanwhile.
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
