"""The `siglit` command: parse, call, print.

Knows how errors are reported, and no command by name: `siglit.commands` lists them and imports one only when it runs.
"""

import contextlib
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from typing_extensions import override

from siglit.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    0: done. 1: the work failed. 2: the input or the configuration is wrong. 3: the loss or the weights of a training
    are no longer finite. 130, 143: stopped by a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    show_messages()
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    sys.exit(_run(words, debug))


def show_messages() -> None:
    """Write siglit's log messages to stderr as plain lines; a program that imports siglit configures logging itself."""
    logger = logging.getLogger("siglit")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    """As logging.StreamHandler, but always to the current sys.stderr, which tests and notebooks replace."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _run(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        import siglit

        print(f"siglit {siglit.__version__}")
        return 0
    if words[0] in _groups() and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(_group_usage(words[0]))
        return 0
    name = next((c for c in COMMANDS if words[: len(c.split())] == c.split()), None)
    if name is None:
        return _fail(_unknown_command(words), 2)
    from siglit.cache import CacheError
    from siglit.errors import UserError
    from siglit.runtime.signals import STOPPED

    try:
        result = _call(name, words[len(name.split()) :])
        _print(str(result))
        return getattr(result, "exit_code", 0)
    except (UserError, CacheError) as error:
        return _report(error, str(error), 2, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _report(error, f"{where}{error.strerror or error}", 2, debug)
    except KeyboardInterrupt as stop:
        # Ctrl-C reaches all processes of a run.
        if _is_local_rank_zero():
            print(str(stop) or STOPPED, file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except SystemExit as stop:  # jsonargparse leaves this way after --help and --print_config
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        if re.search(r"closed by peer|reset by peer|Broken pipe", str(error)) and "gloo" in str(error):
            # The consequence of another rank's failure, which prints the reason itself unless it was killed.
            text = "another process of this run has ended, so this one ends too; if it printed why, that is the error"
            return _report(error, text, 1, debug) if _is_local_rank_zero() else 1
        hint = "" if debug else " (add --debug for the traceback)"
        text = f"{type(error).__name__}: {_cause(str(error))}{hint}"
        return _report(error, text, getattr(error, "exit_code", 1), debug)


def _cause(message: str) -> str:
    """The line of torch's message that says what happened: others are C++ frames, or a worker's traceback."""
    lines = message.strip().splitlines() or [""]
    if lines[0].startswith("Caught "):  # of a DataLoader worker, whose own error is the last line
        return lines[-1]
    of_nccl = [after for line, after in itertools.pairwise(lines) if line.strip() == "Last error:"]
    return "; ".join([lines[0], *of_nccl])


def _call(name: str, words: list[str]) -> Any:
    """Parse the words after a command and run it."""
    command = COMMANDS[name]
    if command.folders is not None:
        arguments = _parse_folders(name, words, command.folders)
        with _removing_empty_folders([arguments["out"]] if "out" in arguments else []):
            return command.load()(**arguments)
    from siglit.parsing.arguments import parse_command

    mode = next((flag for flag in command.alternatives if flag in words), None)
    experiment, flags = parse_command(name, [word for word in words if word != mode])
    with _removing_empty_folders([experiment.output_dir, experiment.cache.path]):
        return (command.alternatives[mode] if mode else command).load()(experiment, **flags)


def _groups() -> set[str]:
    """First words of the commands that have two."""
    return {name.split()[0] for name in COMMANDS if " " in name}


def _unknown_command(words: list[str]) -> str:
    from siglit.parsing.fields import did_you_mean

    name = " ".join(words[:2]) if words[0] in _groups() else words[0]
    hint = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name!r}{hint}"


def _usage() -> str:
    return (
        "usage: siglit COMMAND -c EXPERIMENT.yaml [--section.field VALUE ...]\n"
        "       siglit cache COMMAND FOLDER ...\n\n"
        f"{_command_table(COMMANDS)}\n\n"
        "  siglit COMMAND --help       the fields that the command reads, with units and defaults\n"
        "  siglit COMMAND --help-all   every field of the experiment\n"
        "  siglit COMMAND -c FILE --print_config   the whole experiment as it would run\n"
        "  --dry-run                   siglit train: show learning rate and decay of each parameter, and stop\n"
        "  --resume                    siglit train: resume from the last checkpoint (--train.resume true)\n"
        "  --debug                     show the traceback of an error\n"
    )


def _group_usage(group: str) -> str:
    names = [name for name in COMMANDS if name.startswith(f"{group} ")]
    return (
        f"usage: siglit {group} COMMAND ...\n\n{_command_table(names)}\n\n"
        f"  siglit {group} COMMAND --help   the command's arguments\n"
    )


def _command_table(names: Collection[str]) -> str:
    width = max(map(len, names)) + 2
    return "\n".join(f"  {name:<{width}}{COMMANDS[name].help}" for name in names)


def _parse_folders(name: str, words: list[str], arguments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Parse the words after a command that takes folders; {name of the argument: value}."""
    import argparse

    from siglit.errors import UserError
    from siglit.parsing.fields import did_you_mean

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            unknown = message.partition("unrecognized arguments: ")[2].split()
            if unknown and unknown[0].startswith("--"):
                message = f"{unknown[0]} is not an option of siglit {name}{did_you_mean(unknown[0], arguments)}"
            raise UserError(f"{message}; see siglit {name} --help")

    parser = Parser(prog=f"siglit {name}", description=COMMANDS[name].help, allow_abbrev=False)
    for argument, options in arguments.items():
        parser.add_argument(argument, **options)
    return vars(parser.parse_args(words))


@contextlib.contextmanager
def _removing_empty_folders(paths: Sequence[str | None]) -> Iterator[None]:
    """If the command fails, remove empty folders that it created in or above these paths."""
    folders = [os.path.abspath(path) for path in paths if path]
    before = {folder: _subfolders(folder) for folder in folders}
    missing = [parent for folder in folders for parent in _with_parents(folder) if not os.path.isdir(parent)]
    try:
        yield
    except BaseException:
        # One process cleans up: others may still be about to write.
        if _is_local_rank_zero():
            new = [sub for folder in folders for sub in _subfolders(folder) - before[folder]]
            inner = [path for sub in new for path, *_ in os.walk(sub, topdown=False)]
            for folder in [*inner, *sorted(missing, key=len, reverse=True)]:
                with contextlib.suppress(OSError):  # not empty, or missing
                    os.rmdir(folder)
        raise


def _subfolders(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.path for entry in entries if entry.is_dir(follow_symlinks=False)}
    except OSError:
        return set()


def _with_parents(folder: str) -> Iterator[str]:
    while folder != (parent := os.path.dirname(folder)):
        yield folder
        folder = parent


def _print(text: str) -> None:
    # Only the first of several processes prints; a reader such as `head` may have closed the pipe.
    if _is_local_rank_zero():
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)


def _is_local_rank_zero() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _report(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    return _fail(text, code)


def _fail(text: str, code: int) -> int:
    # One line, whatever a name or a cell of a file holds: no line ends, and no codes that terminals act on.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.splitlines()))
    print(f"siglit: {line}", file=sys.stderr)
    return code
