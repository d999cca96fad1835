"""Three small tasks with verifiable answers, as text with one byte per token.

=========  ======================  ==========
task       prompt                  answer
=========  ======================  ==========
addition   ``17+25=``              ``42\\n``
reversal   ``reverse:hello=``      ``olleh\\n``
recall     ``a=7;k=2;x=5;k?``      ``2\\n``
=========  ======================  ==========

A hash assigns each prompt permanently to training or to the held-out set (:func:`is_held_out`). No batch of
:func:`training_batch` contains a prompt of :func:`held_out_prompts`.

Reads downwards: prompts of each task, the split, documents of several prompts, batches of packed documents.
"""

import dataclasses
import string
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

VOCAB_SIZE = 256  # a token is a byte
END = "\n"  # ends every answer
END_TOKEN = ord(END)

MAX_DIGITS = 2
MAX_WORD = 8
MAX_PAIRS = 90
_LETTERS = np.array(list(string.ascii_lowercase))
_LETTER_PAIRS = np.array([first + second for first in _LETTERS for second in _LETTERS])
# Minimum size in bytes of a recall document: two pairs, a question and its answer, with two-letter keys.
_MIN_ROOM = 16


class Example(NamedTuple):
    """A prompt and its only right answer, which includes the end of line."""

    prompt: str
    answer: str


def addition(rng: Generator) -> Example:
    """The sum of two numbers of one or two digits, equally often."""
    a, b = (int(rng.integers(10**digits)) for digits in rng.integers(1, MAX_DIGITS + 1, size=2))
    return Example(f"{a}+{b}=", f"{a + b}{END}")


def reversal(rng: Generator) -> Example:
    """A word of one to eight random letters, backwards."""
    word = "".join(rng.choice(_LETTERS, size=rng.integers(1, MAX_WORD + 1)))
    return Example(f"reverse:{word}=", word[::-1] + END)


def recall(rng: Generator, *, min_pairs: int = 1, max_pairs: int = MAX_PAIRS) -> Example:
    """Recall of one key's value from a list with four bytes per pair, or five with two-letter keys.

    Args:
      rng: random generator.
      min_pairs, max_pairs: bounds of the list length, which is uniform between them.

    Raises:
      ValueError: not ``1 <= min_pairs <= max_pairs <= 90``.
    """
    if not 1 <= min_pairs <= max_pairs <= MAX_PAIRS:
        raise ValueError(
            f"min_pairs, max_pairs: expected 1 <= min_pairs <= max_pairs <= {MAX_PAIRS}, got {min_pairs}, {max_pairs}"
        )
    letters = _key_letters(rng, min_pairs)
    names = _LETTERS if letters == 1 else _LETTER_PAIRS
    pairs = _pairs(rng, names, int(rng.integers(min_pairs, min(max_pairs, len(names)) + 1)))
    key = str(rng.choice(list(pairs)))
    return Example(_listed(pairs) + _question(key), pairs[key] + END)


def _key_letters(rng: Generator, min_pairs: int) -> int:
    """The number of letters per key: 1 in 30% of the lists, if one letter suffices, else 2."""
    return 1 if rng.random() < 0.3 and min_pairs <= len(_LETTERS) else 2


def _pairs(rng: Generator, names: np.ndarray, count: int) -> dict[str, str]:
    """A list of ``count`` pairs, as an ordered dict from distinct keys among ``names`` to digits."""
    keys = rng.choice(names, size=count, replace=False)
    return {str(key): str(value) for key, value in zip(keys, rng.integers(10, size=count), strict=True)}


def _listed(pairs: dict[str, str]) -> str:
    return "".join(f"{key}={value};" for key, value in pairs.items())


def _question(key: str) -> str:
    return f"{key}?"


TASKS: dict[str, Callable[..., Example]] = {"addition": addition, "reversal": reversal, "recall": recall}


def is_held_out(prompt: str) -> bool:
    """Whether a prompt of any task is excluded from training; 10% are.

    Prompts that differ only in the order of the numbers, or in the key requested from the same list, are on the same
    side. All sums of two numbers below ten are for training: too few to distinguish a rule from memorization.
    """
    if prompt.endswith("?"):
        problem = prompt.rpartition(";")[0]
    elif "+" in prompt:
        numbers = sorted(map(int, prompt.removesuffix("=").split("+")))
        if numbers[-1] < 10:
            return False
        problem = "+".join(map(str, numbers))
    else:
        problem = prompt
    return zlib.crc32(problem.encode()) % 10 == 0


