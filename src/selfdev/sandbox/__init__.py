"""A jail for programs that nobody has read. Imports nothing of the rest of selfdev and can be used alone.

    with Sandbox(Limits(wall_seconds=10)) as box:
        outcome = box.merge(source, {"math": task_vector, "code": other})
        outcome.status, outcome.tensor, outcome.failure, outcome.error, outcome.seconds

A program is hostile until shown otherwise: it is trained to raise a score, and forging the score is the
shortest way. The design assumes that it runs machine code of its own choice in its process, and asks what
that process can reach.

The layers, from the outside in, with what each stops and what it does not:

=====================  ===========================================  ==========================================
layer                  stops                                        does not stop
=====================  ===========================================  ==========================================
forkserver by exec,    reading the parent's memory, environment,    anything that the machine shows to every
scrubbed environment   keys, answers, weights, open files           process
memory files, sealed   changing inputs for others, shrinking a      being wrong: a program may return any
                       file under its reader, a result of another   finite tensor of the right shape
                       size or dtype, a NaN
closed descriptors     using what a parent left open; 0 to 2 are    making new ones
                       /dev/null, the rest is closed
own session            signals from and to a terminal               signals by process number
nobody, no capability  what root may do (when root)                 what every user may do
parent-death signal    outliving the forkserver                     living until the deadline
undumpable             being read by another child                  root outside
resource limits        memory, processor time, files, core dumps    copies of what was writable at the start,
                                                                     wall-clock time, processes of root
no_new_privs           gaining rights by exec                       using those it has
Landlock, no rule      opening, making, running, removing any       stat, access, readlink, chdir, UDP
                       file; TCP; signals and abstract sockets
                       out of the jail (as the kernel's ABI offers)
seccomp allow-list     every call but arithmetic's: no open, stat,  faults of the kernel in the calls that are
                       socket, clone, exec, kill, ptrace, ioctl;    left; side channels
                       no executable or shared memory; no clock
                       or lock of others; other ABIs kill
pidfd and deadline     running for ever; killing a wrong process    using the machine until then
syntax-tree check      nothing; it labels programs that could not   anything hostile
                       work anyway
=====================  ===========================================  ==========================================

A layer that cannot be installed ends the child before the source is looked at, and `SandboxUnavailable` says
which and why. ``Sandbox(unsafe=True)`` keeps the resource limits alone, as far as the system has them, and
`UNSAFE_NOTICE` says what then holds. `docs/security.md` has the threat model.
"""

from .box import UNSAFE_NOTICE, Sandbox
from .context import Context
from .limits import Limits
from .outcome import Outcome, SandboxUnavailable, Status

__all__ = [
    "UNSAFE_NOTICE",
    "Context",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxUnavailable",
    "Status",
]
