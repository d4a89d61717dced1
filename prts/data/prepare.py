"""Every stage from files to features, for each section of a tissue, skipping what the cache already holds.

Each product is a cache file named by a fingerprint of its inputs and settings. One process builds it under a file lock, others wait and
find it built; a killed build leaves nothing but, for features, the chunks that the next run goes on from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import h5py
import numpy as np
import pandas as pd
import torch

from prts.data.splits import TRAIN, Roles
from prts.data.tissue import SectionSpec, Tissue
from prts.errors import InputError
from prts.features.colour import ColourStats
from prts.features.extract import extract
from prts.io.cache import atomic, file_identity, fingerprint, lock
from prts.io.hdf5 import write_h5ad
from prts.io.nuclei import load_nuclei, write_nuclei
from prts.platforms.bin_positions import read_positions
from prts.preprocess.artefacts import KINDS, find_artefacts, is_artefact, log_artefacts
from prts.preprocess.counts import count_nuclei, quality_control
from prts.preprocess.image_check import require_h_and_e
from prts.preprocess.register import WARN_UM, Registration, corrected, measure_section
from prts.section import Section, open_section, open_section_folder
from prts.segmentation.polygons import Polygons
from prts.segmentation.segment import segment
from prts.stopwatch import Stopwatch

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame

    from prts.data.splits import Splitter
    from prts.features.encoders import Encoder
    from prts.preprocess.panel import Panel
    from prts.segmentation.segment import Segmenter

logger = logging.getLogger(__name__)

# Raised when a stage's code changes what it writes for the same inputs.
STAGE_VERSION = {"section": 2, "nuclei": 1, "counts": 1, "registration": 1, "artefacts": 1, "panel": 1, "features": 1}


class PanelBuilder(Protocol):
    """What chooses the genes: `prts.preprocess.panel.PaperPanel` and its like."""

    def __call__(self, counts: Sequence[AnnData]) -> Panel:
        """Fit on the training sections' counts."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that changes the outcome."""
        ...


@dataclass(frozen=True)
class PreparedSection:
    """A section and its cache files: nuclei (all), counts (nuclei that pass QC x all genes), features and colour of those nuclei.

    `registration` is how the bins lay against the nuclei before any correction.
    """

    section: Section
    nuclei: Path
    counts: Path
    features: Path
    colour: Path
    registration: Registration


@dataclass(frozen=True)
class PreparedTissue:
    """A tissue whose sections are ready to be learnt from."""

    name: str
    species: str
    sections: dict[str, PreparedSection]
    train: list[str]
    val: list[str]
    test: list[str]
    panel: Path


def resolve_section(spec: SectionSpec, tissue: str, cache_dir: Path) -> Section:
    """Open a section of a tissue, simulating it first if that is what its config says.

    Raises
    ------
    InputError
        If a file is missing (naming `prts download` where the tissue can be downloaded) or the section contradicts itself.
    """
    if spec.simulate is not None:
        from prts.simulate.section import simulate_section

        settings = dict(spec.simulate)
        fp = fingerprint({"version": STAGE_VERSION["section"], **settings})
        folder = cache_dir / tissue / spec.name / f"section-{fp}"
        if not folder.is_dir():
            with lock(folder):
                if not folder.is_dir():
                    logger.info("%s/%s: simulating the section", tissue, spec.name)
                    try:
                        simulate_section(folder, name=spec.name, **settings)
                    except TypeError as error:
                        raise InputError(f"tissue.sections.{spec.name}.simulate: {error}") from error
        return open_section_folder(folder, name=spec.name)
    assert spec.image is not None
    missing = [path for path in (spec.image, spec.bins) if path is not None and not path.exists()]
    if missing:
        cure = (
            f"`prts download tissue={tissue}` fetches it"
            if spec.download
            else f"set paths.data_dir (or PRTS_DATA), or tissue.sections.{spec.name}"
        )
        raise InputError(f"{missing[0]}: no such file; {cure}")
    return open_section(spec.name, spec.image, bins=spec.bins, mpp=spec.mpp, nuclei=spec.nuclei, spots=spec.spots)


