"""The executables of a Generator, and the device state that they pass on."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from pallas_attn_models.decoder import Decoder, LayerCaches
from pallas_attn_models.generation import steps
from pallas_attn_models.generation.sampling import Limits, Sampling, SamplingArrays
from pallas_attn_models.generation.speculation import Speculation
from pallas_attn_models.generation.state import Counters, DecodeOutput, PrefillBatch, Request, State, empty_row_state
from pallas_attn_models.generation.stats import UsageStats

# What a CUDA graph of XLA may contain: all that it contains by default, and loops.
_GRAPH_LOOPS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}


class Engine:
    """Runs prefill, decode and score on the device. The scheduler owns the request queue.

    Args:
      model: the decoder; :meth:`refresh_weights` reads its weights.
      speculation: drafts tokens for decode, or None; a draft model prefills the same prompts as the model.
      new_caches: creates the empty caches; those of the draft model follow the model's.
      batch_size, max_length: rows, and tokens per row.
      chunk, chunk_rows: a prefill call processes ``chunk`` tokens of ``chunk_rows`` rows.
      limits: see :class:`~pallas_attn_models.generation.Limits`.
      layer_hook: see :class:`~pallas_attn_models.decoder.Decoder`.
      graph_loops: on a GPU, whether CUDA graphs may contain loops; then all steps of a decode call are one graph.

    Attributes:
      usage: totals so far, without compile time.
    """

    def __init__(
        self,
        model: Decoder,
        speculation: Speculation | None,
        new_caches: Callable[[], LayerCaches],
        *,
        batch_size: int,
        max_length: int,
        chunk: int,
        chunk_rows: int,
        limits: Limits,
        layer_hook: Callable[[int, Array], Array] | None,
        graph_loops: bool,
    ) -> None:
        self.model = model
        self.batch_size, self.max_length = batch_size, max_length
        self.chunk, self.chunk_rows = chunk, chunk_rows
        self.limits = limits
        self.usage = UsageStats()
        self._counted: dict[str, int] = dict.fromkeys(Counters.NAMES, 0)
        self._new_caches = new_caches
        self._state: State | None = None
        self._models = [_Weights(model)]
        specs = [steps.ModelSpec(self._models[0].bind, slice(0, model.config.num_layers), layer_hook)]
        if speculation is not None and speculation.draft_model is not None:
            self._models.append(_Weights(speculation.draft_model))
            specs.append(steps.ModelSpec(self._models[1].bind, slice(model.config.num_layers, None)))
        self._template = self._new_batch()
        # Donating the state updates it in place, so that memory never holds two copies.
        jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=_GRAPH_LOOPS if graph_loops else None)
        self._prefill = jit(functools.partial(steps.prefill, specs))
        self._decode = jit(functools.partial(steps.decode, specs, speculation))
        self._score = jit(functools.partial(steps.score, specs))

    @property
    def compile_counts(self) -> dict[str, int]:
        """Executables compiled per function; ``score`` appears once it is used."""
        functions = {"prefill": self._prefill, "decode": self._decode, "score": self._score}
        counts = {name: _num_executables(function) for name, function in functions.items()}
        return {name: count for name, count in counts.items() if count or name != "score"}

    def compile(self, progress: Callable[[str], None] | None = None) -> float:
        """Compiles prefill and decode unless they are compiled already; returns the seconds spent."""
        if all(self.compile_counts.values()):
            return 0.0
        usage, start = self.usage, time.perf_counter()
        calls = (("prefill", lambda: self.prefill(self.empty_batch())), ("decode", lambda: self.decode(0, False)))
        for name, run in calls:
            if progress is not None:
                progress(name)
            run()  # an empty batch compiles and computes nothing
        self.usage = usage
        return time.perf_counter() - start

    def refresh_weights(self) -> None:
        """Reads the model's current weights, for all later calls.

        Raises:
          ValueError: the structure of the model's variables has changed.
        """
        for weights in self._models:
            weights.refresh()

    def empty_batch(self) -> PrefillBatch:
        """A writable batch without work, for the caller to fill in."""
        return jax.tree.map(np.copy, self._template)

    def _new_batch(self) -> PrefillBatch:
        rows, chunk_rows = self.batch_size, self.chunk_rows
        own = np.arange(rows, dtype=np.int32)
        return PrefillBatch(
            released=np.zeros(rows, np.bool_),
            admitted=np.zeros(rows, np.bool_),
            request=Request(
                prompt_length=np.zeros(rows, np.int32),
                leader=own,
                partner=own.copy(),
                guidance=np.ones(rows, np.float32),
                sampling=self.stack([Sampling()] * rows),
            ),
            rows=np.full(chunk_rows, rows, np.int32),
            tokens=np.zeros((chunk_rows, self.chunk), np.int32),
            count=np.zeros(chunk_rows, np.int32),
            next_token=np.full(chunk_rows, -1, np.int32),
            sources=np.zeros(rows, np.int32),
            targets=np.zeros(rows, np.int32),
            num_copies=np.zeros((), np.int32),
            started=np.zeros(rows, np.bool_),
        )

    def stack(self, samplings: list[Sampling]) -> SamplingArrays:
        """The settings as arrays; raises ValueError if they exceed the vocabulary or the limits."""
        config = self.model.config
        return SamplingArrays.stack(
            samplings, limits=self.limits, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids
        )

    def prefill(self, batch: PrefillBatch) -> None:
        """Runs the batch and waits for the result."""
        start = time.perf_counter()
        state = self._prefill(self._weights(), self._take_state(), batch)
        jax.block_until_ready(state.rows.status)
        self._state = state
        self._add_usage(prefill_seconds=time.perf_counter() - start)

    def score(self, batch: PrefillBatch) -> tuple[Array, np.ndarray]:
        """Runs the batch; returns logits ``[R, C, V]``, on the device, and log-probabilities ``[R, C]``."""
        if not _num_executables(self._score):
            self._state, *_ = self._score(self._weights(), self._take_state(), self.empty_batch())  # compiles it
        start = time.perf_counter()
        self._state, logits, logprobs = self._score(self._weights(), self._take_state(), batch)
        logprobs = np.asarray(logprobs)
        self._add_usage(prefill_seconds=time.perf_counter() - start)
        return logits, logprobs

    def decode(self, num_steps: int, eager: bool) -> DecodeOutput:
        """See :func:`~pallas_attn_models.generation.steps.decode`; the output holds NumPy arrays."""
        start = time.perf_counter()
        state, output = self._decode(self._weights(), self._take_state(), np.int32(num_steps), np.bool_(eager))
        output = jax.device_get(output)
        self._state = state
        self._add_usage(decode_seconds=time.perf_counter() - start, **self._new_counts(np.asarray(output.counters)))
        return output

    def reset(self) -> None:
        """Drops the state; the next call starts with all rows free."""
        self._state = None

    def abstract_state(self) -> State:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self._new_state)

    def _take_state(self) -> State:
        """Hands the state to a call, which stores the new one at its end; an interrupted call loses it."""
        state, self._state = self._state, None
        if state is None:
            # Commit the arrays to the weights' device, as the outputs of a call are; otherwise jit would recompile.
            state = jax.device_put(self._new_state(), self.model.embedding.table.sharding)
            self._counted = dict.fromkeys(self._counted, 0)
        return state

    def _new_state(self) -> State:
        request = self.empty_batch().request
        rows = empty_row_state(request, self.max_length, self.model.config.vocab_size)
        return State(self._new_caches(), rows, Counters.zero())

    def _new_counts(self, digits: np.ndarray) -> dict[str, int]:
        """Increments of the counters since the previous call."""
        before, self._counted = self._counted, Counters.values(digits)
        return {name: number - before[name] for name, number in self._counted.items()}

    def _add_usage(self, **more: float) -> None:
        self.usage = self.usage._replace(**{name: getattr(self.usage, name) + number for name, number in more.items()})

    def _weights(self) -> list[list[Array]]:
        return [weights.leaves for weights in self._models]


class _Weights:
    """A model's weights as a flat list: flattening a tree of variables at each call would take longer than the call."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._graph = nnx.graphdef(model)
        self.leaves, self._structure = jax.tree.flatten(nnx.state(model))

    def refresh(self) -> None:
        """Reads the model's current weights."""
        leaves, structure = jax.tree.flatten(nnx.state(self._model))
        if structure != self._structure:
            raise ValueError("model: expected the variables it had when the Generator was created, got different ones")
        self.leaves = leaves

    def bind(self, leaves: list[Array]) -> Decoder:
        """The model with these weights."""
        return nnx.merge(self._graph, self._structure.unflatten(leaves))


def _num_executables(jitted: Any) -> int:
    return jitted._cache_size()
