"""Cell types from a classifier trained on measured nuclei, and scores for how well labels agree.

Clusters named after their own markers flatter a prediction: if it blurs two types into one, there is one cluster fewer and no error. A
classifier trained on the measured nuclei of another section treats predicted and measured nuclei alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from prts.errors import ParameterError
from prts.evaluation.matching import mutual_nearest

if TYPE_CHECKING:
    import anndata as ad
    from numpy.typing import NDArray

_SAME_NUCLEUS_UM = 3.0


class TypeClassifier:
    """Multinomial naive Bayes on UMI counts.

    The log-likelihood is linear in the counts, so the score of expected counts (a prediction) is the mean score of counts drawn from them.
    Unlike log-normalization, it does not depend on sequencing depth or on how noisy the counts are. On the simulated sections, logistic
    regression and linear discriminants on log-normalized counts reach the same accuracy to within one percentage point.

    Parameters
    ----------
    counts
        UMI counts of measured training nuclei, (n_nuclei, n_genes).
    types
        Type of each nucleus, (n_nuclei,); nuclei without one are ignored.
    """

    def __init__(self, counts: Any, types: pd.Series) -> None:
        from sklearn.naive_bayes import MultinomialNB

        known = types.notna().to_numpy()
        names = types.astype(str).to_numpy()[known]
        if len(set(names)) < 2:
            raise ParameterError(
                "",
                "train_section",
                f"has {len(set(names))} cell type{'' if len(set(names)) == 1 else 's'}; a classifier needs at least two, choose another "
                "section",
            )
        self._model = MultinomialNB().fit(sp.csr_matrix(counts)[known], names)

    @property
    def names(self) -> list[str]:
        """The types it was trained on, sorted."""
        return [str(name) for name in self._model.classes_]

    def __call__(self, counts: Any) -> NDArray[np.object_]:
        """Most likely type of each nucleus, (n_nuclei,), from measured or expected counts (n_nuclei, n_genes)."""
        return np.asarray(self._model.predict(sp.csr_matrix(counts)), dtype=object)


def true_rows(xy_px: NDArray[np.float64], truth: ad.AnnData, mpp: float) -> NDArray[np.intp]:
    """Match segmented nuclei to the true nuclei of a simulated section.

    Parameters
    ----------
    xy_px
        Centers of the segmented nuclei, (n_nuclei, 2).
    truth
        `truth.h5ad` of the section.
    mpp
        um per pixel.

    Returns
    -------
    Row of `truth` for each nucleus, (n_nuclei,); -1 if there is no mutual nearest neighbor within 3 um.
    """
    found, there = mutual_nearest(xy_px, np.asarray(truth.obsm["spatial"], dtype=float), _SAME_NUCLEUS_UM / mpp)
    rows = np.full(len(xy_px), -1, dtype=np.intp)
    rows[found] = there
    return rows


def true_types(xy_px: NDArray[np.float64], truth: ad.AnnData, mpp: float) -> pd.Series:
    """True type of each segmented nucleus of a simulated section, missing if unmatched; parameters as for `true_rows`."""
    rows = true_rows(xy_px, truth, mpp)
    names = truth.obs["cell_type"].astype(str).to_numpy(dtype=object)
    return pd.Series(np.where(rows >= 0, names[rows], None), dtype=object)


def agreement(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> dict[str, float]:
    """Agreement of two partitions of the same nuclei, regardless of label names.

    Parameters
    ----------
    reference, found
        Labels, (n_nuclei,); nuclei with a missing label are ignored.

    Returns
    -------
    `ari`, `nmi` (NaN if no nuclei are left) and `n`, the number of nuclei.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    a, b = _both(reference, found)
    if not len(a):
        return {"ari": float("nan"), "nmi": float("nan"), "n": 0}
    return {"ari": float(adjusted_rand_score(a, b)), "nmi": float(normalized_mutual_info_score(a, b)), "n": len(a)}


def accuracy(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> dict[str, float]:
    """Agreement of two sets of labels with the same names.

    Parameters
    ----------
    reference, found
        Labels, (n_nuclei,); nuclei with a missing label are ignored.

    Returns
    -------
    `accuracy`, `majority` (accuracy of always choosing the most common label), `macro_f1` over the labels of the reference, `ari`, `nmi`,
    `n`.
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
    """Number of nuclei by reference label (rows) and found label (columns), over the sorted union of labels."""
    a, b = _both(reference, found)
    names = sorted(set(a) | set(b))
    counts = pd.crosstab(pd.Series(a, dtype=object), pd.Series(b, dtype=object))
    return counts.reindex(index=names, columns=names, fill_value=0).rename_axis(index="reference", columns="found")


def _both(reference: Sequence[Any] | pd.Series, found: Sequence[Any] | pd.Series) -> tuple[Any, Any]:
    a = pd.Series(np.asarray(reference, dtype=object))
    b = pd.Series(np.asarray(found, dtype=object))
    known = (a.notna() & b.notna()).to_numpy()
    return a[known].astype(str).to_numpy(), b[known].astype(str).to_numpy()
