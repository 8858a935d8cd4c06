"""The endpoint factory against `transformers serve`, which is somebody else's server, with a real transformer."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from byte_model import save_byte_model
from endpoint_runs import searching_config
from selfdev.errors import UserError
from selfdev.factory.endpoint import EndpointFactory

pytest.importorskip("fastapi", reason="transformers[serving] is not installed")

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_byte_model(tmp_path_factory.mktemp("served") / "model")
    GenerationConfig(do_sample=True, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home")), "OMP_NUM_THREADS": "1"}
    command = ["serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command],
        env=os.environ | offline,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, found = "", None  # the port is whichever the system gave
        for line in server.stderr or ():
            said += line
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said):
                break
        assert found, said
        yield f"{found[1]}/v1"
    finally:
        server.terminate()
        server.communicate()


@pytest.mark.parametrize("form", ["short", "contract"])
def test_a_real_server_writes_programs(form: str, url: str, model: Path, tmp_path: Path) -> None:
    config = searching_config(url, programs=6, form=form, max_new_tokens=12, model=str(model))
    factory = EndpointFactory(config, tmp_path)
    [prompt] = factory.prompts(0)
    asked = list(enumerate([prompt] * 6))
    written = factory.write(asked, 0, 1.0, [], lambda *_: None)
    assert len({sample.text for sample in written}) > 1
    assert factory.write(asked, 0, 1.0, [], lambda *_: None) == written
    spent = factory.journal.spent()
    extra = len("<user><assistant>") if form == "contract" else 0
    assert spent.tokens_in == 6 * (len(prompt.text.encode()) + extra)
    assert 6 <= spent.tokens_out <= 6 * 12


def test_what_it_does_not_serve_is_refused_in_its_own_words(url: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no word from 'other'.*Server is pinned to"):
        EndpointFactory(searching_config(url, model="other"), tmp_path)
