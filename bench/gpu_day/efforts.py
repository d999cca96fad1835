"""How much time the cases of the GPU suite get, and which ten are its headlines."""

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
_HEADLINE = Effort(rounds=7, seconds=2.0, prepare_seconds=10.0)
_OTHER = Effort(rounds=5, seconds=1.0, prepare_seconds=2.0)
TOY = Effort(rounds=1, seconds=0.0)


def of(case: str) -> Effort:
    """The effort of a case."""
    return _HEADLINE if case in HEADLINES else _OTHER


def others() -> tuple[str, ...]:
    """The cases that are no headlines, in order of importance."""
    return tuple(name for name in named("gpu") if name not in HEADLINES)