def held_out_prompts(task: str, count: int, seed: int, **options: int) -> list[Example]:
    """Examples that never occur in training; may contain duplicates.

    Args:
      task: ``"addition"``, ``"reversal"`` or ``"recall"``.
      count: number of examples.
      seed: determines the examples.
      **options: of the task: ``min_pairs`` and ``max_pairs`` of :func:`recall`.

    Raises:
      ValueError: an unknown task, or a count or an option out of range.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    rng = np.random.default_rng(seed)
    return [_draw(lambda: TASKS[task](rng, **options), held_out=True) for _ in range(count)]


def _draw(sample: Callable[[], Example], *, held_out: bool) -> Example:
    """Samples until an example is on the requested side of the split."""
    while is_held_out((example := sample()).prompt) != held_out:
        pass
    return example


def encode(text: str) -> list[int]:
    """The bytes of a text as tokens."""
    return list(text.encode())


def decode(tokens: list[int]) -> str:
    """The text of tokens; invalid UTF-8 becomes U+FFFD."""
    return bytes(tokens).decode(errors="replace")


# A sequence of examples; each sees those before it.
Document = list[Example]


@dataclasses.dataclass(frozen=True)
class Mix:
    """The distribution of training documents.

    Attributes:
      addition, reversal, recall: shares of the tasks; sum to 1.
      max_pairs: maximum list length.
    """

    addition: float = 0.0
    reversal: float = 0.0
    recall: float = 0.0
    max_pairs: int = MAX_PAIRS

    def __post_init__(self):
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"addition, reversal, recall: expected shares that sum to 1, got {self.shares}")
        if not 2 <= self.max_pairs <= MAX_PAIRS:
            raise ValueError(f"max_pairs: expected 2 to {MAX_PAIRS}, got {self.max_pairs}")

    @property
    def shares(self) -> tuple[float, float, float]:
        return self.addition, self.reversal, self.recall


def training_document(rng: Generator, mix: Mix, room: int) -> Document:
    """Samples a training document. A recall document has at most ``room`` bytes, if that is at least 16."""
    kind = rng.choice(3, p=mix.shares)
    if kind == 0:
        return [_draw(lambda: addition(rng), held_out=False)]
    if kind == 1:
        return [_draw(lambda: reversal(rng), held_out=False)]
    return _recall_document(rng, mix.max_pairs, max(room, _MIN_ROOM))


def _alike(rng: Generator, count: int) -> np.ndarray:
    """Slightly more than ``count`` two-letter keys that share their letters.

    If keys came from all pairs of letters, one letter would almost identify a key, and training would stop there.
    """
    side = int(np.ceil(np.sqrt(count))) + rng.integers(2)
    first, second = (rng.choice(_LETTERS, size=side, replace=False) for _ in range(2))
    return np.array([a + b for a in first for b in second])


def _recall_document(rng: Generator, max_pairs: int, room: int) -> Document:
    """A list and many questions about it, which make the list worth its bytes in a batch.

    Samples questions with replacement; otherwise elimination would help to answer all but the first.
    """
    letters = _key_letters(rng, 1)
    size = letters + 3  # bytes of a pair, and of a question with its answer
    most = min(max_pairs, room // size - 1)

    def sample() -> Document:
        count = int(rng.integers(1, min(most, len(_LETTERS) if letters == 1 else most) + 1))
        pairs = _pairs(rng, _LETTERS if letters == 1 else _alike(rng, count), count)
        questions = min(4 + 2 * len(pairs), room // size - len(pairs))
        keys = rng.choice(list(pairs), size=questions)
        document = [Example(_question(str(key)), pairs[str(key)] + END) for key in keys]
        document[0] = document[0]._replace(prompt=_listed(pairs) + document[0].prompt)
        return document

    while is_held_out((document := sample())[0].prompt):
        pass
    return document


class Batch(NamedTuple):
    """Rows of packed documents that do not see each other.

    Attributes:
      tokens: int32 ``[B, T]``.
      positions: int32 ``[B, T]``, from 0 in each document; -1 is padding.
      segment_ids: int32 ``[B, T]``, one number per document of a row.
      is_answer: bool ``[B, T]``, True for tokens of an answer, including its end.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    is_answer: np.ndarray


def training_batch(rng: Generator, mix: Mix, *, rows: int, length: int) -> Batch:
    """Samples documents and packs them into rows.

    Args:
      rng: random generator.
      mix: distribution of the documents.
      rows: B.
      length: T, at least 32.

    Raises:
      ValueError: a size is too small.
    """
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    if length < 2 * _MIN_ROOM:
        raise ValueError(f"length: expected at least {2 * _MIN_ROOM}, got {length}")
    return Batch(*map(np.stack, zip(*(pack(_fill(rng, mix, length), length) for _ in range(rows)), strict=True)))


def _fill(rng: Generator, mix: Mix, length: int) -> list[Document]:
    """Documents for one row; stops at the first that does not fit."""
    documents: list[Document] = []
    room = length
    while room >= _MIN_ROOM:
        document = training_document(rng, mix, room)
        room -= sum(len(example.prompt) + len(example.answer) for example in document)
        if room >= 0:
            documents.append(document)
    return documents


def pack(documents: list[Document], length: int) -> Batch:
    """One row, ``[T]``: the concatenated documents, then padding.

    Raises:
      ValueError: the documents exceed ``length`` bytes.
    """
    row = Batch(
        tokens=np.zeros(length, np.int32),
        positions=np.full(length, -1, np.int32),
        segment_ids=np.zeros(length, np.int32),
        is_answer=np.zeros(length, np.bool_),
    )
    start = 0
    for segment, document in enumerate(documents):
        tokens = encode("".join(prompt + answer for prompt, answer in document))
        is_answer = np.repeat([False, True] * len(document), [len(text) for example in document for text in example])
        end = start + len(tokens)
        if end > length:
            raise ValueError(f"documents: expected at most length={length} bytes, got {end}")
        row.tokens[start:end] = tokens
        row.positions[start:end] = np.arange(len(tokens))
        row.segment_ids[start:end] = segment
        row.is_answer[start:end] = is_answer
        start = end
    return row
