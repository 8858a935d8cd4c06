"""Is merging a zoo a real problem? The seed, its experts and the human methods on development questions.

python benchmarks/nano_zoo.py [nano|nano2] [--folder ZOO] [--questions 1024] [--settings 29]
python benchmarks/nano_zoo.py [nano|nano2] --transplant GROUP

Each method is tuned on the questions that it is shown with, so its row is a little too good.
The row "best model for each group" is what a merge would reach that kept every expert's skill.

`--transplant` answers why the experts are trained in their MLP weights alone: it trains one expert in all of
its weights (a minute) and puts only its MLP weights into the seed.
"""

import argparse
import copy
import dataclasses
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdev.algorithms.library import Method, methods
from selfdev.evaluation.objective import mean_by_group
from selfdev.evaluation.scoring import encode, score_exact
from selfdev.evaluation.tasks import load_task
from selfdev.zoo import zoo_models, zoos
from selfdev.zoo.nano import RECIPES, nano_tokenizer, train

METHODS = (
    "linear",
    "task_arithmetic",
    "weighted_task_arithmetic",
    "ties",
    "dare_ties",
    "magmax",
    "model_stock",
    "tsv_m",
    "iso_c",
    "wudi",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("zoo", nargs="?", default="nano", choices=zoos())
    arguments.add_argument(
        "--folder", type=Path, help="where it was built anew; the one of the package by default"
    )
    arguments.add_argument("--questions", type=int, default=1024)
    arguments.add_argument("--settings", type=int, default=29, help="settings tried for each method")
    arguments.add_argument("--transplant", metavar="GROUP", help="train one expert in all of its weights")
    options = arguments.parse_args()

    models, task = zoo_models(options.zoo, options.folder), load_task(options.zoo)
    questions = task.development(options.questions, order_seed=0)
    groups = [question.group for question in questions]
    encoded = encode(AutoTokenizer.from_pretrained(models["seed"]), questions)
    seed = AutoModelForCausalLM.from_pretrained(models["seed"])
    experts = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in models["experts"].items()}

    print(f"{'':26}" + "".join(f"{group:>7}" for group in task.groups) + "   mean")
    alone = {
        name: mean_by_group(groups, score_exact(m, encoded).tolist())
        for name, m in {"seed": seed, **experts}.items()
    }
    for name, accuracy in alone.items():
        show(name, accuracy)
    show(
        "best model for each group",
        {group: max(each[group] for each in alone.values()) for group in alone["seed"]},
    )

    parameters = {name: parameter for name, parameter in seed.named_parameters() if ".mlp." in name}
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    vectors = {
        name: torch.stack(
            [expert.get_parameter(name).detach() - originals[name] for expert in experts.values()]
        )
        for name in parameters
    }
    if options.transplant:
        expert = copy.deepcopy(seed)
        recipe = dataclasses.replace(RECIPES[options.zoo].experts[options.transplant], mlp_only=False)
        train(expert, nano_tokenizer(), task, recipe, print)
        show("expert, all weights", mean_by_group(groups, score_exact(expert, encoded).tolist()))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(expert.get_parameter(name))
        show("its MLP in the seed", mean_by_group(groups, score_exact(seed, encoded).tolist()))
        return
    for name in METHODS:
        method = methods()[name]
        found: dict[float, tuple[dict[str, float], str]] = {}
        for setting in trials(method, options.settings, len(experts)):
            with torch.no_grad():
                for tensor, parameter in parameters.items():
                    merged = method.merge(vectors[tensor], originals[tensor], **setting)
                    parameter.copy_(originals[tensor] + merged)
            accuracy = mean_by_group(groups, score_exact(seed, encoded).tolist())
            found[fmean(accuracy.values())] = accuracy, str(setting)
        show(name, *found[max(found)])


def trials(method: Method, count: int, experts: int) -> list[dict[str, Any]]:
    """Settings to try: an even grid where one number is searched, else random ones."""
    if not method.parameters:
        return [{}]
    if len(method.parameters) == 1 and not method.parameters[0].per_expert:
        return [{method.parameters[0].name: value} for value in method.parameters[0].grid(count)]
    stream = random.Random(0)
    return [method.sample(stream, experts) for _ in range(count)]


def show(name: str, accuracy: dict[str, float], note: str = "") -> None:
    shares = "".join(f"{100 * share:7.1f}" for share in accuracy.values())
    print(f"{name:26}{shares}{100 * fmean(accuracy.values()):7.1f}  {note}", flush=True)


if __name__ == "__main__":
    main()
