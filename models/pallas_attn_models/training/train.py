"""Trains the small checkpoint that ships with the package: ``python -m pallas_attn_models.train --out DIR``.

Three choices make training feasible on two CPU cores. Documents are packed, and ``pa.attention``, forward and backward,
skips the blocks between different documents (``python -m bench.training`` measures it). The heads of the first layer
start as a short convolution, each attending a fixed number of tokens back: the pattern that takes longest to form when
recall is learned (Olsson et al. 2022, arXiv:2209.11895; Arora et al. 2023, arXiv:2312.04927). Muon trains the matrices
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Lists grow from a few pairs to the longest
(:data:`PHASES`).

The seed determines all randomness, and the number of steps does not depend on the machine's speed.

Reads downwards: model, curriculum, one step, training, evaluation, tokenizer, command line.
"""

import argparse
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import pallas_attn as pa
from pallas_attn_models.checkpoints import save_hf, writable_directory
from pallas_attn_models.decoder import MLP, Decoder, DecoderConfig, RopeConfig
from pallas_attn_models.generation import Generator, Sampling
from pallas_attn_models.training.tasks import (
    END,
    END_TOKEN,
    MAX_PAIRS,
    MAX_WORD,
    VOCAB_SIZE,
    Batch,
    Example,
    Mix,
    decode,
    encode,
    held_out_prompts,
    training_batch,
)

CONFIG = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    intermediate_size=384,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    # Slow enough that half of a head's features barely rotate within a prompt; these match keys.
    rope=RopeConfig(theta=1e6),
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    eos_token_ids=(END_TOKEN,),
)

# Initialization of the first layer: number of rotary frequencies that carry it, its strength, and the remaining noise.
FAST_FREQUENCIES = 8
LOOK_BACK_SIZE = 7.0
LOOK_BACK_NOISE = 0.3

# Most documents are shorter than the default blocks, which suit long ones.
CPU_BLOCK_SIZES = pa.BlockSizes(64, 32)

MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 0.002
WARMUP_STEPS = 100
LOG_EVERY = 50
EVALUATION_SEED = 1
EVALUATION_ROWS = 25
EVALUATION_CAPACITY = 512
PROMPTS = 100  # of each task
QUICK_STEPS, QUICK_PROMPTS = 8, 4
TOKENIZER = "tokenizer.json"


def new_model(seed: int, implementation: str | None = None) -> Decoder:
    """A decoder whose first layer attends to the last few tokens, and whose other layers start as the identity.

    Args:
      seed: determines the weights.
      implementation: of ``pa.attention``; default: the best available.
    """
    rngs = nnx.Rngs(seed)
    block_sizes = CPU_BLOCK_SIZES if jax.default_backend() == "cpu" else None
    model = Decoder(CONFIG, rngs=rngs, implementation=implementation, block_sizes=block_sizes)

    def draw(param: nnx.Param, scale: float) -> None:
        param.set_value(nnx.initializers.normal(scale)(rngs.params(), param.shape, param.dtype))

    unit = CONFIG.hidden_size**-0.5
    draw(model.embedding.table, unit)
    for index, layer in enumerate(model.layers):
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(mlp, MLP)
        assert mlp.gate is not None
        for linear in (attention.query, attention.key, attention.value, mlp.gate, mlp.up):
            draw(linear.kernel, unit)
        draw(attention.output.kernel, unit if index == 0 else 0.0)
        draw(mlp.down.kernel, 0.0)
    _look_back(model)
    return model


