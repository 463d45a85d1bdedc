"""From the words of a command line to an experiment: experiment files, then options, all of them checked by name.

What a file or an option holds is data: nothing of it is imported, called or read as a further file.
Commands that take folders are parsed by `siglit.cli`.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)
from typing_extensions import override

from siglit.commands import COMMANDS, Command
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.parsing.fields import (
    FIELDS,
    SECTIONS,
    describe_type,
    did_you_mean,
    is_field,
    is_free_form,
    is_list,
    is_optional,
    section_of,
)
from siglit.parsing.yaml_checks import check_file, check_section_option, short

_HELP, _HELP_ALL = ("-h", "--help"), "--help-all"


def parse_command(name: str, words: Sequence[str]) -> tuple[Experiment, dict[str, Any]]:
    """Parse the words after a command that takes an experiment.

    Args:
        name: of the command, such as "train".
        words: experiment files (-c FILE), fields (--optim.lr 1e-3), and the command's own flags and words.

    Returns:
        The experiment; the values of the command's flags and words, by name.

    Raises:
        UserError: a name or a value is wrong; the text names it.
        SystemExit: help was printed.
    """
    command = COMMANDS[name]
    if _HELP_ALL in words:
        _parser(f"siglit {name}", command).parse_args(["--help"])
    words = [part for word in words for part in command.shorthands.get(word, (word,))]
    if command.default_config and not _names_config(words):
        words = ["-c", packaged_config(command.default_config), *words]
    if any(word in _HELP for word in words):
        parser = _parser(f"siglit {name}", command)
        _hide_unread(parser, command)
    else:
        parser = _shared_parser(name)
    try:
        checked = _check_words(words, parser.prog, [flag.lstrip("-") for flag in command.flags])
        parsed = parser.parse_args(checked)
        _check_values(parsed)
        values = vars(parser.instantiate(parsed))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_format_parser_error(error, words)) from error
    flags = {flag: values.pop(flag) for flag in (flag.lstrip("-").replace("-", "_") for flag in command.flags)}
    if command.words:
        flags[command.words] = " ".join(values.pop(command.words))
    values.pop("config")
    return Experiment(**values).with_default_folders(), flags


def load_experiment(path: str | os.PathLike[str], **overrides: Any) -> Experiment:
    """Read an experiment file as every command does.

    Args:
        path: the file.
        overrides: fields in place of the file's, by dotted name: `**{"optim.lr": 1e-3, "train.steps": 100}`; a section
            takes a dict: `optim={"lr": 1e-3}`. Values are strings, numbers, booleans, None, paths, and lists and dicts
            of them.

    Raises:
        UserError: the file cannot be read, or a name or a value is wrong; the text names it.
    """
    words = [f"--config={os.fspath(path)}"]
    for name, value in overrides.items():
        # The parser would end the name at a =, and take the rest for a part of the value.
        if "=" in name or (not is_field(name) and name not in SECTIONS):
            raise UserError(f"{name} is not a field of an experiment{did_you_mean(name, {*FIELDS, *SECTIONS})}")
        try:
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            words.append(f"--{name}={plain if isinstance(plain, str) else json.dumps(plain, default=os.fspath)}")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} has the type {type(value).__name__} ({error}); use strings, numbers, booleans, None, lists or "
                "dicts"
            ) from error
    return parse_command("train", words)[0]


def packaged_config(name: str) -> str:
    """Path of an experiment file: inside the package in a wheel, beside it in a checkout."""
    package = os.path.dirname(os.path.dirname(__file__))
    for folder in (os.path.join(package, "configs"), os.path.join(os.path.dirname(package), "configs")):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise AssertionError(f"{name} is missing from the installation")


@cache
def _shared_parser(name: str) -> ArgumentParser:
    """A command's parser, made once: that takes longer than to parse, and a study parses for each of its runs."""
    return _parser(f"siglit {name}", COMMANDS[name])


def _parser(prog: str, command: Command) -> ArgumentParser:
    # Otherwise the parser imports whatever a `class_path` within a value names, and calls it.
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=_section_paths(),
        docstring_parse_attribute_docstrings=True,
    )
    words = f" {command.words.upper()} ..." if command.words else ""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog}{words} -c EXPERIMENT.yaml [--section.field VALUE ...]",
        description=command.help,
        exit_on_error=False,
    )
    if command.words:
        parser.add_argument(command.words, type=str, nargs="+", help="what to search for")
    for flag, details in command.flags.items():
        parser.add_argument(flag, **details)
    parser.add_argument(
        "-c",
        "--config",
        action=_ExperimentFile,
        help="the experiment file; repeatable, later files override earlier ones",
    )
    parser.add_class_arguments(Experiment)
    return parser


