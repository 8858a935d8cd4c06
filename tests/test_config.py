from pathlib import Path

import pytest

from selfdev.algorithms.source import Form
from selfdev.config import change_config, load_config, parse_config, presets
from selfdev.errors import UserError
from test_tasks import gsm8k_folder


def questions_here(tmp_path: Path) -> list[str]:
    """The preset `paper` with questions from a folder in the place of the Hub's."""
    return [f"task.name=gsm8k_fixed:{gsm8k_folder(tmp_path)}", "task.development=10", "task.test=10"]


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name: str, tmp_path: Path) -> None:
    assert load_config(name, questions_here(tmp_path) if name == "paper" else []).name == name


def test_the_paper_has_no_help_and_its_own_numbers(tmp_path: Path) -> None:
    paper = load_config("paper", questions_here(tmp_path))
    writer, learned, chosen = paper.factory, paper.refinement, paper.preferences
    assert (paper.iterations, paper.programs, paper.verdict.finalists) == (3, 3000, 15)
    assert [round(writer.temperature_at(t), 2) for t in range(3)] == [1.2, 1.0, 0.86]
    assert (learned.loss, learned.beta, learned.learning_rate, learned.rank) == ("sigmoid", 0.01, 1e-6, 256)
    assert (chosen.chosen_share, chosen.rejected_share, chosen.elites) == (0.03, 0.10, 3)
    assert (writer.grammar, writer.warm_start.steps, chosen.repairs, learned.imitation.passes) == (
        "none",
        0,
        0,
        0,
    )
    assert (paper.prompt.examples, len(paper.prompt.names), paper.prompt.form) == ("fixed", 1, Form.CONTRACT)
    assert (learned.refit, learned.held_to, paper.scaling.norm) == ("continue", "previous", None)
    assert (writer.dtype, paper.controls) == ("float32", ("frozen", "feedback"))


@pytest.mark.parametrize(
    ("preset", "change", "says"),
    [
        ("quikstart", "seed=1", "nearest known one is 'quickstart'"),
        (
            "quickstart",
            "factory.temprature=1",
            "unknown key 'factory.temprature'; the nearest known one is 'temperature'",
        ),
        ("quickstart", "progams=1", "nearest known one is 'programs'"),
        ("quickstart", "programs=0", "programs"),
        ("quickstart", "programs=many", "a number from 1 to 1,000,000, or a list of such"),
        ("quickstart", "programs=[168, 0]", "a number from 1 to 1,000,000, or a list of such"),
        ("quickstart", "rivals=ties", r"rivals: it is a list, as in [ties]"),
        ("quickstart", "controls=[forzen]", "controls: Input should be 'frozen'"),
        ("quickstart", "rivals=[tie]", "nearest known one is 'ties'"),
        ("quickstart", "rivals=[nuslerp]", "takes 2 experts"),
        ("quickstart", "task.name=nona", "nearest known one is 'nano'"),
        ("quickstart", "task.test=999999", "999999 test questions"),
        ("quickstart", "prompt.names=[madian]", "nearest known one is 'median'"),
        ("quickstart", "prompt.form=contract", "the warm start teaches the short form"),
        ("quickstart", "factory", "KEY=VALUE"),
        ("quickstart", "factory=[", "not YAML"),
        ("quickstart", "seed.a=1", "seed"),
        ("quickstart", "factory.temperature=.inf", "factory.temperature"),
        ("quickstart", "jail.wall_seconds=0.001", "jail.wall_seconds"),
        ("quickstart", "race.frist=30", "nearest known one is 'first'"),
        ("quickstart", "race.growth=1", "race.growth"),
        ("quickstart", "race=maybe", "race"),
        ("quickstart", "task.weights={ad: 2}", "nearest known one is 'add'"),
        ("quickstart", "task.weights={add: 0}", "task.weights.add"),
        ("quickstart", "task.floors={rve: 2}", "nearest known one is 'rev'"),
        ("absent.yaml", "seed=1", "No such file"),
        ("quickstart", "refinement.rehearsal=99", "beside those that a prompt shows there are"),
        ("quickstart", "rivals=[ties,ties]", "rivals: ties stands there twice"),
        ("quickstart", "controls=[frozen,frozen]", "controls: frozen stands there twice"),
        ("quickstart", "merge.targets='('", "no regular expression"),
        ("quickstart", "controls=[frosen]", "'frozen', 'feedback' or 'learning_feedback'"),
    ],
)
def test_what_cannot_be_is_named_before_any_work(preset: str, change: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("[", r"\[")):
        load_config(preset, [change])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["preferences.pairs=0", "refinement.imitation.passes=0"], "nothing could be learned"),
        (["refinement.refit=never", "controls=[frozen]"], "its own frozen control"),
        (["refinement.refit=never", "controls=[learning_feedback]"], "set 'feedback'"),
        (["prompt.feedback=true", "controls=[learning_feedback]"], "its own learning_feedback control"),
        (
            ["prompt.feedback=true", "refinement.refit=never", "controls=[feedback]"],
            "its own feedback control",
        ),
        (
            ["prompt.feedback=true", "refinement.refit=never", "controls=[learning_feedback]"],
            "leave 'learning_feedback' out",
        ),
    ],
)
def test_what_does_not_go_together_is_named(changes: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_config("quickstart", changes)
    assert load_config("quickstart", [*changes[:1], "controls=[]"]).programs == 56


def test_a_chat_template_is_told_where_it_is_applied(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"prompt\.template: the short form is continued without a chat template"
    ):
        load_config("quickstart", ["prompt.template={enable_thinking: false}"])
    assert load_config(
        "paper", ["task.name=nano", "prompt.template={enable_thinking: false}"]
    ).prompt.template == {"enable_thinking": False}
    served = [
        "factory.model=endpoint:x",
        "factory.endpoint.url=http://localhost/v1",
        "refinement.refit=never",
    ]
    with pytest.raises(UserError, match=r"prompt\.template: a server applies.*chat_template_kwargs"):
        load_config(
            "paper", [*served, "task.name=nano", "controls=[]", "prompt.template={enable_thinking: false}"]
        )


def test_a_file_starts_from_a_preset_and_changes_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: quickstart\nname: mine\nfactory: {temperature: 0.5}\nmerge: {experts: {a: x, b: y}}\nrivals: []\n"
    )
    config = load_config(str(file), ["programs=7"])
    assert (config.name, config.programs, config.factory.temperature) == ("mine", 7, 0.5)
    assert config.factory.model == load_config("quickstart").factory.model
    assert list(config.merge.experts) == ["a", "b"]