def _look_back(model: Decoder) -> None:
    """Initializes head h of the first layer to attend to the token h + 1 positions back, whatever the tokens.

    Every embedding gets the same first feature, which contributes constant vectors to queries and keys. Their product
    after rotation (RoFormer, arXiv:2104.09864, eq. 16) is a sum of ``cos(frequency * (distance - offset))``, maximal
    at distance = offset. Only the fast frequencies distinguish neighbors; the others stay random.
    """
    table = model.embedding.table
    table.set_value(table.get_value().at[:, 0].set(1.0))
    feature = (
        CONFIG.hidden_size**0.5 / 2**0.5
    )  # its size after the norm, because the other features together have norm 1
    half = CONFIG.head_dim // 2
    assert CONFIG.rope is not None
    frequencies = CONFIG.rope.theta ** (-np.arange(FAST_FREQUENCIES) / half)
    fast = np.concatenate([np.arange(FAST_FREQUENCIES), half + np.arange(FAST_FREQUENCIES)])

    def constant(linear: nnx.Linear, heads: int, angles: np.ndarray) -> None:
        kernel = np.array(linear.kernel.get_value()).reshape(CONFIG.hidden_size, heads, CONFIG.head_dim)
        kernel *= LOOK_BACK_NOISE
        kernel[0][:, fast] = LOOK_BACK_SIZE / feature * np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
        linear.kernel.set_value(jnp.asarray(kernel.reshape(CONFIG.hidden_size, -1), linear.kernel.dtype))

    attention = model.layers[0].attention
    offsets = 1 + np.arange(CONFIG.num_heads)[:, None]
    constant(attention.query, CONFIG.num_heads, -offsets * frequencies)
    constant(attention.key, CONFIG.num_kv_heads, np.zeros((CONFIG.num_kv_heads, FAST_FREQUENCIES)))


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of the curriculum.

    Attributes:
      steps: number of batches.
      rows, length: the size of a batch.
      mix: distribution of the documents at the end of the phase.
      first_pairs: ``max_pairs`` at the start of the phase; it grows linearly to ``mix.max_pairs``.
    """

    steps: int
    rows: int
    length: int
    mix: Mix
    first_pairs: int

    def mix_at(self, step: int) -> Mix:
        """The mix at one step of the phase."""
        growth = (self.mix.max_pairs - self.first_pairs) * step // self.steps
        return dataclasses.replace(self.mix, max_pairs=self.first_pairs + growth)


PHASES = (
    Phase(300, 16, 128, Mix(recall=1.0, max_pairs=12), first_pairs=4),
    Phase(1300, 16, 256, Mix(addition=0.45, reversal=0.4, recall=0.15, max_pairs=45), first_pairs=12),
    Phase(700, 8, 512, Mix(addition=0.45, reversal=0.4, recall=0.15, max_pairs=MAX_PAIRS), first_pairs=45),
)


def scaled(phases: Sequence[Phase], steps: int) -> tuple[Phase, ...]:
    """The same curriculum, scaled to ``steps`` steps in total.

    Raises:
      ValueError: fewer steps than phases.
    """
    if steps < len(phases):
        raise ValueError(f"steps: expected at least one for each of {len(phases)} phases, got {steps}")
    total = sum(phase.steps for phase in phases)
    ends = [round(sum(phase.steps for phase in phases[: n + 1]) * steps / total) for n in range(len(phases))]
    lengths = np.maximum(np.diff(ends, prepend=0), 1)
    lengths[np.argmax(lengths)] += steps - lengths.sum()
    return tuple(dataclasses.replace(phase, steps=int(n)) for phase, n in zip(phases, lengths, strict=True))


def batches(phases: Sequence[Phase], seed: int) -> Iterator[Batch]:
    """The batches of all phases. Each has its own random stream, so none depends on earlier ones."""
    index = 0
    for phase in phases:
        for step in range(phase.steps):
            rng = np.random.default_rng([seed, index])
            yield training_batch(rng, phase.mix_at(step), rows=phase.rows, length=phase.length)
            index += 1


def optimizer(steps: int) -> optax.GradientTransformation:
    """Muon for the linear maps, AdamW for the embedding and the norms."""

    def schedule(peak: float) -> optax.Schedule:
        warmup = min(WARMUP_STEPS, steps // 2)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end_value=0.02 * peak)

    transforms: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.contrib.muon(schedule(MUON_LEARNING_RATE), weight_decay=0.01),
        "adam": optax.adamw(schedule(ADAM_LEARNING_RATE), b2=0.98, weight_decay=0.0),
    }

    def labels(params: nnx.State) -> nnx.State:
        return nnx.map_state(lambda path, _: "muon" if path[-1] == "kernel" else "adam", params)

    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(transforms, labels))


def loss_and_accuracy(model: Decoder, batch: Batch) -> tuple[Array, Array]:
    """Mean cross-entropy in nats and accuracy, over the tokens of answers; random prompts cannot be predicted."""
    hidden = model(batch.tokens, batch.positions, segment_ids=batch.segment_ids, apply_head=False).hidden
    logits = model.logits(hidden)[:, :-1]
    targets, is_answer = batch.tokens[:, 1:], batch.is_answer[:, 1:].astype(jnp.float32)
    weights = is_answer / is_answer.sum()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * weights), jnp.sum((jax.lax.argmax(logits, 2, jnp.int32) == targets) * weights)


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer, batch: Batch) -> tuple[Array, Array]:
    """Updates model and optimizer in place; returns the batch's loss and accuracy before the update."""
    (loss, accuracy), gradients = nnx.value_and_grad(loss_and_accuracy, has_aux=True)(model, batch)
    optimizer.update(model, gradients)
    return loss, accuracy


