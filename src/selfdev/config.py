"""What a run is, and how it is read from a preset or a file; its sections are in `settings`.

A preset is a YAML file of these fields; a user's own file may begin with `preset: NAME` and change some of them.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from selfdev.algorithms.examples import examples
from selfdev.algorithms.library import method
from selfdev.algorithms.source import Form
from selfdev.errors import UserError
from selfdev.evaluation.tasks import Split, Task, load_task
from selfdev.names import fields_at, nearest
from selfdev.settings import (
    Endpoint,
    Factory,
    Jail,
    Merge,
    Preferences,
    PromptSettings,
    Race,
    RefinementSettings,
    Scaling,
    Section,
    TaskSettings,
    Verdict,
)
from selfdev.yaml_files import load_yaml

MOST = 1_000_000
"""Programs of one iteration."""

Count = Annotated[int, Field(ge=1, le=MOST)]


class Config(Section):
    """A run, complete."""

    name: str = Field(description="Of the run's folder under runs/.")
    seed: int = Field(1, ge=0, lt=2**63, description="Of all random streams of the run.")
    iterations: int = Field(3, ge=1, le=1000, description="T; no refinement follows the last one.")
    programs: Count | tuple[Count, ...] = Field(
        3000,
        description="N, programs written by each arm in each iteration. A list has those of the first, second, ... "
        "iteration, and its last number holds for all that follow. All arms share the first one's, which cost once.",
    )
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
    controls: tuple[Literal["frozen", "feedback", "learning_feedback"], ...] = Field(
        ("frozen",),
        description="`frozen`: without learning, and under the usual prompts. `feedback`: without learning too, but "
        "each prompt shows one of the arm's own best programs in the place of its last example, as systems do that "
        "evolve programs. "
        "`learning_feedback`: both at once, learning from its own programs.",
    )
    scaling: Scaling = Scaling()
    verdict: Verdict = Verdict()
    jail: Jail = Jail()

    @property
    def budgets(self) -> list[int]:
        """How many programs each arm writes, by iteration."""
        return [self.budget(t) for t in range(self.iterations)]

    def budget(self, t: int) -> int:
        """How many programs each arm writes in iteration t."""
        numbers = (self.programs,) if isinstance(self.programs, int) else self.programs
        return numbers[min(t, len(numbers) - 1)]

    @field_validator("programs", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """One sentence for what is neither a number nor a list of them."""
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers or any(type(number) is not int or not 1 <= number <= MOST for number in numbers):
            raise ValueError(
                f"programs: a number from 1 to {MOST:,}, or a list of such: [168, 56]; not {value!r}"
            )
        return value

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
        self._check_prompt()
        self._check_examples()
        self._check_learning()
        self._check_endpoint()
        self._check_entrants()
        return self

    def _check_prompt(self) -> None:
        """What goes with one form of prompts alone."""
        if self.prompt.template and self.prompt.form is not Form.CONTRACT:
            raise ValueError(
                "prompt.template: the short form is continued without a chat template; leave it out, or set "
                "prompt.form: contract"
            )
        if self.prompt.form is Form.SHORT:
            return
        if self.factory.warm_start.steps:
            raise ValueError(
                "factory.warm_start.steps: the warm start teaches the short form; set prompt.form: short"
            )
        if self.factory.grammar == "python":
            raise ValueError(
                "factory.grammar: the grammar is that of one function in the short form, and an answer in the "
                "contract's form is prose with a module in it; set prompt.form: short or factory.grammar: none"
            )
        for key in ("rehearsal", "shun_examples"):
            if getattr(self.refinement, key):
                raise ValueError(
                    f"refinement.{key}: it takes worked examples in the short form; set prompt.form: short"
                )

    def _check_examples(self) -> None:
        """Whether there are as many worked examples as are asked for."""
        known, prompt = examples(), self.prompt
        for name in prompt.names:
            if name not in known:
                raise ValueError(f"prompt.names: no worked example '{name}'; {nearest(name, known)}")
        if prompt.examples == "drawn" and prompt.shown > len(known):
            raise ValueError(f"prompt.shown: {prompt.shown} examples of {len(known)}")
        shows = prompt.shown if prompt.examples == "drawn" else len(prompt.names)
        if self.refinement.rehearsal and self.refinement.rehearsal > len(known) - shows:
            raise ValueError(
                f"refinement.rehearsal: {self.refinement.rehearsal} worked examples, and beside those that a prompt "
                f"shows there are {len(known) - shows}"
            )
        if self.factory.warm_start.targets + prompt.shown > len(known):
            raise ValueError(
                f"factory.warm_start.targets and prompt.shown together exceed the {len(known)} examples"
            )

    def _check_learning(self) -> None:
        """Whether there are programs to write and something to learn from."""
        if self.factory.repair_turn and min(self.budgets) < 2:
            raise ValueError(
                f"factory.repair_turn: half of the programs come before it, and programs is {min(self.budgets)}; set "
                "programs: 2 or more, or factory.repair_turn: false"
            )
        learns = self.refinement.refit != "never"
        if learns and not self.preferences.pairs and not self.refinement.imitation.passes:
            raise ValueError(
                "preferences.pairs: with none, and with refinement.imitation.passes: 0, nothing could be learned; set "
                "one of them, or refinement.refit: never"
            )

    def _check_entrants(self) -> None:
        """Who takes part beside the factory that learns."""
        for key, names in (("rivals", self.rivals), ("controls", self.controls)):
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{key}: {twice} stands there twice; leave one out")
        for name in self.rivals:
            rival = method(name)
            if rival.experts is not None and rival.experts != len(self.merge.experts):
                raise ValueError(
                    f"rivals: {name} takes {rival.experts} experts and merge.experts has {len(self.merge.experts)}"
                )

    @property
    def shows_programs(self) -> bool:
        """Whether prompts of any arm show programs that were written."""
        return self.prompt.feedback or any("feedback" in name for name in self.controls)

    def load_task(self) -> Task:
        """The task that it names, which has what is asked of it.

        Raises:
            UserError: there is no such task, or it has too few questions or lacks a group.
        """
        task = load_task(self.task.name)
        task.check_count(Split.DEVELOPMENT, self.task.development)
        task.check_count(Split.TEST, self.task.test)
        for field, named in (("weights", self.task.weights), ("floors", self.task.floors)):
            for group in named:
                if group not in task.groups:
                    raise UserError(
                        f"task.{field}: the task has no group '{group}'; {nearest(group, task.groups)}"
                    )
        return task

    def _check_endpoint(self) -> None:
        """What a server that samples asks of the other sections."""
        server, learns = self.factory.endpoint, self.refinement.refit != "never"
        shows = self.prompt.feedback
        own = {(True, True): "learning_feedback", (False, True): "feedback", (False, False): "frozen"}
        if (control := own.get((learns, shows))) in self.controls:
            settings = [
                *([] if learns else ["refinement.refit: never"]),
                *(["prompt.feedback: true"] if shows else []),
            ]
            raise ValueError(
                f"controls: with {' and '.join(settings)} the run is its own {control} control; leave '{control}' out"
            )
        if not learns and "learning_feedback" in self.controls:
            raise ValueError(
                "controls: with refinement.refit: never nothing learns; "
                + (
                    "leave 'learning_feedback' out"
                    if shows
                    else "in the place of 'learning_feedback' set 'feedback'"
                )
            )
        if server is None:
            return
        if self.prompt.template and not self.factory.weights_here:
            raise ValueError(
                "prompt.template: a server applies the chat template; give it factory.endpoint.request: "
                "{chat_template_kwargs: ...} instead"
            )
        if learns and self.refinement.train == "full":
            raise ValueError(
                "refinement.train: a server is given LoRA adapters and no whole model; set it to lora"
            )
        if learns and server.adapters == "none":
            why = (
                "only the server has the model's weights"
                if not self.factory.weights_here
                else (
                    "the server would not get what is learned; with vLLM set factory.endpoint.adapters: vllm"
                )
            )
            raise ValueError(
                f"refinement.refit: {why}. A run that only searches has refinement.refit: never, and the control "
                "'frozen' with prompt.feedback alone"
            )
        if server.chat and self.prompt.form is Form.SHORT:
            raise ValueError(
                "factory.endpoint.chat: the short form is a text to be continued; set prompt.form: contract"
            )


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
    for change in [changes] if isinstance(changes, str) else changes:
        _put(data, *_split(change))
    config = parse_config(data, preset)
    if config.race is not None and config.scaling.norm is not None:  # earlier runs of both are still shown
        raise UserError(
            f"{preset}: race: programs race as they were written, where most miss the scale, and who leaves early is "
            "never brought to scaling.norm; set scaling.norm: null or race: off"
        )
    try:
        config.load_task()
    except UserError as error:
        raise UserError(f"{preset}: {error}") from None
    return config


def change_config(config: Config, changes: Sequence[str], where: str) -> Config:
    """Change a run that has begun, in fields that do not decide what is written.

    Args:
        config: with which it began.
        changes: as in `load_config`.
        where: begins every error.

    Raises:
        UserError: as in `load_config`, or a run must go on with what it began with in this field.
    """
    data = config.model_dump(mode="json")
    # Of the devices it is the same under another name that is taken.
    free = ["factory.device", "task.device", "jail.workers"]
    free += [f"factory.endpoint.{name}" for name in Endpoint.CHANGEABLE] if config.factory.endpoint else []
    for change in changes:
        key, value = _split(change)
        if key not in free:
            raise UserError(
                f"--set {key}: a run goes on with what it began with; only {', '.join(free)} may change"
            )
        _put(data, key, value)
    return parse_config(data, where)


def parse_config(data: Mapping[str, Any], where: str) -> Config:
    """Check a run's fields, but not its task (`Config.load_task`); `where` they come from begins every error.

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
        data = dict(yaml.safe_load(text))
    else:
        data = _read_file(preset)
    if "preset" not in data:
        return data
    return _merged(_read(str(data.pop("preset")), (*seen, preset)), data)


