"""Calls of attention in every form that the kernels serve, checked against the oracle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_attn as pa
from pallas_attn.quantized import Kind
from tests import gradient_check, oracle, tolerances
from tests.gradient_check import assert_outputs


@dataclasses.dataclass(frozen=True)
class Case(gradient_check.Case):
    """A call that may also read quantized keys and values, and pages, and return key weights.

    Attributes:
      key_kind, value_kind: None: plain.
      group: columns per scale, for int4.
      page_table: ``[B, S // page]``; entries that are no page of the pool stand for empty slots.
      page: keys per page.
      gradients: whether gradients are checked too, for plain keys and values without pages.
      key_weights: whether they are returned; not with gradients.
      chunk, shares: of the block sizes.
    """

    key_kind: Kind | None = None
    value_kind: Kind | None = None
    group: int = 8
    page_table: np.ndarray | None = None
    page: int = 16
    gradients: bool = False
    key_weights: bool = False
    chunk: int | None = None
    shares: int = 128

    @property
    def num_pages(self) -> int:
        """Of the pool, where two pages belong to nobody."""
        return self.batch * self.kv_len // self.page + 2

    @property
    def geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of queries and of keys; keys in pages that do not exist are missing."""
        q_positions, kv_positions = super().geometry
        if self.page_table is None:
            return q_positions, kv_positions
        exists = (self.page_table >= 0) & (self.page_table < self.num_pages)
        exists = np.repeat(exists, self.page, 1)
        return q_positions, np.where(exists if kv_positions.ndim == 2 else exists[:, None], kv_positions, -1)

    @property
    def block_options(self) -> pa.BlockSizes | None:
        return self.block_sizes and pa.BlockSizes(*self.block_sizes, chunk=self.chunk, shares=self.shares)

    def pool(self, x: np.ndarray) -> np.ndarray:
        """Keys ``[B, S, K, D]`` in pages ``[P, page, K, D]``, which are NaN where no row has a key."""
        pages = np.full((self.num_pages, self.page, *x.shape[2:]), np.nan, x.dtype)
        for b, row in enumerate(self.page_table):
            for i, page in enumerate(row):
                if 0 <= page < self.num_pages:
                    of_row = x[b, i * self.page : (i + 1) * self.page]
                    # Rows may share a page, and each of them has holes of its own.
                    pages[page] = np.where(np.isnan(pages[page]), of_row, pages[page])
        return pages


def check(case: Case, seed: int = 0) -> None:
    """Checks everything that the call returns, and its gradients."""
    if case.gradients:
        gradient_check.check(case, "triton", seed, few_pairs=True)
        return
    arrays = case.all_arrays(seed)
    (key, plain_key), (value, plain_value) = (
        _stored(case, x, kind) for x, kind in ((arrays.key, case.key_kind), (arrays.value, case.value_kind))
    )
    actual = _attend(case, arrays._replace(key=key, value=value))
    rest = case.visible, case.factor, case.scores, case.sinks, case.pairs
    expected = oracle.attention(arrays.query, plain_key, plain_value, *rest)
    rounded = [x.astype(jnp.dtype(case.dtype)) for x in (plain_key, plain_value)]
    plain = oracle.plain_attention(arrays.query, *rounded, *rest)
    assert actual.out.dtype == case.dtype
    assert_outputs(case, actual.out, actual.lse, expected, plain)
    if case.key_weights:
        weights = _key_weights(case, arrays, plain_key, expected[1])
        # Kernels multiply quantized keys with their scales in the dtype of the query.
        of_rounded = _key_weights(case, arrays, rounded[0], oracle.attention(arrays.query, *rounded, *rest)[1])
        limit = tolerances.key_weights_limit(np.abs(of_rounded - weights).max(), weights.max())
        np.testing.assert_allclose(actual.key_weights, weights, rtol=0, atol=limit)


def _key_weights(case: Case, arrays: gradient_check.Arrays, key: np.ndarray, lse: np.ndarray) -> np.ndarray:
    return oracle.key_weights(arrays.query, key, case.visible, case.factor, lse, case.scores, case.pairs)


def _attend(case: Case, arrays: gradient_check.Arrays) -> pa.AttentionOutput:
    @jax.jit
    def call(arrays: gradient_check.Arrays, mask: Any, q_positions: Any, kv_positions: Any, page_table: Any):
        given = iter(arrays.scores)
        return pa.attention(
            *arrays[:3],
            mask,
            q_positions=q_positions,
            kv_positions=kv_positions,
            page_table=page_table,
            scores=[score.build(pa.scores, next(given) if score.has_array else None) for score in case.scores],
            sinks=arrays.sinks,
            scale=case.scale,
            return_lse=True,
            return_key_weights=case.key_weights,
            block_sizes=case.block_options,
            implementation="triton",
        )

    return call(arrays, case.mask.build(pa.masks), case.q_positions, case.kv_positions, case.page_table)


def _stored(case: Case, x: np.ndarray, kind: Kind | None) -> tuple[Any, np.ndarray]:
    """What the call gets, and the numbers ``[B, S, K, D]`` that it stands for."""
    if case.page_table is not None:
        x = case.pool(x)
    if kind is None:
        stored, plain = jnp.asarray(x), x
    else:
        # What is NaN gets NaN scales.
        stored = pa.QuantizedArray.quantize(jnp.asarray(x), kind, case.group)
        plain = oracle.dequantize(stored)
    return stored, plain if case.page_table is None else oracle.gather(plain, case.page_table)
