"""`make cluster-test`, all of it."""

import re
import subprocess
import sys

import pytest

from faults.two_nodes import why_not

REASON = why_not()


@pytest.mark.long
@pytest.mark.skipif(REASON is not None, reason=f"two nodes: {REASON}")
def test_two_nodes() -> None:
    done = subprocess.run([sys.executable, "-m", "faults.two_nodes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d checks, 0 failed", done.stdout), done.stdout
