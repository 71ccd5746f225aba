"""Threads that hand something over ask the kernel for short turns, and so run soon after they wake.

An engine keeps all cores busy, and a request is handed from thread to thread a dozen times until its first token is
out. At each the next thread may have to wait until an engine's thread has had its turn, 3 ms. From Linux 6.12 on a
thread can ask for shorter turns of its own, and then takes them at once, but gets no more of the processor than before
(sched_setattr(2): sched_runtime of SCHED_OTHER; https://docs.kernel.org/scheduler/sched-eevdf.html).
"""

import ctypes
import os
import platform

TURN_NS = 100_000  # the shortest that Linux grants
SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
SCHED_OTHER, RESET_ON_FORK = 0, 1


class _Attributes(ctypes.Structure):
    """struct sched_attr."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def take_short_turns() -> None:
    """For the threads that this process has; those that they begin, the engine's among them, take the usual ones.

    It is a wish: an older Linux, another system or a sandbox goes on as before.
    """
    if platform.system() != "Linux" or platform.machine() not in SYSCALLS:
        return
    set_attributes, get_attributes = SYSCALLS[platform.machine()]
    libc, size = ctypes.CDLL(None), ctypes.sizeof(_Attributes)
    for thread in map(int, os.listdir("/proc/self/task")):
        now = _Attributes()
        if libc.syscall(get_attributes, thread, ctypes.byref(now), size, 0) or now.policy != SCHED_OTHER:
            continue
        now.size, now.flags, now.runtime_ns = size, RESET_ON_FORK, TURN_NS
        libc.syscall(set_attributes, thread, ctypes.byref(now), 0)
