"""Loops in the control-flow graph of machine code."""

import pytest

pytest.importorskip("triton", reason="PyPI's triton, which compiles without a GPU, is not installed")

from bench.machine_code import sass

NESTED = """
entry:
  //## File "x", line 7
        /*0000*/   MOV R1, RZ ;
.L_x_1:
        /*0010*/   FADD R1, R1, R2 ;
        /*0020*/   @P0 BRA `(.L_x_3) ;
.L_x_2:
  //## File "x", line 9
        /*0030*/   @!PT LDS RZ, [RZ] ;
        /*0040*/   @!P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0050*/   BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/   @P2 BRA `(.L_x_1) ;
        /*0070*/   EXIT ;
.L_x_4:
        /*0080*/   BRA `(.L_x_4) ;
"""


def test_loops_are_those_of_the_graph():
    outer, inner = sass.natural_loops(sass.parse(NESTED))
    assert [x.opcode for x in outer] == ["FADD", "BRA", "LDS", "CALL.REL.NOINC", "BRA", "BRA"]
    assert [x.opcode for x in inner] == ["LDS", "CALL.REL.NOINC", "BRA"]
    assert (outer[0].line, inner[0].line, inner[0].never_runs) == (7, 9, True)


def test_a_jump_back_without_dominance_is_no_loop():
    # The loop is entered at two places, so neither dominates the other.
    text = """
        /*0000*/   @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/   FADD R1, R1, R2 ;
.L_x_2:
        /*0020*/   @P1 BRA `(.L_x_1) ;
        /*0030*/   EXIT ;
"""
    assert sass.natural_loops(sass.parse(text)) == []
