import datetime
import itertools
import json
import os
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import selfdev
from selfdev.config import parse_config
from selfdev.errors import UserError
from selfdev.evaluation.tasks import Question, Split, load_task, split_of
from selfdev.evaluation.tasks.checkers import Numeric
from selfdev.evaluation.tasks.near_duplicates import families

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


# --- tasks made of files

TASK = 'name: mine\ndata: mine.jsonl\nprompt: "{{question}}"\nstop: ["\\n"]\n'


@pytest.fixture
def write(tmp_path):
    """Writes a task file and its data files; rows are dicts, or lines as they are."""

    def written(text=TASK, **files):
        for name, rows in files.items():
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "mine.yaml")

    return written


def sums(count, start=0):
    return [{"question": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(start, start + count)]


def all_of(task, split):
    if split is Split.DEVELOPMENT:
        return task.development(task.size(split), 0)
    return task.open_test(task.size(split), OpenSeal())


def test_a_file_is_dealt_out_by_content(write):
    task = load_task(write(mine=sums(300)))
    development, test = (all_of(task, split) for split in (Split.DEVELOPMENT, Split.TEST))
    assert len(development) + len(test) == 300
    assert 90 < len(development) < 150  # 40 % of 300
    again = load_task(write(mine=[*reversed(sums(300)), {"question": "one more=", "answer": "1"}]))
    assert {q.id for q in development} <= {q.id for q in all_of(again, Split.DEVELOPMENT)}
    assert {q.id for q in test} <= {q.id for q in all_of(again, Split.TEST)}


def test_a_question_is_what_its_templates_make_of_a_row(write):
    text = (
        'name: mine\ndata: mine.jsonl\nprompt: "Q: {{a}} and {{b}}?\\nA:"\ntarget: "{{a}}{{b}} it is"\n'
        'answer: "{{a}}{{b}}"\ngroup: "{{kind}}"\nextract: {pattern: "[a-z]+", pick: last}\n'
    )
    rows = [{"a": "x" * i, "b": "y", "kind": "odd" if i % 2 else "even"} for i in range(1, 60)]
    task = load_task(write(text, mine=rows))
    assert sorted(task.groups) == ["even", "odd"]
    question = next(q for q in all_of(task, Split.TEST) if q.group == "odd")
    count = question.answer.count("x")
    assert question.prompt == f"Q: {'x' * count} and y?\nA:"
    assert question.gold == f" {'x' * count}y it is"
    assert question.where.endswith(f"mine.jsonl:{count}")
    assert task.grading.read("the answer is abc.", "abc")["answer"].right


def test_given_files_are_the_splits(write):
    text = 'name: mine\ndevelopment_data: dev.jsonl\ntest_data: test.jsonl\nprompt: "{{question}}"\ntest_order: file\n'
    task = load_task(write(text, dev=sums(20), test=sums(30, start=20)))
    assert [q.prompt for q in all_of(task, Split.TEST)] == [row["question"] for row in sums(30, start=20)]
    assert {q.prompt for q in all_of(task, Split.DEVELOPMENT)} == {row["question"] for row in sums(20)}


STORY = "{} has {} apples in a basket and then buys {} more apples at the market. How many apples does {} have now?"


def test_near_duplicates_lie_in_one_split(write):
    """Rewordings of each of 60 stories: other numbers, other case and punctuation, another last word."""
    things = [f"{a}{b}" for a in "bcdfgklmnp" for b in ("ola", "ipu", "eno", "ara", "ufi", "osa")]
    rows, story_of = [], {}
    for i, thing in enumerate(things):
        told = [
            f"On {thing} street in {thing} town a {thing} farmer sells {i + n} {thing} seeds to {n} {thing} boys today."
            for n in (3, 17)
        ]
        told += [told[0].upper().replace(".", "  !"), told[1].replace("today", "again")]
        for text in told:
            story_of[text] = i
            rows.append({"question": text, "answer": str(i)})
    task = load_task(write(mine=rows))
    stories = [{story_of[q.prompt] for q in all_of(task, split)} for split in (Split.DEVELOPMENT, Split.TEST)]
    assert stories[0].isdisjoint(stories[1])
    assert stories[0] | stories[1] == set(range(60))


def test_families_by_hand():
    long = STORY.format("Mia", 3, 4, "Mia")
    texts = [
        long,
        STORY.format("Mia", 31, "4,000", "Mia"),
        long.upper().replace("?", " ?"),
        "What is 12 + 34?",
        "what is 12 + 34",
        "What is 12 + 35?",
        "Quite another question that shares no run of three words with any of them",
    ]
    assert families(texts) == [0, 0, 0, 3, 3, 5, 6]
    assert families(texts, mask_numbers=False) == [0, 1, 0, 3, 3, 5, 6]
    assert families(["a b", "A, B!", "a c"], mask_numbers=False) == [0, 0, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=14), min_size=2, max_size=12))
