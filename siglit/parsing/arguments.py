"""From the words of a command line to an experiment: experiment files, then options, all of them checked by name.

What a file or an option holds is data: nothing of it is imported, called or read as a further file.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    set_parsing_settings,
)

from siglit.commands import COMMANDS, Command
from siglit.config import Experiment
from siglit.errors import UserError
from siglit.parsing.fields import (
    did_you_mean,
    expected,
    field_types,
    is_free_form,
    is_list,
    is_optional,
    section_of,
    section_types,
)
from siglit.runtime.files import read_regular

_FIELDS, _SECTIONS = field_types(), section_types()
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
# YAML takes bare dates and "=" for values of their own; the parser reads them as texts.
_PLAIN_TAGS |= {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
_MAX_BYTES = 1 << 24
"""Largest experiment file, 16 MiB."""


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
    words = [word for given in words for word in command.shorthands.get(given, (given,))]
    if command.default_config and not _names_config(words):
        words = ["-c", packaged_config(command.default_config), *words]
    parser = _parser(f"siglit {name}", command)
    try:
        checked = _checked_words(words, parser.prog, [flag.lstrip("-") for flag in command.flags])
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
            takes a dict: `optim={"lr": 1e-3}`.

    Raises:
        UserError: the file cannot be read, or a name or a value is wrong; the text names it.
    """
    words = ["-c", os.fspath(path)]
    for name, value in overrides.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return parse_command("train", words)[0]


def _parser(prog: str, command: Command) -> ArgumentParser:
    # Otherwise the parser imports whatever a `class_path` within a value names, and calls it.
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=_section_paths(),
        docstring_parse_attribute_docstrings=True,
    )
    parser = ArgumentParser(prog=prog, description=command.help, exit_on_error=False)
    if command.words:
        parser.add_argument(command.words, type=str, nargs="+", help="what to look for")
    for flag, details in command.flags.items():
        parser.add_argument(flag, **details)
    parser.add_argument(
        "-c", "--config", action=_ExperimentFile, help="the experiment file; repeatable, later files override earlier"
    )
    parser.add_class_arguments(Experiment)
    return parser


def _names_config(words: Sequence[str]) -> bool:
    """Whether the words give an experiment file, or ask for help, which needs none."""
    return any(w in ("--config", "-h", "--help") or w.startswith(("-c", "--config=")) for w in words)


class _ExperimentFile(ActionConfigFile):
    """The parser's action for files, but checked first, and a data set of a file takes the place of an earlier file's.

    The parser puts files together field by field: the fold of the one would stay and cut the other down in silence.
    """

    def __call__(self, parser: Any, given: Any, path: Any, option: Any = None) -> None:
        for name in _checked_file(path):
            given[name] = None if is_optional(_SECTIONS[name]) else Namespace(**dict.fromkeys(vars(given[name])))
        super().__call__(parser, given, path, option)


