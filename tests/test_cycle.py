"""The whole cycle with a scripted factory on the real zoo, jail, screening and evaluation."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scripted import PROGRAMS, ScriptedFactory, begin_or_resume, killed, scripted_config
from selfdev.algorithms.library import method
from selfdev.algorithms.source import unwrap_short
from selfdev.archive import Archive, Evaluation, TestSealed
from selfdev.cli import main
from selfdev.errors import Interrupted, UserError
from selfdev.evaluation.evaluator import Evaluator, Refused, norm_of
from selfdev.evaluation.evidence import Evidence
from selfdev.evaluation.standing import NORMED, ranked_new
from selfdev.evaluation.tasks.nano import NanoTask
from selfdev.factory.taught import Taught
from selfdev.merging.task_vectors import merge_by_method, read_task_vectors
from selfdev.report.candidate import describe
from selfdev.report.dataset import export_pairs
from selfdev.results import Run
from selfdev.runs import resume, run
from selfdev.sandbox import Sandbox
from selfdev.transfers import transfer
from selfdev.watcher import Silent
from selfdev.zoo import zoo_models


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return begin_or_resume(tmp_path_factory.mktemp("unbroken") / "run")


def statuses(run: Run, arm: str, iteration: int) -> list[str]:
    return [c.failure or str(c.status) for c in run.archive.candidates(arm, iteration)]


def test_every_program_ends_in_one_status(finished: Run) -> None:
    assert statuses(finished, "learning", 0) == [
        *("new", "new", "new", "new", "trivial", "known", "known", "repeated"),
        *("SyntaxError", "TypeError", "ShapeMismatch", "Timeout"),
        *("NonFinite", "NoFunction", "RuntimeError", "NonDeterministic"),
    ]


def test_the_control_has_the_same_first_iteration_and_a_history_of_its_own(finished: Run) -> None:
    assert statuses(finished, "frozen", 0) == statuses(finished, "learning", 0)
    scores = [
        [(e.kind, e.number, e.subject.partition("/")[2], e.score, e.outcomes) for e in its]
        for its in (
            [
                e
                for kind in ("candidate", "scaled")
                for e in finished.archive.evaluations(kind)
                if e.subject.startswith(f"{arm}/1/") and e.number <= NORMED
            ]
            for arm in ("frozen", "learning")
        )
    ]
    assert scores[0] == scores[1] != []
    repeated = [c for c in finished.candidates("frozen") if c.status == "repeated"]
    assert repeated
    assert all(c.nearest and c.nearest.startswith("frozen/") for c in repeated)
    # What the frozen factory wrote once, it writes again: nothing is new.
    assert "new" not in statuses(finished, "frozen", 1)


def test_the_learning_arm_writes_from_its_adapter_and_no_round_follows_the_last(finished: Run) -> None:
    assert statuses(finished, "learning", 1)[8:12] == ["new"] * 4
    rounds = finished.archive.refinements("learning")
    assert [r.iteration for r in rounds] == [0]
    assert rounds[0].adapter == "adapters/learning-1"
    assert (finished.folder / "adapters/learning-1/adapter.txt").is_file()


def test_only_new_programs_are_scored_chosen_and_reported(finished: Run) -> None:
    status = {c.name: c.status for c in finished.archive.candidates()}
    evaluated = {e.subject for e in finished.archive.evaluations("candidate")}
    assert evaluated == {c.name for c in finished.candidates() if c.status == "new"}
    pairs = finished.archive.pairs("learning", 0)
    assert {status[pair.chosen] for pair in pairs} == {"new"}
    assert {pair.reason for pair in pairs} == {"score", "copy", "failure", "repair"}
    discovered = [row for row in finished.verdict["table"] if row["kind"] == "discovered"]
    assert {status[row["name"]] for row in discovered} == {"new"}


def test_failing_programs_have_no_score(finished: Run) -> None:
    for evaluation in finished.archive.evaluations("candidate"):
        assert evaluation.score is not None
        assert evaluation.failure is None
    failed = [c for c in finished.candidates() if c.status == "failed"]
    assert all(c.failure and c.error for c in failed)


def test_rivals_are_tuned_as_often_as_the_learning_arm_evaluated(finished: Run) -> None:
    evaluations = finished.archive.evaluations("candidate") + finished.archive.evaluations("scaled")
    spent = [e for e in evaluations if e.subject.startswith("learning/")]
    for name in finished.config.rivals:
        assert len(finished.archive.evaluations("rival", name)) == len(spent)


def test_the_best_programs_of_each_arm_are_tried_at_other_scales(finished: Run) -> None:
    scaled = finished.archive.evaluations("scaled")
    tuned = [e for e in scaled if e.number > NORMED]
    for arm in ("learning", "frozen"):
        best = {c.name: e.factor for c, e in ranked_new(finished.archive, arm, tuned=False)[:2]}
        wanted = {(name, 1 + i, f * factor) for name, f in best.items() for i, factor in [(1, 0.5), (2, 2.0)]}
        assert {(e.subject, e.number, e.factor) for e in tuned if e.subject.startswith(arm)} == wanted
    for candidate, dev in ranked_new(finished.archive, "learning"):
        tried = [e for e in scaled if e.subject == candidate.name]
        tried += finished.archive.evaluations("candidate", candidate.name)
        assert dev.score == max(e.score or 0.0 for e in tried)
    # On test a finalist stands at the scale that was best on development.
    for candidate, dev in ranked_new(finished.archive, "learning"):
        [test] = finished.archive.evaluations(dev.kind, candidate.name, "test")
        assert (test.number, test.factor) == (dev.number, dev.factor)


def test_every_new_program_is_also_scored_at_one_norm(finished: Run) -> None:
    normed = {e.subject: e for e in finished.archive.evaluations("scaled") if e.number == NORMED}
    new = [c for c in finished.candidates() if c.status == "new"]
    assert set(normed) == {c.name for c in new}
    vectors = read_task_vectors(zoo_models("nano")["seed"], zoo_models("nano")["experts"], "mlp").vectors
    mean = norm_of(torch.stack(list(each.values())).mean(0) for each in vectors.values())
    candidate = new[0]
    with Sandbox() as box:
        merged = box.merge_many(candidate.source or "", list(vectors.values()))
    norm = norm_of(outcome.tensor for outcome in merged if outcome.tensor is not None)
    assert normed[candidate.name].factor * norm == pytest.approx(1.5 * mean)


def test_the_verdict_is_reached_once_on_questions_of_its_own(finished: Run) -> None:
    archive = finished.archive
    assert len(archive.openings()) == 1
    assert len(archive.groups("test")) == 240
    fixed, result = archive.fixed(), archive.verdict()
    assert result["best"] == fixed["best"] == finished.best.name
    kinds = {row["kind"] for row in result["table"]}
    assert kinds == {"seed", "rival", "control", "discovered"}
    best = next(row for row in result["table"] if row["name"] == result["best"])
    against = best["against_best_rival"]
    assert against["low"] <= against["difference"] <= against["high"]
    assert against["p_adjusted"] >= against["p"]
    assert best["test"]["low"] <= best["test"]["score"] <= best["test"]["high"]


def test_the_verdict_says_what_is_sampling_and_what_is_learning(finished: Run) -> None:
    gains = finished.verdict["gains"]
    row = {row["name"]: row for row in finished.verdict["table"]}
    seed = row["seed"]["test"]["score"]
    assert gains["candidate"] == finished.best.name
    assert gains["iteration"] == finished.best.iteration + 1
    mine = row[gains["candidate"]]["test"]["score"]
    assert gains["over_seed"]["difference"] == pytest.approx(mine - seed)
    [control] = gains["controls"]
    assert control["arm"] == "frozen"
    assert row[control["candidate"]]["kind"] == "control"
    its = row[control["candidate"]]["test"]["score"]
    assert control["over_seed"]["difference"] == pytest.approx(its - seed)
    more = control["best_minus_control"]
    assert more["difference"] == pytest.approx(mine - its)
    assert more["low"] <= more["difference"] <= more["high"]
    assert 0 <= more["p"] <= 1
    assert finished.summary()["gains"] == gains


def test_the_test_split_is_sealed_until_the_verdict(finished: Run, tmp_path: Path) -> None:
    record = replace(finished.archive.run, status="running")
    with Archive.create(tmp_path / "archive.db", record) as archive:
        with pytest.raises(TestSealed, match="last iteration is not over"):
            archive.opened("nano")
        assert archive.openings() == []
    with pytest.raises(TestSealed, match="verdict has been reached"):
        finished.archive.opened("nano")


@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param(
            ["warm start:1", "write:9", "judge:4", "judge:23", "refine:2", "write:17"],
            marks=pytest.mark.proof,
        ),
        pytest.param(["judge:20", "rivals:3", "tune:2"], marks=pytest.mark.proof),
        ["scale:5", "verdict:4"],
    ],
)
def test_killed_anywhere_it_resumes_to_the_same_archive(
    kill_at: list[str], finished: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for place in kill_at:
        killed(folder, place)
    resumed = begin_or_resume(folder)
    assert resumed.archive.run.status == "done"
    assert resumed.archive.digest() == finished.archive.digest()


def test_control_c_ends_cleanly_and_names_the_way_on(tmp_path: Path) -> None:
    class Impatient(Silent):
        def screened(self, candidate, evaluation) -> None:  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="selfdev resume") as stopped:
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory(), watch=Impatient())
    assert stopped.value.exit_code == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_ends_the_run_before_its_work(tmp_path: Path) -> None:
    config = scripted_config()
    changed = config.model_copy(update={"task": config.task.model_copy(update={"device": "cuda"})})
    with pytest.raises(UserError, match=r"task\.device: cuda, and torch finds none on this machine"):
        run(changed, tmp_path / "run", factory=ScriptedFactory())
    assert not (tmp_path / "run" / "archive.db").exists()


def test_what_scores_stand_on_is_archived(finished: Run) -> None:
    assert finished.archive.run.facts["task.device"] == "cpu float32"


def test_a_seed_that_cannot_be_scored_ends_the_run_before_a_program_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Evaluation("seed", "seed", 0, "development", None, None, 120, {}, "ScoringError: not finite")
    monkeypatch.setattr(Evaluator, "seed", lambda self, split: failed)
    with pytest.raises(UserError, match=r"the seed cannot be scored, .*not finite.*task\.dtype is float16"):
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory())
    assert not Run(tmp_path / "run").archive.candidates("learning")


def test_a_factory_that_never_writes_a_program_ends_with_a_report(tmp_path: Path) -> None:
    config = scripted_config(programs=3)
    ended = run(
        config, tmp_path / "run", factory=ScriptedFactory(["nonsense", "h(deltas):\n    return (\n", ""])
    )
    assert ended.best is None
    assert "no new program" in ended.verdict["headline"]
    assert [r.adapter for r in ended.archive.refinements("learning")] == [None]
    assert {row["kind"] for row in ended.verdict["table"]} == {"seed"}


def test_a_program_that_is_the_mean_on_real_tensors_is_trivial(tmp_path: Path) -> None:
    softmax = "p(deltas):\n    s = deltas\n    return 1.5 * (torch.softmax(s, dim=0) * s).sum(dim=0)\n"
    ended = run(
        scripted_config(programs=1, iterations=1), tmp_path / "run", factory=ScriptedFactory([softmax])
    )
    candidate = ended.candidate("learning/1/001")
    assert candidate.distance is not None
    assert candidate.distance > 0.5  # on probes it is far from everything
    assert candidate.status == "trivial"
    assert "on the real tensors" in str(candidate.error)
    assert ended.best is None


def test_a_run_that_ends_before_it_has_begun_leaves_no_folder(tmp_path: Path) -> None:
    class Unprepared(ScriptedFactory):
        def prepare(self, tick: Any) -> None:
            (tmp_path / "new" / "written.db").touch()  # as the journal of a server
            raise UserError("no memory for the warm start")

    with pytest.raises(UserError, match="no memory"):
        run(scripted_config(), tmp_path / "new", factory=Unprepared())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()  # the user's own stays
    with pytest.raises(UserError, match="no memory"):
        run(scripted_config(), tmp_path / "new", factory=Unprepared())
    assert (tmp_path / "new").is_dir()


def test_a_program_is_merged_in_as_many_processes_as_the_config_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, boxes = Sandbox.__enter__, list[Sandbox]()
    monkeypatch.setattr(Sandbox, "__enter__", lambda self: boxes.append(self) or entered(self))
    config = scripted_config(programs=4, iterations=1, controls=[], rivals=[], jail={"workers": 2})
    ended = run(config, tmp_path / "run", factory=ScriptedFactory(PROGRAMS[:4]))
    assert ended.best is not None
    experts = {name: f"zoo:nano2/{name}" for name in ("tri", "tot")}
    transfer(tmp_path / "run", "zoo:nano2/seed", experts, "nano2")
    assert [box.workers for box in boxes] == [2, 2]


def test_too_little_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="5 MB are free"):
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory())
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    class Second(Silent):
        def screened(self, candidate, evaluation) -> None:  # type: ignore[no-untyped-def]
            with pytest.raises(UserError, match="another process"):
                resume(tmp_path / "run", factory=ScriptedFactory())
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory(), watch=Second())


def test_a_second_run_does_not_touch_the_first(finished: Run) -> None:
    before = finished.archive.digest()
    with pytest.raises(UserError, match="selfdev resume"):
        run(scripted_config(), finished.folder, factory=ScriptedFactory())
    assert resume(finished.folder, factory=ScriptedFactory()).archive.digest() == before


def test_a_run_whose_factory_has_changed_does_not_go_on(tmp_path: Path) -> None:
    class Stop(Silent):
        def phase(self, name, arm=None, iteration=None):  # type: ignore[no-untyped-def]
            if name == "judge":
                raise KeyboardInterrupt
            return super().phase(name, arm, iteration)

    with pytest.raises(Interrupted):
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory(), watch=Stop())
    other = ScriptedFactory(name="another")
    with pytest.raises(UserError, match="factory has changed"):
        resume(tmp_path / "run", factory=other)


def test_a_run_whose_task_has_changed_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Silent):
        def screened(self, candidate, evaluation) -> None:  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(scripted_config(), tmp_path / "run", factory=ScriptedFactory(), watch=Stop())
    monkeypatch.setattr(NanoTask, "fingerprint", "judged in another way")
    with pytest.raises(UserError, match="task has changed"):
        resume(tmp_path / "run", factory=ScriptedFactory())


def test_a_scale_that_cannot_be_tried_has_a_failure_and_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Evaluator.candidate

    def trouble(self, candidate, split, asked=None, *, number=0, factor=1.0, norm=None):  # type: ignore[no-untyped-def]
        if number:
            raise Refused("Timeout", "too slow today")
        return score(self, candidate, split, asked)

    monkeypatch.setattr(Evaluator, "candidate", trouble)
    config = scripted_config(programs=4, iterations=1, controls=[], rivals=[])
    ended = run(config, tmp_path / "run", factory=ScriptedFactory(PROGRAMS[:4]))
    scaled = ended.archive.evaluations("scaled")
    assert len(scaled) == 8  # four new programs at one norm, the best two at two factors
    assert all(e.score is None and "too slow today" in str(e.failure) for e in scaled)
    assert ended.verdict["best"] == ended.best.name
    assert ended.verdict["table"][1]["test"]["questions"] == 240


def test_a_program_that_fails_for_a_moment_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, failed = Evaluator.candidate, list[str]()

    def trouble(self, candidate, split, *rest, **scale):  # type: ignore[no-untyped-def]
        if split == "test" and candidate.name not in failed:
            failed.append(candidate.name)
            raise Refused("Timeout", "too slow just now")
        return score(self, candidate, split, *rest, **scale)

    monkeypatch.setattr(Evaluator, "candidate", trouble)
    config = scripted_config(programs=2, iterations=1, controls=[], rivals=[])
    ended = run(config, tmp_path / "run", factory=ScriptedFactory(PROGRAMS[:2]))
    assert len(failed) == 2
    assert all(row["test"] and row["failure"] is None for row in ended.verdict["table"])


def test_the_best_rival_is_shown_as_merge_takes_it(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for best in finished.config.rivals:  # the one that was best, and one whose setting is a list
        verdict = finished.verdict | {"best_rival": best}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "verdict", verdict)
            assert main(["show", str(finished.folder)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        words = shlex.split(shown.partition("best rival selfdev merge ")[2].partition(" ...")[0])
        models = [
            "--seed",
            "zoo:nano/seed",
            *(f"--expert={n}=zoo:nano/{n}" for n in finished.config.merge.experts),
        ]
        assert main(["merge", *words, *models, "--out", str(tmp_path / best)]) == 0
        [setting] = [row["parameters"] for row in verdict["table"] if row["name"] == best]
        zoo = zoo_models("nano")
        experts = {name: zoo["experts"][name] for name in finished.config.merge.experts}
        vectors = read_task_vectors(zoo["seed"], experts, "mlp")
        expected = merge_by_method(method(best), vectors, setting)
        merged = load_file(tmp_path / best / "model.safetensors")
        for name, delta in expected.items():
            torch.testing.assert_close(merged[name], vectors.seed[name] + delta)


def test_programs_that_nobody_beats_are_compared_at_their_best_scale(finished: Run) -> None:
    best = finished.summary()["best"]
    listed = {each["name"]: each["score"] for each in finished.summary()["pareto"]}
    ranked = {c.name: e.score for c, e in ranked_new(finished.archive, "learning")}
    assert best["candidate"] in listed
    assert listed == {name: ranked[name] for name in listed}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_change_that_is_refused_is_not_kept(tmp_path: Path) -> None:
    class Impatient(Silent):
        def screened(self, candidate, evaluation) -> None:  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    config, factory = scripted_config(programs=2, iterations=1, controls=[]), ScriptedFactory(PROGRAMS[:2])
    with pytest.raises(Interrupted):
        run(config, tmp_path / "run", factory=factory, watch=Impatient())
    with pytest.raises(UserError, match=r"task\.device"):
        resume(tmp_path / "run", changes=["task.device=cuda"], factory=factory)
    assert resume(tmp_path / "run", changes=["jail.workers=2"], factory=factory).config.jail.workers == 2


def test_a_seed_and_an_expert_of_different_architectures_are_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(tmp_path / "other")
    config = scripted_config(
        merge={"seed": "zoo:nano/seed", "experts": {"add": "zoo:nano/add", "other": str(tmp_path / "other")}}
    )
    with pytest.raises(UserError, match="expert 'other'"):
        run(config, tmp_path / "run", factory=ScriptedFactory())
    assert not (tmp_path / "run" / "archive.db").exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [("zoo:nano/seed", "'b' has the seed's weights"), ("zoo:nano/add", "'a' and 'b' have the same weights")],
)
def test_experts_that_teach_nothing_are_refused(tmp_path: Path, second: str, message: str) -> None:
    experts = {"a": "zoo:nano/add", "b": second}
    with pytest.raises(UserError, match=message):
        run(scripted_config(merge={"seed": "zoo:nano/seed", "experts": experts}), tmp_path / "run")
    assert not (tmp_path / "run" / "archive.db").exists()


def test_failing_programs_are_paired_with_their_working_neighbours(finished: Run) -> None:
    repaired = finished.candidates("repaired")
    assert repaired
    status = {c.name: c.status for c in finished.candidates()}
    pairs = [p for t in range(2) for p in finished.archive.pairs("learning", t) if p.reason == "repair"]
    assert {p.chosen for p in pairs} == {c.name for c in repaired}
    for pair in pairs:
        assert pair.chosen.removeprefix("repaired") == pair.rejected.removeprefix("learning")
        assert status[pair.rejected] == "failed"
        shown = describe(finished, pair.chosen)
        assert (shown["repairs"], shown["temperature"]) == (pair.rejected, None)
        assert shown["pairs"]["chosen"] > 0
    # Nobody wrote them: they are in no list of programs, and cannot win.
    assert not {c.name for c in repaired} & set(status)
    assert {row["arm"] for row in finished.summary()["iterations"]} == {"learning", "frozen"}
    with Sandbox() as box:
        for candidate in repaired:
            vectors = torch.randn(3, 6, 5).unbind()
            outcome = box.merge(candidate.source or "", {str(i): v for i, v in enumerate(vectors)})
            assert outcome.tensor is not None


class Recording(ScriptedFactory):
    """Remembers what each round imitates."""

    def __init__(self) -> None:
        super().__init__()
        self.imitated: list[set[tuple[int, ...]]] = []

    def refine(self, taught: Taught, *more: Any) -> dict[str, Any]:
        self.imitated.append({tokens for _, tokens in taught.imitated})
        return super().refine(taught, *more)


def test_of_repairs_that_are_scored_only_the_good_ones_are_learned_from(tmp_path: Path) -> None:
    factory = Recording()
    config = scripted_config(
        controls=[],
        refinement={"imitation": {"passes": 1}},
        preferences={"repairs": 8, "score_repairs": True, "evidence": 2.0, "chosen_floor": 2},
    )
    ended = run(config, tmp_path / "run", factory=factory)
    repaired = [c for c in ended.candidates("repaired") if c.status == "new"]
    scored = {
        (e.subject, e.number) for kind in ("candidate", "scaled") for e in ended.archive.evaluations(kind)
    }
    # As it was written, and at the norm; tuned and tested is only what the factory wrote.
    assert {pair for pair in scored if pair[0].startswith("repaired")} == {
        (c.name, n) for c in repaired for n in (0, 1)
    }
    good = {c.tokens for c in repaired if Evidence(ended.archive, 2.0).better(c.name)}
    others = {c.tokens for c in repaired} - good
    [imitated] = factory.imitated
    assert repaired
    assert good <= imitated
    assert not others & imitated
    assert ended.best is not None
    assert ended.best.arm == "learning"
    written = sum(subject.startswith("learning/") for subject, _ in scored)
    tuned = [e for e in ended.archive.evaluations("rival", "task_arithmetic") if e.split == "development"]
    assert len(tuned) == written + 2 * len(repaired)


def test_every_arm_writes_as_many_programs_as_the_iteration_has(tmp_path: Path) -> None:
    config = scripted_config(iterations=3, programs=[8, 4], controls=["frozen", "feedback"], rivals=[])
    ended = run(config, tmp_path / "run", factory=ScriptedFactory())
    written = {(row["arm"], row["iteration"]): row["written"] for row in ended.summary()["iterations"]}
    arms = ("learning", "frozen", "feedback")
    assert written == {(arm, t): count for arm in arms for t, count in ((1, 8), (2, 4), (3, 4))}
    first = [[c.source for c in ended.archive.candidates(arm, 0)] for arm in arms]
    assert first[0] == first[1] == first[2]


def test_the_feedback_control_is_shown_its_own_best_programs(tmp_path: Path) -> None:
    config = scripted_config(controls=["frozen", "feedback"], rivals=[])
    ended = run(config, tmp_path / "run", factory=ScriptedFactory())
    first, second = ended.archive.iterations("feedback")
    assert first.prompts == ended.archive.iterations("frozen")[0].prompts == ("prompt 0", "prompt 1")
    ranked = [c for c, _ in ranked_new(ended.archive, "feedback", tuned=False) if c.iteration == 0]
    assert len(ranked) > 1
    for prompt, best in zip(second.prompts, ranked[:2], strict=True):
        assert unwrap_short(best.source or "") in prompt
    # More prompts than elites: these take turns, and what is worse is not shown.
    few = scripted_config(
        controls=["feedback"], rivals=[], prompt={"form": "short", "names": ["vote"], "elites": 1}
    )
    _, second = run(few, tmp_path / "few", factory=ScriptedFactory()).archive.iterations("feedback")
    assert all(unwrap_short(ranked[0].source or "") in prompt for prompt in second.prompts)
    assert not ended.archive.refinements("feedback")
    assert {row["kind"] for row in ended.verdict["table"]} == {"seed", "control", "discovered"}


def test_a_search_by_prompt_feedback_can_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = scripted_config(
        controls=["frozen"],
        rivals=[],
        refinement={"refit": "never"},
        prompt={"form": "short", "names": ["vote"], "feedback": True},
    )
    ended = run(config, tmp_path / "run", factory=ScriptedFactory())
    searching, frozen = (ended.archive.iterations(arm) for arm in ("learning", "frozen"))
    assert searching[0].prompts == frozen[0].prompts == frozen[1].prompts != searching[1].prompts
    [best, *_] = [c for c, _ in ranked_new(ended.archive, "learning", tuned=False) if c.iteration == 0]
    assert unwrap_short(best.source or "") in searching[1].prompts[0]
    assert not ended.archive.refinements("learning")
    assert main(["show", str(tmp_path / "run")]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "this is a search, whose prompts show its own best programs" in page
    assert "prompt feedback adds" in page
    assert ended.best is not None


def test_the_combined_control_learns_from_its_own_programs_and_is_shown_its_best_ones(tmp_path: Path) -> None:
    controls = ["feedback", "learning_feedback"]
    config = scripted_config(
        controls=controls, rivals=[], refinement={"min_pairs": 2, "imitation": {"passes": 1}}
    )
    ended = run(config, tmp_path / "run", factory=ScriptedFactory())
    archive = ended.archive
    first, second = archive.iterations("learning_feedback")
    assert first.prompts == archive.iterations("learning")[0].prompts
    # What is written first is what every arm writes first, and so are its best: they are shown, and learned from.
    assert second.prompts == archive.iterations("feedback")[1].prompts != first.prompts
    [mine], [its] = archive.refinements("learning_feedback"), archive.refinements("learning")
    assert (mine.adapter, its.adapter) == ("adapters/learning_feedback-1", "adapters/learning-1")
    assert (tmp_path / "run" / mine.adapter).is_dir()
    assert all(
        name.startswith(("learning_feedback/", "repaired_learning_feedback/"))
        for pair in archive.pairs("learning_feedback", 0)
        for name in (pair.chosen, pair.rejected)
    )
    assert len(archive.pairs("learning_feedback", 0)) == len(archive.pairs("learning", 0)) > 0
    written = {row["arm"] for row in ended.summary()["iterations"]}
    assert written == {"learning", *controls} == {c.arm for c in ended.candidates()}
    for row in ended.summary()["iterations"]:
        learned = row["arm"] not in ("frozen", "feedback") and row["iteration"] == 1
        assert (row["seconds"]["learning"] > 0) == learned
        assert (row["seconds"]["scoring"] > 0) == (row["evaluated"] > 0)
        assert row["seconds"]["screening"] > 0


def test_the_pairs_are_a_hugging_face_dataset(finished: Run, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    count = export_pairs(finished, tmp_path / "pairs")
    data = datasets.load_dataset(str(tmp_path / "pairs"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == count == len(finished.archive.pairs("learning", 0))
    by_name = {c.name: c for c in finished.archive.candidates()}
    for row, pair in zip(data, finished.archive.pairs("learning", 0), strict=True):
        assert (row["chosen_name"], row["rejected_name"], row["reason"]) == (
            pair.chosen,
            pair.rejected,
            pair.reason,
        )
        assert row["chosen"] == by_name[pair.chosen].text
        assert tuple(row["rejected_tokens"]) == by_name[pair.rejected].tokens
        assert row["prompt"].startswith("prompt ")
        assert row["chosen_score"] is None or 0 <= row["chosen_score"] <= 1
    with pytest.raises(UserError, match="exists"):
        export_pairs(finished, tmp_path / "pairs")
