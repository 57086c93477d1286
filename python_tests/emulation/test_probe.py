"""A launch that the emulated device refuses, and what is left of it."""

import json

from python_tests.emulation.build import HERE, build, run_python

CALLS = """
import ctypes, json, sys
probe = ctypes.CDLL(sys.argv[1])
for name in ("probe_exp2", "probe_reciprocal", "probe_refused_launch"):
    getattr(probe, name).restype = ctypes.c_char_p
x, y = ((ctypes.c_float * 3)(*values) for values in ((-1, 0, 2), (0, 0, 0)))
seen = [probe.probe_refused_launch().decode(), probe.probe_last_error()]
for function in (probe.probe_exp2, probe.probe_reciprocal):
    seen += [function(x, y, ctypes.c_int64(3)).decode(), list(y)]
print(json.dumps(seen))
"""


def test_a_refused_launch_leaves_no_error():
    """As on a device it raises, once, and what is launched after it runs."""
    process = run_python(CALLS, str(build("probe", [HERE / "probe.cu"])))
    assert process.returncode == 0, process.stderr
    refusal, last_error, *launches = json.loads(process.stdout)
    assert "expected 1 to 1024 threads" in refusal and last_error == 0
    assert launches == ["", [0.5, 1, 4], "", [-1, float("inf"), 0.5]]
