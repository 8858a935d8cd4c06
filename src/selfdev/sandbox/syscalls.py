"""Which system calls a jailed program may make, by number, for each architecture.

The list is what torch and Python need for arithmetic once everything is imported. What is not here is
refused with EPERM: there is no open, stat, access, readlink, getcwd, ioctl, fcntl, socket, clone, exec, kill
or ptrace, and nothing that makes a new descriptor.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """One architecture's numbers.

    Attributes:
        audit_arch: AUDIT_ARCH_* of linux/audit.h, which the filter compares first.
        allowed: call name to number; `seccomp` restricts the arguments of some.
        x32_bit: numbers from here on belong to another ABI of the same architecture; 0 where there is none.
    """

    audit_arch: int
    allowed: dict[str, int]
    x32_bit: int = 0


X86_64 = Table(
    audit_arch=0xC000003E,
    x32_bit=0x40000000,
    allowed={
        # memory
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "mremap": 25,
        "madvise": 28,
        # descriptors: 0 to 2 are /dev/null, and the one on which the child says that its layers stand
        "read": 0,
        "write": 1,
        "close": 3,
        # signals to itself, by the interpreter
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "sigaltstack": 131,
        # time and waiting
        "sched_yield": 24,
        "nanosleep": 35,
        "gettimeofday": 96,
        "restart_syscall": 219,
        "clock_gettime": 228,
        "clock_getres": 229,
        "clock_nanosleep": 230,
        "futex": 202,
        # itself
        "getpid": 39,
        "gettid": 186,
        "getrusage": 98,
        "sched_getaffinity": 204,
        "getcpu": 309,
        "getrandom": 318,
        "exit": 60,
        "exit_group": 231,
    },
)

# Checked against asm-generic/unistd.h, which is aarch64's table. Not executed: the suites ran on x86_64.
AARCH64 = Table(
    audit_arch=0xC00000B7,
    allowed={
        "mmap": 222,
        "mprotect": 226,
        "munmap": 215,
        "brk": 214,
        "mremap": 216,
        "madvise": 233,
        "read": 63,
        "write": 64,
        "close": 57,
        "rt_sigaction": 134,
        "rt_sigprocmask": 135,
        "rt_sigreturn": 139,
        "sigaltstack": 132,
        "sched_yield": 124,
        "nanosleep": 101,
        "gettimeofday": 169,
        "restart_syscall": 128,
        "clock_gettime": 113,
        "clock_getres": 114,
        "clock_nanosleep": 115,
        "futex": 98,
        "getpid": 172,
        "gettid": 178,
        "getrusage": 165,
        "sched_getaffinity": 123,
        "getcpu": 168,
        "getrandom": 278,
        "exit": 93,
        "exit_group": 94,
    },
)

TABLES = {"x86_64": X86_64, "aarch64": AARCH64}