def prepare_tissue(
    tissue: Tissue,
    *,
    segmenter: Segmenter,
    prefer_given: bool,
    qc: Mapping[str, Any],
    register: bool,
    artefacts: bool,
    splitter: Splitter,
    panel: PanelBuilder,
    encoder: Encoder,
    cache_dir: Path,
    check_image: bool = True,
    stopwatch: Stopwatch | None = None,
) -> PreparedTissue:
    """Nuclei, counts, panel and features for every section that has a role.

    Parameters
    ----------
    tissue
        The sections and their roles.
    segmenter
        Finds nuclei in an image.
    prefer_given
        Take a section's own nuclei file, where it has one, instead of segmenting.
    qc
        Arguments of `prts.preprocess.counts.quality_control`.
    register
        Move the bins to where their UMIs say that the nuclei are. The shift is measured either way.
    artefacts
        Find artefacts among the nuclei, and choose genes and train without them.
    splitter
        Says which nuclei train: the panel sees no others.
    panel
        Chooses the genes.
    encoder
        Reads features from the image.
    cache_dir
        Holds `<tissue>/<section>/...`.
    check_image
        Refuse images that cannot be H&E.
    stopwatch
        Adds up the seconds of each stage.

    Raises
    ------
    InputError
        From any stage, when its input is wrong. Finished stages stay in the cache.
    """
    watch = stopwatch or Stopwatch()
    root = cache_dir / tissue.name
    specs = [tissue.sections[name] for name in tissue.used]
    with watch("simulate" if any(spec.simulate for spec in specs) else "open"):
        sections = {spec.name: resolve_section(spec, tissue.name, cache_dir) for spec in specs}
    # both read what they are told to use: a missing file stops here, before minutes of segmentation
    encoder.settings()
    if not prefer_given:
        segmenter.settings()

    nuclei: dict[str, Path] = {}
    counts: dict[str, Path] = {}
    passing: dict[str, str] = {}
    registration: dict[str, Registration] = {}
    for name, section in sections.items():
        with watch("segment"):
            nuclei[name] = prepare_nuclei(root / name, section, segmenter, prefer_given, check_image=check_image)
        with watch("counts"):
            settings = _passing_settings(section, nuclei[name], qc, tissue.species, register)
            passing[name] = f"counts-{fingerprint(settings)}"
            counts[name] = _counts(
                root / name, section, nuclei[name], qc, tissue.species, register, artefacts, settings
            )
            registration[name] = _registration(counts[name], name, register)
    with watch("panel"):
        panel_path = _panel(root, tissue, sections, counts, splitter, panel)
    features: dict[str, Path] = {}
    colour: dict[str, Path] = {}
    for name, section in sections.items():
        with watch("features"):
            kept = _passing(load_nuclei(nuclei[name]), counts[name])
            features[name] = prepare_features(root / name, section, kept, encoder, passing[name])
        with watch("colour"):
            colour[name] = prepare_features(root / name, section, kept, ColourStats(), passing[name], kind="colour")
    return PreparedTissue(
        name=tissue.name,
        species=tissue.species,
        sections={
            name: PreparedSection(section, nuclei[name], counts[name], features[name], colour[name], registration[name])
            for name, section in sections.items()
        },
        train=list(tissue.train),
        val=list(tissue.val),
        test=list(tissue.test),
        panel=panel_path,
    )


def _build(path: Path, make: Callable[[Path], None], *, what: str) -> Path:
    """Make a cache file unless it is there, one process at a time."""
    if path.exists():
        return path
    with lock(path):
        if not path.exists():
            logger.info("%s", what)
            with _own_threads(), atomic(path) as temporary:
                make(temporary)
    return path


