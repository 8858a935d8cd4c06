"""The sandbox as its users see it."""

import dataclasses
import itertools
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from . import system
from .context import Context
from .limits import Limits
from .outcome import Outcome, SandboxUnavailable, Status

# What is imported late below does not exist on every system. There the sandbox says so; it imports anyway.
if TYPE_CHECKING:
    from .job import Call
    from .launcher import Launcher

UNSAFE_NOTICE = system.unsafe_notice()

_PROOF_SECONDS = 60.0


class Sandbox:
    """Runs programs that nobody has read. See the package's docstring for what holds and what does not.

    ``with Sandbox() as box: outcome = box.merge(source, model_dict)``. Calls from several threads take turns.
    """

    def __init__(
        self, limits: Limits | None = None, *, unsafe: bool = False, plain: bool = False, workers: int = 1
    ):
        """Make a sandbox; nothing starts before it is entered.

        Args:
            limits: budgets of each jailed child.
            unsafe: leave every layer but the resource limits away. Works on every system; where there is no
                forkserver, in plain child processes.
            plain: of the unsafe mode, use plain child processes on every system.
            workers: children that may run at once; it changes the time that calls take, and nothing else.

        Raises:
            ValueError: plain, but not unsafe; no worker.
        """
        if plain and not unsafe:
            raise ValueError("plain child processes are no jail; Sandbox(plain=True) needs unsafe=True")
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least one is needed")
        self.limits = limits or Limits()
        self.workers = workers
        self.unsafe = unsafe
        self._plain = plain
        self._entered = False
        self._launcher: Launcher | None = None  # started at need: a call that fails takes it along
        self._jobs = itertools.count()
        self._turn = threading.Lock()

    def __enter__(self) -> "Sandbox":
        """Start the forkserver and run a first program in a full jail.

        Raises:
            SandboxUnavailable: where a layer is missing, with the reason. Nothing goes on without it.
        """
        reason = system.why_no_forkserver()
        if self.unsafe:
            warnings.warn(f"UNSAFE SANDBOX: {UNSAFE_NOTICE}", stacklevel=2)
            self._plain = self._plain or bool(reason)
        elif reason:
            raise SandboxUnavailable(f"the jail needs Linux (Landlock and seccomp). {reason}")
        self._entered = True
        try:
            self._prove()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the forkserver and every child."""
        self.close()

    def close(self) -> None:
        """End the forkserver and every child. A second call does nothing."""
        self._entered = False
        self._stop()

    def _stop(self) -> None:
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.stop()

    @property
    def pid(self) -> int:
        """Process id of the forkserver.

        Raises:
            SandboxUnavailable: where none is running.
        """
        if self._launcher is None:
            raise SandboxUnavailable("no forkserver is running; each call starts one where there is none")
        return self._launcher.process.pid

    def merge(
        self,
        source: str,
        model_dict: Mapping[str, torch.Tensor],
        *,
        context: Context | None = None,
        seed: int = 0,
    ) -> Outcome:
        """Run a program's `merge_models` once in a jailed child.

        Args:
            source: a program that defines `merge_models(model_dict, device)` or
                `merge_models(model_dict, device, context)`.
            model_dict: expert's name to task vector; float32, all of one shape.
            context: third argument for programs that ask for it.
            seed: of torch's and Python's generators, in 0..2**63 - 1.

        Raises:
            ValueError: for a model_dict, a context or a seed that is not as above.
            SandboxUnavailable: where the jail broke; never because of what a program did.
        """
        return self.merge_many(source, [model_dict], contexts=[context], seeds=[seed])[0]

    def merge_many(
        self,
        source: str,
        model_dicts: Sequence[Mapping[str, torch.Tensor]],
        *,
        contexts: Sequence[Context | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """Run a program on many tensors, several to a jailed child.

        Which tensors share a child depends on their number and sizes alone, never on the workers; each call
        is seeded anew and sees the program defined anew.

        Args:
            source: as for `merge`.
            model_dicts: one for each call; shapes may differ between calls.
            contexts: one for each call.
            seeds: one for each call; 0 where absent.

        Returns:
            An outcome for each call, in their order.

        Raises:
            ValueError: as for `merge`, and where the lengths differ.
            SandboxUnavailable: where the jail broke; never because of what a program did.
        """
        calls = _calls(model_dicts, contexts, seeds)
        length = len(source.encode("utf-8", "surrogatepass"))
        if length > self.limits.source_bytes:
            text = f"the source has {length} bytes; the limit is {self.limits.source_bytes}"
            return [Outcome(Status.REJECTED, None, "SourceTooLong", text)] * len(calls)
        return self._run(source, calls, self.limits)

    def _run(self, source: str, calls: "list[Call]", limits: Limits) -> list[Outcome]:
        with self._turn:
            outcomes = self._attempt(source, calls, limits)
            if outcomes is None:
                # Nothing that a program does ends the forkserver; a machine out of memory does.
                outcomes = self._attempt(source, calls, limits)
        if outcomes is None:
            raise SandboxUnavailable("the forkserver died twice; is the machine out of memory?")
        return outcomes

    def _attempt(self, source: str, calls: "list[Call]", limits: Limits) -> list[Outcome] | None:
        """All outcomes, or None if the forkserver died. After a failure of any kind the next one is new."""
        self._require_entered()
        if self._plain:
            from . import plain_process

            return plain_process.run(source, calls, limits, self.workers)
        from .batch import Batch
        from .wire import Hangup

        launcher = self._started()
        try:
            return Batch(launcher, source, calls, limits, self._jobs, unsafe=self.unsafe).run(self.workers)
        except Hangup:
            self._stop()
            return None
        except BaseException:
            self._stop()
            raise

    def _require_entered(self) -> None:
        if not self._entered:
            raise SandboxUnavailable(
                "the sandbox is not running; use it as a context manager: with Sandbox() as box"
            )

    def _started(self) -> "Launcher":
        if self._launcher is None:
            from .launcher import Launcher

            self._launcher = Launcher()
        if self._launcher.owner != os.getpid():
            raise SandboxUnavailable(
                "this sandbox belongs to the process that forked this one; make a new one here"
            )
        return self._launcher

    def _prove(self) -> None:
        """Run a known program: every layer is installed once before any other is.

        It has longer than others may: that a machine is busy says nothing of its layers.
        """
        ones = torch.ones(3)
        source = "def merge_models(model_dict, device):\n    return sum(model_dict.values())"
        limits = dataclasses.replace(self.limits, wall_seconds=max(self.limits.wall_seconds, _PROOF_SECONDS))
        (outcome,) = self._run(source, _calls([{"a": ones, "b": ones}], None, None), limits)
        if outcome.tensor is None or not torch.equal(outcome.tensor, 2 * ones):
            raise SandboxUnavailable(
                f"a known program fails in the jail: {outcome.status}, {outcome.failure}: {outcome.error}"
            )


def _calls(
    model_dicts: Sequence[Mapping[str, torch.Tensor]],
    contexts: Sequence[Context | None] | None,
    seeds: Sequence[int] | None,
) -> "list[Call]":
    """Check what the caller gave and bring it into the form that travels."""
    contexts = [None] * len(model_dicts) if contexts is None else contexts
    seeds = [0] * len(model_dicts) if seeds is None else seeds
    if not len(model_dicts) == len(contexts) == len(seeds):
        raise ValueError(
            f"{len(model_dicts)} model_dicts, {len(contexts)} contexts and {len(seeds)} seeds; "
            "a call needs one of each"
        )
    return [_call(*parts) for parts in zip(model_dicts, contexts, seeds, strict=True)]


def _call(model_dict: Mapping[str, torch.Tensor], context: Context | None, seed: int) -> "Call":
    from .job import Call

    if not model_dict:
        raise ValueError("model_dict is empty; a program merges at least one task vector")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be an integer in 0..2**63 - 1")
    for name in model_dict:
        if not isinstance(name, str):
            raise ValueError(f"model_dict: {name!r} is not a string; its keys are the experts' names")
    shape = next(iter(model_dict.values())).shape
    tensors = {name: _travelling(name, tensor, shape) for name, tensor in model_dict.items()}
    if context is not None:
        numbers = isinstance(context.layer, int) and isinstance(context.layers, int)
        if not isinstance(context.name, str) or not numbers:
            raise ValueError(
                f"the context's name must be a string, and layer and layers integers, "
                f"not {context.name!r}, {context.layer!r} and {context.layers!r}"
            )
        context = dataclasses.replace(context, seed=_travelling("the context's seed", context.seed, shape))
    return Call(tensors, seed, context)


def _travelling(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but the first task vector has {tuple(shape)}")
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name}: {tensor.dtype}, but task vectors are float32; convert with .float()")
    return tensor.detach().cpu().contiguous()
