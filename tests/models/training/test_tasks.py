"""The tasks: prompts have the right answers, the split leaks nothing, and packing separates documents."""

import re
import string

import numpy as np
import pytest

from pallas_attn_models.training import tasks
from pallas_attn_models.training.tasks import END, Example, Mix


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def solve(prompt: str) -> str:
    """The answer, read from the prompt alone."""
    if match := re.fullmatch(r"(\d+)\+(\d+)=", prompt):
        return f"{int(match[1]) + int(match[2])}{END}"
    if match := re.fullmatch(r"reverse:([a-z]+)=", prompt):
        return "".join(reversed(match[1])) + END
    match = re.fullmatch(r"((?:[a-z]{1,2}=\d;)+)([a-z]{1,2})\?", prompt)
    assert match, prompt
    keys_and_values = re.findall(r"([a-z]+)=(\d);", match[1])
    assert len(dict(keys_and_values)) == len(keys_and_values), "keys are distinct"
    return dict(keys_and_values)[match[2]] + END


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_right(task, seed):
    generator = rng(seed)
    for _ in range(100):
        example = tasks.TASKS[task](generator)
        assert example.answer == solve(example.prompt)


def test_the_documented_prompts_are_understood():
    assert [solve(prompt) for prompt in ("17+25=", "reverse:hello=", "a=7;k=2;x=5;k?")] == ["42\n", "olleh\n", "2\n"]


def test_sizes_of_prompts():
    generator = rng()
    additions = [tasks.addition(generator).prompt for _ in range(300)]
    assert {len(prompt) for prompt in additions} == {4, 5, 6}
    reversals = [tasks.reversal(generator).prompt for _ in range(300)]
    assert {len(prompt) for prompt in reversals} == set(range(10, 18))
    long = [tasks.recall(generator, min_pairs=60).prompt for _ in range(100)]
    assert min(map(len, long)) >= 300
    assert max(map(len, long)) <= 5 * tasks.MAX_PAIRS + 3
    short = [tasks.recall(generator, max_pairs=5).prompt for _ in range(300)]
    assert {len(prompt.rpartition(";")[2]) for prompt in short} == {2, 3}, "keys of one and of two letters"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_prompts(task):
    examples = tasks.held_out_prompts(task, 50, seed=3)
    assert examples == tasks.held_out_prompts(task, 50, seed=3)
    assert examples != tasks.held_out_prompts(task, 50, seed=4)
    assert len(examples) == 50
    assert all(tasks.is_held_out(example.prompt) for example in examples)


def test_one_in_ten_is_held_out():
    generator = rng()
    words = ("".join(generator.choice(list(string.ascii_lowercase), 8)) for _ in range(5000))
    share = np.mean([tasks.is_held_out(f"reverse:{word}=") for word in words])
    assert 0.08 < share < 0.12


def test_prompts_of_one_problem_are_on_the_same_side():
    for a in range(0, 100, 7):
        for b in range(0, 100, 5):
            assert tasks.is_held_out(f"{a}+{b}=") == tasks.is_held_out(f"{b}+{a}=")
    pairs = "".join(f"{key}=1;" for key in "abcdefgh")
    assert len({tasks.is_held_out(f"{pairs}{key}?") for key in "abcdefgh"}) == 1


def test_sums_of_one_digit_are_for_training():
    assert not any(tasks.is_held_out(f"{a}+{b}=") for a in range(10) for b in range(10))
    assert any(tasks.is_held_out(f"{a}+{b}=") for a in range(10) for b in range(10, 20))


