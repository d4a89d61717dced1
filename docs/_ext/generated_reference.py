"""Sphinx extension that writes the config and command reference from their sources.

A page holds a marker, `<!-- config-reference -->` or `<!-- command-reference -->`, which is replaced when the page is read. What a key
means is said once, in the comment next to it in `configs/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

GROUPS = {
    "tissue": "Which sections there are and what each is for.",
    "experiment": "Complete recipes: loss, network, optimizer and stopping rule together.",
    "ablation": "One change to a recipe, to see what a part is worth.",
    "encoder": "The network that turns the image around a nucleus into numbers.",
    "units": "What is predicted: nuclei, or square bins.",
    "segmentation": "How nuclei are found.",
    "qc": "Which nuclei are kept.",
    "panel": "Which genes are predicted.",
    "split": "How training, validation and test are separated.",
    "loss": "What the network minimizes.",
    "finetune": "Whether the encoder is trained, too.",
    "model": "The network, or one of the baselines in its place.",
    "trainer": "Lightning's `Trainer`.",
    "callbacks": "Early stopping and the choice of the best epoch.",
    "evaluation": "Intervals of the scores.",
    "logger": "Where curves and tables go.",
    "sweep": "Grids and searches, run as a multirun.",
    "broad": "Broad classes of cell types, for `prts analyze`.",
    "paths": "Where data and the cache are.",
    "debug": "A quick check that everything runs.",
}
# Settings of Hydra itself, not of prts.
_HIDDEN_GROUPS = ("hydra",)
_HIDDEN_KEYS = ("defaults", "hydra", "_partial_")
# Groups whose options name a member of a registry.
_REGISTERED = {"encoder": "encoder", "segmentation": "segmenter", "loss": "likelihood"}
_LONG = 60


@dataclass(frozen=True)
class Key:
    """One row of the reference: dotted name, default as written, comment."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Config:
    """One YAML file of configs/."""

    path: Path
    text: str
    comment: str
    bases: list[str]
    keys: list[Key]

    @property
    def is_preset(self) -> bool:
        """Whether the file sets keys of other groups, and so is best shown verbatim."""
        return "# @package" in self.text or self.path.parent.name in ("tissue", "broad")


