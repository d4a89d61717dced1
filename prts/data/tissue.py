"""A tissue as its config describes it: sections, where their files lie, and the role of each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prts.errors import InputError

SPECIES = ("human", "mouse")
ROLES = ("train", "val", "test")


@dataclass(frozen=True)
class SectionSpec:
    """One section of a tissue config. Paths may not exist yet.

    Either `image` is given, or `simulate`: the arguments of `prts.simulate.section.simulate_section`.
    """

    name: str
    image: Path | None = None
    bins: Path | None = None
    mpp: float | None = None
    nuclei: Path | None = None
    spots: Path | None = None
    simulate: Mapping[str, Any] | None = None
    download: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Tissue:
    """Named sections of one species, and which of them train, validate and test; `markers` are genes worth a figure of their own."""

    name: str
    species: str
    sections: Mapping[str, SectionSpec]
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    markers: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        """The sections that have a role, in config order."""
        roles = {*self.train, *self.val, *self.test}
        return [name for name in self.sections if name in roles]


def _refuse_unknown(where: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(known)})"
            raise InputError(f"{where}.{key}: no such key{hint}")


def parse_tissue(config: Mapping[str, Any]) -> Tissue:
    """Check a `tissue` config node and turn it into a `Tissue`.

    Parameters
    ----------
    config
        The node as plain Python containers, interpolations resolved.

    Raises
    ------
    InputError
        For unknown or missing keys, an unknown species, or a role that names no section.
    """
    _refuse_unknown("tissue", config, ["name", "species", "sections", "markers", *ROLES])
    for key in ("name", "species", "sections", "train"):
        if not config.get(key):
            raise InputError(f"tissue.{key}: is required")
    if config["species"] not in SPECIES:
        raise InputError(f"tissue.species: {config['species']!r} is not one of {', '.join(SPECIES)}")
    if not isinstance(config["sections"], Mapping):
        raise InputError(
            "tissue.sections: must map a section's name to its files, such as {lung1: {image: ..., bins: ...}}"
        )
    sections = {str(name): _parse_section(str(name), node) for name, node in config["sections"].items()}
    roles: dict[str, tuple[str, ...]] = {}
    for role in ROLES:
        names = config.get(role) or []
        if isinstance(names, str):
            raise InputError(f"tissue.{role}: must be a list of sections, such as [{names}]")
        for name in names:
            if name not in sections:
                raise InputError(f"tissue.{role}: {name!r} is not a section (there are: {', '.join(sections)})")
        roles[role] = tuple(str(name) for name in names)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        for name in set(roles[first]) & set(roles[second]):
            raise InputError(f"tissue.{second}: {name!r} is also in tissue.{first}; a section has one role")
    markers = config.get("markers") or []
    if isinstance(markers, str):
        raise InputError(f"tissue.markers: must be a list of gene symbols, such as [{markers}]")
    return Tissue(
        name=str(config["name"]),
        species=config["species"],
        sections=sections,
        markers=tuple(dict.fromkeys(map(str, markers))),
        **roles,
    )


def _parse_section(name: str, node: Any) -> SectionSpec:
    where = f"tissue.sections.{name}"
    if not isinstance(node, Mapping):
        raise InputError(f"{where}: must be a mapping with at least image and bins")
    _refuse_unknown(where, node, [f.name for f in fields(SectionSpec) if f.name != "name"])
    if bool(node.get("image")) == bool(node.get("simulate")):
        raise InputError(f"{where}: needs either image (and bins) or simulate")
    if node.get("image") and not node.get("bins"):
        raise InputError(f"{where}.bins: is required, the folder binned_outputs/square_002um of the section")
    paths = {key: Path(str(node[key])) for key in ("image", "bins", "nuclei", "spots") if node.get(key)}
    mpp = node.get("mpp")
    if mpp is not None and not isinstance(mpp, int | float):
        raise InputError(f"{where}.mpp: {mpp!r} is not a number of um/px")
    return SectionSpec(name=name, mpp=mpp, simulate=node.get("simulate"), download=node.get("download"), **paths)
