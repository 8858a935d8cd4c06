"""Questions that were asked before are left out with their rewordings, and what is left is balanced and distinct."""

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdev.errors import UserError
from selfdev.evaluation.tasks import Question, Split, load_task


class Opens:
    """A seal that opens, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def opened(self, task_name: str) -> None:
        self.count += 1


def ids(questions: list[Question]) -> set[str]:
    return {question.id for question in questions}


def sum_of(question: Question) -> tuple[int, ...]:
    """What a question `add` asks, in whatever order."""
    return tuple(sorted(map(int, question.prompt.strip("=").split("+"))))


@settings(max_examples=5, deadline=None)
@given(development=st.integers(1, 1500), test=st.integers(1, 4098), order_seed=st.integers(0, 9))
def test_what_was_asked_and_its_rewordings_are_left_out_of_both_splits(
    development: int, test: int, order_seed: int
) -> None:
    task = load_task("nano")
    before = task.development(development, order_seed) + task.open_test(test, Opens())
    asked = ids(before)
    left = task.development(task.size(Split.DEVELOPMENT, asked), order_seed, asked)
    left_test = task.open_test(task.size(Split.TEST, asked), Opens(), asked)
    assert not ids(left + left_test) & asked
    assert len(ids(left + left_test)) == len(left) + len(left_test)
    sums = {sum_of(question) for question in before if question.group == "add"}
    assert sums.isdisjoint(sum_of(question) for question in left + left_test if question.group == "add")
    counts = {group: sum(question.group == group for question in left_test) for group in task.groups}
    assert len(set(counts.values())) == 1


def test_nothing_left_out_changes_nothing() -> None:
    task = load_task("nano")
    foreign = {"0123456789abcdef"}
    assert task.development(600, 3, foreign) == task.development(600, 3)
    assert task.open_test(600, Opens(), foreign) == task.open_test(600, Opens())


def test_more_than_is_left_is_refused_before_the_seal_opens() -> None:
    task, seal = load_task("nano"), Opens()
    asked = ids(task.open_test(task.size(Split.TEST), Opens()))
    assert task.size(Split.TEST, asked) == 0
    with pytest.raises(UserError, match=r"1 test questions .* it has 0 that were not asked before"):
        task.open_test(1, seal, asked)
    assert seal.count == 0


def test_a_file_s_near_duplicates_go_with_the_question(tmp_path: Path) -> None:
    told = [
        "Mia has {} apples in her bag and buys some more of them on Monday, {} in all",
        "A train with {} waggons leaves the northern station before noon while {} stay behind it",
        "Every shelf of this library carries {} heavy books below its top and {} light ones",
        "Our baker sold {} loaves early today although {} people had come into the shop",
        "The river rose by {} metres last winter and flooded {} houses near the old mill",
        "In spring the farmer plants {} rows of beans between {} rows of maize and waits",
    ]
    rows = [{"question": text.format(a, a + 1), "answer": str(a)} for text in told for a in (3, 8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    declared = (
        'name: told\ndata: d.jsonl\nprompt: "{{question}}"\nscoring: generate\ndevelopment_share: 0.5\n'
    )
    (tmp_path / "told.yaml").write_text(declared)
    task = load_task(str(tmp_path / "told.yaml"))
    everything = task.open_test(task.size(Split.TEST), Opens())
    [first] = task.open_test(1, Opens())
    left = task.open_test(task.size(Split.TEST, {first.id}), Opens(), {first.id})
    [twin] = [q for q in everything if q.id != first.id and q.prompt[:3] == first.prompt[:3]]
    assert ids(left) == ids(everything) - {first.id, twin.id}


def right_answer(question: Question) -> str:
    """The answer by a way of its own, from the prompt alone."""
    body = question.prompt[1:-1]
    match question.group:
        case "gap":
            return "".join(str(max(a, b) - min(a, b)) for a, b in zip(*(map(int, body[i:]) for i in (0, 1))))  # noqa: B905
        case "low":
            return body.split(",")[min(range(3), key=lambda i: int(body.split(",")[i]))]
        case "tri":
            return str(sum([int(body)] * 3))
        case "down":
            return "".join(digit * body.count(digit) for digit in "9876543210")
        case "rot":
            return (body * 2)[1:6]
        case "tot":
            return str(sum(ord(digit) - ord("0") for digit in body))
    raise AssertionError(question.group)


def test_nano2_is_right_and_its_splits_share_nothing() -> None:
    task = load_task("nano2")
    development, test = task.development(3072, 0), task.open_test(6144, Opens())
    training = list(itertools.islice(task.training(task.groups, random.Random(1)), 20_000))
    for question in development + test:
        assert question.answer == right_answer(question)
    splits = ids(development), ids(test), ids(training)
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(splits, 2))
    assert (len(splits[0]), len(splits[1])) == (3072, 6144)


def test_nano_and_nano2_share_no_question_and_no_skill() -> None:
    one, two = load_task("nano"), load_task("nano2")
    assert set(one.groups).isdisjoint(two.groups)
    prompts = [{q.prompt[0] for q in task.development(3072, 0)} for task in (one, two)]
    assert prompts[0].isdisjoint(prompts[1])  # each exercise begins with a letter of its own, or with a digit
