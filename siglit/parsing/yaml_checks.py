"""Checks of an experiment's YAML before the parser sees it: plain data only, known names, no key twice.

Knows the names of the fields; types and bounds are checked later.
"""

from typing import Any

import yaml

from siglit.errors import UserError
from siglit.parsing.fields import FIELDS, SECTIONS, did_you_mean, is_field, is_optional
from siglit.runtime.files import read_regular

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
# In YAML, bare dates and "=" have tags of their own; the parser reads them as strings.
_PLAIN_TAGS |= {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
_MAX_BYTES = 1 << 24
"""Largest experiment file, 16 MiB."""
_MAX_VALUES = 100_000
"""Most values of an experiment, those that aliases repeat counted each time: ten lists of ten aliases are 10¹⁰."""


def check_file(path: str) -> set[str]:
    """Return the dotted names of all sections and fields that an experiment file sets.

    Raises:
        UserError: the file cannot be read, is not YAML, sets an unknown name, or holds more than plain data.
    """
    node = compose_file(path, "experiment file")
    if node is None:
        raise UserError(f"{path} is empty; it needs at least data.train")
    return _check_names(node, "", path)


def read_mapping(path: str, kind: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with plain data.

    Args:
        path: the file.
        kind: what the file is, such as "study file", for messages.

    Raises:
        UserError: the file cannot be read, is not YAML, is not a mapping, or holds more than plain data.
    """
    node = compose_file(path, kind)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path} is not a mapping of names to values, so it is no {kind}; check the path")
    values: dict[str, Any] = yaml.SafeLoader("").construct_document(node)
    return values


def compose_file(path: str, kind: str) -> yaml.Node | None:
    """The nodes of a YAML file of plain data; None if it is empty. Arguments and errors as of `read_mapping`."""
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 at byte {error.start}, so it is no {kind} in YAML; convert it (iconv -t utf-8), or "
            "check the path"
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"there is no {kind} {path or repr(path)}") from error
    except OSError as error:
        raise UserError(f"cannot read the {kind} {path}: {error.strerror}") from error
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply; write sections, fields, and lists of values") from error
    except yaml.YAMLError as error:
        hint = "; put quotes around a string with ${...} inside braces" if "${" in text else ""
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or f"{getattr(error, 'reason', error)}".splitlines()[0]
        position = getattr(error, "position", None)
        if position is not None:
            place = f", line {text.count(chr(10), 0, position) + 1}"
        raise UserError(f"{path}{place} is not YAML: {problem}{hint}") from error
    if node is not None:
        _check_plain(node, path)
    return node


def check_section_option(section: str, value: str) -> None:
    """Check the value of an option that sets a whole section, such as --optim '{lr: 1e-3}'.

    Raises:
        UserError: the value is not a YAML mapping of fields of the section to plain data (or null, if it is optional).
    """
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise UserError(f"--{section} {short(value)} is nested too deeply") from error
    except yaml.YAMLError as error:
        raise UserError(f"--{section} {short(value)} is not YAML: {' '.join(str(error).split())}") from error
    if node is not None and node.tag == "tag:yaml.org,2002:null" and is_optional(SECTIONS[section]):
        return
    if not isinstance(node, yaml.MappingNode):
        field = next(name for name in FIELDS if name.startswith(f"{section}."))
        raise UserError(
            f"{section} is {short(value)}, but it must be a mapping of fields to values, or set one field with "
            f"--{field} VALUE; pass an experiment file with -c"
        )
    _check_plain(node, f"--{section}")
    _check_names(node, section, f"--{section}")


def short(value: str) -> str:
    """A value in one line of at most 80 characters, for a message."""
    return repr(value) if not value.strip() else f"{' '.join(value.split()):.80}"


def _check_plain(node: yaml.Node, where: str) -> None:
    """Refuse values other than strings, numbers, lists and mappings, a key twice, and too many values."""
    values: dict[int, int] = {}
    parents: list[yaml.Node] = []

    def visit(node: yaml.Node) -> int:
        place = _line(where, node)
        if node in parents:
            raise UserError(f"{place}: a value contains itself; write it out")
        if id(node) in values:
            return values[id(node)]
        count = 1
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise UserError(f"{place}: {tag} is not accepted; use strings, numbers, lists and mappings")
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > 100:
            raise UserError(f"{place}: a number has {len(node.value):,} digits; shorten it")
        if isinstance(node, yaml.ScalarNode) and any("\ud800" <= char <= "\udfff" for char in node.value):
            raise UserError(f"{place}: {short(ascii(node.value))} is half of a surrogate pair; write the character out")
        parents.append(node)
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise UserError(f"{place}: a key must be a string")
                visit(key)
                if key.value in keys:
                    raise UserError(f"{_line(where, key)}: {key.value} is given twice; keep one of them")
                keys.add(key.value)
                count += visit(value)
        elif isinstance(node, yaml.SequenceNode):
            count += sum(map(visit, node.value))
        parents.pop()
        if count > _MAX_VALUES:
            raise UserError(f"{place} holds more than {_MAX_VALUES:,} values, with its aliases written out; use fewer")
        values[id(node)] = count
        return count

    visit(node)


def _check_names(node: yaml.Node, section: str, where: str) -> set[str]:
    """Refuse unknown names below a section ("" for the whole); return all names that are set."""
    if not isinstance(node, yaml.MappingNode):
        value = short(node.value) if isinstance(node, yaml.ScalarNode) else "a list"
        raise UserError(
            f"{_line(where, node)}: {section or 'the experiment'} is {value}, but it must be a mapping of fields to "
            "values; pass a further experiment file with -c"
        )
    names: set[str] = set()
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                names |= _check_names(merged, section, where)
            continue
        name = ".".join(filter(None, (section, key.value.removesuffix("+"))))
        names.add(name)
        if name in SECTIONS:
            if value.tag != "tag:yaml.org,2002:null":
                names |= _check_names(value, name, where)
            elif not is_optional(SECTIONS[name]):
                raise UserError(f"the section {name} is empty; fill it, or remove its line to use the defaults")
        elif not is_field(name):
            hint = did_you_mean(name, {*FIELDS, *SECTIONS})
            raise UserError(f"{_line(where, key)}: {short(name)} is not a field{hint}")
    return names


def _line(where: str, node: yaml.Node) -> str:
    return f"{where}, line {node.start_mark.line + 1}"
