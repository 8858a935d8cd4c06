"""A server that does as vLLM does: it tells token ids, and loads what is learned here."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import endpoint_runs
from byte_model import byte_tokenizer, save_byte_model
from endpoint_runs import begin_or_resume, learning_config
from scripted import PROGRAMS as MANY
from selfdev.errors import Halted, UserError
from selfdev.factory.endpoint import EndpointFactory
from selfdev.factory.prompt import Prompt
from selfdev.factory.taught import Taught
from selfdev.models.folder import load_model
from unruly_server import UnrulyServer

PROGRAMS = ["a(deltas):\n    return deltas[0]\n", "b(deltas):\n    return deltas[1]\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def server() -> Iterator[UnrulyServer]:
    with UnrulyServer(PROGRAMS, byte_tokenizer()) as running:
        yield running


def silent(*_: object) -> None:
    pass


def eight(factory: EndpointFactory) -> list[tuple[int, Prompt]]:
    """What an iteration asks for: numbers, and the one prompt."""
    return list(enumerate(factory.prompts(0) * 8))


def refined(factory: EndpointFactory, out: Path, iteration: int) -> Path:
    [prompt] = factory.prompts(0)
    pair = (prompt, factory.tokens(PROGRAMS[0]), factory.tokens(PROGRAMS[1]))
    assert "adapter" in factory.refine(Taught([pair]), iteration, [], out, silent)
    return out


def test_the_tokens_that_the_server_sampled_are_those_that_are_trained_on(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    factory = EndpointFactory(learning_config(server.url, model), tmp_path)
    for sample in factory.write(eight(factory), 0, 1.0, [], silent):
        assert sample.text in [program + "\n\n" for program in PROGRAMS]
        assert sample.tokens == factory.tokens(sample.text)
        assert sample.log_prob == -0.5 * len(sample.tokens)
    assert all(body["return_token_ids"] for body in server.asked)
    # What is left out vLLM takes from the model's generation config.
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert all(neutral.items() <= body.items() for body in server.asked)


def test_each_rounds_adapter_is_loaded_when_it_first_writes_and_the_last_one_unloaded(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    config = learning_config(server.url, model)
    factory = EndpointFactory(config, tmp_path)
    wanted = eight(factory)
    factory.write(wanted, 0, 1.0, [], silent)
    assert server.loaded == []
    assert {body["model"] for body in server.asked} == {"unruly"}

    first = refined(factory, tmp_path / "adapters" / "first", 0)
    factory.write(wanted, 1, 1.0, [first], silent)
    [name] = server.loaded
    assert server.adapters == {name: str(tmp_path / "served" / name)}
    assert {body["model"] for body in server.asked[8:]} == {name}
    PeftModel.from_pretrained(load_model(model), tmp_path / "served" / name)

    # The control writes with the plain model in between, and the same adapter is not loaded twice.
    factory.write(wanted, 1, 1.0, [], silent)
    factory.write(wanted, 2, 1.0, [first], silent)
    assert server.loaded == [name]

    second = refined(factory, tmp_path / "adapters" / "second", 1)
    factory.write(wanted, 3, 1.0, [second], silent)
    [*_, newer] = server.loaded
    assert list(server.adapters) == [newer]
    assert [each.name for each in (tmp_path / "served").iterdir()] == [newer]

    # A server that was started anew has nothing; a resumed run gives it what it needs, under the same name.
    server.adapters.clear()
    asked = len(server.asked)
    again = EndpointFactory(config, tmp_path)
    again.write(wanted, 3, 1.0, [second], silent)
    assert len(server.asked) == asked
    again.write(wanted, 4, 1.0, [second], silent)
    assert list(server.adapters) == [newer]


def test_the_warm_start_is_handed_over_with_the_arms_own_adapter(
    server: UnrulyServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFDEV_CACHE", str(tmp_path / "cache"))
    config = learning_config(server.url, model)
    warm = {"warm_start": {"steps": 2, "rank": 2, "targets": 2}}
    config = type(config)(**config.model_dump() | {"factory": config.factory.model_dump() | warm})
    factory = EndpointFactory(config, tmp_path)
    factory.prepare(silent)
    wanted = eight(factory)
    factory.write(wanted, 0, 1.0, [], silent)
    [only_warm] = server.loaded
    own = refined(factory, tmp_path / "adapters" / "own", 0)
    factory.write(wanted, 1, 1.0, [own], silent)
    both = server.loaded[-1]
    # Both stay: the frozen control goes on with the warm start alone.
    assert list(server.adapters) == [only_warm, both]
    ranks = {
        name: PeftModel.from_pretrained(load_model(model), tmp_path / "served" / name)
        .peft_config["default"]
        .r
        for name in (only_warm, both)
    }
    assert ranks == {only_warm: 2, both: 2 + 4}


def test_the_folder_as_the_server_sees_it_is_what_it_is_told(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    shared = {"shared_folder": str(tmp_path / "here"), "shared_folder_on_server": "/there"}
    factory = EndpointFactory(learning_config(server.url, model, **shared), tmp_path)
    own = refined(factory, tmp_path / "own", 0)
    factory.write(eight(factory), 1, 1.0, [own], silent)
    [(name, path)] = server.adapters.items()
    assert path == f"/there/{name}"
    assert (tmp_path / "here" / name / "adapter_model.safetensors").is_file()


def test_a_server_that_loads_no_adapters_is_refused_before_anything_is_trained(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    server.refuses_adapters = True
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        EndpointFactory(learning_config(server.url, model), tmp_path)


def test_a_server_that_stops_loading_adapters_ends_the_session(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    factory = EndpointFactory(learning_config(server.url, model), tmp_path)
    own = refined(factory, tmp_path / "own", 0)
    server.refuses_adapters = True
    with pytest.raises(Halted, match=r"--max-lora-rank 4 or more.*must see the folder"):
        factory.write(eight(factory), 1, 1.0, [own], silent)


def test_a_server_with_another_model_than_the_one_that_learns_is_refused(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    class Chatty:
        """A tokenizer that puts one token more before every text."""

        def __call__(self, text: str) -> object:
            return byte_tokenizer()("!" + text)

    server.tokenizer = Chatty()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"reads the prompt as \d+ tokens, and the tokenizer of .*, as \d+"):
        EndpointFactory(learning_config(server.url, model), tmp_path)


def test_a_run_that_learns_is_killed_and_resumes_to_the_same_archive(
    server: UnrulyServer, model: Path, tmp_path: Path
) -> None:
    """Killed while the server writes with the adapter of the first round."""
    server.programs = [*MANY[:4], *MANY[9:11]]
    unbroken = begin_or_resume(tmp_path / "unbroken" / "run", server.url, model=model)
    folder, loaded, asked = tmp_path / "killed" / "run", list(server.loaded), len(server.asked)
    assert len(loaded) == 1
    command = [sys.executable, endpoint_runs.__file__, str(folder), server.url, "write:12", str(model)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    resumed = begin_or_resume(folder, server.url)
    assert resumed.archive.run.status == "done"
    assert resumed.archive.digest() == unbroken.archive.digest()
    # One adapter more on the server, loaded once; the control wrote with the plain model.
    [*_, adapter] = server.loaded
    assert len(server.loaded) == 2
    writers = [body["model"] for body in server.asked[asked:]]
    assert writers.count("unruly") == 8 + 8
    assert 8 <= writers.count(adapter) <= 8 + 4  # four were in flight
    [refinement] = resumed.archive.refinements("learning")
    assert refinement.facts["pairs"] > 0
    assert {row["kind"] for row in resumed.verdict["table"]} == {"seed", "control", "discovered"}
