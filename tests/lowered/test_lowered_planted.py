"""The watch and the oracle notice faults: each test plants one into a kernel's Triton IR, as a mistake there would."""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from tests import oracle
from tests.attention_check import LAST, LEFT, S
from tests.lowered.calls import Case, check
from tests.lowered.execution import Lowered, executed
from tests.test_decode import last, live

CAUSAL = oracle.causal()
DECODE = {"batch": 3, "q_len": 1, "kv_positions": live(17, S, 0, capacity=S), "q_positions": last(17, S, 0)}
CASES = {
    "prefill": Case(CAUSAL, LAST, LEFT, head_dim=24),
    "training": Case(CAUSAL, LAST, LEFT, head_dim=24, gradients=True),
    "decode": Case(CAUSAL, head_dim=24, key_weights=True, **DECODE),
    "pages": Case(CAUSAL, page_table=np.array([[4, 99, 1], [0, 3, 2]], np.int32), kv_len=48, q_positions=LAST),
    "int4": Case(CAUSAL, LAST, LEFT, key_kind="int4"),
}
FORWARD, MERGE = "pallas_attn_forward", "pallas_attn_merge"
FLOATS = r"tensor<\d+x\d+x!tt\.ptr<f32>>"
ORACLE = "error .* plain attention"


class Plant(NamedTuple):
    """A fault.

    Attributes:
      case: the call.
      kernel: where it is planted.
      edit: changes the kernel.
      reported: a pattern of the message, which comes from the watch or from the comparison with the oracle.
    """

    case: str
    kernel: str
    edit: Callable[[Lowered], Lowered]
    reported: str


def line(pattern: str, new: str, *, which: int = 0) -> Callable[[Lowered], Lowered]:
    """Rewrites the first (or another) match of a pattern; ``new`` may contain its groups and several lines."""

    def edit(lowered: Lowered) -> Lowered:
        found = list(re.finditer(pattern, lowered.text))[which]
        text = lowered.text[: found.start()] + found.expand(new) + lowered.text[found.end() :]
        return dataclasses.replace(lowered, text=text)

    return edit


def grid(*change: int) -> Callable[[Lowered], Lowered]:
    """Adds to the sizes of the grid."""

    def edit(lowered: Lowered) -> Lowered:
        x, y, z = (size + more for size, more in zip(lowered.grid, change, strict=True))
        return dataclasses.replace(lowered, grid=(x, y, z))

    return edit