def test_no_pair_above_the_overlap_is_missed(drawn):
    """The prefix filter finds what comparing all pairs finds, and the families are its components."""
    texts = [" ".join(f"{word}{word}" for word in words) for words in drawn]
    runs = [set(zip(w, w[1:], w[2:], strict=False)) for w in drawn]
    label = list(range(len(texts)))
    for _ in texts:
        for i, j in itertools.combinations(range(len(texts)), 2):
            if len(runs[i] & runs[j]) >= 0.7 * len(runs[i] | runs[j]):
                label[i] = label[j] = min(label[i], label[j])
    assert families(texts) == label


@pytest.mark.parametrize("draw", ["hash", "first", "each"])
def test_examples_are_in_no_split_and_stand_before_every_question(write, draw):
    # Drawn for each of 30 test questions: 60 draws of 400 rows leave most of them to development.
    text = (
        "name: mine\nfew_shot_data: train.jsonl\ndevelopment_data: train.jsonl\ntest_data: test.jsonl\n"
        f'prompt: "{{{{question}}}}"\nfew_shot: 2\nfew_shot_draw: {draw}\n'
    )
    task = load_task(write(text, train=sums(400), test=sums(30, start=400)))
    development, test = (all_of(task, split) for split in (Split.DEVELOPMENT, Split.TEST))
    shown = {block.split(" ")[0] for q in development + test for block in q.context.split("\n\n")[:-1]}
    assert shown.isdisjoint(q.prompt for q in development + test)
    assert all(q.context.count("\n\n") == 2 for q in development + test)
    assert len(test) == 30
    assert len({q.context for q in development + test}) == 1 if draw != "each" else 20
    if draw == "first":
        assert test[0].context == "0+1= 1\n\n1+2= 3\n\n"
        assert test[0].text.startswith(test[0].context)


def test_a_test_question_whose_rewording_an_example_shows_is_left_out(write):
    text = (
        "name: mine\nfew_shot_data: train.jsonl\ndevelopment_data: train.jsonl\ntest_data: test.jsonl\n"
        'prompt: "{{question}}"\nfew_shot: 1\nfew_shot_draw: first\n'
    )
    leaked = [{"question": STORY.format("Mia", 3, n, "Mia"), "answer": "7"} for n in (4, 5)]
    task = load_task(write(text, train=[leaked[0], *sums(20)], test=[leaked[1], *sums(20, start=30)]))
    assert task.dropped[Split.TEST] == 1
    assert task.size(Split.TEST) == 20


def test_a_development_question_that_a_test_question_rewords_is_left_out(write):
    text = 'name: mine\ndevelopment_data: dev.jsonl\ntest_data: test.jsonl\nprompt: "{{question}}"\n'
    leaked = [{"question": STORY.format("Mia", 3, n, "Mia"), "answer": "7"} for n in (4, 5)]
    task = load_task(write(text, dev=[leaked[0], *sums(20)], test=[leaked[1], *sums(20, start=30)]))
    assert task.dropped == {Split.TRAINING: 0, Split.DEVELOPMENT: 1, Split.TEST: 0}
    with pytest.raises(UserError, match="no training question"):  # nor is it trained on
        next(task.training(task.groups, random.Random(0)))


