"""The `siglit` command: parse, call a stage, print.

Knows the names of the stages and how to report errors; imports a stage, and with it torch, only when that stage runs.
"""

import contextlib
import importlib
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
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
    "cache info": Command("say what a cache holds", "siglit.cache_commands:info", arguments={"path": _CACHE}),
    "cache verify": Command(
        "read a cache again: checksums, counts, keys, finite values",
        "siglit.cache_commands:verify",
        arguments={
            "path": _CACHE,
            "--repair": {"action": "store_true", "help": "delete bad shards, so that precompute makes them again"},
        },
    ),
    "cache skipped": Command(
        "list the images without a row, as CSV", "siglit.cache_commands:skipped", arguments={"path": _CACHE}
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
        return _fail(f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}", 2)
    from siglit.cache import CacheError
    from siglit.errors import UserError

    try:
        rest, arguments = words[len(name.split()) :], COMMANDS[name].arguments
        if arguments is not None:
            given = _parse_folders(name, rest, arguments)
            result = _stage(COMMANDS[name].stage)(**given)
            _print(str(result))
            return getattr(result, "exit_code", 0)
        dry = name == "train" and _DRY_RUN in rest
        experiment, extra, as_yaml = _parse(name, [word for word in rest if not (dry and word == _DRY_RUN)])
        stage = _stage("siglit.dry_run:run" if dry else COMMANDS[name].stage)
        if name in ("train", "quickstart") and not dry:
            extra["as_yaml"] = as_yaml
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
    from jsonargparse import ArgumentParser, set_parsing_settings

    from siglit.config import Experiment
    from siglit.errors import UserError

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"siglit {name}", description=COMMANDS[name].help, exit_on_error=False)
    positional = COMMANDS[name].words
    if positional:
        parser.add_argument(positional, type=str, nargs="+", help="what to look for")
    options = COMMANDS[name].options or {}
    for option, about in options.items():
        parser.add_argument(option, **about)
    parser.add_argument("-c", "--config", action=_overlay(), help="the experiment file; several add up")
    parser.add_class_arguments(Experiment)
    if name == "train":
        words = [word for given in words for word in (_RESUME if given == "--resume" else (given,))]
    if name == "quickstart" and not _names_config(words):
        words = ["-c", str(packaged_config("quickstart.yaml")), *words]
    try:
        _check_files(words)
        parsed = parser.parse_args(words)
        _check_sections(parsed)
        ready = parser.instantiate(parsed)
    except Exception as error:
        if isinstance(error, SystemExit):
            raise
        raise UserError(_told(error, words)) from error
    extra = {name: getattr(ready, name) for name in (o.lstrip("-").replace("-", "_") for o in options)}
    fields = {k: v for k, v in vars(ready).items() if k not in ("config", positional, *extra)}
    if positional:
        extra[positional] = " ".join(getattr(ready, positional))
    as_yaml = parser.dump(parsed, skip_unset=True)
    return Experiment(**fields).with_default_folders(), extra, as_yaml


def _overlay() -> Any:
    """The parser's action for files, but a data set that a file names takes the whole place of an earlier file's.

    The parser puts files together field by field: the fold of the one would stay and cut the other down in silence.
    """
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    class Overlay(ActionConfigFile):
        def __call__(self, parser: Any, given: Any, path: Any, option: Any = None) -> None:
            sets = _sets_in(path)
            if "val" in sets:
                given["data.val"] = None
            if "train" in sets:
                given["data.train"] = type(given)(**dict.fromkeys(vars(given["data.train"])))
            super().__call__(parser, given, path, option)

    return Overlay


def _sets_in(path: str) -> list[str]:
    """Names of the data sets that a file gives a format; whatever is wrong with the file is for the parser to say."""
    import yaml

    try:
        with open(path, "rb") as file:
            sets = yaml.safe_load(file)["data"].items()
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return []
    return [name for name, spec in sets if isinstance(spec, dict) and "format" in spec]


def _parse_folders(name: str, words: list[str], arguments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import argparse

    from siglit.errors import UserError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; see siglit {name} --help")

    parser = Parser(prog=f"siglit {name}", description=COMMANDS[name].help, allow_abbrev=False)
    for argument, options in arguments.items():
        parser.add_argument(argument, **options)
    return vars(parser.parse_args(words))


def _check_files(words: list[str]) -> None:
    """Refuse a key that an experiment file gives twice: YAML would take the last one in silence."""
    import yaml

    from siglit.errors import UserError

    def look(node: yaml.Node, path: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    raise UserError(
                        f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice; keep one of them"
                    )
                seen.add(key.value)
                look(value, path)

    for option, path in itertools.pairwise(words):
        if option in ("-c", "--config") and os.path.isfile(path):
            with open(path, "rb") as file:
                text = file.read()
                try:
                    node = yaml.compose(text, Loader=yaml.SafeLoader)
                except yaml.YAMLError as error:
                    hint = "; put quotes around a text with ${...} inside braces" if b"${" in text else ""
                    raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}{hint}") from error
            if node is None:
                raise UserError(f"{path} is empty; it needs at least data.train")
            look(node, path)


def _check_sections(parsed: Any) -> None:
    from siglit.errors import UserError

    for section in ("image_tower", "cache", "tokenizer", "text_tower", "loss", "optim", "train", "eval"):
        if parsed.get(section) is None:
            raise UserError(f"the section {section} is empty; fill it, or remove its line to take the defaults")


def _told(error: Exception, words: list[str]) -> str:
    """The parser's message in one line, with what to do where it does not say."""
    text = " ".join(str(error).split())
    # An optional section is a union to the parser, which then tells of every member; the first one's complaint counts.
    complaint = r"Errors: - (?:Problem with given class_path \S+ )?(.*?)(?: - Expected| Given|$)"
    union = re.match(rf"(Parser key .*?:).*?{complaint}", text)
    if union:
        text = f"{union[1]} {union[2]}"
    if "are required" in text and not _names_config(words):
        text += "; give the experiment file with -c FILE"
    return text


def _names_config(words: list[str]) -> bool:
    return any(w in ("-c", "--config", "-h", "--help") or w.startswith("--config=") for w in words)


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
