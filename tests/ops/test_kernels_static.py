"""The kernels compile for GPUs that are not there, to no more instructions than they did, and keep all in registers.

The counts are in kernels.json, by ``python benchmarks/kernels_static.py --table tests/ops/kernels.json``. They are of
one version of Triton: with another the kernels are to compile.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests import processes

pytest.importorskip("triton")
TABLE = Path(__file__).with_name("kernels.json")


@pytest.mark.slow
def test_no_kernel_has_got_longer(tmp_path):
    found = tmp_path / "kernels.json"
    compiled = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    processes.run([sys.executable, "benchmarks/kernels_static.py", "--table", str(found)], check=True, env=compiled)
    now, before = json.loads(found.read_text()), json.loads(TABLE.read_text())
    assert now["kernels"].keys() == before["kernels"].keys()
    for name, targets in now["kernels"].items():
        for target, counts in targets.items():
            assert counts["spills"] == 0, name
            if now["triton"] == before["triton"]:
                assert counts["instructions"] <= 1.02 * before["kernels"][name][target]["instructions"], name


def test_a_loop_counts_as_often_as_it_runs():
    kernels_static = pytest.importorskip("benchmarks.kernels_static")
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
.L_x_0:
        /*0010*/                   ISETP.GE.AND P0, PT, R11, R6, PT ;
        /*0020*/              @P6 BRA P1, `(.L_x_0) ;
        /*0030*/             @!P0 STG.E [R2.64], R4 ;
"""
    assert kernels_static.counted(code) == {"LDG.E.128": 1, "ISETP.GE.AND": kernels_static.LOOPS, "STG.E": 1}