def test_the_fingerprint_changes_with_template_and_data(write):
    first = load_task(write(mine=sums(40))).fingerprint
    assert load_task(write(mine=sums(40))).fingerprint == first
    assert load_task(write(TASK + "max_new_tokens: 9\n", mine=sums(40))).fingerprint != first
    assert load_task(write(mine=sums(41))).fingerprint != first


FILES = {"mine": sums(40)}
TWO_FILES = 'name: mine\ndevelopment_data: dev.jsonl\ntest_data: test.jsonl\nprompt: "{{question}}"\n'


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        ("name: mine\ndata: mine.jsonl\n", FILES, r"mine.yaml:1: the field 'prompt' is missing"),
        (
            TASK + "promt: x\n",
            FILES,
            r"mine.yaml:5: unknown field 'promt'; the nearest known one is 'prompt'",
        ),
        (
            TASK + "checker: {name: exact, ignorecase: true}\n",
            FILES,
            r"mine.yaml:5: unknown field 'checker.ignorecase'; the nearest known one is 'ignore_case'",
        ),
        (
            TASK + "extract: {last: {pattern: x, pik: last}}\n",
            FILES,
            r"unknown field 'extract.last.pik'; the nearest known one is 'pick'",
        ),
        ("name: mine\nprompt: x\n", FILES, r"mine.yaml:1: it names no questions"),
        (TASK + "stop: [", FILES, r"mine.yaml:5: no YAML"),
        (TASK + "max_new_tokens: 0\n", FILES, r"mine.yaml:5: max_new_tokens: .* not 0"),
        (TASK + "checker: exakt\n", FILES, r"mine.yaml:5: no checker 'exakt'; there are exact, numeric"),
        (TASK + 'extract: "("\n', FILES, r"mine.yaml:5: no regular expression"),
        (TASK + 'target: "{{answer"\n', FILES, r"mine.yaml:5: no template"),
        (TASK + "scoring: exact\nextract: x\n", FILES, r"takes no extraction"),
        (
            TASK + 'target: "{{anwser}}"\n',
            FILES,
            r"mine.yaml:5: the template `target` names the column 'anwser', which .*mine.jsonl does not have; its "
            r"columns are question, answer",
        ),
        (
            TASK,
            {"mine": [*sums(3), {"question": "7="}]},
            r"mine.jsonl:4: the field 'answer' is missing, and the template `target` needs it",
        ),
        (
            TASK,
            {"mine": [*sums(3), {"question": None, "answer": "1"}]},
            r"mine.jsonl:4: the field 'question'",
        ),
        (TASK, {"mine": [*sums(3), "", "{nonsense"]}, r"mine.jsonl:5: no JSON"),
        (TASK, {"mine": [*sums(3), f'{{"question": {"9" * 5000}}}']}, r"mine.jsonl:4: .*4300 digits"),
        (TASK, {"mine": [*sums(3), "[1]"]}, r"mine.jsonl:4: list, not an object"),
        (TASK, {"mine": []}, r"mine.jsonl: it holds no question"),
        (TASK, {}, r"mine.jsonl: No such file or directory; the task file names it"),
        (
            TASK,
            {"mine": [*sums(3), sums(1)[0]]},
            r"mine.jsonl:4: the same question .* stands at .*mine.jsonl:1",
        ),
        (
            TASK,
            {"mine": [{"id": 7, **row} for row in sums(2)]},
            r"mine.jsonl:2: the id 7 stands on line 1 already",
        ),
        (
            TASK + "checker: numeric\n",
            {"mine": [*sums(3), {"question": "7=", "answer": "seven"}]},
            r"mine.jsonl:4: the checker 'numeric' cannot use the answer 'seven': it is no number",
        ),
        (
            TASK,
            {"mine": [*sums(3), {"question": "7=", "answer": " "}]},
            r"mine.jsonl:4: the checker 'exact' cannot",
        ),
        (TASK, {"mine": sums(1)}, r"mine.yaml:2: the (development|test) split is empty"),
        (
            TASK,
            {"mine": [{"question": STORY.format("Mia", n, n, "Mia"), "answer": "1"} for n in range(40)]},
            r"mine.yaml:2: the (development|test) split is empty: .* or set `near_duplicates: text`",
        ),
        (
            TWO_FILES,
            {"dev": sums(4), "test": [{"question": "", "answer": "1", **row} for row in sums(4)]},
            r"the same question with the same answer stands at",
        ),
        (TASK + "few_shot: 41\n", FILES, r"mine.yaml:5: 41 few-shot examples, and there are 40 rows"),
    ],
)
def test_bad_input_is_refused_with_its_place(write, text, files, message):
    with pytest.raises(UserError, match=message):
        load_task(write(text, **files))