@contextmanager
def _own_threads() -> Iterator[None]:
    """Leave torch as many threads as it has: features and weights depend on them, and shall not depend on what was in the cache.

    numba, by which scanpy chooses genes, sets its own number in the OpenMP that both share.
    """
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def prepare_nuclei(
    folder: Path, section: Section, segmenter: Segmenter | None, prefer_given: bool, *, check_image: bool = True
) -> Path:
    """The cache file with a section's nuclei, made if it is not there.

    Parameters
    ----------
    folder
        Where the section's cache files lie.
    section
        The section.
    segmenter
        Finds nuclei in an image; None where given nuclei are the only source.
    prefer_given
        Take the section's own nuclei file, where it has one.
    check_image
        Refuse an image that cannot be H&E.

    Raises
    ------
    InputError
        If the image is no H&E, no nucleus is found, or the nuclei file does not fit the image.
    """
    used = Polygons(section.nuclei) if segmenter is None or (prefer_given and section.nuclei is not None) else segmenter
    settings = {
        "version": STAGE_VERSION["nuclei"],
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "segmenter": used.settings(),
        **section.reading(),
    }

    def make(path: Path) -> None:
        with section.open_slide() as slide:
            if check_image:
                require_h_and_e(slide)
            write_nuclei(segment(slide, used), path)

    name = used.settings()["name"]
    return _build(folder / f"nuclei-{fingerprint(settings)}.parquet", make, what=f"{section.name}: nuclei by {name}")


def _passing_settings(
    section: Section, nuclei: Path, qc: Mapping[str, Any], species: str, register: bool
) -> dict[str, Any]:
    """All that decides which nuclei pass QC: features depend on that, and on nothing else that stands in the counts."""
    bins = section.bins
    if bins is None:
        raise InputError(f"section {section.name}: has no bins, and training needs them (binned_outputs/square_002um)")
    return {
        "version": STAGE_VERSION["counts"],
        "nuclei": nuclei.stem,
        "matrix": file_identity(bins / "filtered_feature_bc_matrix.h5"),
        "positions": file_identity(bins / "spatial" / "tissue_positions.parquet"),
        "qc": dict(qc),
        "species": species,
        **({"registered": STAGE_VERSION["registration"]} if register else {}),
    }


def _counts(
    folder: Path,
    section: Section,
    nuclei: Path,
    qc: Mapping[str, Any],
    species: str,
    register: bool,
    artefacts: bool,
    settings: Mapping[str, Any],
) -> Path:
    def make(path: Path) -> None:
        assert section.bins is not None
        polygons = load_nuclei(nuclei)
        found = measure_section(section.bins, polygons, section.mpp)
        grid = corrected(read_positions(section.bins), found, section.mpp) if register else None
        measured = count_nuclei(section.bins, polygons, species=species, grid=grid)
        kept = quality_control(measured, mpp=section.mpp, **qc)
        kept.uns["prts"].update(section=section.name, species=species, nuclei=nuclei.name, mpp=section.mpp)
        kept.uns["prts"]["registration"] = {**found.report(), "corrected": register and found.measured}
        if artefacts:
            with section.open_slide() as slide:
                kind = pd.Series(find_artefacts(slide, polygons), index=polygons["cell_id"])
            kept.obs["artefact"] = pd.Categorical(kind.loc[kept.obs_names], categories=list(KINDS))
            kept.uns["prts"]["artefacts"] = log_artefacts(section.name, kept.obs["artefact"])
        write_h5ad(kept, path, compression="gzip")

    settings = {**settings, "registration": STAGE_VERSION["registration"]}
    if artefacts:
        settings["artefacts"] = STAGE_VERSION["artefacts"]
    return _build(folder / f"counts-{fingerprint(settings)}.h5ad", make, what=f"{section.name}: bins to nuclei")


def _registration(counts: Path, name: str, register: bool) -> Registration:
    """What was found when the counts were made, said again in every run that uses them."""
    from anndata.io import read_elem

    with h5py.File(counts) as file:
        stored = read_elem(file["uns/prts/registration"])
    found = Registration(**{field.name: np.asarray(stored[field.name]).item() for field in fields(Registration)})
    if not found.measured or found.displacement_um <= WARN_UM:
        logger.info("%s: %s", name, found.sentence())
    elif register:
        logger.info("%s: %s; corrected", name, found.sentence())
    else:
        logger.warning("%s: %s; preprocess.register=true moves them back", name, found.sentence())
    return found


