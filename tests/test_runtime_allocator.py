from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from ldm_vae.runtime import reuse_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
chosen = reuse_freed_memory()
for _ in range(4):
    faults()  # small remainders lie between the first ones
print(int(chosen), before, faults())
"""
"""A page that the kernel has to clear is a minor fault: 64 MB are 16,384 of them, where pages are small."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_large_tensors_reuse_freed_memory():
    """In a process of its own: it is a choice for a whole one."""
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=240)
    chosen, before, after = map(int, found.stdout.split())
    if not chosen:
        pytest.skip("another C library")
    assert after < 1000 < before
