"""Who writes programs, where, and what it is asked."""

import re
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from selfdev.algorithms.source import Form
from selfdev.settings.section import Device, Dtype, Section


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

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """What tokens cost that were read and written, in the unit of the prices."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

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
    prompts: int = Field(4, ge=1, description="Drawn prompts in each iteration; at most one a program.")
    feedback: bool = Field(
        False,
        description="Whether what the run searches by shows its own best programs, each in the place of a prompt's "
        "last example, as systems do that evolve programs.",
    )
    elites: int = Field(
        4, ge=1, description="Best programs of an arm that take turns in the prompts where its own are shown."
    )
    template: dict[str, bool | int | float | str] = Field(
        {},
        description="Given to the factory's chat template, such as {enable_thinking: false}. A server is told so by "
        "`factory.endpoint.request` (`chat_template_kwargs`).",
    )
