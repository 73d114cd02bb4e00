"""Clocks that jump, for some processes only; the host's are never touched.

The kernel's time namespaces shift the monotonic and the boot clock, when a process starts and not later; there is no
namespace for the wall clock. So the wall clock jumps in a small C library that the processes of a test load first
(LD_PRELOAD) and that adds an offset read from a shared file: it can change while they run, and the code under test
knows nothing of it. It is compiled on the spot, with the compiler that DeepSpeed's setup needs anyway.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile double *offset;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("TIGER_CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (page != MAP_FAILED) offset = page;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (failed || !offset || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)) return failed;
    long long jump = (long long)(*offset * 1e9), at = now->tv_sec * 1000000000LL + now->tv_nsec + jump;
    now->tv_sec = at / 1000000000LL;
    now->tv_nsec = at % 1000000000LL;
    return 0;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    if (!failed) { now->tv_sec = exact.tv_sec; now->tv_usec = exact.tv_nsec / 1000; }
    return failed;
}

time_t time(time_t *into) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (into) *into = exact.tv_sec;
    return exact.tv_sec;
}
"""


class WallClock:
    """The wall clock of every process that was started with `environment()`, its children included."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("a C compiler is needed for a wall clock that jumps")
        self._offset, self._library = folder / "clock.offset", folder / "clock.so"
        (folder / "clock.c").write_text(SOURCE)
        self.jump_to(0.0)
        built = [compiler, "-O1", "-shared", "-fPIC", "-o", str(self._library), str(folder / "clock.c"), "-ldl"]
        subprocess.run(built, check=True)

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "TIGER_CHAOS_CLOCK": str(self._offset)}

    def jump_to(self, offset_s: float) -> None:
        """From now on these processes are that much ahead of the true time (behind it, below zero)."""
        # In place and in one write: the processes have this file mapped.
        descriptor = os.open(self._offset, os.O_WRONLY | os.O_CREAT, 0o644)
        os.pwrite(descriptor, struct.pack("d", offset_s), 0)
        os.close(descriptor)


def later_boot(seconds: int) -> list[str]:
    """What to put before a command so that its monotonic and boot clocks are that much ahead from its start.

    As on a machine that has been up for longer: two nodes' monotonic clocks have nothing to do with each other.
    """
    if os.geteuid() != 0:
        pytest.skip("a time namespace needs root")
    words = ["unshare", "--time", f"--monotonic={seconds}", f"--boottime={seconds}", "--fork", "--kill-child", "--"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this kernel has no time namespaces")
    return words
