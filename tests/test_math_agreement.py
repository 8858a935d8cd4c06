"""MATH as lm-evaluation-harness asks and judges it: its own task functions beside ours, and a whole run of each."""

import json

import pytest

from byte_model import save_byte_model
from selfdev.evaluation.harness import compare
from selfdev.evaluation.tasks import load_task

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
try:
    from lm_eval.tasks.minerva_math import utils as minerva
except (ImportError, AssertionError) as error:  # it insists on one version of antlr4
    pytest.skip(f"lm-eval's MATH cannot be loaded: {error}", allow_module_level=True)

HALF = r"Half of one is $\boxed{\frac{1}{2}}$."
PAIR = r"So the point is $\boxed{(3,-4)}$."
ROOTS = r"The solutions are $\boxed{1,-2}$."
INTERVAL = r"We get $x \in \boxed{[2,5)}$."
ROOT = r"It is $\sqrt{12} = \boxed{2\sqrt{3}}$."
COUNT = r"There are $\boxed{1{,}024}$ ways."
ANGLE = r"The angle is $\boxed{45^\circ}$."
WORD = r"The answer is $\boxed{\text{Tuesday}}$."
PERCENT = r"That is $\boxed{12\%}$."
POLYNOMIAL = r"Hence $\boxed{x^2+2x+1}$."
MATRIX = r"So $\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}$."
EQUATION = r"The line is $\boxed{y = 2x - 3}$."
BIG = r"In total $\boxed{10^{6}}$."
MONEY = r"It costs $\boxed{\$3.50}$."


def final(answer: str) -> str:
    return f" We compute.\nFinal Answer: The final answer is ${answer}$. I hope it is correct."


OUTPUTS = [
    (HALF, final(r"\frac{1}{2}")),
    (HALF, final(r"\frac12")),
    (HALF, final(r"\dfrac{2}{4}")),
    (HALF, final("0.5")),
    (HALF, final("1/2")),
    (HALF, final("0.50001")),
    (HALF, final(r"-\frac{1}{2}")),
    (HALF, " The answer is one half."),
    (HALF, r" First \boxed{3}, no, \boxed{\frac{1}{2}}."),
    (HALF, r" First \boxed{\frac{1}{2}}, no, \boxed{3}."),
    (HALF, ""),
    (HALF, " " * 20),
    (HALF, r" $\boxed{\frac{1}{2}"),
    (HALF, r" $\frac{1}{0}$"),
    (PAIR, final("(3,-4)")),
    (PAIR, final("(3, -4)")),
    (PAIR, final(r"\left(3,-4\right)")),
    (PAIR, final("(-4,3)")),
    (PAIR, final("3,-4")),
    (ROOTS, final("1,-2")),
    (ROOTS, final("-2,1")),
    (ROOTS, final(r"\{1,-2\}")),
    (ROOTS, final("x=1, x=-2")),
    (ROOTS, final("1")),
    (INTERVAL, final("[2,5)")),
    (INTERVAL, final("[2,5]")),
    (INTERVAL, final(r"2 \le x < 5")),
    (ROOT, final(r"2\sqrt{3}")),
    (ROOT, final(r"\sqrt{12}")),
    (ROOT, final(r"2\sqrt3")),
    (ROOT, final("3.4641")),
    (COUNT, final("1024")),
    (COUNT, final("1,024")),
    (COUNT, final("2^{10}")),
    (COUNT, final("1,025")),
    (ANGLE, final("45")),
    (ANGLE, final(r"45^{\circ}")),
    (ANGLE, final(r"\frac{\pi}{4}")),
    (WORD, final(r"\text{Tuesday}")),
    (WORD, final(r"\text{Monday}")),
    (WORD, " It is Tuesday."),
    (PERCENT, final(r"12\%")),
    (PERCENT, final("0.12")),
    (PERCENT, final("12")),
    (POLYNOMIAL, final("(x+1)^2")),
    (POLYNOMIAL, final("x^2+2x+2")),
    (MATRIX, final(r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")),
    (MATRIX, final(r"\begin{pmatrix}1&2\\4&3\end{pmatrix}")),
    (EQUATION, final("y=2x-3")),
    (EQUATION, final("2x-3")),
    (EQUATION, final("2x - y = 3")),
    (BIG, final("1000000")),
    (BIG, final("1,000,000")),
    (MONEY, final("3.50")),
    (MONEY, final(r"\$3.5")),
    (MONEY, " He pays 3.5 dollars and gets 7 dollars back."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small folder in MATH's form."""
    folder = tmp_path_factory.mktemp("math")
    solutions = dict.fromkeys(solution for solution, _ in OUTPUTS)
    problems = [
        {
            "problem": f"Problem {'abcdefghijklmn'[i]}{'!' * i}: $x_{i}$?",
            "solution": solution,
            "level": "Level 1",
        }
        for i, solution in enumerate(solutions)
    ]
    for file, rows in (("train", problems[:6]), ("test", problems[6:])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_verdicts_on_tricky_outputs_are_the_harness_own(folder):
    """Of each output: what math-verify finds in it, and whether that is right."""
    grading = load_task(f"math:{folder}").grading
    assert len(OUTPUTS) >= 40
    ours = [grading.read(text, solution)["text"].right for solution, text in OUTPUTS]
    theirs = [
        minerva.process_results({"solution": solution, "answer": ""}, [text])["math_verify"] == 1
        for solution, text in OUTPUTS
    ]
    differing = [pair for pair, a, b in zip(OUTPUTS, ours, theirs, strict=True) if a != b]
    assert differing == []
    assert 15 <= sum(ours) <= len(OUTPUTS) - 15


def test_prompts_are_the_harness_own(folder):
    task = load_task(f"math:{folder}")
    [question, *_] = task.development(1, 0)
    shown = minerva.list_fewshot_samples()
    examples = [minerva.doc_to_text(each) + " " + each["solution"] for each in shown]
    problem = question.prompt.removeprefix("Problem:\n").removesuffix("\n\nSolution:")
    assert question.text == "\n\n".join([*examples, minerva.doc_to_text({"problem": problem})])


def test_the_harness_own_task_gets_the_same_texts_and_verdicts(folder, tmp_path):
    """With its own configuration, pointed at the local files."""
    model = str(save_byte_model(tmp_path / "bytes"))
    ours, both = compare(model, f"math:{folder}", limit=3)
    assert (both.verdicts, both.extracted, both.questions) == (3, 3, 3)
    assert all(len(answer.text) > 20 for answer in ours.answers)