def read_config(path: Path) -> Config:
    """Read one file: its first comment, the options it builds on, and a row for each key."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            head.append(line.lstrip("# ").rstrip())
    node = yaml.compose(text)
    keys, bases = [], []
    if isinstance(node, yaml.MappingNode):
        keys = list(_rows(node, lines, ""))
        defaults = (yaml.safe_load(text) or {}).get("defaults", [])
        bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return Config(path, text, " ".join(head), bases, keys)


def config_reference(configs: Path = CONFIGS) -> str:
    """The config reference as Markdown."""
    parts = ["## Commands", "", "The settings of each command, apart from the groups below.", ""]
    for path in sorted(configs.glob("*.yaml")):
        config = read_config(path)
        parts += [f"### `prts {path.stem}`", "", *_table(config.keys)]
    groups = sorted({path.parent.relative_to(configs).as_posix() for path in configs.glob("*/*.yaml")})
    order = [name for name in GROUPS if name in groups]
    order += [name for name in groups if name not in GROUPS and name.split("/")[0] not in _HIDDEN_GROUPS]
    for group in order:
        parts += [f"## `{group}`", "", GROUPS.get(group, ""), ""]
        for path in sorted((configs / group).glob("[!_]*.yaml")):  # _x.yaml has settings that other options share
            parts += _option(group, read_config(path))
    return "\n".join(parts)


def command_reference() -> str:
    """`prts <command> --help` of every command, as Markdown."""
    from prts.cli.app import COMMANDS, command_help

    parts = []
    for command in COMMANDS:
        parts += [f"## `prts {command}`", ""]
        for paragraph in command_help(command).strip().split("\n\n"):
            parts += _paragraph(paragraph)
    return "\n".join(parts)


def _paragraph(text: str) -> list[str]:
    """A paragraph of a help text: usage, examples and columns verbatim, the rest as prose."""
    if re.match(r"(usage|example): ", text):
        lines = re.sub(r"^(?:usage|example): |^ {7,}", "", text, flags=re.M).splitlines()
        title = "Usage:" if text.startswith("usage") else "Example:" if len(lines) == 1 else "Examples:"
        return [title, "", "```text", *lines, "```", ""]
    if re.search(r"\S {2,}\S", text):
        return ["```text", *text.splitlines(), "```", ""]
    # outside code spans, nothing is Markdown
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return ["".join(piece if piece.startswith("`") else re.sub(r"([<*\[\]_])", r"\\\1", piece) for piece in pieces), ""]


def _option(group: str, config: Config) -> Iterator[str]:
    yield f"### `{group}={config.path.stem}`"
    yield ""
    if config.comment:
        yield _sentence(config.comment)
        yield ""
    if config.is_preset:
        body = re.sub(r"\A(#.*\n)+", "", config.text).strip()
        if body:
            yield from ("````{dropdown} The file", "```yaml", body, "```", "````", "")
        return
    keys = {key.name: key for key in config.keys}
    for base in reversed(config.bases):
        if base.startswith("_"):
            keys = {key.name: key for key in read_config(config.path.with_name(f"{base}.yaml")).keys} | keys
    target, name = keys.pop("_target_", None), keys.get("name")
    if target is not None:
        yield f"Builds `{target.default}`."
        yield ""
    elif name is not None and group in _REGISTERED:
        yield f"Builds the {_REGISTERED[group]} registered as `{keys.pop('name').default}`."
        yield ""
    if bases := [f"`{base}`" for base in config.bases if not base.startswith("_")]:
        yield f"As {' and '.join(bases)}, with these changes:" if keys else f"As {' and '.join(bases)}."
        yield ""
    yield from _table(list(keys.values()))


def _table(keys: list[Key]) -> Iterator[str]:
    rows = [key for key in keys if not key.name.endswith("_target_")]
    if not rows:
        return
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for key in rows:
        default = _cell(f"`{key.default}`") if key.default else ""
        yield f"| `{key.name}` | {default} | {_cell(key.comment)} |"
    yield ""


def _rows(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[Key]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if key.value in _HIDDEN_KEYS:
            continue
        above = _comment_above(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            inline = _comment_after(lines, key.end_mark)
            if said := " ".join(filter(None, (above, inline))):
                yield Key(name, "", said)
            yield from _rows(value, lines, f"{name}.")
            continue
        end = key.end_mark if _is_block(value) else value.end_mark
        yield Key(name, _default(value), " ".join(filter(None, (above, _comment_after(lines, end)))))


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and not node.flow_style


def _default(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "required" if node.value == "???" else node.value or "null"
    plain: Any = yaml.SafeLoader("").construct_object(node, deep=True)
    shown = _flow(plain)
    return shown if len(shown) <= _LONG else f"{shown[: _LONG - 4]} ..."


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _comment_after(lines: list[str], mark: yaml.Mark) -> str:
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    found = re.search(r"(?:^|\s)#\s*(.*)$", rest)
    return found.group(1).strip() if found else ""


def _comment_above(lines: list[str], line: int) -> str:
    """The comment on the lines above a key; a comment above the first key describes the file."""
    said: list[str] = []
    while line > 0 and (stripped := lines[line - 1].strip()).startswith("#"):
        said.insert(0, stripped.lstrip("# "))
        line -= 1
    return " ".join(said) if line > 0 else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."


def _insert(app: Any, docname: str, source: list[str]) -> None:
    if "<!-- config-reference -->" in source[0]:
        for path in CONFIGS.rglob("*.yaml"):
            app.env.note_dependency(str(path))
        source[0] = source[0].replace("<!-- config-reference -->", config_reference())
    if "<!-- command-reference -->" in source[0]:
        source[0] = source[0].replace("<!-- command-reference -->", command_reference())


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
