"""Loops and counts, on a listing small enough to count by hand."""

from __future__ import annotations

import pytest
from static_sass import Instruction, functions, hot_loop, loops, shortest_round

# cuobjdump's form: an address, the instruction, its encoding in two lines. Two nested loops: the inner one from 0x30 to
# 0xb0 has the matrix instructions, the outer one from 0x10 to 0xd0 all of them and one bit operation more.
LISTING = """
	code for sm_80
		Function : _Z6kernelv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                               /* 0x00000a0000017a02 */
                                                                                        /* 0x000fe40000000f00 */
        /*0010*/                   LOP3.LUT R2, R2, 0xf, RZ, 0xc0, !PT ;                /* 0x0000000f02027812 */
        /*0020*/              @P0  BRA 0xe0 ;                                           /* 0x000000b000000947 */
        /*0030*/                   LDS.128 R4, [R3] ;                                   /* 0x0000000003047984 */
        /*0040*/              @!PT LDS RZ, [RZ] ;                                       /* 0x00000000ff00f984 */
        /*0050*/              @!P4 LDGSTS.E.BYPASS.128 [R29+0x800], [R24.64] ;          /* 0x08000000181d9fae */
        /*0060*/                   LDS.U16 R8, [R3+0x10] ;                              /* 0x0000100003087984 */
        /*0070*/                   HMMA.16816.F32 R32, R36, R24, R32 ;                  /* 0x000000182420723c */
        /*0080*/                   HADD2.F32 R8, -RZ, R8.H0_H0 ;                        /* 0x20000008ff087230 */
        /*0090*/                   UIADD3 UR4, UR4, 0x1, URZ ;                          /* 0x0000000104047890 */
        /*00a0*/                   ISETP.GE.AND P1, PT, R63, R71, PT ;                  /* 0x000000473f00720c */
        /*00b0*/              @!P1 BRA 0x30 ;                                           /* 0xffffff7000009947 */
        /*00c0*/                   I2F.RP R6, R7 ;                                      /* 0x0000000700067306 */
        /*00d0*/              @!UP0 BRA 0x10 ;                                          /* 0xffffff3000000947 */
        /*00e0*/                   EXIT ;                                               /* 0x000000000000794d */
        /*00f0*/                   BRA 0xf0;                                            /* 0xfffffff000007947 */
		Function : _Z5otherv
        /*0000*/                   EXIT ;                                               /* 0x000000000000794d */
"""


@pytest.fixture(scope="module")
def code() -> list[Instruction]:
    return functions(LISTING)["_Z6kernelv"]


def test_reads_every_instruction(code: list[Instruction]) -> None:
    assert list(functions(LISTING)) == ["_Z6kernelv", "_Z5otherv"]
    assert [i.address for i in code] == list(range(0, 0x100, 0x10))
    copy = code[5]
    assert (copy.name, copy.modifiers, copy.guard) == ("LDGSTS", ".E.BYPASS.128", "@!P4")
    assert copy.operands == "[R29+0x800], [R24.64]"
    assert [i.address for i in code if i.never] == [0x40]


def test_a_branch_backwards_is_a_loop_and_one_to_itself_is_not(code: list[Instruction]) -> None:
    assert loops(code) == [(3, 11), (1, 13)]


def test_the_hot_loop_is_the_smallest_with_all_matrix_instructions(code: list[Instruction]) -> None:
    loop = hot_loop(code)
    assert loop is not None
    assert (loop.issue, loop.size, loop.inner, loop.matrix) == (9, 9, 0, 1)
    assert (loop.alu, loop.fma, loop.conversions) == (1, 1, 0)  # ISETP; HADD2; I2F is outside
    # the placeholder behind !PT is issued and nothing else
    assert loop.lds == 2
    assert [loop.of_width("LDS", bits) for bits in (128, 64, 32, 16)] == [1, 0, 0, 1]
    assert loop.of_width("LDGSTS", 128) == 1


def test_without_matrix_instructions_the_largest_innermost_loop() -> None:
    code = functions(LISTING.replace("HMMA.16816.F32", "FFMA"))["_Z6kernelv"]
    loop = hot_loop(code)
    assert loop is not None
    assert (loop.issue, loop.fma) == (9, 2)


def test_dot_products_tell_the_main_loop_from_others() -> None:
    """A copy loop inside the main loop is not where the time goes."""
    code = functions(LISTING.replace("HMMA.16816.F32", "FFMA").replace("I2F.RP", "IDP.4A.U8.S8"))["_Z6kernelv"]
    loop = hot_loop(code)
    assert loop is not None
    assert (loop.issue, loop.inner) == (13, 1)


def test_no_loop() -> None:
    assert hot_loop(functions(LISTING)["_Z5otherv"]) is None


# A loop from 0x00 to 0xa0. What is done once a tile, 0x20 and 0x30, is skipped by most rounds; 0x60 as well, but a copy
# behind the same branch is not.
BRANCHES = """
		Function : _Z1kv
        /*0000*/                   LDS.64 R4, [R3] ;
        /*0010*/              @P0  BRA 0x40 ;
        /*0020*/                   IMAD.WIDE R6, R8, 0x400, R6 ;
        /*0030*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0040*/                   HMMA.16816.F32 R32, R36, R24, R32 ;
        /*0050*/              @P1  BRA 0x80 ;
        /*0060*/                   IADD3 R10, R10, 0x1, RZ ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R29], [R24.64] ;
        /*0080*/                   ISETP.GE.AND P0, PT, R63, R71, PT ;
        /*0090*/              @P2  BRA 0x40 ;
        /*00a0*/              @!P0 BRA 0x0 ;
        /*00b0*/                   EXIT ;
"""


def test_a_round_leaves_out_what_a_branch_skips_but_no_product_and_no_copy() -> None:
    body = functions(BRANCHES)["_Z1kv"][:-1]
    way = shortest_round(body)
    assert way is not None
    assert [i.address for i in way] == [0x00, 0x10, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xA0]
    loop = hot_loop([*body, *functions(BRANCHES)["_Z1kv"][-1:]])
    assert loop is not None and loop.way
    # two branches go back: the smaller loop has the same products
    assert (loop.issue, loop.size, loop.inner) == (6, 6, 0)


def test_a_copy_that_no_way_passes_is_noticed() -> None:
    """Moved behind the loop's end: the count would be of another loop."""
    body = functions(BRANCHES.replace("@P1  BRA 0x80", "     BRA 0x80"))["_Z1kv"][:-1]
    assert shortest_round(body) is None
