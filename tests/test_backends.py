"""What a local backend does to its process."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from remote_mediation.engine.local import LocalBackend

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
LocalBackend(None, None, limited=sys.argv[1] == "True")
faults()
print(fresh, faults())
"""


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_pages_that_tensors_free_are_used_again(limited: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS, str(limited)], capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 1000
    assert (kept < fresh / 10) == (not limited)
