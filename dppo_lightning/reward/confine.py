"""What a worker process gives up before a completion is looked at, as far as the machine permits it.

Linux only, and by system calls: Python 3.11 has no functions for most of them. Every call is tried; one that is refused
is reported and never stops a run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
SPACES = {"own network": NEW_NETWORK, "own process ids": NEW_PIDS, "own IPC": NEW_IPC}

DISK_MIB, OPEN_FILES, PROCESSES = 64, 64, 32
"""Limits for all files together and for each one, for files open at a time, and for processes and threads."""


def call(number: int, *arguments: object) -> int:
    """Make a system call.

    Raises:
        OSError: It failed.
    """
    result = LIBC.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def unshare(flags: int) -> bool:
    """Leave namespaces; tell whether that was permitted."""
    return LIBC.unshare(flags) == 0


def enter_namespaces() -> tuple[set[str], bool]:
    """Give this process, which has one thread, and its children namespaces of their own.

    The mounts are left to ``seal_mounts``.

    Returns:
        The names in SPACES of those that the machine permits, and whether it took a new user namespace.
    """
    everything = sum(SPACES.values())
    if os.geteuid() == 0 and unshare(everything):
        return set(SPACES), False
    uid, gid = os.geteuid(), os.getegid()
    new_user = unshare(NEW_USER)
    if new_user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return {name for name, flag in SPACES.items() if unshare(flag)}, new_user


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> bool:
    """Mount; tell whether that was permitted."""
    kind_bytes = None if kind is None else kind.encode()
    done: int = LIBC.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode())
    return done == 0


NO_SUID_DEV_EXEC = 2 | 4 | 8


def seal_mounts() -> tuple[bool, bool]:
    """Give this process mounts of its own: every file system read-only, and only its own processes in /proc.

    Returns:
        Whether the mounts are its own, and whether they are sealed.
    """
    if not unshare(NEW_MOUNTS):
        return False, False
    private = mount("none", "/", None, 0x4000 | 0x40000)  # what follows is seen here only
    attributes = ctypes.create_string_buffer(struct.pack("QQQQ", 1, 0, 0, 0))  # set MOUNT_ATTR_RDONLY
    try:
        call(442, -100, b"/", 0x8000, attributes, ctypes.c_size_t(32))  # mount_setattr, recursive
        sealed = private
    except OSError:
        sealed = False
    # Where a container hides parts of /proc no new one may be mounted, and an empty folder does as well.
    hidden = mount("proc", "/proc", "proc", NO_SUID_DEV_EXEC) or mount("none", "/proc", "tmpfs", NO_SUID_DEV_EXEC)
    return True, sealed and hidden


def mount_scratch(folder: str, user: int) -> bool:
    """Mount an empty file system in memory at ``folder``."""
    options = f"size={DISK_MIB}m,nr_inodes=4096,mode=0700"
    return mount("none", folder, "tmpfs", 2 | 4, f"{options},uid={user},gid={user}" if user else options)


def unmount(folder: str) -> None:
    LIBC.umount2(folder.encode(), 2)  # also while something there is in use


@dataclass(frozen=True)
class User:
    """User that scorers become.

    Attributes:
        id: User and group id that nobody else has; None to stay the same.
        reads_all: Whether it keeps root's right to read every file, for Python or the reward lie where no other user
            may look.
        missing: What the machine does not permit, empty for nothing.
    """

    id: int | None
    reads_all: bool = False
    missing: str = ""


def another_user(needed: Iterable[str]) -> User:
    """Find a user for scorers; only root may change users.

    Args:
        needed: Folders and files that it must be able to read.
    """
    if os.geteuid() != 0:
        return User(None, missing="another user (only root may change users)")
    paths = [path for path in needed if os.path.exists(path)]
    user = User(61184 + os.getpid() % 4000)  # of systemd's range for users that exist for a while
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(user)
            os.write(writes, next((path for path in paths if not _readable(path)), "").encode()[:900] or b"\n")
        finally:
            os._exit(0)
    os.close(writes)
    unreadable = os.read(reads, 1000).decode()
    os.close(reads)
    os.waitpid(pid, 0)
    if not unreadable:
        return User(None, missing="another user")
    if unreadable == "\n":
        return user
    return User(user.id, True, f"hiding root's files (no other user may read {unreadable})")


def _readable(path: str) -> bool:
    return os.access(path, os.R_OK | (os.X_OK if os.path.isdir(path) else 0))


READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH


def become(user: User) -> None:
    """Change to a user without groups, and give up every capability, also those that a program would bring."""
    kept = READ_ALL if user.reads_all else 0
    if user.id is not None:
        prctl(8, 1)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(user.id, user.id, user.id)
        os.setresuid(user.id, user.id, user.id)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    LIBC.capset(header, ctypes.create_string_buffer(struct.pack("6I", kept, kept, kept, 0, 0, 0)))
    if kept:
        LIBC.prctl(47, 2, 2, 0, 0)  # programs that are started keep it too
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


def prctl(option: int, value: int) -> bool:
    return LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0


def die_with_parent() -> None:
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended."""
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def hide_memory() -> None:
    """Let no process of the same user read or change this one's memory."""
    prctl(4, 0)  # PR_SET_DUMPABLE


def set_limits(memory: int, seconds: int, others: int) -> None:
    """Limit this process and its children.

    Args:
        memory: Bytes of address space beyond what there is now, for each process.
        seconds: Processor seconds, for each process.
        others: Number of processes and threads that the same user may have beside them.
    """
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # /proc is hidden
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 4096
    for kind, value in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, DISK_MIB << 20),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES + others),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (limit, limit + 1 if kind == resource.RLIMIT_CPU else limit))  # a signal, then the end


def processes_of_user() -> int:
    """Number of processes and threads that this process's user has."""
    found = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue  # it has ended
    return found


CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
CHANGES = WRITE_FILE | sum(1 << bit for bit in range(4, 13))  # and removing, and making anything
NEWER = {2: 1 << 13, 3: TRUNCATE}  # renaming into another folder; version of Landlock -> what it knows beside


def landlock_version() -> int:
    """Version of Landlock that the kernel knows, 0 for none."""
    try:
        return call(CREATE_RULESET, None, 0, 1)
    except OSError:
        return 0


def forbid_writes(folder: str) -> None:
    """Let this process change nothing outside of ``folder``, and reach no TCP port and no process outside.

    Raises:
        OSError: The kernel refuses.
    """
    version = landlock_version()
    changes = CHANGES | sum(right for since, right in NEWER.items() if version >= since)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = struct.pack("QQQ", changes, 3, 3)[:size]  # bind and connect; abstract sockets and signals
    ruleset = call(CREATE_RULESET, ctypes.create_string_buffer(rules), ctypes.c_size_t(size), 0)
    for path, rights in ((folder, changes & ~(1 << 6 | 1 << 11)), ("/dev/null", changes & (WRITE_FILE | TRUNCATE))):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, place)
        call(ADD_RULE, ruleset, 1, ctypes.create_string_buffer(rule), 0)
        os.close(place)
    call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def needed_paths() -> list[str]:
    """What another user must be able to read to go on running this Python."""
    return [*(path for path in sys.path if path), os.path.realpath(sys.executable)]
