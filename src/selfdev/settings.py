"""The sections of a config. Every field has a unit or a range, and a reader; an unknown key is an error."""

import re
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from selfdev.algorithms.source import Form

Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Knows its fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WarmStart(Section):
    """Supervised steps on the worked examples before the first iteration; see `factory/warm_start.py`."""

    steps: int = Field(
        0, ge=0, description="Optimiser steps; 0 leaves the warm start out, as the paper does."
    )
    learning_rate: float = Field(3e-4, gt=0, description="Peak rate of AdamW.")
    rank: int = Field(32, ge=1, description="LoRA rank.")
    targets: int = Field(8, ge=1, description="Worked examples that one step learns to write.")
    seed: int = Field(0, description="Of the draw; not the run's, so that runs share one cached adapter.")


LIMITS = ("max_tokens", "max_completion_tokens")
"""Fields of a request that limit what a server writes."""


class Endpoint(Section):
    """A server that speaks OpenAI's protocol and writes the programs; see docs/endpoints.md."""

    CHANGEABLE: ClassVar = (
        *("url", "key_env", "shared_folder", "shared_folder_on_server", "concurrency", "requests_a_minute"),
        *("timeout", "retries", "backoff", "patience"),
        *("tokens_budget", "money_budget", "price_in", "price_out"),
    )
    """Fields that do not decide what is written, and may change when a run is resumed."""

    url: str = Field(description="Its address up to and with /v1, such as http://localhost:8000/v1.")
    model: str | None = Field(
        None, description="What the server calls the model; `factory.model` by default."
    )
    key_env: str | None = Field(
        None, description="Environment variable that holds the key. The key itself is written nowhere."
    )
    chat: bool | None = Field(
        None,
        description="Ask by messages, or let a text be continued; by default as `prompt.form` is: `contract` is a "
        "message, `short` a text.",
    )
    adapters: Literal["none", "vllm"] = Field(
        "none", description="`vllm`: what is learned here is loaded into the running server, which is vLLM."
    )
    shared_folder: str | None = Field(
        None, description="Where adapters lie that the server loads; by default in the run's folder."
    )
    shared_folder_on_server: str | None = Field(
        None, description="The same folder as the server sees it, where that is another path."
    )
    request: dict[str, JsonValue] = Field(
        {}, description="Fields added to every request as they are; `null` leaves one of ours out."
    )
    concurrency: int = Field(16, ge=1, le=1024, description="Requests at once.")
    requests_a_minute: float | None = Field(None, gt=0, description="Requests are spaced out to so many.")
    timeout: float = Field(300.0, gt=0, description="Until a request is given up, in seconds.")
    retries: int = Field(6, ge=0, description="Times that a request is sent again after it failed.")
    backoff: float = Field(
        1.0, gt=0, description="Longest wait before the first retry, in seconds; it doubles each time."
    )
    patience: float = Field(
        120.0, gt=0, description="Longest wait at all, in seconds; a server that wants more ends the session."
    )
    tokens_budget: int | None = Field(
        None, ge=1, description="Tokens of the whole run, read and written, at which it stops."
    )
    money_budget: float | None = Field(
        None, gt=0, description="Price of the whole run at which it stops, in the unit of the prices."
    )
    price_in: float = Field(0.0, ge=0, description="Of a million tokens read.")
    price_out: float = Field(0.0, ge=0, description="Of a million tokens written.")

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = urlsplit(value)
        if "@" in value or parts.query or parts.fragment:  # not repeated: there may be a key in it
            raise ValueError(
                "factory.endpoint.url: it holds a password or a query; give the bare address, and name the environment "
                "variable that holds the key under factory.endpoint.key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(
                f"factory.endpoint.url: '{value}' is no address; it reads like http://localhost:8000/v1"
            )
        return value.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"[A-Za-z_][A-Za-z0-9_]*", value
        ):  # it may be the key itself
            raise ValueError(
                "factory.endpoint.key_env: it is no name of an environment variable; export the key under one, such "
                "as OPENAI_API_KEY, and give that name"
            )
        return value

    @model_validator(mode="after")
    def _priced(self) -> "Endpoint":
        if self.money_budget is not None and not self.price_in + self.price_out:
            raise ValueError(
                "factory.endpoint.money_budget: nothing has a price; set factory.endpoint.price_in and price_out"
            )
        unlimited = self.request.get(LIMITS[0], 1) is None and self.request.get(LIMITS[1]) is None
        if unlimited and (self.tokens_budget or self.money_budget):
            raise ValueError(
                "factory.endpoint.request: it leaves out max_tokens and names no max_completion_tokens, so nobody "
                "knows what an answer may cost, and no budget could be held; name one of them"
            )
        for field in (*LIMITS, "n"):
            value = self.request.get(field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(
                    f"factory.endpoint.request: {field} is {value!r}; it is a whole number from 1"
                )
        return self


ENDPOINT_MODEL = "endpoint:"
"""Begins a `factory.model` whose weights are not here: only the server has them."""


class Factory(Section):
    """The model that writes algorithms, and how it is sampled."""

    model: str = Field(
        description="Where its weights come from, see `selfdev.models.sources`; or `endpoint:NAME`, a model that only "
        "the server has, so that nothing can be learned."
    )
    endpoint: Endpoint | None = Field(
        None, description="The server that samples; without it this process does."
    )
    temperature: float = Field(1.2, gt=0, description="T_1, of the first iteration. The paper: 1.2.")
    decay: float = Field(0.2, ge=0, description="T_t = T_1 / (1 + decay (t - 1)).")
    top_k: int = Field(0, ge=0, description="Most likely tokens that are drawn from; 0: all.")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability of the tokens that are drawn from.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Least probability of a token, as a share of the highest; 0: any."
    )
    max_new_tokens: int = Field(512, ge=8, description="Where a program that does not end is cut, in tokens.")
    batch: int = Field(
        64, ge=1, description="Programs written at once; one that ends makes room for the next."
    )
    device: Device = Field(
        "auto", description="Where it computes in process; `auto`: CUDA's GPU if there is one, else the CPU."
    )
    dtype: Dtype = Field("float32", description="Type of its weights. On most CPUs only float32 is fast.")
    grammar: Literal["none", "python"] = Field(
        "none",
        description="`python`: only what continues a valid program with names in scope is sampled. For the short form, "
        "in process; needs the extra `grammar`.",
    )
    repair_turn: bool = Field(
        False,
        description="Of an iteration's `programs` half are written as always; those of them that fail are shown to the "
        "factory, each with its error, and it may write each once more; what is left is written as always.",
    )
    warm_start: WarmStart = WarmStart()

    def temperature_at(self, iteration: int) -> float:
        """The sampling temperature of an iteration, counted from 0."""
        return self.temperature / (1 + self.decay * iteration)

    @property
    def weights_here(self) -> bool:
        """Whether the model's weights are on this machine, to be trained."""
        return not self.model.startswith(ENDPOINT_MODEL)

    @model_validator(mode="after")
    def _served(self) -> "Factory":
        """What must fit together where a server samples."""
        server = self.endpoint
        if server is None:
            if not self.weights_here:
                raise ValueError(
                    f"factory.model: '{self.model}' is a server's; give factory.endpoint.url too"
                )
            return self
        if server.adapters == "vllm" and not self.weights_here:
            raise ValueError(
                f"factory.endpoint.adapters: '{self.model}' has no weights here that could be trained; set "
                "factory.model to where they come from, and factory.endpoint.model to what the server calls them"
            )
        if self.warm_start.steps and server.adapters == "none":
            raise ValueError(
                "factory.warm_start.steps: the server would not have the warm start; with vLLM set "
                "factory.endpoint.adapters: vllm, with others factory.warm_start.steps: 0"
            )
        if self.grammar != "none":
            raise ValueError(
                "factory.grammar: a server samples by itself; set factory.grammar: none, and give its own field for "
                "grammars under factory.endpoint.request"
            )
        if server.tokens_budget is not None and server.tokens_budget <= self.max_new_tokens:
            raise ValueError(
                f"factory.endpoint.tokens_budget: {server.tokens_budget} tokens do not pay for one program, which may "
                f"take {self.max_new_tokens} (factory.max_new_tokens) and its prompt"
            )
        return self