def train(phases: Sequence[Phase], seed: int, console: Console) -> Decoder:
    """Trains a new model, with progress on the console."""
    steps = sum(phase.steps for phase in phases)
    model = new_model(seed)
    state = nnx.Optimizer(model, optimizer(steps), wrt=nnx.Param)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=steps, loss=float("nan"), accuracy=float("nan"))
        for step, batch in enumerate(batches(phases, seed), start=1):
            loss, accuracy = map(float, train_step(model, state, batch))
            progress.update(bar, advance=1, loss=loss, accuracy=accuracy)
            if not console.is_terminal and step % LOG_EVERY == 0:  # a log file cannot show the progress bar
                console.print(f"step {step}/{steps}  loss {loss:.3f}  accuracy {accuracy:.3f}")
    return model


def exact_answers(generator: Generator, examples: Sequence[Example]) -> float:
    """The share of examples answered exactly under greedy decoding."""
    right = 0
    sampling = Sampling(max_new_tokens=MAX_WORD + len(END))
    for start in range(0, len(examples), generator.batch_size):
        chunk = examples[start : start + generator.batch_size]
        result = generator.generate([encode(example.prompt) for example in chunk], sampling)
        for example, tokens, reason in zip(chunk, result.tokens, result.finish_reasons, strict=True):
            right += reason == "stop" and decode(tokens) + END == example.answer
    return right / len(examples)


def evaluate(model: Decoder, count: int) -> Table:
    """Exact-answer rates on ``count`` held-out prompts per task, and on as many with lists of at least 300 bytes."""
    generator = Generator(model, batch_size=EVALUATION_ROWS, capacity=EVALUATION_CAPACITY)
    table = Table("task", "bytes", "prompts", "exact", title="Held-out prompts, greedy decoding")
    rows = {
        "addition": held_out_prompts("addition", count, EVALUATION_SEED),
        "reversal": held_out_prompts("reversal", count, EVALUATION_SEED),
        "recall": held_out_prompts("recall", count, EVALUATION_SEED),
        "recall, long lists": held_out_prompts("recall", count, EVALUATION_SEED, min_pairs=60),
    }
    for name, examples in rows.items():
        sizes = [len(example.prompt) for example in examples]
        exact = exact_answers(generator, examples)
        table.add_row(name, f"{min(sizes)}-{max(sizes)}", str(len(examples)), f"{exact:.1%}")
    return table


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with the 256 bytes as tokens; the id of a token is the byte's value."""
    # A visible character represents each byte: the byte's own, or else one beyond the first 256.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = {ord(char): char for char in alphabet if ord(char) < 256}
    replacements = iter(char for char in alphabet if ord(char) >= 256)
    vocabulary = {visible.get(byte) or next(replacements): byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _between(low: int, high: int) -> Callable[[str], int]:
    """An ``argparse`` type for an int in this range."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {value}")
        return value

    parse.__name__ = "int"
    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, saves and evaluates the checkpoint; see ``--help``. Checks first that ``--out`` is writable."""
    total = sum(phase.steps for phase in PHASES)
    parser = argparse.ArgumentParser(
        prog="python -m pallas_attn_models.train",
        description="Train the small checkpoint that ships with the package.",
    )
    parser.add_argument("--out", required=True, help="directory for the checkpoint")
    parser.add_argument("--seed", type=_between(0, 2**32 - 1), default=0, help="determines all randomness (default: 0)")
    length = parser.add_mutually_exclusive_group()
    steps = _between(len(PHASES), 2**31 - 1)
    length.add_argument("--steps", type=steps, default=total, help=f"length of the curriculum (default: {total})")
    quick = f"{QUICK_STEPS} steps and {QUICK_PROMPTS} prompts, for a smoke test"
    length.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    try:
        out = writable_directory("--out", options.out, TOKENIZER)  # fail now, not after hours
    except (ValueError, OSError) as error:
        parser.error(str(error))

    console = Console()
    phases = scaled(PHASES, QUICK_STEPS if options.quick else options.steps)
    model = train(phases, options.seed, console)
    save_hf(model, out)
    unfinished = out / f".{TOKENIZER}"
    byte_tokenizer().save(str(unfinished))
    unfinished.replace(out / TOKENIZER)
    console.print(evaluate(model, QUICK_PROMPTS if options.quick else PROMPTS))
