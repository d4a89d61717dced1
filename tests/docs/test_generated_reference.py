"""The config and command reference, generated from configs/ and from the commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs/_ext"))

from generated_reference import GROUPS, command_reference, config_reference, read_config  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]


def test_a_file_becomes_rows_of_key_default_and_comment(tmp_path: Path) -> None:
    path = tmp_path / "encoder.yaml"
    path.write_text(
        "# An encoder of two lines,\n"
        "# the second here.\n"
        "defaults:\n"
        "  - base\n"
        "  - _self_\n"
        "weights: null   # a file # or none\n"
        "net:            # the network\n"
        "  hidden: [256, 128]   # widths\n"
        "  path: ${paths.data_dir}/a#b\n"
        "# said above\n"
        "share: true\n"
        "size: ???\n"
        "hydra: {run: {dir: .}}\n"
    )

    config = read_config(path)

    assert config.comment == "An encoder of two lines, the second here."
    assert config.bases == ["base"]
    assert [(key.name, key.default, key.comment) for key in config.keys] == [
        ("weights", "null", "a file # or none"),
        ("net", "", "the network"),
        ("net.hidden", "[256, 128]", "widths"),
        ("net.path", "${paths.data_dir}/a#b", ""),
        ("share", "true", "said above"),
        ("size", "required", ""),
    ]


def test_every_group_and_option_is_in_the_reference() -> None:
    reference = config_reference()

    for path in (ROOT / "configs").glob("*/[!_]*.yaml"):
        assert f"### `{path.parent.name}={path.stem}`" in reference, path
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"### `prts {path.stem}`" in reference, path
    groups = {path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")}
    assert groups == set(GROUPS), "describe each group in docs/_ext/generated_reference.py"


def test_an_option_shows_what_it_shares_with_others() -> None:
    _, _, rest = config_reference().partition("### `encoder=vit256`")
    option, _, _ = rest.partition("###")

    assert "Builds the encoder registered as `vit256`." in option
    assert "| `checkpoint_key` | `teacher` |" in option and option.count("`checkpoint_key`") == 1
    assert "| `stride` | `128` |" in option
    assert "_token" not in option


def test_a_bar_in_a_comment_does_not_split_its_cell() -> None:
    rows = [line for line in config_reference().splitlines() if line.startswith("| `")]

    assert rows
    assert all(len(re.split(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_the_command_reference_is_the_help() -> None:
    from prts.cli.app import COMMANDS

    reference = command_reference()

    for command in COMMANDS:
        assert f"## `prts {command}`" in reference
        assert f"```text\nprts {command} " in reference


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    """Sphinx checks links; this checks paths in code spans, such as `benchmarks/ceiling.py`."""
    named = re.findall(
        r"(?<![\w/.])((?:prts|configs|tests|benchmarks|scripts|notebooks)/[\w/]+\.(?:py|yaml|sh|ipynb))",
        page.read_text(),
    )

    # the guides say where a file of the example package would go
    shown = {path.name for path in (ROOT / "docs/howto/example").rglob("*")}
    assert [name for name in named if not (ROOT / name).is_file() and Path(name).name not in shown] == []