def _checked_file(path: str) -> list[str]:
    """Refuse a file that is no experiment; return the names of the data sets that it gives a format."""
    try:
        text = read_regular(path, _MAX_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"there is no experiment file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the experiment file {path}: {error.strerror}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        hint = "; put quotes around a text with ${...} inside braces" if b"${" in text else ""
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}{hint}") from error
    if node is None:
        raise UserError(f"{path} is empty; it needs at least data.train")
    _check_plain(node, path)
    named = _check_section(node, "", path)
    return [name for name in ("data.val", "data.train") if f"{name}.format" in named]


def _check_plain(node: yaml.Node, where: str) -> None:
    """Refuse all that is not texts, numbers, lists and mappings, and a key that a mapping holds twice."""
    done: set[int] = set()
    above: list[yaml.Node] = []

    def look(node: yaml.Node) -> None:
        place = f"{where}, line {node.start_mark.line + 1}"
        if node in above:
            raise UserError(f"{place}: a value holds itself; write it out")
        if id(node) in done:
            return
        done.add(id(node))
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{place}: {tag} is not taken; an experiment holds texts, numbers, lists and mappings")
        above.append(node)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{place}: a key must be a text")
                look(key)
                if key.value in seen:
                    raise UserError(
                        f"{where}, line {key.start_mark.line + 1}: {key.value} is given twice; keep one of them"
                    )
                seen.add(key.value)
                look(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                look(value)
        above.pop()

    look(node)


def _check_section(node: yaml.Node, section: str, where: str) -> set[str]:
    """Refuse names that are no fields below a section ("" for the whole); return all names that are there."""
    if not isinstance(node, yaml.MappingNode):
        found = _short(node.value) if isinstance(node, yaml.ScalarNode) else "a list"
        raise UserError(
            f"{where}, line {node.start_mark.line + 1}: {section or 'the experiment'} is {found}, but it must be names "
            "with values below it; a further experiment file is given with -c"
        )
    named: set[str] = set()
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                named |= _check_section(merged, section, where)
            continue
        name = ".".join(filter(None, (section, key.value.removesuffix("+"))))
        named.add(name)
        if name in _SECTIONS:
            if value.tag != "tag:yaml.org,2002:null":
                named |= _check_section(value, name, where)
            elif not is_optional(_SECTIONS[name]):
                raise UserError(f"the section {name} is empty; fill it, or remove its line to take the defaults")
        elif not _is_field(name):
            known = {*_FIELDS, *_SECTIONS}
            line = key.start_mark.line + 1
            raise UserError(f"{where}, line {line}: {name} is not a field{did_you_mean(name, known)}")
    return named


def _is_field(name: str) -> bool:
    below = (field for field, kind in _FIELDS.items() if is_free_form(kind))
    return name in _FIELDS or any(name.startswith(f"{field}.") for field in below)


def _checked_words(words: Sequence[str], command: str, own: Sequence[str]) -> list[str]:
    """Refuse options that the command has not; return the words, with brackets around a list that came without."""
    checked, skip = list(words), {*own, "config", "help", "print_config"}
    for place, word in enumerate(words):
        if word == "--":
            break
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").removesuffix("+")
        if not word.startswith("--") or " " in option or name in skip:
            continue
        if not _is_field(name) and name not in _SECTIONS and name.removesuffix(".help") not in _SECTIONS:
            hint = did_you_mean(name, {*_FIELDS, *_SECTIONS, *skip}, "--") or f"; see {command} --help"
            raise UserError(f"--{name} is not an option of {command}{hint}")
        if not (equals or words[place + 1 : place + 2]):
            continue  # the parser says that a value is missing
        value = value if equals else words[place + 1]
        if name in _SECTIONS:
            _check_section_option(name, value)
        elif is_list(_FIELDS.get(name)) and value not in ("", "null") and not value.startswith("["):
            checked[place if equals else place + 1] = f"{option}=[{value}]" if equals else f"[{value}]"
    return checked


def _check_section_option(name: str, value: str) -> None:
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--{name} {_short(value)} is not YAML: {' '.join(str(error).split())}") from error
    if node is not None and node.tag == "tag:yaml.org,2002:null" and is_optional(_SECTIONS[name]):
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            f"{name} is {_short(value)}, but it must be names with values, such as --{_first_field(name)} VALUE; an "
            "experiment file is given with -c"
        )
    _check_plain(node, f"--{name}")
    _check_section(node, name, f"--{name}")


def _check_values(parsed: Namespace) -> None:
    """Refuse what the parser lets pass: null where a value is needed, and anything but data in free-form fields."""
    for name, kind in _FIELDS.items():
        value = parsed.get(name)
        section = name.rpartition(".")[0]
        left_out = bool(section) and parsed.get(section) is None
        if value is None and not (left_out or is_optional(kind)):
            raise UserError(f"{name} is null, but it must be {expected(kind)}")
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
        raise UserError(f"{name} is a {type(value).__name__}; give texts, numbers, lists and names with values")


def _format_parser_error(error: Exception, words: Sequence[str]) -> str:
    """What the parser says, in one line that names the field, its value and what it takes."""
    text = str(error)
    field = None
    for key in re.finditer(r'Parser key "([^"]+)"', text):
        name = f"{field[0]}.{key[1]}" if field and f"{field[0]}.{key[1]}" in _FIELDS else key[1]
        field = (name, text[key.end() :])
    if field and (missing := re.search(r"arguments are required: (.*)", field[1])):
        return f"{field[0]}.{missing[1].split(', ')[0]} is missing; give {field[0]} a format and a path"
    if field and field[0] in _FIELDS:
        name, complaint = field
        kind, value = _FIELDS[name], re.search(r"G(?:ot|iven) value: (.*)", complaint)
        about_a_part = value is not None and value[0].startswith("Got") and is_list(kind)
        has = (
            "has" if about_a_part and not re.search(r"Expected a <class 'list'>|Expected a tuple", complaint) else "is"
        )
        return f"{name} {has} {_short(value[1]) if value else 'wrong'}, but it must be {expected(kind)}"
    text = " ".join(text.split())
    if stray := re.fullmatch(r"unrecognized arguments: (.*)", text):
        return f"{_short(stray[1])} belongs to no option, which takes one value: quote a text, write a list as [1,5]"
    if "are required" in text and not _names_config(words):
        text += "; give the experiment file with -c FILE"
    return text


def _section_paths() -> list[str]:
    """Import paths of the dataclasses, which the parser names to itself where a section may be left out."""
    sections = (section_of(kind) for kind in _SECTIONS.values())
    return sorted({f"{section.__module__}.{section.__qualname__}" for section in sections if section})


def _first_field(section: str) -> str:
    return next(name for name in _FIELDS if name.startswith(f"{section}."))


def _short(value: str) -> str:
    return repr(value) if not value.strip() else f"{' '.join(value.split()):.80}"


def packaged_config(name: str) -> str:
    """Path of an experiment file: inside the package in a wheel, beside it in a checkout."""
    here = os.path.dirname(os.path.dirname(__file__))
    for folder in (os.path.join(here, "configs"), os.path.join(os.path.dirname(here), "configs")):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise AssertionError(f"{name} is missing from the installation")
