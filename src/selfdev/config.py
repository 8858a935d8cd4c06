"""What a run is. Every field has a unit or a range, and a reader; an unknown key is an error.

A preset is a YAML file of these fields; a user's own file may begin with `preset: NAME` and change some of them.
"""

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from selfdev.algorithms.examples import examples
from selfdev.algorithms.library import method
from selfdev.algorithms.source import Form
from selfdev.errors import UserError
from selfdev.evaluation.tasks import Split, load_task


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WarmStart(_Section):
    """Supervised steps on the worked examples before the first iteration; see `factory/warm_start.py`."""

    steps: int = Field(
        0, ge=0, description="Optimiser steps; 0 leaves the warm start out, as the paper does."
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate of AdamW.")
    rank: int = Field(32, ge=1, description="LoRA rank.")
    targets: int = Field(8, ge=1, description="Worked examples that one step learns to write.")
    seed: int = Field(0, description="Of the draw; not the run's, so that runs share one cached adapter.")


class Factory(_Section):
    """The model that writes algorithms, and how it is sampled."""

    model: str = Field(description="Where its weights come from; see `selfdev.models.sources`.")
    temperature: float = Field(1.2, gt=0, description="T_1, of the first iteration. The paper: 1.2.")
    decay: float = Field(0.2, ge=0, description="T_t = T_1 / (1 + decay (t - 1)).")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability of the tokens that are drawn from.")
    max_new_tokens: int = Field(512, ge=8, description="Where a program that does not end is cut, in tokens.")
    batch: int = Field(64, ge=1, description="Programs written at once.")
    warm_start: WarmStart = WarmStart()

    def temperature_at(self, iteration: int) -> float:
        """The sampling temperature of an iteration, counted from 0."""
        return self.temperature / (1 + self.decay * iteration)


class PromptSettings(_Section):
    """What the factory is asked."""

    form: Form = Field(
        Form.CONTRACT, description="`contract`: merge_models(model_dict, device); `short`: merge_NAME."
    )
    examples: Literal["fixed", "drawn"] = Field(
        "fixed",
        description="`fixed`: one prompt for the whole run, the paper's way; `drawn`: dealt out anew.",
    )
    names: tuple[str, ...] = Field(
        ("inverse_distance",), description="The worked examples of a fixed prompt, in their order."
    )
    shown: int = Field(3, ge=1, description="Worked examples in a drawn prompt.")
    prompts: int = Field(4, ge=1, description="Drawn prompts in each iteration.")


class Merge(_Section):
    """What is merged."""

    seed: str = Field(description="M0: where its weights come from.")
    experts: dict[str, str] = Field(
        min_length=2, description="Name of each expert, and where its weights come from."
    )
    targets: str = Field("mlp", description="Which tensors: mlp, attention, all, or a regular expression.")


class TaskSettings(_Section):
    """The questions that decide."""

    name: str = Field(description="A built-in task, gsm8k:FOLDER, or a YAML file; see docs/tasks.md.")
    development: int = Field(100, ge=1, description="Questions of the development split.")
    test: int = Field(1000, ge=1, description="Questions of the test split, which the verdict opens once.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Weight of a group in the score; 1 for groups that are not named."
    )
    floors: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        {}, description="Points that may be lost on a group against the seed; who loses more may not win."
    )


class Race(_Section):
    """How the new programs of an iteration race; see `evaluation/race.py`."""

    first: int = Field(60, ge=1, description="Questions that every program answers.")
    growth: float = Field(1.2, gt=1, description="How many times as many it is from one look to the next.")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Probability at which one of the best may leave early."
    )


class Preferences(_Section):
    """From scores to pairs. The paper: 3 % chosen, 10 % rejected, 3 elites, no failures."""

    chosen_share: float = Field(
        0.03, gt=0, le=1, description="Best share of the iteration's programs that is chosen."
    )
    chosen_floor: int = Field(
        1, ge=1, description="At least so many programs are chosen, if there are any new ones."
    )
    rejected_share: float = Field(
        0.10, gt=0, le=1, description="Worst share of the programs that is rejected."
    )
    rejected_floor: int = Field(
        1, ge=1, description="At least so many new programs may be rejected for their score."
    )
    elites: int = Field(3, ge=0, description="Best programs of each earlier iteration that are chosen again.")
    failures_as_rejected: bool = Field(False, description="Programs that fail may be the rejected side.")
    copies_as_rejected: bool = Field(
        False, description="Trivial, known and repeated ones may be the rejected side."
    )
    failing_cap: float = Field(
        0.5, ge=0, le=1, description="Largest share of pairs whose rejected side fails."
    )
    pairs: int = Field(64, ge=1, description="Pairs of one round.")
    pairs_each: int = Field(64, ge=1, description="Pairs of a round that one chosen program may stand in.")


