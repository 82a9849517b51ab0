"""A wall clock that can be set for some processes alone, as an operator or a time service would set the machine's.

A small shared library, compiled here and preloaded into them, adds what a file says to every time of day that they ask
for. Monotonic clocks stay as they are, as they do when a machine's clock is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from toolkit.errors import ResourceError

__all__ = ["Clock"]

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile long long *added;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("QVL_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(NULL, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) added = page;
    close(file);
}

int clock_gettime(clockid_t which, struct timespec *told) {
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(which, told);
    if (code == 0 && added && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) told->tv_sec += *added;
    return code;
}

int gettimeofday(struct timeval *restrict told, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""


class Clock:
    """The clock of the processes that are started with `environment`. At first it tells the machine's time.

    Raises ResourceError where no C compiler is.
    """

    def __init__(self, directory: Path) -> None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise ResourceError("a clock that can be set is compiled: install a C compiler (cc).")
        directory.mkdir(parents=True, exist_ok=True)
        self._file, source, self._library = (directory / name for name in ("added", "clock.c", "clock.so"))
        self.set(0)
        source.write_text(_SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", self._library, source, "-ldl"], check=True)

    def set(self, ahead: int) -> None:
        """Let the clock be so many seconds ahead of the machine's from now on; below 0: behind it."""
        content = ahead.to_bytes(8, "little", signed=True)
        if not self._file.exists():
            self._file.write_bytes(content)
        with self._file.open("r+b", buffering=0) as stream:  # in place: the processes have mapped it
            stream.write(content)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for those processes; what is preloaded already stays."""
        preloaded = os.pathsep.join(filter(None, [str(self._library), os.environ.get("LD_PRELOAD")]))
        return {"LD_PRELOAD": preloaded, "QVL_CLOCK": str(self._file)}
