"""Freed memory is reused inside the context and nowhere else, and nothing fails where malloc cannot be set up."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest

import siglit
from siglit.errors import UserError
from siglit.runtime import malloc
from siglit.runtime.malloc import reusing_freed_memory
from tests.conftest import parse

BLOCK = 64 * 2**20
"""Bytes; glibc never reuses as large a block by itself."""
PAGES = BLOCK // resource.getpagesize()
ON = [(malloc._M_MMAP_MAX, 0), (malloc._M_TRIM_THRESHOLD, -1)]
COMMANDS = ["precompute", "eval_retrieval", "eval_zeroshot", "eval_fewshot", "eval_logits", "eval_probe", "search"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for setting in malloc._SETTINGS:
        monkeypatch.delenv(f"MALLOC_{setting.upper()}_", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The (parameter, value) that a fake C library gets."""

    class Library:
        def __init__(self):
            self.calls = []

        def gnu_get_libc_version(self):
            raise AssertionError

        def mallopt(self, parameter, value):
            self.calls.append((parameter, value))
            return 1

        def malloc_trim(self, pad):
            self.calls.append("trim")

        def signal(self, number, handler):
            """Of the handler of bus errors."""

    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library.calls


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_blocks_are_reused_inside_and_returned_at_the_end():
    """Counts page faults: a block that comes from the kernel has one for each of its pages."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(BLOCK)
        ctypes.memset(block, 1, BLOCK)
        libc.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    assert faults() > 0.9 * PAGES
    before = resident()
    with reusing_freed_memory():
        faults()
        assert faults() < 0.1 * PAGES
        assert resident() > before + 0.9 * PAGES
    assert resident() < before + 0.1 * PAGES
    assert faults() > 0.9 * PAGES


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_run_towers_keep_memory_and_give_it_back_on_errors(project, monkeypatch, calls, name):
    """Precompute and evaluation: here each fails after it has begun."""
    monkeypatch.chdir(project)
    experiment = parse("precompute", "--data.train.path", "absent.csv", "--cache.path", "absent")
    with pytest.raises(UserError):
        getattr(siglit, name)(experiment, **({"query": "a word"} if name == "search" else {}))
    assert calls[:2] == ON
    assert calls[2:] == [
        (malloc._M_MMAP_MAX, 65_536),
        (malloc._M_MMAP_THRESHOLD, 2**25),
        (malloc._M_TRIM_THRESHOLD, 2**26),
        "trim",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("MALLOC_MMAP_MAX_", "10"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.trim_threshold=65536"),
    ],
)
def test_settings_of_the_environment_stay(calls, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with reusing_freed_memory():
        pass
    assert calls == []


def test_other_settings_of_the_environment_do_not_matter(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    with reusing_freed_memory():
        assert calls == ON


@pytest.mark.parametrize("error", [None, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch, error):
    """As musl, whose library lacks mallopt, macOS or Windows: no error and no message."""

    def library(name):
        if error is not None:
            raise error
        return object()

    monkeypatch.setattr(ctypes, "CDLL", library)
    with reusing_freed_memory():
        pass


@pytest.mark.parametrize(("mode", "kept"), [("locked", False), ("unlocked", True)])
def test_training_keeps_memory_where_images_pass_through_a_tower(cached, project, monkeypatch, calls, mode, kept):
    class BegunError(Exception):
        pass

    def run(*_):
        raise BegunError

    monkeypatch.chdir(project)
    monkeypatch.setattr("siglit.commands.train._run", run)
    with pytest.raises(BegunError):
        siglit.train(parse("train", "--mode", mode))
    assert calls[:2] == (ON if kept else [])