def _hide_unread(parser: ArgumentParser, command: Command) -> None:
    """Leave the sections that the command does not read out of its help, and say where they are listed."""
    for action in parser._actions:
        name = action.dest
        if (name in FIELDS or name in SECTIONS) and not any(
            name == read or name.startswith(f"{read}.") for read in command.reads
        ):
            action.help = argparse.SUPPRESS
    parser.epilog = f"Every section of the experiment: {parser.prog} {_HELP_ALL}"


def _names_config(words: Sequence[str]) -> bool:
    """Whether the words give an experiment file, or ask for help, which needs none."""
    return any(w == "--config" or w in _HELP or w.startswith(("-c", "--config=")) for w in words)


class _ExperimentFile(ActionConfigFile):
    """The parser's action for files, but checked first, and a data set of a file replaces that of an earlier file.

    The parser merges files field by field: the fold of an earlier data set would remain and silently cut the new one.
    """

    @override
    def __call__(self, parser: Any, namespace: Any, path: Any, option: Any = None) -> None:
        names = check_file(path)
        for name in ("data.val", "data.train"):
            if f"{name}.format" in names:
                empty = None if is_optional(SECTIONS[name]) else Namespace(**dict.fromkeys(vars(namespace[name])))
                namespace[name] = empty
        super().__call__(parser, namespace, path, option)


def _check_words(words: Sequence[str], command: str, flags: Sequence[str]) -> list[str]:
    """Refuse unknown options; return the words, with brackets around lists that were given without.

    Args:
        words: after the command.
        command: its name, for messages.
        flags: names of the command's own flags.
    """
    checked, skip = list(words), {*flags, "config", "help", "help-all", "print_config"}
    for position, word in enumerate(words):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").removesuffix("+")
        if not word.startswith("--") or " " in option or name in skip:
            continue
        if not is_field(name) and name not in SECTIONS and name.removesuffix(".help") not in SECTIONS:
            hint = did_you_mean(name, {*FIELDS, *SECTIONS, *skip}, "--") or f"; see {command} --help"
            raise UserError(f"--{name} is not an option of {command}{hint}")
        if not equals and position + 1 == len(words):
            continue  # the parser reports the missing value
        value = value if equals else words[position + 1]
        if name in SECTIONS:
            check_section_option(name, value)
        elif is_list(FIELDS.get(name)) and value not in ("", "null") and not value.startswith("["):
            checked[position if equals else position + 1] = f"{option}=[{value}]" if equals else f"[{value}]"
    return checked


def _check_values(parsed: Namespace) -> None:
    """Refuse what the parser accepts: null where a value is needed, and anything but data in free-form fields."""
    for name, kind in FIELDS.items():
        value = parsed.get(name)
        section = name.rpartition(".")[0]
        section_is_null = bool(section) and parsed.get(section) is None
        if value is None and not (section_is_null or is_optional(kind)):
            raise UserError(f"{name} is null, but it must be {describe_type(kind)}")
        if is_free_form(kind):
            _check_data(name, value)


def _check_data(name: str, value: Any) -> None:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        if "class_path" in value:
            raise UserError(f"{name} holds class_path, but nothing is imported or called here; give plain values")
        for key, inner in value.items():
            _check_data(f"{name}.{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_data(f"{name}.{number}", inner)
    elif not (value is None or isinstance(value, (str, int, float))):
        raise UserError(f"{name} is a {type(value).__name__}; use strings, numbers, lists and mappings")


def _format_parser_error(error: Exception, words: Sequence[str]) -> str:
    """The parser's error as one line that names the field, its value and what it takes."""
    text = str(error)
    name, complaint = "", text
    for key in re.finditer(r'Parser key "([^"]+)"', text):
        name = f"{name}.{key[1]}" if f"{name}.{key[1]}" in FIELDS else key[1]
        complaint = text[key.end() :]
    if name and (missing := re.search(r"arguments are required: (.*)", complaint)):
        return f"{name}.{missing[1].split(', ')[0]} is missing; give {name} a format and a path"
    if name in FIELDS:
        kind, value = FIELDS[name], re.search(r"G(?:ot|iven) value: (.*)", complaint)
        is_item = value is not None and value[0].startswith("Got") and is_list(kind)
        is_item = is_item and not re.search(r"Expected a <class 'list'>|Expected a tuple", complaint)
        verb = "has" if is_item else "is"
        return f"{name} {verb} {short(value[1]) if value else 'wrong'}, but it must be {describe_type(kind)}"
    text = " ".join(text.split())
    if stray := re.fullmatch(r"unrecognized arguments: (.*)", text):
        return (
            f"{short(stray[1])} does not belong to an option: write --optim.lr 1e-3, with one value; quote "
            "text with spaces, write a list as [1,5]"
        )
    if "are required" in text and not _names_config(words):
        text += "; give the experiment file with -c FILE"
    return text


def _section_paths() -> list[str]:
    """Import paths of the sections' dataclasses, which the parser itself imports by name where one is optional."""
    sections = (section_of(kind) for kind in SECTIONS.values())
    return sorted({f"{section.__module__}.{section.__qualname__}" for section in sections if section})
