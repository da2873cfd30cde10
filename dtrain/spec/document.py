"""YAML files as values that remember their lines.

YAML 1.2's core schema read from PyYAML's events: `yes` and `010` mean what they say, `1e-3` is a number. Nothing
here recurses over a file, and size, depth and number of values are bounded before anything is built from them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dtrain.errors import InputError

MAX_BYTES = 2**20
MAX_VALUES = 10_000
"""Values in a file, each alias counted as what it stands for."""
MAX_DEPTH = 32
MAX_KEY_LENGTH = 200

INT = re.compile(r"[-+]?[0-9]+\Z")
RADIX_INT = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)\Z")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((sign + word for sign in ("", "+") for word in (".inf", ".Inf", ".INF")), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass
class Node:
    """One value of a document and where it was written."""

    value: Any
    """A scalar, a `dict[str, Node]` or a `list[Node]`."""
    where: str
    """Of the value, or of its key if it has one: `jobs/x.yaml:4`, or `--set a.b=c`."""
    written: str = ""
    """A scalar as it stands in the file."""
    quoted: bool = False
    size: int = 1
    height: int = 1
    mistakes: list[tuple[str, str]] = field(default_factory=list)
    """Of the whole document, each as (where, what and the next move); filled at its root only."""

    def plain(self) -> Any:
        """The value without its lines."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read(path: str | Path) -> Node:
    """The document in a file; its root is a mapping.

    Raises `InputError` when it cannot be read or is not one YAML document. Mistakes that leave the rest readable
    (a key given twice, for example) are listed in the root's `mistakes`.
    """
    root = parse(_text(path), str(path))
    if root is None:
        raise InputError(f"{path}:1: the file is empty; write at least `name: ...` (`dtrain schema` lists every key)")
    if not isinstance(root.value, dict):
        raise InputError(f"{root.where}: expected `key: value` lines, found {found(root)}")
    return root


