"""A jail for programs that nobody has read."""

from .box import UNSAFE_NOTICE, Sandbox
from .context import Context
from .limits import Limits
from .outcome import Outcome, SandboxUnavailable, Status

__all__ = ["UNSAFE_NOTICE", "Context", "Limits", "Outcome", "Sandbox", "SandboxUnavailable", "Status"]