class PromptSettings(Section):
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


class Merge(Section):
    """What is merged."""

    seed: str = Field(description="M0: where its weights come from.")
    experts: dict[str, str] = Field(
        min_length=2, description="Name of each expert, and where its weights come from."
    )
    targets: str = Field("mlp", description="Which tensors: mlp, attention, all, or a regular expression.")

    @field_validator("targets")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"'{value}' is no regular expression: {error}; use mlp, attention, all or another one"
            ) from None
        return value


class TaskSettings(Section):
    """The questions that decide."""

    name: str = Field(description="A built-in task, gsm8k:FOLDER, or a YAML file; see docs/tasks.md.")
    development: int = Field(100, ge=1, description="Questions of the development split.")
    test: int = Field(1000, ge=1, description="Questions of the test split, which the verdict opens once.")
    device: Device = Field(
        "auto", description="Where merged models answer; `auto`: CUDA's GPU if there is one, else the CPU."
    )
    dtype: Dtype = Field(
        "float32", description="Type of their weights then. On most CPUs only float32 is fast."
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Weight of a group in the score; 1 for groups that are not named."
    )
    floors: dict[str, Annotated[float, Field(ge=0, le=100)]] = Field(
        {}, description="Points that may be lost on a group against the seed; who loses more may not win."
    )


