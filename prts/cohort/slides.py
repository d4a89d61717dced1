"""The slides of a cohort: a folder, a CSV with a row per slide, or a table in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from prts.api.predict import SlideSettings
from prts.arguments import check_settings, parameters
from prts.errors import InputError, ParameterError, did_you_mean, some_of
from prts.preprocess.stains.base import require_method
from prts.section_folder import IMAGE_SUFFIXES
from prts.segmentation import segmenters

if TYPE_CHECKING:
    import pandas as pd

    from prts.api.nuclei_source import NucleiSource

SlideSource: TypeAlias = "Path | str | Sequence[Path | str] | pd.DataFrame"

_SETTINGS = tuple(parameters(SlideSettings)[0])
COLUMNS = ("image", "out", "nuclei", "segmentation", *_SETTINGS)
_TEXT = ("image", "out", "nuclei", "segmentation", "stain", "flip", "roi")
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class CohortSlide:
    """One slide of a cohort.

    Attributes
    ----------
    name
        Its output without `.h5ad`, relative to the cohort folder: `slide1`, or `batch2/slide1`.
    image
        The full-resolution H&E image.
    nuclei
        Its own file of polygons, or segmenter; None: as for all slides.
    settings
        Fields of `prts.api.predict.SlideSettings` that differ from those for all slides.
    """

    name: str
    image: Path
    nuclei: NucleiSource = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_slides(
    source: SlideSource, *, patterns: Sequence[str] | None = None, leave_out: Path | None = None
) -> list[CohortSlide]:
    """List the slides of a cohort. Images are not opened, so that a bad one does not stop the others.

    Parameters
    ----------
    source
        A folder, which is searched for images; a CSV, or a table, with the columns `COLUMNS`, of which only `image` is required and empty
        cells mean "as for all slides"; or paths of images. Relative paths in a CSV start at its folder.
    patterns
        Which files of a folder are slides, such as `*.svs`, or `**/*.svs` with its subfolders; None: all images directly in it.
    leave_out
        A folder that is not searched: that of the results.

    Raises
    ------
    InputError
        If there is no slide, a column or a value is wrong, or two slides would write the same file.
    """
    if not isinstance(source, str | Path):
        table: Any = source
        return _of_table("slides", table) if hasattr(source, "columns") else _of_images("slides", table)
    path = Path(source)
    if path.is_dir():
        return _of_images(str(path), _search(path, patterns, leave_out), path)
    if not path.is_file():
        raise InputError(f"{path}: no such folder or file; give a folder of slides, or a CSV with a column `image`")
    if patterns is not None:
        raise ParameterError("", "patterns", f"applies to a folder, and {path} is a file; omit it")
    return _of_table(str(path), _read_csv(path), path.parent)


def _search(folder: Path, patterns: Sequence[str] | None, leave_out: Path | None) -> list[Path]:
    results = None if leave_out is None or leave_out.resolve() == folder.resolve() else leave_out.resolve()
    files = folder.glob("*") if patterns is None else (path for each in patterns for path in folder.glob(each))
    found = {
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (results is None or results not in path.resolve().parents)
    }
    if found:
        return sorted(found)
    if patterns is not None:
        raise InputError(f"{folder}: no image matches {', '.join(patterns)}; give other patterns")
    deeper = sorted({path.suffix for path in folder.glob("*/**/*") if path.suffix.lower() in IMAGE_SUFFIXES})
    hint = f"patterns=[**/*{deeper[0]}] searches its subfolders, too" if deeper else "give the folder of the slides"
    raise InputError(f"{folder}: contains no image (*{', *'.join(IMAGE_SUFFIXES[:3])}, ...); {hint}")


def _of_images(where: str, images: Iterable[Path | str], root: Path | None = None) -> list[CohortSlide]:
    """Slides with the settings of all, named like their images."""
    found = []
    for image in map(Path, images):
        folder = image.parent.relative_to(root) if root is not None else Path()
        found.append(CohortSlide((folder / image.stem).as_posix(), image))
    return _checked(where, found, [str(slide.image) for slide in found])


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.lstrip().partition("\n")[0]
        delimiter = max(_DELIMITERS, key=header.count)
        names = [name.strip() for name in header.split(delimiter)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path}: has the column {twice[0]!r} twice; leave one of them out")
        return pd.read_csv(
            io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, skipinitialspace=True, index_col=False
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a text file; give a folder of slides, or a CSV (UTF-8) with a column `image`"
        ) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise InputError(f"{path}: not a table ({error}); give a CSV with a column `image`") from error


def _of_table(where: str, table: pd.DataFrame, root: Path | None = None) -> list[CohortSlide]:
    columns = [str(name).strip() for name in table.columns]
    for name in columns:
        if name not in COLUMNS:
            raise InputError(
                f"{where}: has an unknown column {name!r}{did_you_mean(name, COLUMNS)}; the columns are {', '.join(COLUMNS)}"
            )
    if "image" not in columns:
        raise InputError(f"{where}: has no column `image`; its first line names the columns, such as image,mpp,stain")
    found, places = [], []
    for number, row in enumerate(table.itertuples(index=False, name=None), 2 if root is not None else 0):
        cells = {key: value for key, value in zip(columns, row, strict=True) if not _is_empty(value)}
        if not cells:
            continue
        place = f"line {number}" if root is not None else f"row {number}"
        try:
            found.append(_slide(cells, root or Path()))
        except ParameterError as error:
            raise InputError(f"{where} {place}: {error.name or error.owner}: {error.problem}") from error
        places.append(place)
    return _checked(where, found, places)


def _is_empty(value: Any) -> bool:
    import pandas as pd

    if isinstance(value, str):
        return not value.strip()
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def _slide(cells: dict[str, Any], root: Path) -> CohortSlide:
    """A slide from the cells of its row that are not empty."""
    values = {key: _value(key, value) for key, value in cells.items()}
    if "image" not in values:
        raise ParameterError("", "image", "is empty; give the path of the slide")
    image = root / str(values.pop("image"))
    name = _name(str(values.pop("out", f"{image.stem}.h5ad")))
    nuclei: NucleiSource = values.pop("nuclei", None)
    segmentation = values.pop("segmentation", None)
    if segmentation is not None:
        if nuclei is not None:
            raise ParameterError("", "nuclei", "and segmentation are mutually exclusive; leave one of them empty")
        nuclei = segmenters.build({"name": segmentation})
    elif isinstance(nuclei, str):
        nuclei = root / nuclei
    roi = values.get("roi")
    if isinstance(roi, str) and not roi.startswith("["):
        values["roi"] = root / roi
    settings = check_settings(SlideSettings, values, "")
    require_method(settings.get("stain", "none"))
    return CohortSlide(name, image, nuclei, settings)


def _value(key: str, cell: Any) -> Any:
    """A cell as a plain value: in a CSV, numbers and true or false are written as in YAML."""
    if not isinstance(cell, str):
        return cell
    cell = cell.strip()
    if key in _TEXT:
        return cell
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError:
        return cell


def _name(out: str) -> str:
    path = PurePosixPath(out.replace("\\", "/"))
    if path.suffix != ".h5ad":
        raise ParameterError("", "out", f"{out} does not end in .h5ad; a prediction is an AnnData file")
    if path.is_absolute() or ".." in path.parts or fnmatch(out, "?:*"):
        raise ParameterError("", "out", f"{out} is not inside the cohort folder; give a name such as slide1.h5ad")
    return path.with_suffix("").as_posix()


def _checked(where: str, slides: list[CohortSlide], places: Sequence[str]) -> list[CohortSlide]:
    """Refuse an empty list, and two slides with the same output."""
    if not slides:
        raise InputError(f"{where}: lists no slides; give at least one")
    by_name: dict[str, list[str]] = {}
    for slide, place in zip(slides, places, strict=True):
        by_name.setdefault(slide.name, []).append(place)
    for name, same in by_name.items():
        if len(same) > 1:
            raise InputError(
                f"{where}: {some_of(same)} would all write {name}.h5ad; list them in a CSV and name each in its column `out`"
            )
    return slides