def _read_file(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"no preset '{name}'; {nearest(name, presets())}; a file of your own ends in .yaml")
    try:
        data = _yaml(path.read_text(encoding="utf-8"), name)
    except OSError as error:
        here = "" if path.is_absolute() else f" (in {Path.cwd()})"
        raise UserError(f"{name}: {error.strerror}{here}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: it is no text in UTF-8") from None
    if not isinstance(data, dict):
        raise UserError(f"{name}: it holds no fields; a run needs at least name, factory, merge and task")
    return data


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section; the experts are replaced as a whole."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key != "experts":
            _merged(base[key], value)
        else:
            base[key] = value
    return base


def _split(change: str) -> tuple[str, Any]:
    """Key and value of a `KEY=VALUE`."""
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise UserError(f"--set {change}: it reads KEY=VALUE, for example --set factory.temperature=0.8")
    return key, _yaml(value, f"--set {change}")


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
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from None


def _explain(problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] == "missing":
        return f"{'.'.join(path)} is missing; give it"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{'.'.join(path)}'; {nearest(path[-1], fields_at(Config, path[:-1]))}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    where = ".".join(part for part in path if not part.isdigit())
    if problem["type"] == "tuple_type":
        return f"{where}: it is a list, as in [{problem['input']}], not {problem['input']!r}"
    if problem["type"] == "too_short":
        return f"{where}: at least {problem['ctx']['min_length']}, and there are {problem['ctx']['actual_length']}"
    return f"{where}: {problem['msg']}, not {problem['input']!r}"