class RefinementSettings(_Section):
    """One DPO round. The paper: beta 0.01, learning rate 1e-6, LoRA rank 256."""

    beta: float = Field(0.01, gt=0, description="Strength of the pull towards the reference.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak rate of AdamW.")
    rank: int = Field(256, ge=1, description="LoRA rank; alpha is the same.")
    epochs: int = Field(1, ge=1, description="Passes over the pairs.")
    supervised: float = Field(0.0, ge=0, description="Factor on the chosen side's loss in nats a token.")
    shun_examples: int = Field(
        0,
        ge=0,
        description="So many of the worked examples that a prompt shows, the first ones, are rejected against its "
        "chosen programs: copies of them, before anybody writes one; short form only.",
    )
    rehearsal: int = Field(
        0,
        ge=0,
        description="Worked examples that each step imitates beside the chosen programs; short form only.",
    )
    pairs_a_step: int = Field(
        4, ge=1, description="Pairs that share one packed prompt and one optimiser step."
    )
    refit: Literal["continue", "fresh"] = Field(
        "continue",
        description="`continue`: on top of the last adapter, which is the reference (the paper). `fresh`: a new one "
        "on the first factory, which is the reference, from the pairs of all rounds.",
    )


class Scaling(_Section):
    """The scale of the best programs is tuned before the verdict, as that of every rival is; off in the paper."""

    programs: int = Field(0, ge=0, description="Best new programs of each arm that are tuned; 0 tunes none.")
    factors: tuple[float, ...] = Field(
        (0.5, 0.7, 1.4, 2.0), description="What a program's merged task vector is multiplied by, beside 1."
    )


class Verdict(_Section):
    """The final test."""

    finalists: int = Field(
        15, ge=1, description="Discovered programs measured on test, best on development first."
    )
    level: float = Field(0.95, gt=0, lt=1, description="Of every interval.")


class Jail(_Section):
    """Limits of one jailed program."""

    wall_seconds: float = Field(10.0, ge=0.1, le=3600, description="Until it is killed.")
    memory_mb: int = Field(1024, ge=64, description="Above what the bare process takes, in MB.")


