import subprocess
import sys

import pytest

MEASURE = """
import sys
import torch
from selfdev.merging.heap import return_large_blocks

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024

if sys.argv[1] == "returned":
    return_large_blocks()
torch.ones(6 << 20)  # 24 MB: when it is freed, glibc puts what is smaller into its arenas
before = resident()
blocks = [torch.ones(2 << 20) for _ in range(20)]
kept = blocks[-1]  # above all others in its arena
blocks.clear()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_large_blocks_go_back_to_the_system_though_a_later_one_stays() -> None:
    def grown(how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", MEASURE, how], check=True, capture_output=True).stdout
        )

    assert grown("returned") < 40 < 120 < grown("kept")  # MB; what stays has 8
