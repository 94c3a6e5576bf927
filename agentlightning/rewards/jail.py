"""Runs `program.py` of the working directory with as little as the system lets us take away. A script of its own: code.py
starts it, and it becomes the program.

Arguments: seconds of CPU, bytes of address space, bytes a file, bytes of all files, processes. In order: an end with whoever
started it; another user than root; no network, no other processes, a file system in memory (Linux namespaces, unprivileged);
limits of resources; no files but Python's and the system's libraries (Landlock, https://docs.kernel.org/userspace-api/landlock.html).
The limits must be had; the rest is taken where the kernel gives it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

_PROGRAM = "program.py"
_NOBODY = 65534
_INSIDE = 1000  # the user inside the namespace: not root, so that it has no capabilities there either
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Becomes the program, or its parent that hands its exit status on."""
    cpu_s, memory, file_bytes, scratch_bytes, processes = map(int, sys.argv[1:])
    scratch, source = os.getcwd(), Path(_PROGRAM).read_bytes()
    if sys.platform == "linux":
        _leave_root(scratch)
        _end_with_parent()
        isolated = _enter_namespaces()
        if isolated:
            _mount_scratch(scratch, source, scratch_bytes)
            _become_child()  # the first process of its namespace: with it all others end
            _become_child()
        _limit(cpu_s, memory, file_bytes, processes + 3 if isolated else 0)  # beside the parents, or beside all of the user's
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _see_only_libraries(scratch)
    else:
        _limit(cpu_s, memory, file_bytes, None)
    os.execv(sys.executable, [sys.executable, "-P", "-s", "-S", "-B", _PROGRAM])


def _limit(cpu_s: int, memory: int, file_bytes: int, processes: int | None) -> None:
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))
    if processes is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_root(scratch: str) -> None:
    """Root becomes nobody; if nobody cannot read this Python, at least its processes count as nobody's, whom a limit holds."""
    if os.getuid() != 0:
        return
    os.setgroups([])
    os.seteuid(_NOBODY)
    reachable = all(os.access(path, os.R_OK, effective_ids=True) for path in (sys.executable, os.__file__))
    os.seteuid(0)
    if reachable:
        os.chown(scratch, _NOBODY, _NOBODY)
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root
    else:
        os.setresuid(_NOBODY, 0, 0)


def _enter_namespaces() -> bool:
    """No network, processes, mounts or shared memory but its own. False where an unprivileged user may not."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWPID | _CLONE_NEWNS | _CLONE_NEWIPC) != 0:
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_INSIDE} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{_INSIDE} {gid} 1")
    return True


def _mount_scratch(scratch: str, source: bytes, size: int) -> None:
    """The working directory in memory, of a limited size, seen by this program only."""
    if _libc.mount(b"tmpfs", scratch.encode(), b"tmpfs", 0, f"size={size},mode=0700".encode()) == 0:
        os.chdir(scratch)
        Path(_PROGRAM).write_bytes(source)


def _become_child() -> None:
    """Go on in a child; the parent waits for it and ends as it did."""
    child = os.fork()
    if child == 0:
        _end_with_parent()
        return
    while True:  # the first process of a namespace is the parent of all orphans in it
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _see_only_libraries(scratch: str) -> None:
    """Landlock: read Python and the system's libraries, write in the working directory, no TCP, no signals to others."""
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return
    everything = (1 << 13) - 1
    for version, bit in ((2, 13), (3, 14), (5, 15)):
        everything |= (1 << bit) if abi >= version else 0
    attributes = struct.pack("QQQ", everything, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    read = _EXECUTE | _READ_FILE | _READ_DIR
    python = (sys.executable, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__))
    rules = dict.fromkeys((*_SYSTEM, *python), read)
    rules |= {"/dev/null": read | _WRITE_FILE, scratch: everything}
    for path, access in rules.items():
        if os.path.exists(path):
            of_a_file = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
            _allow(ruleset, path, access & everything & (-1 if os.path.isdir(path) else of_a_file))
    _libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    _libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", access, beneath), 0)
    os.close(beneath)


if __name__ == "__main__":
    main()
