"""`selfdev merge`: how its words are read, what it prints, and how it ends."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import TENSORS, UP, nano_seed, read, relative, write
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.merging.recipe import Recipe, read_experts, read_parameters

MEAN = "import torch\n\ndef merge_models(model_dict, device):\n    return torch.stack(list(model_dict.values())).mean(0)\n"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {
        "seed": write(tmp_path / "seed"),
        "one": write(tmp_path / "one", {UP: TENSORS[UP] + 1}),
        "two": write(tmp_path / "two", {UP: TENSORS[UP] * 3}),
    }


def words(models: dict[str, Path], out: Path, *more: str, method: str = "task_arithmetic") -> list[str]:
    experts = [word for name in ("one", "two") for word in ("--expert", f"{name}={models[name]}")]
    return ["merge", "--method", method, "--seed", str(models["seed"]), *experts, "--out", str(out), *more]


def test_it_says_what_it_did_and_writes_what_the_formula_gives(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(models, tmp_path / "out", "-p", "scale=0.5")) == 0
    printed, errors = capsys.readouterr()
    assert re.fullmatch(
        rf"merged 2 of 4 tensors \(targets mlp; the others are the seed's\) into {tmp_path}/out in \d+\.\d s\n",
        printed,
    )
    assert errors == ""
    assert torch.equal(read(tmp_path / "out")[UP], TENSORS[UP] + 0.5 * (1 + 2 * TENSORS[UP]))


def test_the_card_holds_a_command_that_gives_the_same_again(models: dict[str, Path], tmp_path: Path) -> None:
    more = ("-p", "density=0.7", "--targets", "all", "--dtype", "bf16", "--embeddings", "crop")
    assert main(words(models, tmp_path / "out", *more, method="ties")) == 0
    [command] = re.findall(r"```sh\nselfdev (.+)\n```", (tmp_path / "out/README.md").read_text())
    assert main([str(tmp_path / "again") if word == "DIR" else word for word in shlex.split(command)]) == 0
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == again


def test_a_list_gives_each_expert_its_value(models: dict[str, Path], tmp_path: Path) -> None:
    assert (
        main(words(models, tmp_path / "out", "-p", "weights=1,0.25", method="weighted_task_arithmetic")) == 0
    )
    assert torch.equal(read(tmp_path / "out")[UP], TENSORS[UP] + 1 + 0.25 * 2 * TENSORS[UP])


def test_a_file_runs_in_the_jail_or_trusted(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(MEAN)
    for name, more in (("jailed", ()), ("trusted", ("--trust",))):
        assert main(words(models, tmp_path / name, *more, method=str(tmp_path / "mean.py"))) == 0
        assert torch.allclose(read(tmp_path / name)[UP], TENSORS[UP] + (1 + 2 * TENSORS[UP]) / 2)
    card = (tmp_path / "jailed/README.md").read_text()
    assert "by `mean.py`, run in the jail" in card
    assert MEAN in card


@pytest.mark.parametrize("more", [(), ("--trust",)])
def test_a_file_may_begin_with_a_mark_of_byte_order(
    models: dict[str, Path], tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "mean.py").write_text("\ufeff" + MEAN)
    assert main(words(models, tmp_path / "out", *more, method=str(tmp_path / "mean.py"))) == 0
    assert MEAN in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (
            "import sys\nsys.exit(0)\ndef merge_models(model_dict, device): ...\n",
            2,
            "cannot be imported: SystemExit",
        ),
        (
            "def merge_models(model_dict, device):\n    raise SystemExit\n",
            1,
            f"on tensor '{UP}' of shape (3, 2) raises",
        ),
    ],
)
def test_a_trusted_file_cannot_end_the_merge_as_if_it_were_done(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    code: int,
    message: str,
) -> None:
    (tmp_path / "leaves.py").write_text(text)
    assert main(words(models, tmp_path / "out", "--trust", method=str(tmp_path / "leaves.py"))) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_may_have_any_bytes_for_a_name(models: dict[str, Path], tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/one\xff"))
    models["one"] = models["one"].rename(strange)
    assert main(words(models, tmp_path / "out")) == 0
    assert r"one\udcff" in (tmp_path / "out/README.md").read_text()


def test_targets_choose_and_a_regular_expression_will_do(tmp_path: Path) -> None:
    seed, one = nano_seed(), relative(nano_seed(), tmp_path / "one", 1)
    for targets, count in (("mlp", 9), ("attention", 12), ("all", 30), (r"layers\.0\..*norm", 2)):
        out = tmp_path / f"out{count}"
        given = [
            "merge",
            "--method",
            "linear",
            "--seed",
            str(seed),
            "--expert",
            f"one={one}",
            "--out",
            str(out),
        ]
        assert main([*given, "--targets", targets]) == 0
        changed = [name for name, tensor in read(out).items() if not torch.equal(tensor, read(seed)[name])]
        assert len(changed) == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "tis"), "unknown method: 'tis'; the nearest known one is 'ties'"),
        (("--method", "ties", "-p", "densty=1"), "unknown parameter of method 'ties': 'densty'"),
        (("--method", "ties", "-p", "density=much"), "parameter 'density' of method 'ties'"),
        (("--method", "ties", "-p", "density=" + 100_000 * "["), "parameter 'density' of method 'ties'"),
        (("--method", "ties", "-p", "density"), "parameter 'density' is not of the form KEY=VALUE"),
        (("--method", "ties", "-p", "density=1", "-p", "density=2"), "parameter 'density' is given twice"),
        (("--method", "ties", "--trust"), "--trust is for a file of your own, and 'ties' is none"),
        (
            ("--method", "runs/x:learning/1/001", "--trust"),
            "--trust is for a file of your own, and 'runs/x:learning/1/001' is none; methods of the library need no "
            "trust, and what a model wrote runs in the jail",
        ),
        (("--method", "ties", "-p", "lambda=1"), "'lambda', as mergekit calls it; here it is 'scale'"),
        (("--method", "della_linear"), "as mergekit calls it; here it is della with elect=false"),
        (("--method", "TIES"), "unknown method: 'TIES'; the nearest known one is 'ties'"),
        (("--method", "frankenmerge"), "unknown method: 'frankenmerge'; known are linear, task_arithmetic, "),
        (("--method", "merge.yml"), "give a configuration of mergekit's with --config"),
        (("--method", "slerp"), "method 'slerp' takes exactly 2 experts, not 3"),
        (("--method", "nothing.py"), "method 'nothing.py' cannot be read"),
        (("--method", "runs/none:learning/1/001"), "runs/none holds no run"),
        (("--method", "ties", "--targets", "mpl"), "targets 'mpl' selects no parameter"),
        (("--method", "ties", "--dtype", "int8"), "unknown dtype: 'int8'; known are bf16, fp16, fp32"),
        (
            ("--method", "ties", "--embeddings", "crp"),
            "unknown embeddings: 'crp'; the nearest known one is 'crop'",
        ),
        (("--method", "ties", "--expert", "one=x"), "two experts are called 'one'"),
        (("--method", "ties", "--expert", "./x"), "expert './x' is not of the form NAME=MODEL"),
        (("--method", "ties", "--seed", "./none"), "'./none' is not there"),
    ],
)
def test_mistakes_end_with_code_2_and_nothing_is_written(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    third = ["--expert", f"three={models['one']}"]
    assert main([*words(models, tmp_path / "out"), *third, *more]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_folder_that_one_is_in_is_not_replaced(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../here", ""):
        assert main(words(models, Path(out), method="linear")) == 2
        assert "is the folder that you are in, which would be replaced" in capsys.readouterr().err


def test_experts_with_equal_weights_are_told_and_what_is_written_as_json(
    models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--expert", f"again={models['one']}", "--dtype", "bfloat16"]
    assert main(words(models, tmp_path / "out", *more, "--json", method="linear")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "out")
    [(file, digest)] = told["hashes"].items()
    assert digest == hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest()
    assert caplog.messages == ["expert 'again' has the weights of expert 'one'"]
    assert read(tmp_path / "out")[UP].dtype is torch.bfloat16


def test_a_run_in_the_place_of_its_program_is_told_apart(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/archive.db").touch()
    assert main(words(models, tmp_path / "out", method=str(tmp_path / "run"))) == 2
    assert "is a run; name one of its programs" in capsys.readouterr().err


def test_a_file_takes_no_parameters_but_a_seed(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mean.py").write_text(MEAN)
    for parameter in ("scale=1", "seed=-1", "seed=x"):
        assert main(words(models, tmp_path / "out", "-p", parameter, method=str(tmp_path / "mean.py"))) == 2
        assert "a file takes no parameters but -p seed=N" in capsys.readouterr().err
    (tmp_path / "mean.py").write_text("x = 1\n")
    assert main(words(models, tmp_path / "out", method=str(tmp_path / "mean.py"))) == 2
    assert "defines no merge_models(model_dict, device)" in capsys.readouterr().err


def test_an_algorithm_that_fails_ends_with_code_1(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.py").write_text(
        "def merge_models(model_dict, device):\n    return model_dict['three']\n"
    )
    assert main(words(models, tmp_path / "out", method=str(tmp_path / "bad.py"))) == 1
    assert (
        f"the algorithm fails on tensor '{UP}' of shape (3, 2): KeyError: 'three'" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_parameters_are_read_as_numbers_lists_and_words() -> None:
    given = ["a=0.5", "b=3", "c=True", "d=1,0.5,2", "e=[1, 2]", "f=word", "g=1e-3", "h=null", "i=x=y"]
    read = read_parameters(given)
    assert read == {
        "a": 0.5,
        "b": 3,
        "c": True,
        "d": [1, 0.5, 2],
        "e": [1, 2],
        "f": "word",
        "g": 1e-3,
        "h": None,
        "i": "x=y",
    }


def test_experts_keep_their_order_and_sources_may_hold_an_equals_sign() -> None:
    assert list(read_experts(["b=pypi:x==1", "a=./y"]).items()) == [("b", "pypi:x==1"), ("a", "./y")]


@given(
    st.dictionaries(
        st.text("abc_", min_size=1),
        st.one_of(
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
            st.lists(st.integers()),
        ),
        max_size=3,
    )
)
def test_what_the_card_writes_is_read_back(parameters: dict[str, object]) -> None:
    line = shlex.split(Recipe("m", "s", {"x": "y"}, parameters).command("all"))
    assert read_parameters([line[i + 1] for i, word in enumerate(line) if word == "-p"]) == parameters


def test_no_expert_is_a_mistake() -> None:
    with pytest.raises(UserError, match="there is no expert to merge"):
        Recipe("ties", "s", {}).check()


def test_a_program_cannot_end_its_block_in_the_card(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(MEAN + '"""\n```\n# Evidence\nscores 100 %\n"""\n')
    assert main(words(models, tmp_path / "out", "--trust", method=str(tmp_path / "mean.py"))) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.count("````") == 2
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (models["seed"] / "config.json").read_text()
    )
