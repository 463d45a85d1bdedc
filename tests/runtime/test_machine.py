"""Cores and memory respect the affinity and the control groups, of both versions, with all their ancestors."""

import os

import pytest

from siglit.runtime import machine

GB = 1 << 30


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write a tree of control groups; the machine has 8 cores and 100 GB."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "meminfo").write_text(f"MemTotal: {200 << 20} kB\nMemAvailable: {100 << 20} kB\n")

    def make(own, **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return make


def group(folder, **files):
    return {f"{folder}{name}": text for name, text in files.items()}


def memory_2(folder, limit, used, inactive=0, active=0):
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}"
    return group(folder, memory_DOT_max=limit, memory_DOT_current=used, memory_DOT_stat=stat)


def memory_1(folder, limit, used, inactive=0):
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 0"
    files = {"memory_DOT_limit_in_bytes": limit, "memory_DOT_usage_in_bytes": used, "memory_DOT_stat": stat}
    return group(folder, **files)


def test_without_control_groups_the_whole_machine_counts(fake):
    fake("0::/\n")
    assert (machine.cores(), machine.free_memory()) == (8, 100 * GB)


def test_cores_are_those_of_the_affinity(monkeypatch):
    """Of this very process; no group of the test machine limits it to less than one."""
    monkeypatch.setattr(machine, "_CGROUPS", machine.Path("/absent"))
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert machine.cores() == len(allowed)


@pytest.mark.parametrize(
    ("inner", "outer", "cores"), [("max", "max", 8), ("250000", "max", 3), ("max", "400000", 4), ("20000", "max", 1)]
)
def test_a_quota_of_time_counts_in_cores(fake, inner, outer, cores):
    limits = {"a__b__cpu_DOT_max": f"{inner} 100000", "a__cpu_DOT_max": f"{outer} 100000"}
    fake("0::/a/b\n", **limits)
    assert machine.cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (200_000, 2)])
def test_a_quota_of_version_1(fake, quota, cores):
    files = {"cpu,cpuacct__j__cpu_DOT_cfs_quota_us": quota, "cpu,cpuacct__j__cpu_DOT_cfs_period_us": 100_000}
    fake("5:cpuset:/\n4:cpu,cpuacct:/j\n0::/\n", **files)
    assert machine.cores() == cores


@pytest.mark.parametrize(
    ("inner", "outer", "free"),
    [
        (("max", GB), ("max", GB), 100),
        ((10 * GB, 4 * GB), ("max", GB), 6),
        ((10 * GB, 4 * GB), (8 * GB, 5 * GB), 3),
        ((10 * GB, 4 * GB, 2 * GB, GB), ("max", GB), 9),
        ((10 * GB, 11 * GB), ("max", GB), 0),
        ((500 * GB, GB), ("max", GB), 100),
    ],
)
def test_free_memory_is_the_least_of_the_machine_and_all_groups(fake, inner, outer, free):
    """The file cache of a group counts as free, as that of the machine does."""
    fake("0::/a/b\n", **memory_2("a__b__", *inner), **memory_2("a__", *outer))
    assert machine.free_memory() == free * GB


def test_free_memory_of_version_1(fake):
    around = memory_1("memory__", 2**63 - 4096, 50 * GB)
    fake("9:pids:/x\n4:memory:/job/step\n0::/\n", **memory_1("memory__job__step__", 7 * GB, 3 * GB, GB), **around)
    assert machine.free_memory() == 5 * GB


def test_a_path_from_outside_the_container_is_cut_to_the_folders_that_exist(fake):
    """The container's own group is then the root of what it sees."""
    fake("0::/docker/0a1b\n", **memory_2("", 3 * GB, GB))
    assert machine.free_memory() == 2 * GB


def test_this_machine():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert machine.free_memory() > 1 << 20


def test_cores_per_task_of_slurm_are_not_divided_again(fake, monkeypatch):
    fake("")
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert (machine.cores_per_rank(4), machine.cores_per_rank(100)) == (2, 1)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert machine.cores_per_rank(4) == 8


def test_data_workers_are_one_per_core_of_a_rank_and_at_most_16(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 48)
    assert [machine.default_workers(ranks) for ranks in (1, 2, 4, 100)] == [16, 16, 12, 1]
