"""What is learned here, on a running vLLM server: adapters by name, loaded when they are first needed.

vLLM takes one LoRA adapter a request, so the warm start's and an arm's own are handed over as their exact sum. The
name is made of their weights' hash and of the run's tag: a server that was started anew gets them again, and runs
that share a server do not touch each other's.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from selfdev.errors import SelfdevError, UserError
from selfdev.factory.combined_adapter import combine_adapters, combined_rank
from selfdev.factory.server import NoAnswer, Server
from selfdev.models.folder import weights_hash
from selfdev.settings import Endpoint

_NOBODY = "selfdev-nobody"


class ServedAdapters:
    """The adapters of one run.

    Args:
        settings: where they are put for the server.
        folder: of the run, where they are put by default.
        tag: marks them as this run's.
    """

    def __init__(self, settings: Endpoint, folder: Path, tag: str):
        self._shared = (
            Path(settings.shared_folder).expanduser() if settings.shared_folder else folder / "served"
        )
        self._on_server = settings.shared_folder_on_server or str(self._shared.absolute())
        self._prefix = f"selfdev-{tag}-"

    def name(self, layers: Sequence[Path]) -> str:
        """What the server calls the sum of these adapters."""
        hashes = "".join(weights_hash(layer) for layer in layers)
        return self._prefix + hashlib.sha256(hashes.encode()).hexdigest()[:12]

    async def load(self, server: Server, layers: Sequence[Path], also: Iterable[Sequence[Path]] = ()) -> None:
        """See to it that the server has the sum of some adapters, and nothing of this run that is not needed again.

        Args:
            server: a running vLLM.
            layers: the adapters.
            also: more sums that stay if they are there.

        Raises:
            NoAnswer: the server cannot be reached.
            SelfdevError: it will not load them.
        """
        name = self.name(layers)
        served = await server.models()
        if name not in served:
            self._put(name, layers)
            path = f"{self._on_server}/{name}"
            try:
                await server.load_adapter(name, path)
            except NoAnswer as error:
                if error.status is None:
                    raise
                raise SelfdevError(
                    f"{error}\nvLLM takes adapters while it runs if it was started with --enable-lora, --max-lora-rank "
                    f"{combined_rank(layers)} or more, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment; "
                    f"it must see the folder {path}"
                ) from error
        needed = {name} | {self.name(each) for each in also if each}
        for stale in [each for each in served if each.startswith(self._prefix) and each not in needed]:
            await server.unload_adapter(stale)
        # Also what a server that was started anew has forgotten, and what was killed while it was written.
        for folder in self._shared.glob("*"):
            if folder.name.removeprefix(".").startswith(self._prefix) and folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def _put(self, name: str, layers: Sequence[Path]) -> None:
        """Write the sum aside and rename it, so that a folder of that name is always whole."""
        if (self._shared / name).is_dir():
            return
        aside = self._shared / f".{name}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        combine_adapters(layers, aside)
        aside.rename(self._shared / name)


async def check_runtime_adapters(server: Server) -> None:
    """Make sure that a server can load adapters while it runs, before anything is trained for it.

    Raises:
        UserError: it cannot.
    """
    try:
        await server.unload_adapter(_NOBODY)
    except NoAnswer as error:
        if _NOBODY not in str(error):  # who looked for it says that it is not there
            raise UserError(
                f"factory.endpoint.adapters: the server does not load adapters while it runs: {error}\n"
                "Start vLLM with --enable-lora, --max-lora-rank (the sum of factory.warm_start.rank and "
                "refinement.rank) and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            ) from error