@pytest.mark.parametrize("name", ["addition", "reversal", "recall"])
@pytest.mark.parametrize("room", [16, 64, 500])
def test_training_documents(name, room):
    generator = rng(room)
    mix = Mix(**{name: 1.0})
    for _ in range(50):
        document = tasks.training_document(generator, mix, room)
        assert not tasks.is_held_out(document[0].prompt)
        if name == "recall":
            assert sum(len(prompt) + len(answer) for prompt, answer in document) <= room
            listed = document[0].prompt.rpartition(";")[0] + ";"
            questions = [document[0].prompt.rpartition(";")[2], *(example.prompt for example in document[1:])]
            for question, (_, answer) in zip(questions, document, strict=True):
                assert solve(listed + question) == answer
                assert not tasks.is_held_out(listed + question)
        else:
            assert document == [Example(document[0].prompt, solve(document[0].prompt))]


def test_one_letter_of_a_key_is_not_enough_in_training():
    generator = rng()
    shared = []
    for _ in range(200):
        prompt = tasks.training_document(generator, Mix(recall=1.0, max_pairs=20), 128)[0].prompt
        keys = re.findall(r"([a-z]{2})=", prompt)
        if len(keys) >= 6:
            shared += [sum(key[letter] == other[letter] for other in keys) > 1 for key in keys for letter in (0, 1)]
    assert np.mean(shared) > 0.8


def test_pack():
    documents = [[Example("1+2=", "3\n")], [Example("a=7;a?", "7\n"), Example("a?", "7\n")]]
    row = tasks.pack(documents, 20)
    assert tasks.decode(row.tokens[:16].tolist()) == "1+2=3\na=7;a?7\na?7\n"[:16]
    assert row.positions.tolist() == [*range(6), *range(12), -1, -1]
    assert row.segment_ids.tolist()[:18] == [0] * 6 + [1] * 12
    answers = tasks.decode(row.tokens[row.is_answer].tolist())
    assert answers == "3\n7\n7\n"
    assert [array.dtype.name for array in row] == ["int32", "int32", "int32", "bool"]
    with pytest.raises(ValueError, match="documents: expected at most length=17 bytes, got 18"):
        tasks.pack(documents, 17)


def test_training_batch():
    mix = Mix(addition=0.3, reversal=0.3, recall=0.4)
    batch = tasks.training_batch(rng(), mix, rows=4, length=128)
    again = tasks.training_batch(rng(), mix, rows=4, length=128)
    assert all(array.shape == (4, 128) for array in batch)
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))
    assert np.mean(batch.positions < 0) < 0.3, "rows are mostly full"
    assert not batch.is_answer[batch.positions < 0].any()
    # A position that does not continue the previous one starts a new document.
    new = np.diff(batch.positions) != 1
    real = batch.positions[:, 1:] >= 0
    assert np.array_equal((np.diff(batch.segment_ids) != 0) & real, new & real)


def test_tokens_are_bytes():
    assert tasks.encode("a=7;é") == [97, 61, 55, 59, 0xC3, 0xA9]
    assert tasks.decode(tasks.encode("a=7;é")) == "a=7;é"
    assert tasks.encode(END) == [tasks.END_TOKEN]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.held_out_prompts("sorting", 1, 0), "task: expected one of addition, reversal, recall"),
        (lambda: tasks.held_out_prompts("recall", 0, 0), "count: expected at least 1, got 0"),
        (lambda: tasks.held_out_prompts("recall", 1, 0, max_pairs=91), "min_pairs, max_pairs: expected .* got 1, 91"),
        (lambda: tasks.recall(rng(), min_pairs=5, max_pairs=4), "min_pairs, max_pairs: expected .* got 5, 4"),
        (lambda: Mix(addition=0.5), "addition, reversal, recall: expected shares that sum to 1"),
        (lambda: Mix(addition=1.5, recall=-0.5), "addition, reversal, recall: expected shares that sum to 1"),
        (lambda: Mix(recall=1.0, max_pairs=1), "max_pairs: expected 2 to 90, got 1"),
        (lambda: tasks.training_batch(rng(), Mix(recall=1.0), rows=0, length=64), "rows: expected at least 1, got 0"),
        (lambda: tasks.training_batch(rng(), Mix(recall=1.0), rows=1, length=8), "length: expected at least 32, got 8"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
