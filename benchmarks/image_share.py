"""How near a run comes to what the image can show.

`python benchmarks/image_share.py run=outputs/demo/make section=cache/demo/test/section-xxxxxxxx`

On a simulated section the truth says what a perfect reader of the image would expect of each nucleus (`image_rate`: its type and domain as
far as they are drawn, not bursts, depth or the neighbours' UMI). Nuclei of the run are matched to true ones by their centres (3 um). The
table gives, over genes with a noise ceiling of at least 0.1, the PCC of the model, of the perfect reader and of the true rates.
"""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from prts.evaluation.expression import pearson_per_gene
from prts.evaluation.matching import match


def main() -> None:
    arguments = dict(text.split("=", 1) for text in sys.argv[1:])
    run, section = Path(arguments["run"]), Path(arguments["section"])
    prediction = ad.read_h5ad(run / "predictions.h5ad")
    truth = ad.read_h5ad(section / "truth.h5ad")
    counts = ad.read_h5ad(next(path for path in section.parent.glob("counts-*.h5ad") if has(path, prediction)))
    mpp = float(prediction.uns["prts"]["mpp"])
    measured = match(prediction, counts, mpp=mpp)
    true = {}
    for name, rates in {"true rates": truth.X, "image": truth.layers["image_rate"]}.items():
        rated = ad.AnnData(rates, obs=truth.obs[[]], var=truth.var, obsm={"spatial": truth.obsm["spatial"]})
        true[name] = match(rated, counts, mpp=mpp)
    # nuclei that are in both: row of the measured section by cell_id
    common = np.intersect1d(measured.cell_id, true["image"].cell_id)
    rows = pd.Index(measured.cell_id).get_indexer(common)
    pcc = {"model": pearson_per_gene(measured.measured[rows], measured.predicted[rows])}
    for name, matched in true.items():
        columns = pd.Index(matched.genes).get_indexer(list(measured.genes))
        rates = matched.predicted[pd.Index(matched.cell_id).get_indexer(common)][:, columns]
        pcc[name] = pearson_per_gene(measured.measured[rows], rates)
    table = pd.DataFrame(pcc, index=list(measured.genes))
    table["ceiling"] = pd.read_csv(run / "per_gene.csv").set_index("gene")["ceiling"].reindex(table.index).fillna(0)
    known = table[table["ceiling"] >= 0.1]
    print(f"{len(common)} nuclei, {len(known)} genes with a ceiling of 0.1 or more")
    print("| | mean PCC | share of what the image shows | share of the ceiling |\n|---|---|---|---|")
    for name in ("model", "image", "true rates", "ceiling"):
        total = known[name].sum()
        shares = (total / known[other].sum() for other in ("image", "ceiling"))
        print(f"| {name} | {known[name].mean():.3f} | {' | '.join(f'{share:.3f}' for share in shares)} |")


def has(path: Path, prediction: ad.AnnData) -> bool:
    """Whether these are counts of the nuclei that were predicted."""
    return bool(np.isin(prediction.obs_names, ad.read_h5ad(path, backed="r").obs_names).all())


if __name__ == "__main__":
    main()
