"""What the factory learns from, and how."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfdev.settings.section import Section


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
        description="`continue`: a round trains the very weights of the round before (with `train: lora` its adapter, "
        "and no new one on top), and AdamW begins with the moments it has left; needs `refit: continue`.",
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
        description="`continue`: from what was learned before (the paper). `fresh`: from the first factory, "
        "from the pairs of all rounds. `never`: nothing is learned.",
    )
    reference: Literal["first", "previous"] | None = Field(
        None,
        description="What the model is held to: the `first` factory, or that of the `previous` iteration; `null`: the "
        "one that a round begins from.",
    )

    @property
    def one_adapter(self) -> bool:
        """Whether all rounds train one adapter, each the last state of it, and none puts a new one on top."""
        return self.train == "lora" and self.optimizer == "continue"

    @property
    def last_is_all(self) -> bool:
        """Whether what a round saves has all of the rounds before it in it, or nothing of them."""
        return self.refit == "fresh" or self.train == "full" or self.one_adapter

    @property
    def held_to(self) -> Literal["first", "previous"]:
        """The reference, whether it is named or follows from `refit`."""
        return self.reference or ("first" if self.refit == "fresh" else "previous")

    @model_validator(mode="after")
    def _trained_as_a_whole(self) -> "RefinementSettings":
        """What goes only with training an adapter, or only where a round trains the weights of the one before."""
        if self.train == "full" and self.kl:
            raise ValueError(
                "refinement.kl: the reference's distributions are made with the model's own output layer, which "
                "refinement.train: full trains; set refinement.train: lora or refinement.kl: 0"
            )
        if self.optimizer == "continue" and self.refit != "continue":
            raise ValueError(
                "refinement.optimizer: every round trains new weights, which the moments of earlier ones do not belong "
                "to, unless refinement.refit is continue; set that, or optimizer: fresh"
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
