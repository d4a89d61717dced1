"""`prts.Model`: train it on sections, save it, load it, and predict slides."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from prts.api.plan import (
    FEATURES,
    NETWORK,
    FitSettings,
    assign_roles,
    check_features,
    common_species,
    make_plan,
    make_recipe,
    split_settings,
)
from prts.api.polygons import attach_nuclei, nuclei_of
from prts.api.predict import EncoderRuntime, SlideSettings, build_encoder, predict_slide
from prts.arguments import check_settings
from prts.errors import InputError
from prts.extras import require_extra
from prts.io.cache import atomic, default_cache
from prts.models.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from prts.api.evaluate import Scores
    from prts.api.nuclei_source import NucleiSource
    from prts.cohort.slides import SlideSource
    from prts.data.prepare import PanelBuilder
    from prts.data.splits import Splitter
    from prts.features.encoders import Encoder
    from prts.models.likelihoods import Likelihood
    from prts.section import Section
    from prts.segmentation.segment import Segmenter


class Model:
    """Predicts the expression of every nucleus from an H&E image.

    `Model.load` opens a trained model; `Model(...)` describes one that `train` fits.

    Parameters
    ----------
    encoder
        Turns the image around a nucleus into features: a name (`"classical"` needs no weights) or an encoder, such as
        `prts.encoders.vit256("vit256_small_dino.pth")`.
    likelihood
        Model of the counts: a name (`"poisson"`, `"hurdle"`, `"paper"`, `"released"`) or a likelihood.
    network
        Arguments of `prts.models.network.PRTSNet` that differ from the defaults: `hidden`, `order`, `dropout`, `heads`, `standardize`,
        `rank`.
    features
        Blocks of features in the order of the network's input: `local` (the nucleus), `global` (its 128 um surroundings) and
        `morphology` (shape and crowding of the polygons) are the default; `context` is color around the nucleus at seven scales. Without
        `local` and `global`, no encoder is run.

    Raises
    ------
    InputError
        If there is no such encoder or likelihood, or a setting is wrong.

    Examples
    --------
    >>> import prts
    >>> print(prts.Model("classical", likelihood="poisson"))
    untrained prts model: encoder classical, poisson likelihood, features local + global + morphology
    """

    def __init__(
        self,
        encoder: Encoder | str,
        likelihood: Likelihood | str = "poisson",
        network: Mapping[str, Any] | None = None,
        *,
        features: Sequence[str] = FEATURES,
    ) -> None:
        from prts.features.encoders import encoders
        from prts.models.likelihoods import likelihoods

        self._encoder: Encoder | None = encoders.build({"name": encoder}) if isinstance(encoder, str) else encoder
        self.likelihood = likelihoods.build({"name": likelihood}) if isinstance(likelihood, str) else likelihood
        self.network = {**NETWORK, **(network or {})}
        self.features = check_features(features)
        make_recipe(self.likelihood, self.network, FitSettings())  # refuses settings that do not fit together
        self.history: pd.DataFrame | None = None
        self.metrics: dict[str, Any] = {}
        self._bundle: Bundle | None = None
        self.runtime = EncoderRuntime()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def load(cls, path: Path | str, *, encoder_weights: Path | str | None = None, device: str = "auto") -> Self:
        """Open a trained model.

        Parameters
        ----------
        path
            The folder `model` of a training run, or one written by `save`; or a model on the Hugging Face hub, as
            `hf://owner/name` or `hf://owner/name@revision`.
        encoder_weights
            The encoder's weights file, if it is not where training read it. They are read when the first slide is predicted.
        device
            `auto` (a GPU if there is one), or a torch device.

        Raises
        ------
        InputError
            If the folder is not a model, is damaged, or was written by a newer prts, or the model cannot be downloaded.

        Examples
        --------
        >>> import prts
        >>> model = prts.Model.load(demo_model)
        >>> model.per_gene.columns.tolist()
        ['gene_id', 'val_pcc', 'ceiling', 'predictable']
        """
        bundle = load_bundle(path)
        model = cls.__new__(cls)
        model._encoder, model.likelihood = None, bundle.likelihood
        model.network = {key: value for key, value in bundle.metadata["architecture"].items() if key != "name"}
        model.features, model.history, model.metrics = bundle.input_use, None, {}
        model._bundle, model._folder = bundle, None
        model.runtime = EncoderRuntime(weights=encoder_weights, device=device)
        return model

    @property
    def encoder(self) -> Encoder:
        """The encoder, which turns the image around a nucleus into features."""
        if self._encoder is None:
            self._encoder = build_encoder(self.bundle, self.runtime)
        return self._encoder

    @property
    def bundle(self) -> Bundle:
        """The trained network with its metadata.

        Raises
        ------
        InputError
            If the model is not trained.
        """
        if self._bundle is None:
            raise InputError("model: is not trained; call train(), or open a trained one with prts.Model.load(path)")
        return self._bundle

    @property
    def genes(self) -> list[str]:
        """Names of the genes that the model predicts."""
        return self.bundle.genes

    @property
    def per_gene(self) -> pd.DataFrame:
        """Validation scores of each gene: `gene_id, val_pcc, ceiling, predictable`, indexed by gene."""
        return self.bundle.per_gene()

    def train(
        self,
        sections: Sequence[Section],
        validation: Sequence[Section] = (),
        *,
        test: Sequence[Section] = (),
        split: Splitter | str | None = None,
        species: str | None = None,
        nuclei: Segmenter | str | None = None,
        genes: int | Sequence[str] | Path | str | PanelBuilder = 1000,
        out: Path | str | None = None,
        cache_dir: Path | str | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Fit the model on sections with measured counts, and score it on held-out nuclei.

        Nuclei, counts, genes and features are prepared first and kept in the cache. Gene panel, scaling, output rule and thresholds come
        from training and validation nuclei only.

        Parameters
        ----------
        sections
            Training sections, from `prts.read_visium_hd`.
        validation
            Validation sections, used for early stopping; if there are none, spatial blocks of `sections` are held out, with a guard band.
        test
            Test sections, whose scores are in `metrics`; never used to choose anything.
        split
            `"by_section"`, `"blocks"` or a splitter; None: by section if there is a validation section, else blocks.
        species
            `"human"`, `"mouse"` or another, for the mitochondrial share; None: inferred from the gene names.
        nuclei
            A segmenter or its name, `"bins"` for square bins; None: bins if the sections were read with `units="bins"`, else a section's
            own nuclei if it has some, else StarDist.
        genes
            Number of most variable genes to predict, a list of genes, a file with such a list, or a panel builder.
        out
            Run folder to write as `prts train` does: model, metrics, predictions, figures, report. None: nothing is written.
        cache_dir
            Folder of the cache; None: `$PRTS_CACHE`, else `cache`.
        settings
            Fields of `prts.api.plan.FitSettings` (`max_epochs`, `learning_rate`, `batch_size`, `scale`, `seed`, `trainer`, ...) and of
            `prts.api.plan.SectionSettings` (`qc`, `register`, `artefacts`,
            `counting`, `exposure`, `check_image`, `augment`).

        Returns
        -------
        One row per epoch, also in `history`: `epoch`, `train/loss`, `val/loss`, `val/pcc`, ...

        Raises
        ------
        InputError
            If a section or a setting is wrong.

        Examples
        --------
        >>> import prts
        >>> section, other = prts.read_visium_hd(demo_section), prts.read_visium_hd(other_section)
        >>> model = prts.Model("classical")
        >>> history = model.train([section], validation=[other], nuclei="watershed", genes=60, max_epochs=2)
        >>> history["epoch"].tolist()
        [0, 1]
        """
        require_extra("train", "Model.train")
        from prts.api.train import train_run

        fitting, preparation = split_settings({**settings, "nuclei": nuclei, "genes": genes})
        by_name, roles, splitter = assign_roles(sections, validation, test, split)
        plan = make_plan(
            by_name,
            roles,
            splitter,
            species or common_species(by_name.values()),
            encoder=self.encoder,
            features=self.features,
            recipe=make_recipe(self.likelihood, self.network, fitting),
            preparation=preparation,
            settings=fitting,
            cache_dir=default_cache(cache_dir),
        )
        folder = tempfile.TemporaryDirectory(prefix="prts-") if out is None else None
        place = Path(folder.name if folder is not None else str(out))
        run = train_run(plan, place, cache_dir=plan.preparation.cache_dir, report=out is not None)
        self.history, self.metrics = run.history, run.metrics
        self._bundle, self._folder = run.bundle, folder
        return run.history

    def predict(
        self,
        image: Path | str | Section,
        *,
        nuclei: NucleiSource = None,
        mpp: float | None = None,
        out: Path | str | None = None,
        roi: Path | str | Sequence[Any] | None = None,
        stain: str = "none",
        rotate: Literal[0, 90, 180, 270] = 0,
        flip: Literal["none", "horizontal", "vertical"] = "none",
        intervals: bool | None = None,
        artefacts: bool = True,
        check_image: bool = True,
        check_scale: bool = True,
        max_pixels: int | None = None,
        tta: Literal[1, 4, 8] = 1,
        strict: bool = False,
        cache_dir: Path | str | None = None,
    ) -> AnnData:
        """Predict every nucleus of an H&E image.

        Parameters
        ----------
        image
            The full-resolution H&E image (TIFF, BigTIFF, OME-TIFF, SVS, NDPI, MRXS, PNG, JPEG), or an open section.
        nuclei
            The name of a segmenter (`"stardist"`, `"watershed"`), a file of polygons, a GeoDataFrame of polygons in full-resolution
            pixels, or a segmenter; None: the segmenter that training used. `"bins"`, and None for a model that was trained on bins, tiles
            the tissue with squares; a section that was read with `units="bins"` has its own.
        mpp
            um per pixel of the image, if its metadata lack it. It is never guessed.
        out
            Write the prediction to this `.h5ad` file chunk by chunk, in bounded memory, and the polygons to `<out>.nuclei.parquet`.
        roi, stain, rotate, flip, intervals, artefacts, check_image, check_scale, max_pixels, tta, strict
            See `prts.api.predict.SlideSettings`.
        cache_dir
            Folder of the cache, where nuclei and features are kept; None: `$PRTS_CACHE`, else `cache`.

        Returns
        -------
        Nuclei x genes: `X` expected UMI (CSR float32), `layers["prob"]` P(expressed), `layers["lower"]` and `layers["upper"]` the 90%
        interval of counts, `obs["ood"]` and `obs["artefact"]`, `var["predictable"]`, `obsm["spatial"]` in full-resolution pixels. With
        `out` it is backed by that file; without, it is in memory and carries the polygons in `uns["nuclei"]`.

        Raises
        ------
        InputError
            If the image, the nuclei or a setting is wrong.

        Examples
        --------
        >>> import prts
        >>> model = prts.Model.load(demo_model)
        >>> adata = model.predict(demo_slide, nuclei="watershed", roi=[0, 0, 600, 600])
        >>> adata.X.dtype, adata.uns["prts"]["scale"]
        (dtype('float32'), 'umi')
        """
        import anndata as ad

        settings = SlideSettings(
            mpp, stain, rotate, flip, roi, intervals, artefacts, check_image, check_scale, max_pixels, tta, strict
        )
        cache = default_cache(cache_dir)

        def write(file: Path) -> None:
            predict_slide(
                self.bundle, image, file, nuclei=nuclei, settings=settings, encoder=self.runtime, cache_dir=cache
            )

        if out is not None:
            write(Path(out))
            return ad.read_h5ad(out, backed="r")
        self.bundle  # noqa: B018  (refuse an untrained model before a folder is made)
        with tempfile.TemporaryDirectory(prefix="prts-") as folder:
            file = Path(folder) / "prediction.h5ad"
            write(file)
            adata = ad.read_h5ad(file)
            attach_nuclei(adata, nuclei_of(adata, file))
        return adata

    def predict_many(
        self,
        slides: SlideSource,
        out: Path | str,
        *,
        nuclei: NucleiSource = None,
        patterns: Sequence[str] | None = None,
        page: bool = True,
        cache_dir: Path | str | None = None,
        **settings: Any,
    ) -> pd.DataFrame:
        """Predict many slides into one folder, which other processes and machines may share; finished slides are skipped.

        Parameters
        ----------
        slides
            A folder, a CSV or a table with a row per slide (columns: `prts.cohort.slides.COLUMNS`), or paths of images.
        out
            Folder for `<slide>.h5ad`, `<slide>.nuclei.parquet`, `<slide>.html`, `<slide>.state.json`, `summary.csv` and `summary.html`.
        nuclei
            A segmenter or its name; None: the segmenter that training used. A table may name a file of polygons for each slide.
        patterns
            Which files of a folder are slides, such as `["**/*.svs"]`; None: all images directly in it.
        page
            Write an interactive page for each slide.
        cache_dir
            Folder of the cache; None: `$PRTS_CACHE`, else `cache`.
        settings
            Fields of `prts.api.predict.SlideSettings`; a table may have others for single slides.

        Returns
        -------
        One row per slide, also of those that failed (`prts.cohort.summary.summarise`).

        Raises
        ------
        InputError
            If the list of slides or a setting is wrong, or the folder cannot be written. Errors of a slide are in its row.

        Examples
        --------
        >>> import prts
        >>> model = prts.Model.load(demo_model)
        >>> model.predict_many([demo_slide], "out", nuclei="watershed", page=False)["status"].tolist()
        ['done']
        """
        from prts.cohort.cohort import open_cohort
        from prts.cohort.worker import predict_cohort

        given = SlideSettings(**check_settings(SlideSettings, settings, ""))
        cohort = open_cohort(slides, out, self.bundle, patterns=patterns, nuclei=nuclei, settings=given, page=page)
        return predict_cohort(cohort, self.runtime, cache_dir)

    def evaluate(self, adata: AnnData, section: Section | Path | str, **settings: Any) -> Scores:
        """Score a prediction of this model against measured counts, next to the baselines that were fitted with it.

        Parameters
        ----------
        adata
            Result of `predict`.
        section
            The predicted section, with its measured counts.
        settings
            See `prts.evaluate`.
        """
        from prts.api.evaluate import evaluate

        return evaluate(adata, section, model=self, **settings)

    def save(self, path: Path | str) -> None:
        """Write the model as a folder: `model.safetensors` and `model.json`, without pickle or code.

        Parameters
        ----------
        path
            The folder; an older model there is replaced.

        Raises
        ------
        InputError
            If the model is not trained, the folder holds something else, or it cannot be written.
        """
        path, source = Path(path), self.bundle.folder
        if path.is_dir() and any(path.iterdir()) and not (path / "model.json").is_file():
            raise InputError(f"{path}: holds other files; name a new folder")
        if path.resolve() == source.resolve():
            return
        with atomic(path) as temporary:
            shutil.copytree(source, temporary)

    def __str__(self) -> str:
        if self._bundle is None:
            return (
                f"untrained prts model: encoder {self.encoder.name}, {self.likelihood.name} likelihood, "
                f"features {' + '.join(self.features)}"
            )
        return describe(self._bundle)

    __repr__ = __str__


def describe(bundle: Bundle) -> str:
    """Summarize a trained model in a few lines: what it is, what it was trained on, and how good it is.

    Parameters
    ----------
    bundle
        The model.
    """
    about = bundle.metadata
    pcc, ceiling = np.nanmean(bundle.val_pcc), np.nanmean(bundle.ceiling)
    lines = [
        f"prts model of {about['species']} {about['tissue']}: {len(bundle.genes):,} genes, encoder {about['encoder']['name']}, "
        f"{bundle.likelihood.name} likelihood",
        f"trained on {', '.join(about['train_sections'])} (seed {about['seed']})",
    ]
    if np.isfinite(pcc):
        lines.append(f"validation: mean PCC {pcc:.3f}, noise ceiling {ceiling:.3f}")
    if bundle.predictable is not None:
        lines.append(f"{int(bundle.predictable.sum()):,} genes are predictable on validation (see .per_gene)")
    return "\n".join(lines)