class Race(Section):
    """How the new programs of an iteration race; see `evaluation/race.py`."""

    first: int = Field(60, ge=1, description="Questions that every program answers.")
    growth: float = Field(1.2, gt=1, description="How many times as many it is from one look to the next.")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Probability at which one of the best may leave early."
    )


class Preferences(Section):
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
    evidence: float = Field(
        0.0,
        ge=0,
        description="E-value from which one program is surely better than another. Chosen are those surely better than "
        "the seed, and not paired with one rejected for its score unless surely better than that; 0: any is.",
    )
    alike: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Chosen programs whose texts are more alike than this (share of equal tokens) share `pairs_each`; "
        "such rejected ones wait for the others.",
    )
    repairs: int = Field(
        0,
        ge=0,
        description="Small edits that are tried on each failing program; the first one that works and is new is "
        "imitated or, where nothing is, preferred to it, beside `pairs`. 0: none.",
    )
    score_repairs: bool = Field(
        False,
        description="Repairs are scored on development too, and only those are learned from that are, by `evidence`, "
        "surely better than the seed; rivals get as many evaluations more.",
    )
    pairs: int = Field(64, ge=0, description="Pairs of one round; 0: programs are imitated alone.")
    pairs_each: int = Field(64, ge=1, description="Pairs of a round that one chosen program may stand in.")


class ImitationSettings(Section):
    """Before the preferences, the programs that work and are new are imitated; the paper has nothing like it."""

    passes: int = Field(0, ge=0, description="How often each of them is imitated; 0 leaves it out.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak rate of AdamW.")
    programs_a_step: int = Field(
        6, ge=1, description="Programs that share one packed prompt and one optimiser step."
    )


