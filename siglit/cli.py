"""The `siglit` command: parse, call a stage, print.

Knows the names of the stages and how to report errors; imports a stage, and with it torch, only when that stage runs.
"""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from siglit.config import Experiment


class Command(NamedTuple):
    """One command: what it does, and `module:function` of its stage."""

    help: str
    stage: str
    words: str | None = None
    arguments: dict[str, dict[str, Any]] | None = None
    """What argparse is to know of a command that takes folders instead of an experiment."""
    options: dict[str, dict[str, Any]] | None = None
    """Options of a command that takes an experiment, beside its fields."""


_CACHE = {"help": "folder of a cache, such as cache/NAME/train"}
_CACHES = {"help": "folder of a cache, finished or not, or a folder of caches, such as cache/NAME with train and val"}

_RESUME = ("--train.resume", "true")
_DRY_RUN = "--dry-run"

COMMANDS = {
    "quickstart": Command(
        "train and evaluate on a generated set, with no network and no data", "siglit.quickstart:run"
    ),
    "precompute": Command("encode images once with the frozen tower into the cache", "siglit.precompute:run"),
    "tokenizer train": Command("train a SentencePiece vocabulary on the captions", "siglit.tokenizer_training:run"),
    "train": Command("train the text tower on the cache, or both towers on images", "siglit.training:run"),
    "plan": Command(
        "say before any run what training takes: memory, time and disk",
        "siglit.plan:run",
        options={
            "--devices": {"type": int, "help": "devices that share the batch; default: train.devices × train.nodes"},
            "--gpu-memory": {"type": float, "help": "GiB of each device; default: those of this machine's GPU"},
            "--examples-per-second": {"type": float, "help": "of one device; default: measured here in a few steps"},
            "--rows": {"type": int, "help": "images to train on; default: as the cache or the source tells"},
        },
    ),
    "eval-retrieval": Command("report Recall@K of images and captions", "siglit.eval_retrieval:run"),
    "eval-zeroshot": Command("classify images by the texts of their classes", "siglit.eval_zeroshot:run"),
    "eval-fewshot": Command(
        "classify images by ridge regression on a few labelled ones per class", "siglit.eval_fewshot:run"
    ),
    "eval-probe": Command("classify images by logistic regression on the locked tower", "siglit.eval_probe:run"),
    "eval-logits": Command(
        "histogram and calibration of the logits of pairs, and nearest captions", "siglit.eval_logits:run"
    ),
    "report": Command("put everything known of a run on one page, runs/<name>/report.html", "siglit.report:run"),
    "plot": Command(
        "draw the curves of runs into one picture: siglit plot RUN RUN ...",
        "siglit.plot:run",
        arguments={
            "runs": {"nargs": "+", "help": "output folders of runs, such as runs/NAME"},
            "--out": {"default": "curves.png", "help": "the PNG file to write; default: curves.png"},
        },
    ),
    "search": Command("find the images for a sentence: siglit search WORDS -c FILE", "siglit.search:run", "query"),
    "cache info": Command(
        "say what a cache holds, and who made it", "siglit.cache_commands:info", arguments={"path": _CACHES}
    ),
    "cache verify": Command(
        "read every byte of a cache again: checksums, counts, keys, finite values",
        "siglit.cache_commands:verify",
        arguments={
            "path": _CACHES,
            "--repair": {"action": "store_true", "help": "delete bad shards, so that precompute makes them again"},
        },
    ),
    "cache skipped": Command(
        "list the images without a row, as CSV", "siglit.cache_commands:skipped", arguments={"path": _CACHES}
    ),
    "cache merge": Command(
        "put caches of one tower together: siglit cache merge OUT IN IN ...",
        "siglit.cache_commands:merge",
        arguments={
            "out": {"help": "folder of the new cache"},
            "parts": {"nargs": "+", "help": "folders of complete caches"},
        },
    ),
    "cache export": Command(
        "write a cache as .npy and parquet, in clip-retrieval's layout",
        "siglit.cache_exchange:export",
        arguments={"path": _CACHE, "out": {"help": "new folder"}},
    ),
    "cache import": Command(
        "make a cache of embeddings in .npy and parquet, or in HDF5",
        "siglit.cache_exchange:import_",
        arguments={
            "out": {"help": "folder of the new cache"},
            "--embeddings": {"required": True, "help": ".npy file (rows, D), folder of them, or HDF5 (`embedding`)"},
            "--metadata": {"help": "parquet file, or folder with one per .npy file"},
            "--model": {"required": True, "help": "what made them; compared with image_tower.model"},
            "--key": {"help": "column that names the image; default: key, else image_path"},
            "--caption": {"help": "column of a text or a list of texts; default: captions, else caption"},
            "--label": {"help": "column of a class number; default: label if there"},
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 the input or the configuration is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    sys.exit(_run(words, debug))


def _run(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        import siglit

        print(f"siglit {siglit.__version__}")
        return 0
    name = next((c for c in COMMANDS if words[: len(c.split())] == c.split()), None)
    if name is None:
        return _fail(_no_command(words), 2)
    from siglit.cache import CacheError
    from siglit.errors import UserError

    try:
        rest, arguments = words[len(name.split()) :], COMMANDS[name].arguments
        if arguments is not None:
            given = _parse_folders(name, rest, arguments)
            with _no_empty_folders([given["out"]] if "out" in given else []):
                result = _stage(COMMANDS[name].stage)(**given)
            _print(str(result))
            return getattr(result, "exit_code", 0)
        dry = name == "train" and _DRY_RUN in rest
        experiment, extra, as_yaml = _parse(name, [word for word in rest if not (dry and word == _DRY_RUN)])
        stage = _stage("siglit.dry_run:run" if dry else COMMANDS[name].stage)
        if name in ("train", "quickstart") and not dry:
            extra["as_yaml"] = as_yaml
        with _no_empty_folders([experiment.output_dir, experiment.cache.path]):
            result = stage(experiment, **extra)
        _print(str(result))
    except (UserError, CacheError) as error:
        return _report(error, str(error), 2, debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _report(error, f"{where}{error.strerror or error}", 2, debug)
    except KeyboardInterrupt as stop:
        # Ctrl-C reaches all processes of a run.
        if _is_first_here():
            print(str(stop) or "stopped; what was finished is kept", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except SystemExit as stop:  # jsonargparse leaves this way after --help and --print_config
        return stop.code if isinstance(stop.code, int) else 1
    except Exception as error:
        where = "" if debug else " (add --debug for the traceback)"
        return _report(error, f"{type(error).__name__}: {error}{where}", 1, debug)
    return 0


def _no_command(words: list[str]) -> str:
    from siglit.fields import did_you_mean

    rooms = {command.split()[0] for command in COMMANDS if " " in command}
    given = " ".join(words[:2]) if words[0] in rooms else words[0]
    hint = did_you_mean(given, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
    return f"there is no command {given!r}{hint}"


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    table = "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
    return (
        "usage: siglit COMMAND -c EXPERIMENT.yaml [--section.field VALUE ...]\n"
        "       siglit cache COMMAND FOLDER ...\n\n"
        f"{table}\n\n"
        "  siglit COMMAND --help       every field with its unit and default\n"
        "  siglit COMMAND -c FILE --print_config   the whole experiment as it would run\n"
        "  --dry-run                   siglit train: say what each parameter's rate and decay would be, and stop\n"
        "  --resume                    siglit train: go on from the last checkpoint (--train.resume true)\n"
        "  --debug                     show the traceback of an error\n"
    )


def _parse(name: str, words: list[str]) -> tuple["Experiment", dict[str, Any], str]:
    from siglit.arguments import names_config, parse_experiment

    if name == "train":
        words = [word for given in words for word in (_RESUME if given == "--resume" else (given,))]
    if name == "quickstart" and not names_config(words):
        words = ["-c", str(packaged_config("quickstart.yaml")), *words]
    command = COMMANDS[name]
    return parse_experiment(f"siglit {name}", command.help, words, command.words, command.options)


def _parse_folders(name: str, words: list[str], arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import argparse

    from siglit.errors import UserError
    from siglit.fields import did_you_mean

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
def _no_empty_folders(places: Sequence[str | None]) -> Iterator[None]:
    """Where the command fails, remove what it made in or above these folders and left empty."""
    folders = [os.path.abspath(place) for place in places if place]
    there = {folder: _subfolders(folder) for folder in folders}
    missing = [folder for place in folders for folder in _with_parents(place) if not os.path.isdir(folder)]
    try:
        yield
    except BaseException:
        # One process cleans up: others may still be about to write.
        if _is_first_here():
            new = [sub for folder in folders for sub in _subfolders(folder) - there[folder]]
            inner = [path for sub in new for path, *_ in os.walk(sub, topdown=False)]
            for folder in [*inner, *sorted(missing, key=len, reverse=True)]:
                with contextlib.suppress(OSError):  # not empty, or not there
                    os.rmdir(folder)
        raise


def _subfolders(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.path for entry in entries if entry.is_dir(follow_symlinks=False)}
    except OSError:
        return set()


def _with_parents(folder: str) -> Iterator[str]:
    while folder != (above := os.path.dirname(folder)):
        yield folder
        folder = above


def packaged_config(name: str) -> str:
    """Path of an experiment file: inside the package in a wheel, beside it in a checkout."""
    here = os.path.dirname(__file__)
    for folder in (os.path.join(here, "configs"), os.path.join(os.path.dirname(here), "configs")):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise AssertionError(f"{name} is missing from the installation")


def _stage(where: str) -> Callable[..., Any]:
    module, function = where.split(":")
    return getattr(importlib.import_module(module), function)


def _print(text: str) -> None:
    # Only the first of several processes speaks; a reader such as `head` may have gone.
    if _is_first_here():
        with contextlib.suppress(BrokenPipeError):
            print(text, flush=True)


def _is_first_here() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _report(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    return _fail(text, code)


def _fail(text: str, code: int) -> int:
    print(f"siglit: {text}", file=sys.stderr)
    return code