def test_a_bad_task_ends_a_run_before_it_begins(write, tmp_path):
    out = tmp_path / "run"
    config = {"seed": "zoo:nano/seed", "experts": {"add": "zoo:nano/add", "max": "zoo:nano/max"}}
    run = {"name": "x", "factory": {"model": "absent"}, "merge": config}
    with pytest.raises(UserError, match=r"mine.jsonl:2: the field 'answer' is missing"):
        selfdev.run(
            parse_config(run | {"task": {"name": write(mine=[*sums(1), {"question": "7="}])}}, "x"), out
        )
    assert not out.exists()


# --- built-in tasks beside nano


@pytest.mark.parametrize("name", ["word_problems", "units", "dates", "strings"])
def test_everyday_tasks(name):
    task = load_task(name)
    development, test = (all_of(task, split) for split in (Split.DEVELOPMENT, Split.TEST))
    assert (len(development), len(test)) == (384, 640)
    prompts = [{q.prompt for q in each} for each in (development, test)]
    assert prompts[0].isdisjoint(prompts[1])
    assert len({q.context for q in development + test}) == 1
    shown = development[0].context
    assert shown.count("Answer:") == 4
    assert not any(q.prompt in shown for q in development + test)
    for question in development + test:
        assert question.answer == everyday_answer(question)


