import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdev.errors import UserError
from selfdev.evaluation.tasks import Question, Split, load_task, split_of

GROUPS = ("add", "sub", "sum", "max", "rev", "sort")


class OpenSeal:
    """A seal that opens, and keeps a record of it."""

    def __init__(self):
        self.record = []

    def opened(self, task_name):
        self.record.append(task_name)


class ShutSeal:
    def opened(self, task_name):
        raise UserError(f"the test split of task '{task_name}' is sealed until the verdict")


@pytest.fixture(scope="module")
def task():
    return load_task("nano")


@pytest.fixture(scope="module")
def splits(task):
    """All development and test questions, and a hundred thousand training questions."""
    return {
        Split.TRAINING: set(itertools.islice(task.training(GROUPS, random.Random(5)), 100_000)),
        Split.DEVELOPMENT: set(task.development(3072, order_seed=0)),
        Split.TEST: set(task.open_test(6144, OpenSeal())),
    }


def operands(question):
    """What a question asks, however its operands are ordered."""
    body = question.prompt.strip("tmrs=")
    if question.group in ("add", "sub", "max"):
        return question.group, tuple(sorted(map(int, body.replace("+", ",").replace("-", ",").split(","))))
    if question.group == "rev":
        return question.group, min(body, body[::-1])
    return question.group, "".join(sorted(body))


def right_answer(question):
    """The answer by a way of its own, from the prompt alone."""
    body = question.prompt.strip("tmrs=")
    match question.group:
        case "add" | "sub":
            return str(eval(body))
        case "sum":
            return str(sum(int(digit) for digit in body))
        case "max":
            return str(max(int(number) for number in body.split(",")))
        case "rev":
            return "".join(reversed(body))
        case "sort":
            return "".join(digit * body.count(digit) for digit in "0123456789")


def test_splits_share_no_question_and_no_reordering_of_one(splits):
    for one, other in itertools.combinations(splits.values(), 2):
        assert not {question.id for question in one} & {question.id for question in other}
        assert not set(map(operands, one)) & set(map(operands, other))


def test_training_reaches_all_questions_of_its_split_and_no_other(splits):
    # There are 10,000 questions `add`; 100,000 draws over six groups meet nearly all of the training split.
    seen = {question.prompt for question in splits[Split.TRAINING] if question.group == "add"}
    assert 5000 < len(seen) < 6700


def test_splits_are_as_large_as_promised(splits):
    assert len(splits[Split.TEST]) == 6144
    assert len(splits[Split.DEVELOPMENT]) == 3072
    for split, least in ((Split.TEST, 683), (Split.DEVELOPMENT, 342)):
        for group in GROUPS:
            assert sum(question.group == group for question in splits[split]) >= least


def test_every_answer_is_right(splits):
    for question in itertools.chain(splits[Split.DEVELOPMENT], splits[Split.TEST]):
        assert question.answer == right_answer(question)


def test_shares_of_the_splits():
    counts = dict.fromkeys(Split, 0)
    for number in range(20_000):
        counts[split_of(f"question {number}")] += 1
    assert counts[Split.TRAINING] == pytest.approx(12_000, abs=300)
    assert counts[Split.DEVELOPMENT] == pytest.approx(3_000, abs=200)
    assert counts[Split.TEST] == pytest.approx(5_000, abs=250)


@settings(max_examples=15, deadline=None)
@given(order_seed=st.integers(0, 10**6), count=st.integers(1, 3072))
def test_development_is_balanced_distinct_and_nested(order_seed, count):
    task = load_task("nano")
    questions = task.development(count, order_seed)
    assert questions == task.development(3072, order_seed)[:count]
    assert len(set(questions)) == count
    sizes = [sum(question.group == group for question in questions) for group in GROUPS]
    assert max(sizes) - min(sizes) <= 1


def test_another_order_seed_draws_other_questions(task):
    assert task.development(600, 1) != task.development(600, 2)
    assert set(task.development(600, 1)) != set(task.development(600, 2))
    assert set(task.development(3072, 1)) == set(task.development(3072, 2))


def test_a_shut_seal_gives_no_question(task):
    with pytest.raises(UserError, match="sealed until the verdict"):
        task.open_test(1, ShutSeal())


def test_opening_is_recorded_and_always_gives_the_same_questions(task):
    seal = OpenSeal()
    first = task.open_test(4096, seal)
    assert seal.record == ["nano"]
    assert task.open_test(100, seal) == first[:100]
    assert seal.record == ["nano", "nano"]


def test_development_holds_no_test_question_however_much_is_asked_for(task):
    with pytest.raises(UserError, match="it has 3072; ask for 1 to 3072"):
        task.development(3073, order_seed=0)
    with pytest.raises(UserError, match="0 development questions were asked for"):
        task.development(0, order_seed=0)


def test_too_many_test_questions_are_refused(task):
    with pytest.raises(UserError, match="it has 6144"):
        task.open_test(6145, OpenSeal())


def test_an_impossible_count_does_not_open_the_seal(task):
    seal = OpenSeal()
    with pytest.raises(UserError):
        task.open_test(6145, seal)
    assert seal.record == []


def test_id_is_of_the_content():
    question = Question("add", "1+2=", "3")
    assert question.id == Question("add", "1+2=", "3").id
    assert len(question.id) == 16
    others = [Question("sub", "1+2=", "3"), Question("add", "1+2", "=3"), Question("add", "1+2=", "4")]
    assert question.id not in {other.id for other in others}


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="unknown task 'nanno'; the nearest known one is 'nano'"):
        load_task("nanno")