def _panel(
    root: Path,
    tissue: Tissue,
    sections: Mapping[str, Section],
    counts: Mapping[str, Path],
    splitter: Splitter,
    panel: PanelBuilder,
) -> Path:
    settings = {
        "version": STAGE_VERSION["panel"],
        "counts": {name: path.stem for name, path in counts.items()},
        "roles": [tissue.train, tissue.val, tissue.test],
        "split": splitter.settings(),
        "panel": panel.settings(),
    }

    def make(path: Path) -> None:
        import anndata as ad

        measured = {name: ad.read_h5ad(file) for name, file in counts.items()}
        xy_um = {name: data.obsm["spatial"] * sections[name].mpp for name, data in measured.items()}
        parts = splitter(xy_um, Roles(tissue.train, tissue.val, tissue.test))
        trains = {name: (parts[name] == TRAIN) & ~is_artefact(measured[name].obs) for name in tissue.train}
        panel([measured[name][rows].copy() for name, rows in trains.items()]).to_json(path)

    return _build(root / f"panel-{fingerprint(settings)}.json", make, what="gene panel from the training nuclei")


def prepare_features(
    folder: Path, section: Section, nuclei: GeoDataFrame, encoder: Encoder, source: str, *, kind: str | None = None
) -> Path:
    """The feature store of some nuclei of a section, extracted if it is not there; goes on where a killed run stopped.

    Parameters
    ----------
    folder
        Where the section's cache files lie.
    section
        The section.
    nuclei
        The nuclei.
    encoder
        Reads features from the image.
    source
        The cache file that says which nuclei these are.
    kind
        First part of the file's name; `features-<encoder>` if left out.

    Raises
    ------
    InputError
        If the encoder's weights are not right.
    """
    settings = {
        "version": STAGE_VERSION["features"],
        "nuclei": source,
        "image": file_identity(section.image),
        "mpp": section.mpp,
        "encoder": encoder.settings(),
        **section.reading(),
    }
    # `exact` is left out of the name: stores of before there was a choice keep theirs
    named = {key: value for key, value in encoder.settings().items() if (key, value) != ("sampling", "exact")}
    path = folder / f"{kind or f'features-{encoder.name}'}-{fingerprint({**settings, 'encoder': named})}.h5"
    if not path.exists():
        with lock(path):
            if not path.exists():
                # not through `_build`: extract keeps its own finished chunks, so that a killed run goes on
                with section.open_slide() as slide:
                    extract(slide, nuclei, encoder, path, provenance=settings)
    return path


def prepare_artefacts(folder: Path, section: Section, nuclei: Path) -> pd.Categorical:
    """The kind of artefact of each of a section's nuclei, in their order, from the cache; found if it is not there.

    The slide is looked at in its own colours, as it is in training: the rules compare a nucleus with the others of its slide, so matched
    colours would add nothing, and they bring pen and folds, which are no colours of tissue, nearer to it.

    Parameters
    ----------
    folder
        Where the section's cache files lie.
    section
        The section.
    nuclei
        The cache file with its nuclei.
    """
    own = replace(section, recolour=None)
    settings = {
        "version": STAGE_VERSION["artefacts"],
        "nuclei": nuclei.stem,
        "image": file_identity(own.image),
        "mpp": own.mpp,
        **own.reading(),
    }

    def make(path: Path) -> None:
        polygons = load_nuclei(nuclei)
        with own.open_slide() as slide:
            kinds = find_artefacts(slide, polygons)
        pd.DataFrame({"cell_id": polygons["cell_id"], "artefact": kinds}).to_parquet(path, index=False)

    path = folder / f"artefacts-{fingerprint(settings)}.parquet"
    found = pd.read_parquet(_build(path, make, what=f"{section.name}: artefacts"))
    kinds: pd.Categorical = pd.Categorical(found["artefact"].astype(str).to_numpy(object), categories=list(KINDS))
    return kinds


def _passing(nuclei: GeoDataFrame, counts: Path) -> GeoDataFrame:
    """The nuclei whose counts passed QC, in the order of the counts."""
    from anndata.io import read_elem

    with h5py.File(counts) as file:
        names = read_elem(file["obs"]).index
    return nuclei.set_index("cell_id").loc[names].reset_index(names="cell_id")
