"""A round by TRL on many devices: `accelerate launch` starts a process for each, and these share the pairs.

They find what is to be done in a folder: `round.json`, and in `start` what is trained, as it is before the preferences.
They leave `learned` and `outcome.json` there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import load_moments, save_learned
from selfdev.factory.assembly import Made
from selfdev.factory.packing import Model
from selfdev.factory.refinement import Diverged, Losses, Outcome, Report, Step
from selfdev.models.folder import load_tokenizer
from selfdev.settings import RefinementSettings

START, LEARNED = "start", "learned"

_ROUND, _OUTCOME = "round.json", "outcome.json"
_STEP = "selfdev: step "
_SAID = 2000
"""Last characters of what the processes print that the message of an error has."""


@dataclass(frozen=True)
class Round:
    """What the processes do.

    Attributes:
        ground: what is trained, without its new adapter.
        reference: None: the ground without the adapter.
        dtype: of the weights.
        tokenizer: folder of it.
        settings: of the run.
        flip_rate: see `refine_with_trl`.
        pairs_a_pass: of one process.
        moments: folder of what an earlier round has left of its optimiser.
        steps: of preferences.
    """

    ground: Made
    reference: Made | None
    dtype: str
    tokenizer: Path
    settings: RefinementSettings
    flip_rate: float
    pairs_a_pass: int
    moments: Path | None
    steps: Sequence[Step]

    def trainee(self, folder: Path, device: torch.device | str = "cpu") -> Model:
        """What is trained, as it lies in a folder."""
        if self.settings.train == "full":
            return Made(folder).load(self.dtype, device).requires_grad_(True)
        adapted: PeftModel = PeftModel.from_pretrained(
            self.ground.load(self.dtype, device), folder, is_trainable=True
        )
        return adapted


_FORMAT = TypeAdapter(Round)


def processes_of(settings: RefinementSettings) -> int:
    """How many processes train.

    Raises:
        UserError: the file of accelerate does not say it, or they cannot share out an optimiser step evenly.
    """
    accelerate, pairs_a_step = settings.accelerate, settings.pairs_a_step
    if accelerate is None:
        return 1
    try:
        count = int(yaml.safe_load(Path(accelerate).expanduser().read_text())["num_processes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"refinement.accelerate: '{accelerate}' does not say num_processes ({error}); write it by "
            "`accelerate config --config_file FILE`"
        ) from None
    if count < 1 or pairs_a_step % count:
        raise UserError(
            f"refinement.pairs_a_step: {pairs_a_step} pairs cannot be shared out evenly among the {count} processes of "
            f"'{accelerate}'; take a multiple of {count}"
        )
    return count


def refine_in_processes(round_: Round, folder: Path, tick: Report) -> Outcome:
    """Start the processes and wait for them.

    Args:
        round_: what they do.
        folder: has `start`; afterwards `learned` as well.
        tick: called after each optimiser step with how many are done.

    Raises:
        Diverged: a loss or a weight is not finite.
        SelfdevError: they ended with an error.
    """
    (folder / _ROUND).write_bytes(_FORMAT.dump_json(round_))
    config = Path(round_.settings.accelerate or "").expanduser()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["-m", __name__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launched:
        said = ""
        try:
            for line in launched.stdout or ():
                if line.startswith(_STEP):
                    tick(int(line.removeprefix(_STEP)))
                else:
                    said = (said + line)[-_SAID:]
        except BaseException:
            launched.terminate()  # the launcher ends what it has started
            raise
    file = folder / _OUTCOME
    if launched.returncode or not file.is_file():
        raise SelfdevError(
            f"refinement: `accelerate launch` ended with {launched.returncode}, and its processes said:\n{said.strip()}"
        )
    outcome = json.loads(file.read_text())
    if "diverged" in outcome:
        raise Diverged(outcome["diverged"])
    losses = [Losses(**each) for each in outcome["losses"]]
    return Outcome(losses, outcome["stopped"], load_moments(folder / LEARNED))


def take_part(folder: Path) -> None:
    """What each of the processes does; the first one tells of it."""
    from selfdev.factory.trl_backend import refine_with_trl

    first, processes = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    round_ = _FORMAT.validate_json((folder / _ROUND).read_bytes())
    model = round_.trainee(folder / START)
    try:
        outcome = refine_with_trl(
            model,
            round_.reference and round_.reference.load(round_.dtype),
            load_tokenizer(round_.tokenizer),
            round_.steps,
            round_.settings,
            flip_rate=round_.flip_rate,
            pairs_a_pass=round_.pairs_a_pass,
            processes=processes,
            moments=load_moments(round_.moments) if round_.moments else None,
            tick=lambda step: print(f"{_STEP}{step}", flush=True) if first else None,
        )
    except Diverged as error:
        found: dict[str, Any] = {"diverged": str(error)}
    else:
        found = {"losses": [asdict(each) for each in outcome.losses], "stopped": outcome.stopped}
        if first:
            save_learned(model, folder / LEARNED, outcome.moments)
    if first:
        (folder / _OUTCOME).write_text(json.dumps(found))


if __name__ == "__main__":
    take_part(Path(sys.argv[1]))
