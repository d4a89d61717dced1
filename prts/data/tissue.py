"""A tissue as described by its config: sections, the paths of their files, and their roles."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prts.errors import ParameterError, did_you_mean
from prts.platforms import DEFAULT_PLATFORM, platforms

ROLES = ("train", "val", "test")


@dataclass(frozen=True)
class SectionSpec:
    """One section of a tissue config. Paths need not exist yet.

    Attributes
    ----------
    name
        Name of the section.
    image
        The full-resolution H&E image; None with `simulate`, or if the platform's files include the image.
    mpp
        um per full-resolution pixel, if the files do not state it.
    nuclei, spots
        Nuclei from another tool, measured spots.
    platform
        The platform that measured the section, a name in `prts.platforms.platforms`.
    measurement
        Arguments of the platform's constructor: all keys of the section's config that are not listed here.
    simulate
        Arguments of `prts.simulate.section.simulate_section`.
    download
        Where `prts download` gets the files from.
    """

    name: str
    image: Path | None = None
    mpp: float | None = None
    nuclei: Path | None = None
    spots: Path | None = None
    platform: str = DEFAULT_PLATFORM
    measurement: Mapping[str, Any] = field(default_factory=dict)
    simulate: Mapping[str, Any] | None = None
    download: Mapping[str, Any] | None = None


_OWN_KEYS = [f.name for f in fields(SectionSpec) if f.name not in ("name", "measurement")]


@dataclass(frozen=True)
class Tissue:
    """Named sections of one species and their roles; `markers` are genes whose mean PCC is reported separately."""

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


def parse_tissue(config: Mapping[str, Any]) -> Tissue:
    """Check a `tissue` config node and turn it into a `Tissue`.

    Parameters
    ----------
    config
        The node as plain Python containers, interpolations resolved.

    Raises
    ------
    ParameterError
        For unknown or missing keys, or a role that names no section.
    """
    _refuse_unknown("tissue", "", config, ["name", "species", "sections", "markers", "license", "cite", *ROLES])
    for key in ("name", "species", "sections", "train"):
        if not config.get(key):
            raise ParameterError("tissue", key, "is required")
    if not isinstance(config["sections"], Mapping):
        raise ParameterError(
            "tissue", "sections", "must map a section's name to its files, such as {lung1: {image: ..., bins: ...}}"
        )
    sections = {str(name): _parse_section(str(name), node) for name, node in config["sections"].items()}
    markers = config.get("markers") or []
    if isinstance(markers, str):
        raise ParameterError("tissue", "markers", f"must be a list of gene symbols, such as [{markers}]")
    return Tissue(
        name=str(config["name"]),
        species=config["species"],
        sections=sections,
        markers=tuple(dict.fromkeys(map(str, markers))),
        **_parse_roles(config, sections),
    )


def _parse_roles(config: Mapping[str, Any], sections: Mapping[str, SectionSpec]) -> dict[str, tuple[str, ...]]:
    roles: dict[str, tuple[str, ...]] = {}
    for role in ROLES:
        names = config.get(role) or []
        if isinstance(names, str):
            raise ParameterError("tissue", role, f"must be a list of sections, such as [{names}]")
        for name in names:
            if name not in sections:
                raise ParameterError("tissue", role, f"{name!r} is not a section; choose from {', '.join(sections)}")
        roles[role] = tuple(str(name) for name in names)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        for name in set(roles[first]) & set(roles[second]):
            raise ParameterError("tissue", second, f"{name!r} is also in tissue.{first}; give each section one role")
    return roles


def _parse_section(name: str, node: Any) -> SectionSpec:
    if not isinstance(node, Mapping):
        raise ParameterError("section", name, "must be a mapping with at least image and bins")
    given = {str(key): value for key, value in node.items() if value is not None}
    own = {key: given.pop(key) for key in _OWN_KEYS if key in given}
    platform = str(own.get("platform", DEFAULT_PLATFORM))
    image = bool(own.get("image")) or ("simulate" not in own and hasattr(platforms[platform], "own_image"))
    if image == bool(own.get("simulate")):
        raise ParameterError(
            "section", name, "needs either image, the H&E image that the counts are registered to, or simulate"
        )
    if image:
        _check_platform(name, platform, given)
    else:
        _refuse_unknown("section", f"{name}.", given, _OWN_KEYS)
    mpp = own.get("mpp")
    if mpp is not None and not isinstance(mpp, int | float):
        raise ParameterError("section", f"{name}.mpp", f"{mpp!r} is not a number; give um/px")
    own |= {key: Path(str(own[key])) for key in ("image", "nuclei", "spots") if key in own}
    return SectionSpec(name=name, measurement=given, **own)


def _check_platform(section: str, platform: str, settings: Mapping[str, Any]) -> None:
    """Check the names of a platform's settings without constructing it."""
    parameters = inspect.signature(platforms[platform]).parameters
    _refuse_unknown("section", f"{section}.", settings, [*_OWN_KEYS, *parameters])
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise ParameterError("section", f"{section}.{key}", f"is required for the platform {platform}")


def _refuse_unknown(owner: str, prefix: str, given: Iterable[str], known: list[str]) -> None:
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) or f"; choose from {', '.join(known)}"
            raise ParameterError(owner, f"{prefix}{key}", f"no such key{hint}")
