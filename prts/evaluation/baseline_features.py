"""Inputs of the baselines that do not use the model's features, read from the cache of a prepared tissue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from prts.data.nucleus_set import NucleusSet
from prts.data.on_disk import described_on_disk
from prts.features.morphology import morphology
from prts.features.store import read_features, rows_of
from prts.io.nuclei import load_nuclei

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prts.data.prepare import PreparedTissue


def with_colour(sets: Sequence[NucleusSet], tissue: PreparedTissue) -> list[NucleusSet]:
    """The same nuclei with their 12 color statistics (`prts.features.colour`) as features."""
    return [
        described_on_disk(nuclei, tissue.sections[nuclei.section], "colour")
        or replace(nuclei, features=read_features(tissue.sections[nuclei.section].colour, nuclei.cell_id))
        for nuclei in sets
    ]


def with_context(sets: Sequence[NucleusSet], tissue: PreparedTissue) -> list[NucleusSet]:
    """The same nuclei with their 42 context statistics (`prts.features.context`) as features."""
    return [
        described_on_disk(nuclei, tissue.sections[nuclei.section], "context")
        or replace(nuclei, features=read_features(tissue.sections[nuclei.section].context, nuclei.cell_id))
        for nuclei in sets
    ]


def with_morphology(sets: Sequence[NucleusSet], tissue: PreparedTissue) -> list[NucleusSet]:
    """The same nuclei with shape and crowding of their polygons (`prts.features.morphology`) as features.

    Raises
    ------
    InputError
        If a nucleus has no polygon.
    """
    stored = [described_on_disk(nuclei, tissue.sections[nuclei.section], "morphology") for nuclei in sets]
    if None not in stored:
        return [nuclei for nuclei in stored if nuclei is not None]
    described = {}
    for name in dict.fromkeys(nuclei.section for nuclei in sets):
        prepared = tissue.sections[name]
        polygons = load_nuclei(prepared.nuclei)
        described[name] = pd.Index(polygons["cell_id"]), morphology(polygons, prepared.section.mpp)
    described_sets = []
    for nuclei in sets:
        known, columns = described[nuclei.section]
        where = tissue.sections[nuclei.section].nuclei
        rows = rows_of(known, nuclei.cell_id, f"{where}: has no polygons of", "delete it and prepare again")
        described_sets.append(replace(nuclei, features=columns[rows]))
    return described_sets
