"""Cores and memory that this process may use, within its affinity and its control groups.

A container or a SLURM job gets a part of the machine, but `os.cpu_count` and /proc/meminfo report all of it.
Knows nothing of GPUs.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_MAX_WORKERS = 16


def cores() -> int:
    """Cores that this process may run on, at least 1; a quota of part of a core counts as a whole one."""
    # taskset, SLURM and cpuset groups set the affinity; macOS has none.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (quota for quota in map(_quota, _groups("cpu")) if quota is not None)
    return min([available, *(max(1, math.ceil(quota)) for quota in quotas)])


def cores_per_rank(ranks: int) -> int:
    """Cores for each of the `ranks` processes on this machine, at least 1.

    SLURM_CPUS_PER_TASK already belongs to one rank and is not divided again.
    """
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores(), int(per_task)) if per_task.isdecimal() and int(per_task) else max(1, cores() // ranks)


def default_workers(ranks: int) -> int:
    """Data-loading workers for each of the `ranks` processes on this machine: one per core, at most 16."""
    return min(_MAX_WORKERS, cores_per_rank(ranks))


def free_memory() -> int:
    """Bytes that this process can still allocate, including file cache that the kernel would drop."""
    try:
        available = _read_fields(_MEMINFO)["MemAvailable:"] * 1024
    except (OSError, KeyError):  # not Linux: what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *(free for free in map(_free_in_group, _groups("memory")) if free is not None)])


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups (version 2 or 1) that this process is in, each followed by its ancestors."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        # In a container the path may be the host's: only those of its folders that exist here count.
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir())


def _quota(group: Path) -> float | None:
    """CPU time that a group may use, in cores; None: no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no limit: "max", or no such file
        return None


def _free_in_group(group: Path) -> int | None:
    """Bytes below a group's memory limit; None: no limit."""
    version_2 = (group / "memory.max").exists()
    limit, used = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    try:
        left = int((group / limit).read_text(encoding="utf-8")) - int((group / used).read_text(encoding="utf-8"))
        counts = _read_fields(group / "memory.stat")
    except (OSError, ValueError):  # no limit: "max", or no such file
        return None
    # The group's use includes the file cache of what it has read, such as an embedding cache that was read once.
    prefix = "" if version_2 else "total_"
    return max(0, left + counts.get(f"{prefix}inactive_file", 0) + counts.get(f"{prefix}active_file", 0))


def _read_fields(path: Path) -> dict[str, int]:
    """{first word: second word} of each line of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {words[0]: int(words[1]) for words in map(str.split, lines) if words}
