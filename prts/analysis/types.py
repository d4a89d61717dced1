"""Types of nuclei by a classifier that has only seen measured training nuclei: the fair way to ask whether a prediction shows them.

Clusters of a prediction are named after its own markers, so they flatter it: a prediction that blurs two types into one has one
cluster less and no error. A classifier trained on measured nuclei of another section asks the same question of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.errors import InputError
from prts.evaluation.matching import mutual_nearest

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

_SAME_NUCLEUS_UM = 3.0


class TypeClassifier:
    """Multinomial naive Bayes on UMI counts: each type is a profile of shares of genes, and a nucleus gets the likeliest.

    The log-likelihood is linear in the counts, so expected counts (a prediction) get the mean of what counts drawn from them would:
    no step of it depends on depth or on how noisy the counts are, as log-normalisation does. On the simulated sections logistic
    regression and linear discriminants on log-normalised counts name as many nuclei rightly, within one per cent.

    Parameters
    ----------
    counts
        UMI counts of measured training nuclei, (n_nuclei, n_genes).
    types
        Of each nucleus, (n_nuclei,); missing ones are left out.
    """

    def __init__(self, counts: Any, types: pd.Series) -> None:
        from sklearn.naive_bayes import MultinomialNB

        known = types.notna().to_numpy()
        names = types.astype(str).to_numpy()[known]
        if len(set(names)) < 2:
            raise InputError(
                f"train_section: its nuclei are of {len(set(names))} type, which leaves nothing to tell apart; give a section with more"
            )
        self._model = MultinomialNB().fit(sp.csr_matrix(counts)[known], names)

    @property
    def names(self) -> list[str]:
        """Types that it knows, sorted."""
        return [str(name) for name in self._model.classes_]

    def __call__(self, counts: Any) -> NDArray[np.object_]:
        """The likeliest type of each nucleus, (n_nuclei,), of measured or expected counts (n_nuclei, n_genes)."""
        return np.asarray(self._model.predict(sp.csr_matrix(counts)), dtype=object)


def true_rows(xy_px: NDArray[np.float64], truth: ad.AnnData, mpp: float) -> NDArray[np.intp]:
    """Which nucleus of a simulated section each segmented one is.

    Parameters
    ----------
    xy_px
        Centres of the segmented nuclei, (n_nuclei, 2).
    truth
        `truth.h5ad` of the section.
    mpp
        um a pixel.

    Returns
    -------
    (n_nuclei,) row of `truth`; -1 where no true nucleus is the mutually nearest within 3 um.
    """
    found, there = mutual_nearest(xy_px, np.asarray(truth.obsm["spatial"], dtype=float), _SAME_NUCLEUS_UM / mpp)
    rows = np.full(len(xy_px), -1, dtype=np.intp)
    rows[found] = there
    return rows


def true_types(xy_px: NDArray[np.float64], truth: ad.AnnData, mpp: float) -> pd.Series:
    """True type of each segmented nucleus of a simulated section, missing where it is none; parameters as for `true_rows`."""
    rows = true_rows(xy_px, truth, mpp)
    names = truth.obs["cell_type"].astype(str).to_numpy(dtype=object)
    return pd.Series(np.where(rows >= 0, names[rows], None), dtype=object)


def agreement(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> dict[str, float]:
    """How well two partitions of the same nuclei agree, whatever their names.

    Parameters
    ----------
    reference, found
        Labels, (n_nuclei,); a nucleus that either leaves out is not counted.

    Returns
    -------
    `ari`, `nmi` (NaN without a nucleus) and `n`, the nuclei counted.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    a, b = _both(reference, found)
    if not len(a):
        return {"ari": float("nan"), "nmi": float("nan"), "n": 0}
    return {"ari": float(adjusted_rand_score(a, b)), "nmi": float(normalized_mutual_info_score(a, b)), "n": len(a)}


def accuracy(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> dict[str, float]:
    """How well labels of the same names agree.

    Parameters
    ----------
    reference, found
        Labels, (n_nuclei,); a nucleus that either leaves out is not counted.

    Returns
    -------
    `accuracy`, `majority` (what the commonest label alone would score), `macro_f1` over the labels of the reference, `ari`, `nmi`, `n`.
    """
    from sklearn.metrics import accuracy_score, f1_score

    a, b = _both(reference, found)
    nothing = float("nan")
    scores = {"accuracy": nothing, "majority": nothing, "macro_f1": nothing}
    if len(a):
        names = sorted(set(a))
        macro = f1_score(a, b, labels=names, average="macro", zero_division=0)
        common = pd.Series(a).value_counts(normalize=True).iloc[0]
        scores = {"accuracy": float(accuracy_score(a, b)), "majority": float(common), "macro_f1": float(macro)}
    return scores | agreement(reference, found)


def confusion(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> pd.DataFrame:
    """Nuclei by label of the reference (rows) and label found (columns), over the union of both, sorted."""
    a, b = _both(reference, found)
    names = sorted(set(a) | set(b))
    counts = pd.crosstab(pd.Series(a, dtype=object), pd.Series(b, dtype=object))
    return counts.reindex(index=names, columns=names, fill_value=0).rename_axis(index="reference", columns="found")


def _both(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> tuple[Any, Any]:
    a = pd.Series(np.asarray(reference, dtype=object))
    b = pd.Series(np.asarray(found, dtype=object))
    known = (a.notna() & b.notna()).to_numpy()
    return a[known].astype(str).to_numpy(), b[known].astype(str).to_numpy()
