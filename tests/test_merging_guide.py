"""What docs/merging.md says is so: its commands run on the zoo, one after the other, and its tables name what there is."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdev.algorithms.library import methods
from selfdev.cli import main
from selfdev.merging.job import _ROOM_BESIDE
from selfdev.merging.recipe import Dtype
from selfdev.merging.vocabulary import Embeddings
from selfdev.merging.writer import SHARD_BYTES
from selfdev.sandbox.syntax import ALLOWED_IMPORTS
from test_export import NAME, a_run
from test_readme import ROOT, blocks

GUIDE = (ROOT / "docs/merging.md").read_text(encoding="utf-8")
COMMANDS = [line for block in blocks(GUIDE, "") for line in block.splitlines()]
ON_THE_ZOO = [line for line in COMMANDS if not re.search(r"[ =]\./|owner/", line)]


def test_the_commands_run_on_the_zoo_and_give_models_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, python = blocks(GUIDE, "python")
    [config] = blocks(GUIDE, "yaml")
    Path("mean.py").write_text(file)
    Path("merge.yml").write_text(config)
    Path("runs").mkdir()
    a_run(Path("runs/quickstart-1"))
    assert NAME in GUIDE
    assert len(ON_THE_ZOO) == 8
    for line in ON_THE_ZOO:
        assert main(shlex.split(line)[1:]) == 0, line
    exec(python, {})
    capsys.readouterr()
    merged = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    assert [path.name for path in merged] == [
        "by-candidate",
        "by-config",
        "by-file",
        "by-trusted-file",
        "from-python",
        "merged",
        "queries-and-keys",
    ]
    for folder in merged:
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "from-python")]
    assert same[0] == same[1]
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "mean.py",
        "discovered.py",
        "discovered_method.py",
    }


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    assert main([words[1], "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("-"))
    if words[1] == "merge" and "--method" in words:
        method = words[words.index("--method") + 1]
        assert method in methods() or "/" in method or method.endswith(".py")


def test_the_tables_name_what_there_is() -> None:
    text = " ".join(GUIDE.split())
    assert "`--dtype " + "`, `".join(get_args(Dtype)) + "`" in text
    assert all(f"`--embeddings {word}`" in text for word in get_args(Embeddings))
    [listed] = re.findall(r"lets a file import (.*?), and gives", text)
    assert set(re.split(r", | and ", listed)) == ALLOWED_IMPORTS
    assert f"at most {SHARD_BYTES / 1e9:g} GB" in text
    assert f"and {_ROOM_BESIDE / 1e6:.0f} MB" in text
