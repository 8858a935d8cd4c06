"""Agreement with lm-evaluation-harness, question by question, offline."""

import json
import random

import pytest

from byte_model import save_byte_model
from checkpoints import nano_seed
from selfdev.cli import main
from selfdev.errors import UserError
from selfdev.evaluation.harness import Verdict, agreement, compare
from selfdev.evaluation.measure import measure
from test_checkpoint import lora
from test_tasks import gsm8k_folder

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    return str(save_byte_model(tmp_path_factory.mktemp("models") / "bytes"))


@pytest.fixture
def sums(tmp_path):
    """A JSONL task of the zoo's own kind of sums, on which the seed scores between 20 and 80 %."""
    stream = random.Random(0)
    drawn = sorted(
        {(kind, stream.randrange(60, 100), stream.randrange(60)) for kind in "+-" for _ in range(120)}
    )
    rows = [{"sum": f"{a}{kind}{b}", "result": a + b if kind == "+" else a - b} for kind, a, b in drawn]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(**fields):
        fields = {
            "name": "sums",
            "data": "sums.jsonl",
            "prompt": "{{sum}}=",
            "target": "{{result}}",
            "delimiter": "",
            "max_new_tokens": 6,
        } | fields
        (tmp_path / "sums.yaml").write_text(json.dumps(fields))  # JSON is YAML
        return str(tmp_path / "sums.yaml")

    return task


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"extract": {"pattern": "[0-9]+", "pick": "last"}, "checker": "numeric"},
        {
            "extract": "([0-9])$",
            "answer": "{{(result|string)[-1]}}",
            "checker": {"name": "exact", "ignore": ["x"]},
        },
        {"few_shot": 2, "separator": ",", "stop": [","]},
        {"scoring": "exact"},
    ],
)
def test_a_jsonl_task_gets_the_same_verdicts(sums, fields):
    ours, both = compare("zoo:nano/seed", sums(**fields), limit=40)
    assert (both.verdicts, both.questions) == (40, 40)
    assert both.extracted == (None if fields.get("scoring") else 40)
    assert both.differing == []
    assert both.score == pytest.approx(sum(a.outcome for a in ours.answers) / 40)
    if not fields.get("few_shot") and "answer" not in fields:  # examples are strange to it, last digits easy
        assert 0.2 <= ours.score <= 0.8


@pytest.mark.parametrize(
    ("name", "split"), [("gsm8k", "test"), ("gsm8k", "development"), ("gsm8k_fixed", "test")]
)
def test_gsm8k_gets_the_same_texts(byte_folder, tmp_path, name, split):
    """With invented files of GSM8K's form; on `test` with the harness's own task configuration."""
    folder = gsm8k_folder(tmp_path, train=60, test=6)
    ours, both = compare(byte_folder, f"{name}:{folder}", split, limit=4)
    assert (both.verdicts, both.extracted, both.questions) == (4, 4, 4)
    assert all(len(answer.text) > 20 for answer in ours.answers)


@pytest.mark.parametrize("name", ["units", "strings"])
def test_everyday_tasks_get_the_same_texts(byte_folder, name):
    _, both = compare(byte_folder, name, limit=8)
    assert (both.verdicts, both.extracted) == (8, 8)


def test_disagreement_is_counted_and_named(sums):
    ours = measure("zoo:nano/seed", sums(), limit=3)
    theirs = {a.question: Verdict(a.outcome, {"text": a.extracted}) for a in ours.answers}
    first, second, _ = (a.question for a in ours.answers)
    theirs[first] = Verdict(not theirs[first].right, theirs[first].extracted)
    theirs[second] = Verdict(theirs[second].right, {"text": "another"})
    found = agreement(ours, theirs)
    assert (found.verdicts, found.extracted, found.differing) == (2, 2, [first, second])


def test_the_command_shows_both(sums, capsys):
    assert (
        main(["evaluate", "zoo:nano/seed", "--task", sums(), "--limit", "6", "--with", "lm-eval", "--json"])
        == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["lm_eval"]["verdicts"] == shown["questions"] == 6
    assert main(["evaluate", "zoo:nano/seed", "--task", sums(), "--limit", "6", "--with", "lm-eval"]) == 0
    assert "the same verdict on 6 of 6, the same answer on 6" in capsys.readouterr().out


def test_likelihood_has_no_verdict_to_compare(sums):
    with pytest.raises(UserError, match="compared on answers"):
        compare("zoo:nano/seed", sums(scoring="loglikelihood"), limit=3)


def test_an_adapter_gets_the_same_verdicts(sums, tmp_path):
    lora(nano_seed(), tmp_path / "adapter", r=2, target_modules=["up_proj"])
    ours, agreed = compare(str(tmp_path / "adapter"), sums(), limit=40)
    assert agreed.verdicts == agreed.questions == 40
    assert ours.score != measure("zoo:nano/seed", sums(), limit=40).score