class RefinementSettings(Section):
    """One round of training; see docs/learning.md. The paper: DPO, beta 0.01, learning rate 1e-6, LoRA rank 256."""

    backend: Literal["own", "trl"] = Field(
        "own", description="`own`: packed prompts, made for CPUs. `trl`: TRL's DPOTrainer, the extra `trl`."
    )
    devices: int = Field(
        1,
        ge=1,
        description="With `backend: trl`: so many processes, one a device, share the pairs of every step.",
    )
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "kto"] = Field(
        "sigmoid", description="Of the preferences; see `factory/losses.py`. The paper: sigmoid."
    )
    beta: float = Field(0.01, gt=0, description="Strength of the pull towards the reference.")
    flip_rate: Literal["measured"] | Annotated[float, Field(ge=0, le=0.45)] = Field(
        "measured",
        description="Of `loss: robust`: share of the pairs that are the wrong way round; `measured`: from the answers "
        "of both programs of each pair.",
    )
    kl: float = Field(
        0.0,
        ge=0,
        description="Factor on the divergence from the reference, in nats a token; 0 leaves it out.",
    )
    kl_direction: Literal["forward", "reverse"] = Field(
        "reverse", description="`reverse`: KL(model || reference); `forward`: KL(reference || model)."
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak rate of AdamW.")
    train: Literal["lora", "full"] = Field(
        "lora", description="`lora`: an adapter on the frozen weights (the paper). `full`: all weights."
    )
    rank: int = Field(256, ge=1, description="LoRA rank; alpha is the same.")
    epochs: int = Field(1, ge=1, description="Passes over the pairs.")
    supervised: float = Field(0.0, ge=0, description="Factor on the chosen side's loss in nats a token.")
    shun_examples: int = Field(
        0,
        ge=0,
        description="So many of the worked examples that a prompt shows, the first ones, are rejected against its "
        "chosen programs: copies of them, before anybody writes one; short form only.",
    )
    imitation: ImitationSettings = ImitationSettings()
    rehearsal: int = Field(
        0,
        ge=0,
        description="Worked examples that each step imitates beside the programs; short form only.",
    )
    pairs_a_step: int = Field(
        4, ge=1, description="Pairs that share one packed prompt and one optimiser step."
    )
    optimizer: Literal["fresh", "continue"] = Field(
        "fresh",
        description="`continue`: AdamW begins with the moments that the round before has left; with `train: full` and "
        "`refit: continue` alone, since a new adapter's matrices are not those that earlier moments belong to.",
    )
    tokens_a_pass: int | None = Field(
        None,
        ge=1,
        description="Most tokens, the prompt included, of one forward and backward pass; a step that has more takes "
        "several. `null`: as many as memory allows.",
    )
    min_pairs: int = Field(1, ge=1, description="A round that has fewer pairs is skipped.")
    stop_margin: float | None = Field(
        None,
        gt=0,
        description="Mean margin of the last four steps, in nats, above which a round ends early; `null`: never.",
    )
    refit: Literal["continue", "fresh", "never"] = Field(
        "continue",
        description="`continue`: a new adapter on top of the last one (the paper). `fresh`: one on the first factory, "
        "from the pairs of all rounds. `never`: nothing is learned.",
    )
    reference: Literal["first", "previous"] | None = Field(
        None,
        description="What the model is held to: the `first` factory, or that of the `previous` iteration; `null`: the "
        "one that the new adapter stands on.",
    )

    @property
    def held_to(self) -> Literal["first", "previous"]:
        """The reference, whether it is named or follows from `refit`."""
        return self.reference or ("first" if self.refit == "fresh" else "previous")

    @model_validator(mode="after")
    def _trained_as_a_whole(self) -> "RefinementSettings":
        """What goes only with, or only without, training all weights."""
        if self.train == "full" and self.kl:
            raise ValueError(
                "refinement.kl: the reference's distributions are made with the model's own output layer, which "
                "refinement.train: full trains; set refinement.train: lora or refinement.kl: 0"
            )
        if self.optimizer == "continue" and (self.train, self.refit) != ("full", "continue"):
            raise ValueError(
                "refinement.optimizer: every round trains new weights, which the moments of earlier ones do not belong "
                "to, unless refinement.train is full and refinement.refit is continue; set both, or optimizer: fresh"
            )
        return self

    @model_validator(mode="after")
    def _done_by_trl(self) -> "RefinementSettings":
        """What TRL's DPOTrainer cannot do."""
        if self.backend == "trl":
            for key, on in (
                ("loss: kto", self.loss == "kto"),
                ("kl", self.kl),
                ("rehearsal", self.rehearsal),
            ):
                if on:
                    raise ValueError(
                        f"refinement.{key}: TRL's DPOTrainer has nothing like it; leave it out or set "
                        "refinement.backend: own"
                    )
        elif self.devices > 1:
            raise ValueError(
                "refinement.devices: only TRL's DPOTrainer trains on several; set refinement.backend: trl or devices: 1"
            )
        if self.pairs_a_step % self.devices:
            raise ValueError(
                f"refinement.pairs_a_step: {self.pairs_a_step} pairs cannot be shared out evenly among "
                f"{self.devices} devices; take a multiple of {self.devices}"
            )
        return self


class Scaling(Section):
    """A program is what it is up to a factor, so its scale is tuned, as that of every rival is; off in the paper."""

    norm: float | None = Field(
        None,
        gt=0,
        description="Every new program is scored as it was written and once more with its merged task vector brought "
        "to this norm, in norms of the mean task vector; `null`: only as written.",
    )
    programs: int = Field(
        0, ge=0, description="Best new programs of each arm that are tuned before the verdict; 0 tunes none."
    )
    factors: tuple[float, ...] = Field(
        (0.5, 0.7, 1.4, 2.0), description="What the scale at which a program is best so far is multiplied by."
    )


class Verdict(Section):
    """The final test."""

    finalists: int = Field(
        15, ge=1, description="Discovered programs measured on test, best on development first."
    )
    level: float = Field(0.95, gt=0, lt=1, description="Of every interval.")


class Jail(Section):
    """Limits of one jailed program."""

    wall_seconds: float = Field(10.0, ge=0.1, le=3600, description="Until it is killed.")
    memory_mb: int = Field(1024, ge=64, description="Above what the bare process takes, in MB.")