def everyday_answer(question):
    """The answer by a way of its own, from the prompt alone."""
    text = question.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    quoted = re.findall(r"'(\w+)'", text)
    match question.group:
        case "buy":
            return str(numbers[0] * numbers[1])
        case "share":
            return str(numbers[0] // numbers[1])
        case "left":
            return str(numbers[0] - numbers[1])
        case "together":
            return str(sum(numbers))
        case "length" | "weight" | "time" | "volume":
            units = re.sub(r"How many (\w+) are \d+ (\w+)\?", r"\2 \1", text)
            units = re.sub(r"Convert \d+ (\w+) to (\w+)\.", r"\1 \2", units)
            factor = {
                "metres centimetres": 100,
                "kilometres metres": 1000,
                "yards feet": 3,
                "kilograms grams": 1000,
                "tonnes kilograms": 1000,
                "pounds ounces": 16,
                "hours minutes": 60,
                "days hours": 24,
                "weeks days": 7,
                "litres millilitres": 1000,
                "gallons quarts": 4,
                "cups spoons": 16,
            }[units]
            return str(numbers[0] * factor)
        case "weekday":
            days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
            return days[(days.index(text.split()[-1].strip("?")) + numbers[0]) % 7]
        case "month":
            months = [
                "January",
                "February",
                "March",
                "April",
                "May",
                "June",
                "July",
                "August",
                "September",
                "October",
                "November",
                "December",
            ]
            return months[(months.index(text.split()[-1].strip("?")) + numbers[0]) % 12]
        case "between":
            return str(numbers[1] - numbers[0])
        case "later":
            start = datetime.date(*numbers[1:])
            return str(start + datetime.timedelta(days=numbers[0]))
        case "reverse":
            return "".join(reversed(quoted[0]))
        case "last":
            return quoted[0][0] if "first" in text else quoted[0][-1]
        case "count":
            return str(sum(letter == quoted[0] for letter in quoted[1]))
        case "join":
            return quoted[0] + quoted[1]


# --- GSM8K and MATH


def gsm8k_folder(tmp_path, train=60, test=20):
    """Files of GSM8K's form, invented."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    names = [
        f"{a}{b}" for a in "BDFGKLMNPR" for b in ("ola", "ipu", "eno", "ara", "ufi", "osa", "elo", "iki")
    ]
    for file, start, count in (("train", 0, train), ("test", train, test)):
        rows = []
        for i in range(start, start + count):
            name = names[i]
            question = (
                f"{name} sees {i} {name}birds on a {name}tree. {i} more {name}birds come. How many are there?"
            )
            rows.append(
                {"question": question, "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i:,}"}
            )
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gsm8k_reads_answers_as_the_harness_does(tmp_path):
    task = load_task(f"gsm8k_fixed:{gsm8k_folder(tmp_path)}")
    gold = "16 - 3 = 13\n13 * 100 = 1300.\n#### 1,300"
    for text, strict, flexible in [
        (" 5 + 8\n#### 1300\n\n", True, True),
        (" She has $1,300.", False, True),
        (" #### 1,300.00", False, False),
        (" #### 7, or rather 1300", False, True),
        (" none", False, False),
    ]:
        read = task.grading.read(task.grading.cut(text), gold)
        assert [reading.right for reading in read.values()] == [strict, flexible], text
    assert list(read) == ["strict-match", "flexible-extract"]
    assert read["strict-match"].extracted == "[invalid]"
    assert task.grading.cut("#### 5\n\nQuestion: and") == "#### 5\n\n"


def test_gsm8k_shows_the_examples_of_the_harness(tmp_path):
    folder = gsm8k_folder(tmp_path, train=60, test=4)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    task = load_task(f"gsm8k:{folder}")
    stream = random.Random(1234)
    for question in all_of(task, Split.TEST):
        drawn = stream.sample(rows, 5)
        shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in drawn)
        assert question.context == shown
    fixed = all_of(load_task(f"gsm8k_fixed:{folder}"), Split.TEST)[0]
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:5])
    assert fixed.context == shown


@pytest.mark.skipif(
    "SELFDEV_GSM8K" not in os.environ, reason="SELFDEV_GSM8K names no folder of the real files"
)
def test_the_real_gsm8k():
    task = load_task(f"gsm8k:{os.environ['SELFDEV_GSM8K']}")
    assert (task.size(Split.DEVELOPMENT), task.size(Split.TEST)) == (3083, 1318)
    development, test = (all_of(task, split) for split in (Split.DEVELOPMENT, Split.TEST))
    prompts = {q.prompt for q in development + test}
    assert len(prompts) == 3083 + 1318
    shown = {part for q in development + test for part in q.context.split("\n\nQuestion: ")}
    assert not {q.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") for q in development + test} & {
        part.partition("\nAnswer:")[0].removeprefix("Question: ") for part in shown
    }


def test_math_has_four_examples_and_judges_by_mathematics(tmp_path):
    pytest.importorskip("math_verify")
    for file, start in (("train", 0), ("test", 40)):
        rows = [
            {
                "problem": f"Find {'x' * n} if it is half of ${n}$.",
                "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$.",
            }
            for n in range(start + 1, start + 31)
        ]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(f"math:{tmp_path}")
    question = all_of(task, Split.TEST)[0]
    assert question.context.count("I hope it is correct.") == 4
    assert question.text.endswith("Problem:\nFind " + "x" * 41 + " if it is half of $41$.\n\nSolution:")
    right = task.grading.read(
        "Final Answer: The final answer is $20.5$. I hope it is correct.", question.answer
    )
    wrong = task.grading.read(
        "Final Answer: The final answer is $20$. I hope it is correct.", question.answer
    )
    assert (right["text"].right, wrong["text"].right) == (True, False)
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "?", "solution": "none"}) + "\n")
    with pytest.raises(UserError, match="the checker 'math-verify' cannot use the answer"):
        load_task(f"math:{tmp_path}")


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("1,234.50", "1234.5", True),
        ("$7", "7", True),
        ("7.", "7", True),
        ("-0", "0", True),
        ("7.01", "7", False),
        ("seven", "7", False),
        ("", "7", False),
        ("nan", "7", False),
    ],
)
def test_numeric(answer, gold, right):
    assert Numeric().right(answer, gold) is right
