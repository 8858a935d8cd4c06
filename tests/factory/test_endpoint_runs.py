"""Whole runs whose programs a server writes: killed, out of money, and with a key that nobody may see."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import endpoint_runs
from endpoint_runs import begin_or_resume, searching_config
from scripted import PROGRAMS, Stopper
from selfdev.cli import main
from selfdev.config import load_config, parse_config
from selfdev.errors import Interrupted, UserError
from selfdev.results import open_run
from selfdev.runs import resume, run
from unruly_server import UnrulyServer

KEY = "sk-very-secret-0123456789"
QUICK = [program for program in PROGRAMS if "while True" not in program and "torch.seed" not in program]


CUT_OFF = """
import os, sqlite3, sys
account = sqlite3.connect(sys.argv[1], isolation_level=None)
account.execute("PRAGMA cache_size = 1")
account.execute("BEGIN IMMEDIATE")
account.execute("UPDATE request SET tokens_in = 99, answer = hex(randomblob(20000))")
os._exit(0)
"""


def test_killed_in_the_middle_nothing_is_paid_for_twice_but_what_was_in_flight(tmp_path: Path) -> None:
    with UnrulyServer(QUICK) as server:
        command = [sys.executable, endpoint_runs.__file__, str(tmp_path / "run"), server.url, "write:6"]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        ended = subprocess.run(command, env=environment, check=False)
        assert ended.returncode == -signal.SIGKILL
        assert 5 <= len(server.answered) < 12
        # Four at once: what the killed process had in flight is asked for again, and nothing else.
        finished = begin_or_resume(tmp_path / "run", server.url)
        assert 12 <= len(server.answered) <= 12 + 4
        assert len({body["seed"] for body in server.answered}) == 12
    written = finished.candidates("learning")
    assert len(written) == 12
    assert all(candidate.status is not None for candidate in written)
    assert finished.archive.run.status == "done"


def test_a_run_that_only_searches_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with UnrulyServer(QUICK) as server:
        finished = run(searching_config(server.url, iterations=2, programs=6), tmp_path / "run")
        assert len(server.answered) == 12
    assert finished.archive.refinements("learning") == []
    assert {c.arm for c in finished.candidates()} == {"learning"}
    assert finished.best is not None
    assert finished.archive.run.facts["factory"] == {"model": "endpoint:unruly", "served": "unruly"}
    assert main(["show", str(tmp_path / "run")]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "nothing was learned" in page
    assert "360 tokens read, 120 written" in page  # 30 and 10 a program
    server = {"tokens_in": 360, "tokens_out": 120, "price": 0.0}
    assert finished.summary()["run"]["server"] == server
    # A process that is killed in a step of its account leaves a journal of SQLite's own, which takes that step back.
    written = tmp_path / "run" / "written.db"
    subprocess.run([sys.executable, "-c", CUT_OFF, str(written)], check=True)
    assert Path(f"{written}-journal").is_file()
    assert open_run(tmp_path / "run").summary()["run"]["server"] == server


@pytest.mark.parametrize(
    ("form", "turn"),
    [
        ("short", "# Corrected:"),
        pytest.param("contract", "Write it corrected", marks=pytest.mark.proof),
    ],
)
def test_what_fails_is_asked_for_once_more_and_paid_for_once(form: str, turn: str, tmp_path: Path) -> None:
    functions = [
        program for program in QUICK if "(deltas)" in program
    ]  # nothing else fits into a message's block
    with UnrulyServer(functions) as server:
        config = searching_config(server.url, form=form, programs=16)
        settings = config.factory.model_copy(update={"repair_turn": True})
        config = config.model_copy(update={"factory": settings})
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", watch=Stopper("write:12"))  # as it is screened
        assert len(server.answered) == 8
        finished = resume(tmp_path / "run")
        assert len(server.answered) == 16
        assert len({body["seed"] for body in server.answered}) == 16
        asked = {body.get("prompt") or body["messages"][0]["content"] for body in server.answered}
    written = finished.candidates("learning")
    [iteration] = finished.archive.iterations("learning")
    assert len(written) == 16
    assert asked == set(iteration.prompts)
    failed = [c for c in written[:8] if c.source is not None and c.status == "failed"]
    assert sum(turn in prompt for prompt in iteration.prompts) == len(failed) > 0
    assert [c.prompt for c in written[8:]] == [*range(1, 1 + len(failed)), *[0] * (8 - len(failed))]


def test_a_used_up_budget_ends_resumable_and_a_raised_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with UnrulyServer(QUICK) as server:
        config = searching_config(server.url, tokens_budget=800, programs=24)
        with pytest.raises(
            Interrupted, match=rf"800 tokens does not pay(.|\n)*selfdev resume {folder}"
        ) as ended:
            run(config, folder)
        assert ended.value.exit_code == 3
        assert 0 < len(server.answered) < 24
        assert main(["resume", str(folder)]) == 3
        assert "does not pay for one more program" in capsys.readouterr().err
        assert main(["resume", str(folder), "--set", "factory.endpoint.tokens_budget=9000"]) == 0
        assert len(server.answered) == 24
    assert open_run(folder).config.factory.endpoint.tokens_budget == 9000


def test_a_key_is_nowhere_to_be_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNRULY_KEY", KEY)
    folder = tmp_path / "run"
    # It repeats the key in its errors and in what it writes.
    echoing = [*QUICK, f"z(deltas):\n    return deltas[0]  # {KEY}\n"]
    with UnrulyServer(echoing, key=KEY) as server:
        config = searching_config(server.url, key_env="UNRULY_KEY", programs=24, concurrency=1)
        (tmp_path / "config.yaml").write_text(config.model_dump_json())
        server.misdeeds = ["", "", "401"]
        assert main(["run", str(tmp_path / "config.yaml"), "--out", str(folder)]) == 3
        assert main(["resume", str(folder)]) == 0
        assert any(KEY in server.programs[body["seed"] % len(echoing)] for body in server.answered)
    for command in (["show", str(folder)], ["show", str(folder), "--json"]):
        assert main(command) == 0
    said = capsys.readouterr()
    assert "[key]" in said.err
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"archive.db", "written.db"} <= {file.name for file in files}
    for content in (said.out, said.err, *(file.read_bytes().decode("latin-1") for file in files)):
        assert KEY not in content
    assert any("[key]" in candidate.text for candidate in open_run(folder).candidates())


def test_only_what_does_not_decide_the_answers_changes_when_a_run_is_resumed(tmp_path: Path) -> None:
    with UnrulyServer(QUICK) as server, pytest.raises(Interrupted):
        run(searching_config(server.url, tokens_budget=700, programs=30), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"factory.temperature: a run goes on with what it began with; only factory"
    ):
        resume(tmp_path / "run", changes=["factory.temperature=2"])
    with pytest.raises(UserError, match=r"tokens_budget: 10 tokens do not pay for one program"):
        resume(tmp_path / "run", changes=["factory.endpoint.tokens_budget=10"])
    assert open_run(tmp_path / "run").config.factory.endpoint.tokens_budget == 700


URL = {"url": "http://127.0.0.1:8000/v1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": {"model": "endpoint:x"}}, "give factory.endpoint.url too"),
        ({"factory": {"model": "endpoint:x", "endpoint": {}}}, "factory.endpoint.url"),
        (
            {"factory": {"model": "endpoint:x", "endpoint": {**URL, "keyenv": "A"}}},
            "nearest known one is 'key_env'",
        ),
        ({"factory": {"model": "endpoint:x", "endpoint": {"url": "localhost:8000"}}}, "is no address"),
        ({"factory": {"model": "endpoint:x", "endpoint": {**URL, "money_budget": 1}}}, "nothing has a price"),
        (
            {"factory": {"model": "endpoint:x", "endpoint": {**URL, "tokens_budget": 9}}},
            "do not pay for one program",
        ),
        (
            {"factory": {"model": "endpoint:x", "endpoint": {**URL, "adapters": "vllm"}}},
            "has no weights here",
        ),
        ({"factory": {"model": "endpoint:x", "endpoint": {**URL, "chat": True}}}, "text to be continued"),
        (
            {"factory": {"model": "m", "endpoint": URL, "warm_start": {"steps": 1}}},
            "would not have the warm start",
        ),
        ({"refinement": {}}, "only the server has the model's weights"),
        ({"refinement": {}, "factory": {"model": "m", "endpoint": URL}}, "factory.endpoint.adapters: vllm"),
        (
            {
                "refinement": {"train": "full"},
                "factory": {"model": "m", "endpoint": {**URL, "adapters": "vllm"}},
            },
            "LoRA adapters and no whole model; set it to lora",
        ),
        ({"controls": ["frozen"]}, "the run is its own frozen control"),
        (
            {
                "factory": {
                    "model": "endpoint:x",
                    "endpoint": {**URL, "tokens_budget": 9**9, "request": {"max_tokens": None}},
                }
            },
            "no budget could be held",
        ),
        (
            {"factory": {"model": "endpoint:x", "endpoint": {**URL, "request": {"n": 0}}}},
            "a whole number from 1",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    config = searching_config(URL["url"]).model_dump(mode="json") | changes
    with pytest.raises(UserError, match=message):
        parse_config(config, "mine")


@pytest.mark.parametrize(
    "endpoint",
    [
        {"url": f"http://me:{KEY}@127.0.0.1/v1"},
        {"url": f"http://127.0.0.1/v1?key={KEY}"},
        {**URL, "key_env": KEY},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(endpoint: dict[str, str]) -> None:
    config = searching_config(URL["url"]).model_dump(mode="json")
    config["factory"]["endpoint"] = endpoint
    with pytest.raises(UserError, match="environment variable") as refused:
        parse_config(config, "mine")
    assert KEY not in str(refused.value)


def test_the_files_in_the_documentation_are_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "endpoints.md").read_text()
    files = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if text.startswith("preset:")]
    assert len(files) == 2
    for text in files:
        (tmp_path / "mine.yaml").write_text(text)
        assert load_config(str(tmp_path / "mine.yaml")).factory.endpoint is not None
