"""How long one nano candidate takes: merge four experts into the seed, then score 1,024 questions.

python benchmarks/nano_scoring.py [--threads 2] [--repeats 20]

The peer is `generate` of transformers with the same answers, measured in the same run; it has no merge to do.
The merge is TIES, which sorts, and so is one of the dearer methods.

Where other work shares the cores, set OMP_WAIT_POLICY=passive: two threads that wait by spinning take ten times
as long there.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdev.algorithms.library import methods
from selfdev.evaluation.scoring import encode, score_exact
from selfdev.evaluation.tasks import load_task
from selfdev.zoo import zoo_models

QUESTIONS = 1024


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--repeats", type=int, default=20)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)

    models = zoo_models("nano")
    tokenizer = AutoTokenizer.from_pretrained(models["seed"])
    seed = AutoModelForCausalLM.from_pretrained(models["seed"]).eval()
    experts = [AutoModelForCausalLM.from_pretrained(path) for path in models["experts"].values()]
    parameters = {name: parameter for name, parameter in seed.named_parameters() if ".mlp." in name}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    vectors = {
        name: torch.stack([expert.get_parameter(name).detach() - originals[name] for expert in experts])
        for name in parameters
    }
    questions = load_task("nano").development(QUESTIONS, order_seed=0)
    merge = methods()["ties"].merge
    began = time.perf_counter()
    encoded = encode(tokenizer, questions)
    print(f"encode, once a run    {time.perf_counter() - began:8.3f} s")

    merging, scoring = [], []
    for _ in range(options.repeats):
        began = time.perf_counter()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name] + merge(vectors[name]))
        merged = time.perf_counter()
        right = score_exact(seed, encoded)
        merging.append(merged - began)
        scoring.append(time.perf_counter() - merged)
    both = [sum(pair) for pair in zip(merging, scoring, strict=True)]

    ids = tokenizer([question.prompt for question in questions], return_tensors="pt", padding=True)
    longest = max(len(question.answer) for question in questions) + 1
    generating = []
    for _ in range(3):
        began = time.perf_counter()
        written = seed.generate(**ids, max_new_tokens=longest, do_sample=False)[
            :, ids["input_ids"].shape[1] :
        ]
        texts = [text.split(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(written)]
        generating.append(time.perf_counter() - began)
    same = [
        text == question.answer for text, question in zip(texts, questions, strict=True)
    ] == right.tolist()

    print(
        f"{options.threads} threads, {QUESTIONS} questions, {options.repeats} repeats; best, median and worst"
    )
    for name, seconds in {
        "merge": merging,
        "score": scoring,
        "merge and score": both,
        "generate": generating,
    }.items():
        print(f"{name:21} {min(seconds):8.3f} {statistics.median(seconds):8.3f} {max(seconds):8.3f} s")
    print(f"generate over score   {min(generating) / min(scoring):8.1f} times, best against best")
    print(f"verdicts equal to generate's: {same}")


if __name__ == "__main__":
    main()
