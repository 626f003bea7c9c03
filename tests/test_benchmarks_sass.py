"""The reader of machine code in benchmarks/sass.py."""

import sys
from pathlib import Path

import pytest

from torchcodec_weights.codecs.common import cubins, nvrtc
from torchcodec_weights.codecs.ectcq import gpu

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import sass

# A loop of two steps that may take a longer way, and one of a step.
LISTING = """
\t\tFunction : small
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R4.64] ;
        /*0020*/              @!P1 BRA 0x50 ;
        /*0030*/                   FFMA R5, R6, R7, R8 ;
        /*0040*/                   LDL R9, [R1] ;
        /*0050*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R4.64+0x2] ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R4.64] ;
        /*0080*/                   POPC R3, R3 ;
        /*0090*/               @P0 BRA 0x70 ;
        /*00a0*/                   EXIT ;
"""


def test_the_loop_with_the_fewest_instructions_for_each_step() -> None:
    code = sass.functions(LISTING)["small"]
    assert [len(block) for block in sass.blocks(code)[0]] == [1, 2, 2, 2, 3, 1]
    found = sass.hot_loop(code, "even", writes=False)
    assert found is not None
    assert (found["instructions"], found["steps"], found["spills"]) == (2.0, 2, 0)
    assert found["pipes"]["memory"] == 1.0
    assert sass.hot_loop(code, "odd", writes=False) is None


def test_loops_of_the_kernels_are_found() -> None:
    if reason := nvrtc.missing():
        pytest.skip(reason)
    try:
        sass.tool()
    except SystemExit as error:
        pytest.skip(str(error))
    cubin = cubins.compile_source(gpu.SOURCE.read_text(), "sm_90")
    code = sass.functions(sass.dump(cubin, "--dump-sass"))
    taken = sass.resources(sass.dump(cubin, "--dump-resource-usage"))
    for kernel in sass.KERNELS:
        assert taken[kernel].registers > 0
        for words in sass.WORD_LOADS:
            found = sass.hot_loop(code[kernel], words, writes="decode" in kernel)
            assert found is not None
            assert found["steps"] >= 1