class Config(_Section):
    """A run, complete."""

    name: str = Field(description="Of the run's folder under runs/.")
    seed: int = Field(1, ge=0, description="Of all random streams of the run.")
    iterations: int = Field(3, ge=1, description="T; no refinement follows the last one.")
    programs: int = Field(3000, ge=1, description="N, programs written by each arm in each iteration.")
    factory: Factory
    prompt: PromptSettings = PromptSettings()
    merge: Merge
    task: TaskSettings
    race: Race | None = Field(
        None, description="`off`: every new program answers all questions, the paper's way; `on`, or fields."
    )
    preferences: Preferences = Preferences()
    refinement: RefinementSettings = RefinementSettings()
    rivals: tuple[str, ...] = Field((), description="Human-designed methods, tuned on the development split.")
    controls: tuple[Literal["frozen"], ...] = Field(
        ("frozen",), description="`frozen`: the same without learning."
    )
    scaling: Scaling = Scaling()
    verdict: Verdict = Verdict()
    jail: Jail = Jail()

    @field_validator("race", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """`on` and `off` are truth values in YAML, and words elsewhere."""
        if _is_switch(value):
            return {} if value in (True, "on") else None
        return value

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        """What no single field can see. Each error names the field."""
        known = examples()
        for name in self.prompt.names:
            if name not in known:
                raise ValueError(f"prompt.names: no worked example '{name}'; {_nearest(name, known)}")
        if self.prompt.examples == "drawn" and self.prompt.shown > len(known):
            raise ValueError(f"prompt.shown: {self.prompt.shown} examples of {len(known)}")
        if self.factory.warm_start.steps and self.prompt.form is not Form.SHORT:
            raise ValueError(
                "factory.warm_start.steps: the warm start teaches the short form; set prompt.form: short"
            )
        if self.prompt.form is not Form.SHORT:
            for key, on in (
                ("rehearsal", self.refinement.rehearsal),
                ("shun_examples", self.refinement.shun_examples),
            ):
                if on:
                    raise ValueError(
                        f"refinement.{key}: it takes worked examples in the short form; set prompt.form: short"
                    )
        if self.factory.warm_start.targets + self.prompt.shown > len(known):
            raise ValueError(
                f"factory.warm_start.targets and prompt.shown together exceed the {len(known)} examples"
            )
        if self.prompt.examples == "drawn" and self.prompt.prompts > self.programs:
            raise ValueError(f"prompt.prompts: {self.prompt.prompts} prompts for {self.programs} programs")
        for name in self.rivals:
            rival = method(name)
            if rival.experts is not None and rival.experts != len(self.merge.experts):
                raise ValueError(
                    f"rivals: {name} takes {rival.experts} experts and merge.experts has {len(self.merge.experts)}"
                )
        task = load_task(self.task.name)
        task.check_count(Split.DEVELOPMENT, self.task.development)
        task.check_count(Split.TEST, self.task.test)
        for field, named in (("weights", self.task.weights), ("floors", self.task.floors)):
            for group in named:
                if group not in task.groups:
                    raise ValueError(
                        f"task.{field}: the task has no group '{group}'; {_nearest(group, task.groups)}"
                    )
        return self


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("selfdev") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_config(preset: str, changes: Sequence[str] = ()) -> Config:
    """Read a preset or a YAML file.

    Args:
        preset: name of a preset, or path of a file; a file may name the preset it starts from under `preset`.
        changes: `a.b=value` each, the value in YAML; applied last, in their order.

    Raises:
        UserError: unknown preset or key (with the nearest known one), or an impossible value.
    """
    data = _read(preset)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise UserError(f"--set {change}: it reads KEY=VALUE, for example --set factory.temperature=0.8")
        _put(data, key, _yaml(value, f"--set {change}"))
    return parse_config(data, preset)


def parse_config(data: Mapping[str, Any], where: str) -> Config:
    """Check a run's fields; `where` they come from begins every error.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return Config.model_validate(data)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        raise UserError(
            f"{where}: " + "; ".join(_explain(dict(problem)) for problem in error.errors())
        ) from None


def _read(preset: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if preset in seen:
        raise UserError(
            f"{preset}: it starts from itself, by way of {' and '.join(seen)}; name another preset"
        )
    if preset in presets():
        text = (resources.files("selfdev") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
        return dict(yaml.safe_load(text))
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"no preset '{preset}'; {_nearest(preset, presets())}; a file of your own ends in .yaml"
        )
    try:
        data = _yaml(path.read_text(encoding="utf-8"), preset)
    except OSError as error:
        raise UserError(f"{preset}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{preset}: it is no text in UTF-8") from None
    if not isinstance(data, dict):
        raise UserError(f"{preset}: it holds no fields; a run needs at least factory, merge and task")
    if "preset" not in data:
        return data
    return _merged(_read(str(data.pop("preset")), (*seen, preset)), data)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section; the experts are replaced as a whole."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key != "experts":
            _merged(base[key], value)
        else:
            base[key] = value
    return base


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None or _is_switch(data[section]):
            data[section] = {}  # a field of a section that is on or off turns it on
        data = data[section]
        if not isinstance(data, dict):
            raise UserError(f"--set {key}: {section} is no section")
    data[last] = value


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool) or value in ("on", "off")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None


def _explain(problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{'.'.join(path)}'; {_nearest(path[-1], _fields(path[:-1]))}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{'.'.join(path)}: {problem['msg']}, not {problem['input']!r}"


def _fields(path: Sequence[str]) -> Sequence[str]:
    section: Any = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next(each for each in (*get_args(annotation), annotation) if each is not type(None))
    return list(section.model_fields)


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"the nearest known one is '{close[0]}'" if close else "there are none"