def test_a_race_is_on_or_off_or_spelled_out() -> None:
    assert load_config("quickstart", ["race=off"]).race is None
    on = load_config("quickstart", ["race=on", "scaling.norm=null"])
    assert on.race is not None
    assert on.race.alpha == 0.05
    spelled = load_config("quickstart", ["race=off", "race.first=12", "scaling.norm=null"]).race
    assert spelled is not None
    assert (spelled.first, spelled.growth) == (12, on.race.growth)
    assert parse_config(on.model_dump(mode="json"), "again") == on


def test_the_temperature_falls_as_in_the_paper() -> None:
    factory = load_config("quickstart", ["factory.temperature=1.2"]).factory
    assert [round(factory.temperature_at(t), 3) for t in range(3)] == [1.2, 1.0, 0.857]


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config("quickstart").seed = 2


def test_a_file_that_starts_from_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text(f"preset: {file}\n")
    with pytest.raises(UserError, match="starts from itself"):
        load_config(str(file))
    file.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(str(file))


def test_a_file_says_each_thing_once_and_all_that_is_needed(tmp_path: Path) -> None:
    twice, bare = tmp_path / "twice.yaml", tmp_path / "bare.yaml"
    twice.write_text("preset: quickstart\nprograms: 8\nmerge:\n  experts: {a: x, a: y}\n")
    with pytest.raises(UserError, match=r"'a' is given twice; give it once"):
        load_config(str(twice))
    bare.write_text(
        "iterations: 1\nfactory: {model: x}\nmerge: {seed: s, experts: {a: x, b: y}}\ntask: {name: nano}\n"
    )
    with pytest.raises(UserError, match="name is missing; give it"):
        load_config(str(bare))
    for impossible in ("seed=99999999999999999999", "programs=100000000000", "programs=[8,100000000000]"):
        with pytest.raises(
            UserError, match=r"seed: Input should be less than|programs: a number from 1 to 1,000,000"
        ):
            load_config("quickstart", [impossible])


def test_a_race_goes_by_what_was_written_and_so_not_with_a_norm() -> None:
    with pytest.raises(
        UserError, match=r"race: programs race as they were written, .* set scaling\.norm: null"
    ):
        load_config("quickstart", ["race=on"])
    assert load_config("quickstart", ["race=on", "scaling.norm=null"]).race is not None
    # A run that began with both, before that was refused, can still be read.
    both = load_config("quickstart").model_dump(mode="json") | {"race": {"first": 60}}
    assert parse_config(both, "archive").race is not None
    with pytest.raises(UserError, match=r"scaling\.factors: .* greater than 0"):
        load_config("quickstart", ["scaling.factors=[0.5,0]"])


def test_a_run_goes_on_with_what_it_began_with_but_for_the_names_of_its_devices() -> None:
    config = load_config("quickstart")
    changed = change_config(config, ["task.device=cpu", "factory.device=cpu"], "here")
    assert (changed.task.device, changed.factory.device) == ("cpu", "cpu")
    with pytest.raises(
        UserError, match=r"--set seed: .*only factory\.device, task\.device, jail\.workers may change"
    ):
        change_config(config, ["seed=2"], "here")
