"""A process goes on when the reader of its output has gone, and when its output cannot print a character."""

import os
import subprocess
import sys

WRITE = """
from cluster.machines.output import make_lasting
import sys
make_lasting()
for number in range(20000):
    print(number, "北京")
print("went on", file=sys.stderr)
"""


def test_goes_on_without_a_reader() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0 \\u5317\\u4eac\n"
    process.stdout.close()
    assert process.stderr.read() == b"went on\n"
    assert process.wait(20) == 0