def parse(text: str, name: str, *, fixed_where: bool = False) -> Node | None:
    """The one document in `text`, None when it holds nothing but comments.

    Errors are located as `name:line`, or as plain `name` with `fixed_where`.
    """
    builder = _Builder(name, fixed_where)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{builder.at(mark.line if mark else 0)}: not valid YAML: {_explain(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0)
        code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
        raise InputError(f"{builder.at(line)}: not a text file: control character {code:#04x}; remove it") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode, a version of 5000 digits
        raise InputError(f"{builder.at(builder.line)}: not valid YAML: {str(error).splitlines()[0]}") from None
    if builder.root is not None:
        builder.root.mistakes = builder.mistakes
    return builder.root


def found(node: Node) -> str:
    """What stands at a node, in words for a message: `'ten'`, `an empty value`, `a list`."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "an empty value" if node.written == "" else node.written
    text = node.written if len(node.written) <= 40 else f"{node.written[:37]}..."
    return repr(text) if isinstance(node.value, str) else text


def near_files(path: str | Path) -> str:
    """A half-sentence naming the file that was probably meant, looked for beside it and in `jobs` and `clusters`."""
    import difflib

    asked = Path(path)
    folders = dict.fromkeys([asked.parent, Path(), Path("jobs"), Path("clusters")])
    candidates = {str(file): file for folder in folders for file in _yaml_files(folder)}
    by_stem = [name for name, file in candidates.items() if file.stem == asked.stem and file != asked]
    near = by_stem or difflib.get_close_matches(str(asked), candidates, n=1, cutoff=0.6)
    if not near:
        stems = {file.stem: name for name, file in reversed(candidates.items())}
        near = [stems[stem] for stem in difflib.get_close_matches(asked.stem, stems, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in {".yaml", ".yml"})[:1000]
    except OSError:
        return []


def _text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file{near_files(path)}") from None
    except IsADirectoryError:
        inside = [str(file) for file in _yaml_files(Path(path))[:3]]
        such = f", such as {', '.join(inside)}" if inside else ""
        raise InputError(f"{path}: this is a folder; name a file in it{such}") from None
    except PermissionError:
        raise InputError(f"{path}: not allowed to read this file; try `chmod u+r`{near_files(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{str(path)[:200]!r}: cannot be read: {reason}; name a YAML file") from None
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_BYTES // 2**10} KiB, so not a job or cluster file; name another one"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"{data[error.start]:#04x}"
        raise InputError(f"{path}:{line}: not a text file: byte {byte} is not UTF-8; save it as UTF-8") from None


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be parsed"
    if "'\\t'" in problem:
        return "a tab where spaces belong; indent with spaces"
    if "mapping values are not allowed" in problem:
        return "a second `:` on one line; put quotes around the text, or start a new line"
    if "expected <block end>" in problem:
        return "this line does not line up with those above; indent the keys of one mapping alike"
    if "could not find expected ':'" in problem:
        return "a key without `:`; write `key: value`"
    return problem


@dataclass
class _Open:
    """A mapping or list whose end has not been read yet."""

    node: Node
    anchor: str | None
    key: Node | None = None
    """Key whose value comes next."""


class _Builder:
    """Makes nodes of events, keeping the open ones on a stack of its own."""

    def __init__(self, name: str, fixed_where: bool) -> None:
        self.name, self.fixed_where = name, fixed_where
        self.root: Node | None = None
        self.mistakes: list[tuple[str, str]] = []
        self.line = 0
        self.open: list[_Open] = []
        self.anchors: dict[str, Node | None] = {}
        self.num_values = 0
        self.num_documents = 0

    def at(self, line: int) -> str:
        return self.name if self.fixed_where else f"{self.name}:{line + 1}"

    def feed(self, event: yaml.Event) -> None:
        self.line = event.start_mark.line if event.start_mark else self.line
        where = self.at(self.line)
        if isinstance(event, yaml.DocumentStartEvent):
            self.num_documents += 1
            if self.num_documents > 1:
                raise InputError(f"{where}: a second document (`---`); put each into a file of its own")
        elif isinstance(event, yaml.AliasEvent):
            self._close(self._alias(event.anchor, where), None)
        elif isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event.tag, where)
            self._close(self._scalar(event, where), event.anchor)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._refuse_tag(event.tag, where)
            if len(self.open) >= MAX_DEPTH:
                raise InputError(
                    f"{where}: nested more than {MAX_DEPTH} deep; no key lies that deep, check the brackets"
                )
            self._count(1, where)
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            self.open.append(_Open(Node(value, where), event.anchor))
            if event.anchor:
                self.anchors[event.anchor] = None
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            done = self.open.pop()
            self._close(done.node, done.anchor)

    def _close(self, node: Node, anchor: str | None) -> None:
        """Put a finished node where it belongs."""
        if anchor:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        if isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif parent.key is None:
            parent.key = self._key(node)
            return
        else:
            key, parent.key = parent.key, None
            if key.value in parent.node.value:
                first = parent.node.value[key.value].where
                self.mistakes.append((key.where, f"{key.value} is given twice, first at {first}; remove one of them"))
                return
            parent.node.value[key.value] = Node(
                node.value, key.where, node.written, node.quoted, node.size, node.height
            )
        parent.node.size += node.size
        parent.node.height = max(parent.node.height, node.height + 1)

    def _key(self, node: Node) -> Node:
        if node.value == "<<" and not node.quoted:
            raise InputError(f"{node.where}: merge keys (`<<`) are not supported; write the keys out")
        if not isinstance(node.value, str):
            raise InputError(
                f"{node.where}: expected a name as key, found {found(node)}; put it in quotes if it is meant"
            )
        if not node.value.isprintable() or len(node.value) > MAX_KEY_LENGTH:
            raise InputError(f"{node.where}: no key looks like {found(node)}; write a plain name")
        return node

    def _alias(self, anchor: str | None, where: str) -> Node:
        node = self.anchors.get(anchor or "")
        if node is None:
            what = "stands for a value that contains it" if anchor in self.anchors else "has no anchor above it"
            raise InputError(f"{where}: alias *{anchor} {what}; write the value out")
        if len(self.open) + node.height - 1 > MAX_DEPTH:
            raise InputError(f"{where}: alias *{anchor} nests values more than {MAX_DEPTH} deep; no key lies that deep")
        self._count(node.size, where)
        return Node(node.value, where, node.written, node.quoted, node.size, node.height)

    def _scalar(self, event: yaml.ScalarEvent, where: str) -> Node:
        self._count(1, where)
        text = event.value
        if bad := CONTROL.search(text):
            raise InputError(f"{where}: control character {ord(bad[0]):#04x} in a text; remove it")
        quoted = event.style is not None
        return Node(text if quoted else resolve(text), where, text, quoted)

    def _count(self, size: int, where: str) -> None:
        self.num_values += size
        if self.num_values > MAX_VALUES:
            raise InputError(
                f"{where}: more than {MAX_VALUES} values, aliases counted as what they stand for; use fewer"
            )

    @staticmethod
    def _refuse_tag(tag: str | None, where: str) -> None:
        if tag is not None:
            raise InputError(
                f"{where}: tags ({tag[:40]}) are not supported; put a value in quotes if it is meant as text"
            )


def resolve(text: str) -> Any:
    """The value of an unquoted scalar in YAML 1.2's core schema."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    try:
        if INT.match(text):
            return int(text)
        if RADIX_INT.match(text):
            return int(text, 0)
    except ValueError:  # more digits than Python converts
        return float("-inf") if text.startswith("-") else float("inf")
    return float(text) if FLOAT.match(text) else text
