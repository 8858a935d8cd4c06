"""A round by TRL on several devices: a process for each, and these share the pairs of every step.

They find what is to be done in a folder: `round.json`, and in `start` what is trained, as it is before the preferences.
They leave `learned` and `outcome.json` there. torchrun starts them, and ends all where one fails.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.adapter import load_moments, save_learned, with_adapter
from selfdev.factory.assembly import Blueprint
from selfdev.factory.packing import Model
from selfdev.factory.refinement import Diverged, Losses, Outcome, Report, Step
from selfdev.models.folder import load_tokenizer
from selfdev.settings import RefinementSettings

START, LEARNED = "start", "learned"

_ROUND, _OUTCOME, _FAILED = "round.json", "outcome.json", "failed.txt"
_STEP = re.compile(r"selfdev: step (\d+);")
_PATIENCE = 20.0
"""Seconds that processes have to end after they were asked to."""


@dataclass(frozen=True)
class Round:
    """What the processes do.

    Attributes:
        ground: what is trained, without the adapter that is.
        reference: an adapter stands in the place of the one that is trained; None: there is none in it.
        device: kind of it, such as `cuda`; each process takes one.
        dtype: of the weights.
        tokenizer: folder of it.
        settings: of the run.
        flip_rate: see `refine_with_trl`.
        pairs_a_pass: of one process.
        moments: folder of what an earlier round has left of its optimiser.
        steps: of preferences.
    """

    ground: Blueprint
    reference: Blueprint | Path | None
    device: str
    dtype: str
    tokenizer: Path
    settings: RefinementSettings
    flip_rate: float
    pairs_a_pass: int
    moments: Path | None
    steps: Sequence[Step]

    def trainee(self, folder: Path, device: str) -> Model:
        """What is trained, as it lies in a folder."""
        if self.settings.train == "full":
            return Blueprint(folder).load(self.dtype, device).requires_grad_(True)
        return with_adapter(self.ground.load(self.dtype, device), folder, trained=True)


_FORMAT = TypeAdapter(Round)


def check_devices(wanted: int, visible: int) -> None:
    """Raise UserError if there are fewer GPUs, or one is wanted where TRL would use several."""
    if wanted > visible:
        raise UserError(
            f"refinement.devices: {wanted} are asked for and {visible} GPUs are visible; take {visible}"
        )
    if wanted == 1 < visible:
        raise UserError(
            f"refinement.backend: trl sees {visible} GPUs; set refinement.devices: {visible} to train on all, or "
            "make one visible with CUDA_VISIBLE_DEVICES"
        )


def refine_in_processes(round_: Round, folder: Path, tick: Report) -> Outcome:
    """Start the processes and wait for them; none is left behind.

    Args:
        round_: what they do.
        folder: has `start`; afterwards `learned` as well, the optimiser's moments in it.
        tick: called after each optimiser step with how many are done.

    Raises:
        Diverged: a loss or a weight is not finite.
        SelfdevError: they ended with an error.
    """
    (folder / _ROUND).write_bytes(_FORMAT.dump_json(round_))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--log-dir",
        str(folder / "log"),
    ]
    command += ["--nproc-per-node", str(round_.settings.devices), "-m", __name__, str(folder)]
    last = ""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end tells the processes that nobody waits for them
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as launched:
        try:
            for line in launched.stdout or ():
                if found := _STEP.search(line):
                    tick(int(found[1]))
                else:
                    last = line.strip() or last
        except BaseException:
            _end(launched)
            raise
    outcome = _read(folder / _OUTCOME)
    if outcome is None or launched.returncode:
        failed = folder / _FAILED
        why = f"{failed.read_text()}; " if failed.is_file() else ""
        why += f"torchrun ended with {launched.returncode} ({last})"
        raise SelfdevError(
            f"refinement: a process of the {round_.settings.devices} that train has failed: {why}; mend that and "
            "resume, or begin a run with lower refinement.pairs_a_step, rank or devices"
        )
    if "diverged" in outcome:
        raise Diverged(outcome["diverged"])
    return Outcome([Losses(**each) for each in outcome["losses"]], outcome["stopped"])


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _end(launched: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(launched.pid, number)
            launched.wait(_PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def take_part(folder: Path) -> None:
    """What each of the processes does; the first one tells of it."""
    from selfdev.factory.trl_backend import refine_with_trl

    threading.Thread(target=_leave_with_the_run, daemon=True).start()
    first = os.environ["RANK"] == "0"
    round_ = _FORMAT.validate_json((folder / _ROUND).read_bytes())
    device = round_.device if round_.device == "cpu" else f"{round_.device}:{os.environ['LOCAL_RANK']}"
    model, held = round_.trainee(folder / START, device), round_.reference
    try:
        outcome = refine_with_trl(
            model,
            held.load(round_.dtype, device) if isinstance(held, Blueprint) else held,
            load_tokenizer(round_.tokenizer),
            round_.steps,
            round_.settings,
            flip_rate=round_.flip_rate,
            pairs_a_pass=round_.pairs_a_pass,
            moments=load_moments(round_.moments) if round_.moments else None,
            tick=lambda step: print(f"selfdev: step {step};", flush=True) if first else None,
        )
    except Diverged as error:
        found: dict[str, Any] = {"diverged": str(error)}
    else:
        found = {"losses": [asdict(each) for each in outcome.losses], "stopped": outcome.stopped}
        if first:
            save_learned(model, folder / LEARNED, outcome.moments)
    if first:
        (folder / _OUTCOME).write_text(json.dumps(found))


def _leave_with_the_run() -> None:
    """End this process once the one that reads its steps is gone, however that came."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """`python -m selfdev.factory.trl_processes FOLDER`, as torchrun starts it."""
    folder = Path(sys.argv[1])
    try:
        take_part(folder)
    except Exception as error:
        # The first of them has the cause; the others may only have lost it.
        with suppress(FileExistsError), (folder / _FAILED).open("x") as file:
            file.write(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
