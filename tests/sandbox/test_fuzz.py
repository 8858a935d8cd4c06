"""A short run of the fuzz script; `benchmarks/sandbox_fuzz.py` does 10,000."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sandbox_fuzz.py"


def test_mutated_programs_leave_nothing_behind() -> None:
    spec = importlib.util.spec_from_file_location("sandbox_fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures, faults = script.fuzz(programs=150, seed=1)
    assert faults == []
    assert sum(figures["statuses"].values()) == 150
    assert figures["statuses"]["ok"] > 10  # the mutations still leave programs that run