PLANTS = {
    "a load without its mask": Plant(
        "prefill", FORWARD, line(rf"(tt\.load %\w+), %\w+, %\w+ : ({FLOATS})", r"\1 : \2"), "out of bounds: .*operand 0"
    ),
    "masked lanes without a default": Plant(
        "prefill", FORWARD, line(rf"(tt\.load %\w+, %\w+), %\w+ : ({FLOATS})", r"\1 : \2"), "not finite"
    ),
    "a store without its mask": Plant(
        "prefill", FORWARD, line(rf"(tt\.store %\w+, %\w+), %\w+ : ({FLOATS})", r"\1 : \2"), "out of bounds: .*result 0"
    ),
    "heads that share a tile of the output": Plant(
        "prefill", FORWARD, line(r"tt\.get_program_id y : i32", "arith.constant 0 : i32"), "two writes: .*result 0"
    ),
    "key heads that share a tile of dK": Plant(
        "training",
        "pallas_attn_d_key_value",
        line(r"tt\.get_program_id y : i32", "arith.constant 0 : i32"),
        "two writes: .*result",
    ),
    "too few programs": Plant("prefill", FORWARD, grid(0, -1, 0), "never written: .*result 0"),
    "too many programs": Plant("prefill", FORWARD, grid(0, 1, 0), "out of bounds"),
    "a loop that ends one block early": Plant(
        "prefill",
        FORWARD,
        line(
            r"(%\S+ = scf\.for %\w+ = %\w+ to )(%\w+)( step )(%\w+)",
            r"%planted = arith.subi \2, \4 : i32\n\1%planted\3\4",
            which=-1,
        ),
        ORACLE,
    ),
    "a product of more than 32 bits": Plant(
        "prefill",
        FORWARD,
        line(
            r"(%\w+) = tt\.get_program_id y : i32",
            r"%planted = tt.get_program_id y : i32\n"
            r"%large = arith.constant 1500000000 : i32\n"
            r"%less = arith.constant 1499999999 : i32\n"
            r"%planted_a = arith.muli %planted, %large : i32\n"
            r"%planted_b = arith.muli %planted, %less : i32\n"
            r"\1 = arith.subi %planted_a, %planted_b : i32",
        ),
        "overflow: 2 and 1500000000 give 3000000000",
    ),
    "a division by zero": Plant(
        "prefill",
        FORWARD,
        line(r"(%\w+ = arith\.div\w+ %\w+), %\w+", r"%planted = arith.constant 0 : i32\n\1, %planted", which=-1),
        "division by zero",
    ),
    "a store to a query": Plant(
        "prefill",
        FORWARD,
        line(r"tt\.splat %arg\d+ : (!tt\.ptr<f32>)", r"tt.splat %arg0 : \1", which=-1),
        "write to an op",
    ),
    "a result that is read and written again": Plant(
        "prefill",
        FORWARD,
        line(
            rf"tt\.store (%\w+), %\w+, (%\w+) (: {FLOATS})",
            r"\g<0>\n%planted = tt.load \1, \2 \3\ntt.store \1, %planted, \2 \3",
        ),
        "read after write: .*the same program",
    ),
    "lanes that write one element": Plant(
        "prefill",
        FORWARD,
        line(r"tt\.make_range \{[^}]*\} : (tensor<\w+>)", r"arith.constant dense<0> : \1", which=-1),
        "two lanes",
    ),
    "keys and values interchanged": Plant("prefill", FORWARD, line(r"%arg1\b", "%arg2", which=1), ORACLE),
    "a product that rounds to TF32": Plant(
        "prefill", FORWARD, line(r"(tt\.dot %\w+, %\w+, %\w+) :", r"\1, inputPrecision = tf32 :"), ORACLE
    ),
    "a merge that reads one part too many": Plant(
        "decode",
        MERGE,
        line(r"arith\.cmpi slt, (.*tensor<16xi32>)", r"arith.cmpi sle, \1"),
        "unwritten read: .*operand 0",
    ),
    "a mask that hides the query's own key": Plant(
        "training",
        "pallas_attn_d_query",
        line(r"arith\.cmpi sle, (%\w+, %\w+ : tensor<16x16xi32>)", r"arith.cmpi slt, \1"),
        "gradient of query: error",
    ),
    "a page in place of another": Plant(
        "pages", FORWARD, line(r"arith\.minsi (%c\d+_i32\w*, %\w+ : i32)", r"arith.maxsi \1"), "out is not finite"
    ),
    "a shift of all bits": Plant(
        "int4",
        FORWARD,
        line(
            r"(%\w+ = arith\.shrsi %\w+), %\w+ : (tensor<\w+xi8>)",
            r"%planted = arith.constant dense<8> : \2\n\1, %planted : \2",
        ),
        "shift too wide: by 8 of 8 bits",
    ),
}


def reported(case: Case, edit: Callable[[Lowered], Lowered] = lambda x: x) -> str:
    """What the watch and the oracle report of a call."""
    with executed(edit=edit) as watch:
        try:
            check(case)
        except AssertionError as error:
            return "\n".join([*map(str, watch.take()), str(error)])
    return "\n".join(map(str, watch.take()))


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_nothing_is_reported(name):
    assert reported(CASES[name]) == ""


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_reported(name):
    plant = PLANTS[name]

    def edit(lowered: Lowered) -> Lowered:
        return plant.edit(lowered) if lowered.name == plant.kernel else lowered

    message = reported(CASES[plant.case], edit)
    assert re.search(plant.reported, message), message
