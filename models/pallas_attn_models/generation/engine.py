"""The executables of a Generator, and the state that each hands on to the next."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

import pallas_attn as pa
from pallas_attn_models.decoder import Decoder
from pallas_attn_models.generation import steps
from pallas_attn_models.generation.rows import Report, Request, State, Tally, Work, empty_rows
from pallas_attn_models.generation.sampling import Limits, Sampling, SamplingArrays
from pallas_attn_models.generation.speculation import Speculation
from pallas_attn_models.generation.stats import Spent


class Engine:
    """Runs prefill, decode and score on the device; knows nothing of requests that wait.

    Args:
      model: the decoder. Its weights are those of the last :meth:`take_weights`.
      speculation: how decode drafts tokens, or None; a draft model is read and run together with the model.
      new_caches: makes the empty caches, one per layer, those of the draft model after the model's own.
      batch_size, max_length: rows, and tokens that each can have.
      chunk, chunk_rows: a call of prefill reads so many tokens of so many rows.
      limits: see :class:`~pallas_attn_models.generation.Limits`.
      layer_hook: see :class:`~pallas_attn_models.decoder.Decoder`.

    Attributes:
      spent: so far, without what compiling took.
    """

    def __init__(
        self,
        model: Decoder,
        speculation: Speculation | None,
        new_caches: Callable[[], tuple[pa.caches.KVCache, ...]],
        *,
        batch_size: int,
        max_length: int,
        chunk: int,
        chunk_rows: int,
        limits: Limits,
        layer_hook: Callable[[int, Array], Array] | None,
    ) -> None:
        self.model = model
        self.batch_size, self.max_length = batch_size, max_length
        self.chunk, self.chunk_rows = chunk, chunk_rows
        self.limits = limits
        self.spent = Spent()
        self._counted = dict.fromkeys((field.name for field in dataclasses.fields(Tally)), 0)
        self._new_caches = new_caches
        self._state: State | None = None
        self._models = [_Weights(model)]
        networks = [steps.Network(self._models[0].bind, slice(0, model.config.num_layers), layer_hook)]
        if speculation is not None and speculation.draft_model is not None:
            self._models.append(_Weights(speculation.draft_model))
            networks.append(steps.Network(self._models[1].bind, slice(model.config.num_layers, None)))
        self._nothing = self._no_work()
        # The state is donated: updated in place, and never held twice.
        self._prefill = jax.jit(functools.partial(steps.prefill, networks), donate_argnums=1)
        self._decode = jax.jit(functools.partial(steps.decode, networks, speculation), donate_argnums=1)
        self._score = jax.jit(functools.partial(steps.score, networks), donate_argnums=1)

    @property
    def compile_counts(self) -> dict[str, int]:
        """How many executables each function has; score only where it was used."""
        functions = {"prefill": self._prefill, "decode": self._decode, "score": self._score}
        counts = {name: _num_executables(function) for name, function in functions.items()}
        return {name: count for name, count in counts.items() if count or name != "score"}

    def compile(self, progress: Callable[[str], None] | None = None) -> float:
        """Compiles prefill and decode, unless that is done, and returns the seconds it took."""
        if all(self.compile_counts.values()):
            return 0.0
        spent, start = self.spent, time.perf_counter()
        for name, run in (("prefill", lambda: self.prefill(self.no_work())), ("decode", lambda: self.decode(0, False))):
            if progress is not None:
                progress(name)
            run()  # nothing is asked for: nothing is computed
        self.spent = spent
        return time.perf_counter() - start

    def take_weights(self) -> None:
        """From now on, the weights that the model has now.

        Raises:
          ValueError: the model has other variables than it had.
        """
        for one in self._models:
            one.take()

    def no_work(self) -> Work:
        """Arrays of the right shapes, to be filled in."""
        return jax.tree.map(np.copy, self._nothing)

    def _no_work(self) -> Work:
        rows, chunk_rows = self.batch_size, self.chunk_rows
        nobody = np.arange(rows, dtype=np.int32)
        return Work(
            released=np.zeros(rows, np.bool_),
            admitted=np.zeros(rows, np.bool_),
            request=Request(
                prompt_length=np.zeros(rows, np.int32),
                leader=nobody,
                partner=nobody.copy(),
                guidance=np.ones(rows, np.float32),
                sampling=self.stack([Sampling()] * rows),
            ),
            rows=np.full(chunk_rows, rows, np.int32),
            tokens=np.zeros((chunk_rows, self.chunk), np.int32),
            count=np.zeros(chunk_rows, np.int32),
            following=np.full(chunk_rows, -1, np.int32),
            sources=np.zeros(rows, np.int32),
            targets=np.zeros(rows, np.int32),
            num_copies=np.zeros((), np.int32),
            started=np.zeros(rows, np.bool_),
        )

    def stack(self, samplings: list[Sampling]) -> SamplingArrays:
        """The settings as arrays; raises a ValueError for what the vocabulary or the limits do not hold."""
        config = self.model.config
        return SamplingArrays.stack(
            samplings, limits=self.limits, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids
        )

    def prefill(self, work: Work) -> None:
        """Does ``work``, and waits for it."""
        start = time.perf_counter()
        state = self._prefill(self._weights(), self._take_state(), work)
        jax.block_until_ready(state.rows.status)
        self._state = state
        self._spend(prefill_seconds=time.perf_counter() - start)

    def score(self, work: Work) -> tuple[Array, np.ndarray]:
        """Does ``work``; logits ``[R, C, V]``, on the device, and log-probabilities ``[R, C]`` of the tokens."""
        if not _num_executables(self._score):
            self._state, *_ = self._score(self._weights(), self._take_state(), self.no_work())  # compiles it
        start = time.perf_counter()
        self._state, logits, logprobs = self._score(self._weights(), self._take_state(), work)
        logprobs = np.asarray(logprobs)
        self._spend(prefill_seconds=time.perf_counter() - start)
        return logits, logprobs

    def decode(self, num_steps: int, eager: bool) -> Report:
        """See :func:`~pallas_attn_models.generation.steps.decode`; the report holds NumPy arrays."""
        start = time.perf_counter()
        state, report = self._decode(self._weights(), self._take_state(), np.int32(num_steps), np.bool_(eager))
        report = jax.device_get(report)
        self._state = state
        self._spend(decode_seconds=time.perf_counter() - start, **self._new_counts(np.asarray(report.tally)))
        return report

    def forget(self) -> None:
        """Begins anew, with all rows free."""
        self._state = None

    def abstract_state(self) -> State:
        """The shapes of the state."""
        return jax.eval_shape(self._new_state)

    def _take_state(self) -> State:
        """Hands the state to a call, which gives it back when it ends; one that was broken off has lost it."""
        state, self._state = self._state, None
        if state is None:
            # Bound to the weights' device, as what a call gives back is: if only some were, jit would recompile.
            state = jax.device_put(self._new_state(), self.model.embedding.table.sharding)
            self._counted = dict.fromkeys(self._counted, 0)
        return state

    def _new_state(self) -> State:
        request = self.no_work().request
        rows = empty_rows(request, self.max_length, self.model.config.vocab_size)
        return State(self._new_caches(), rows, Tally.zero())

    def _new_counts(self, digits: np.ndarray) -> dict[str, int]:
        """What the state has counted since this was asked last."""
        before, self._counted = self._counted, Tally.values(digits)
        return {name: number - before[name] for name, number in self._counted.items()}

    def _spend(self, **more: float) -> None:
        self.spent = self.spent._replace(**{name: getattr(self.spent, name) + number for name, number in more.items()})

    def _weights(self) -> list[list[Array]]:
        return [one.leaves for one in self._models]


class _Weights:
    """The weights of a model as a flat list: a tree of variables costs more Python at each call than the call does."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._graph = nnx.graphdef(model)
        self.leaves, self._structure = jax.tree.flatten(nnx.state(model))

    def take(self) -> None:
        """Those that the model has now."""
        leaves, structure = jax.tree.flatten(nnx.state(self._model))
        if structure != self._structure:
            raise ValueError("model: expected the variables that it had when its Generator was made, got others")
        self.leaves = leaves

    def bind(self, leaves: list[Array]) -> Decoder:
        """The model with these weights."""
        return nnx.merge(self._graph, self._structure.unflatten(leaves))


def _num_executables(jitted: Any) -> int:
    return jitted._cache_size()
