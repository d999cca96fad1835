"""A generator with scripted answers, for tests of its callers."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pallas_attn_models.generation.requests import Handle
from pallas_attn_models.generation.sampling import Sampling


def byte_tokenizer(special: Sequence[str] = ()) -> Tokenizer:
    """One token per byte, as in the vocabularies of GPT-2 and Llama 3, then the ``special`` ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


class ScriptedGenerator:
    """Answers each request with the next of ``scripts``; a step yields ``burst`` tokens, as with speculation.

    Attributes:
      asked: submitted requests ``(prompt, sampling)``.
      rounds: number of rounds so far.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], max_length: int = 1000, burst: int = 1) -> None:
        self.max_length, self._burst = max_length, burst
        self.asked: list[tuple[list[int], Sampling]] = []
        self.rounds = 0
        self._scripts = [*map(list, scripts)]
        self._running: list[tuple[Handle, list[int]]] = []

    def submit(self, prompt: list[int], sampling: Sampling, **_: Any) -> Handle:
        handle = Handle(sampling, self.step, lambda handle: handle.finish("cancelled"))
        self.asked.append((prompt, sampling))
        self._running.append((handle, self._scripts.pop(0)))
        return handle

    def step(self, interval: int = 64) -> None:
        self.rounds += 1
        for handle, script in self._running:
            if handle.done:
                continue
            for _ in range(min(interval * self._burst, len(script))):
                handle.extend([script.pop(0)], [-1.0], [[]])
            if len(handle.tokens) == handle.sampling.max_new_tokens:
                handle.finish("length")
            elif not script:
                handle.finish("stop")
