"""How much time the cases of the GPU suite get, and which ten are its headlines."""

from collections.abc import Iterable

from bench.times.cases import named
from bench.times.measure import Effort

HEADLINES = (
    "causal",
    "causal-backward",
    "left-padded",
    "decode-131072",
    "decode-ragged",
    "window",
    "decode-int8",
    "left-padded-backward",
    "documents",
    "boolean-causal",
)
_HEADLINE = Effort(rounds=7, seconds=1.2, prepare_seconds=6.0)
_OTHER = Effort(rounds=5, seconds=1.0, prepare_seconds=2.0)
# Prepared before all other peers, as far as the time of a case goes.
_FIRST_PEERS = ("jax.nn.cudnn", "torch.sdpa", "jax.pallas", "torch.flex", "tokamax.triton", "tokamax.mosaic")
TOY = Effort(rounds=1, seconds=0.0)


def of(case: str) -> Effort:
    """The effort of a case."""
    return _HEADLINE if case in HEADLINES else _OTHER


def in_order(peers: Iterable[str]) -> list[str]:
    """Names of peers, the most telling first."""
    names = [*peers]
    return [x for x in _FIRST_PEERS if x in names] + [x for x in names if x not in _FIRST_PEERS]


def others() -> tuple[str, ...]:
    """The cases that are no headlines, in order of importance."""
    return tuple(name for name in named("gpu") if name not in HEADLINES)
