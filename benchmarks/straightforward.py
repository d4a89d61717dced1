"""Each stage as one would write it first: what the speed-ups are measured against.

Own code, after what the 10x guide "Nuclei Segmentation and Custom Binning" and the released code of the paper do. Library calls do the
work wherever these have them; nothing is slowed down on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from shapely.geometry import Point


def count(
    positions: pd.DataFrame, barcodes: pd.Index, matrix: sparse.csr_matrix, nuclei: gpd.GeoDataFrame
) -> tuple[list[str], sparse.csr_matrix]:
    """Counts of nuclei: a point for every bin, a spatial join, then one row of a LIL matrix after the other (the guide's steps).

    Parameters
    ----------
    positions
        `x` and `y` of all bins of the array by barcode.
    barcodes
        Of the matrix's rows.
    matrix
        Bins x genes.
    nuclei
        With `cell_id` and polygons.

    Returns
    -------
    The nuclei that hold a bin, and their counts.
    """
    points = gpd.GeoDataFrame(
        {"barcode": positions.index}, geometry=[Point(xy) for xy in zip(positions["x"], positions["y"], strict=True)]
    )
    joined = gpd.sjoin(points, nuclei[["cell_id", "geometry"]], how="left", predicate="within")
    inside = joined[joined["cell_id"].notna()]
    inside = inside[~inside["barcode"].duplicated(keep=False)].set_index("barcode")  # a bin in two belongs to neither
    kept = barcodes.isin(inside.index)
    counts = matrix[kept]
    groups = inside.loc[barcodes[kept]].groupby("cell_id", observed=True).indices
    summed = sparse.lil_matrix((len(groups), matrix.shape[1]))
    for row, members in enumerate(groups.values()):
        summed[row] = counts[members].sum(axis=0)
    return list(groups), summed.tocsr()


def extract(
    slide: np.ndarray, mpp: float, nuclei: gpd.GeoDataFrame, network: torch.nn.Module, encoder: Any, folder: Path
) -> np.ndarray:
    """Features of nuclei: a TIFF for each, written, rotated and read again, then the network in fp32.

    Parameters
    ----------
    slide
        All of its pixels.
    mpp
        Its um/px.
    nuclei
        The nuclei.
    network
        The fp32 vision transformer.
    encoder
        Its normalisation (`mean`, `std`) and um/px.
    folder
        Where the tiles go.

    Returns
    -------
    (n, 576) class token, and the mean of the four central tokens with adjacent channels averaged.
    """
    from PIL import Image

    half = round(128 * encoder.mpp / mpp)
    padded = np.pad(slide, ((half, half), (half, half), (0, 0)), constant_values=255)
    centroid = nuclei.geometry.centroid
    for k, (x, y) in enumerate(zip(centroid.x, centroid.y, strict=True)):
        crop = padded[round(y) : round(y) + 2 * half, round(x) : round(x) + 2 * half]
        tile = Image.fromarray(crop).resize((256, 256), Image.Resampling.BICUBIC)
        tile.rotate(90).save(folder / f"{k}.tif")
    loader = torch.utils.data.DataLoader(_Tiles(folder, len(nuclei), encoder.mean, encoder.std), batch_size=16)
    rows = []
    with torch.inference_mode():
        for tiles in loader:
            tokens = network.forward_features(tiles)
            grid = tokens[:, 1:].reshape(len(tiles), 16, 16, -1)
            local = grid[:, 7:9, 7:9].mean(dim=(1, 2)).reshape(len(tiles), -1, 2).mean(dim=2)
            rows.append(torch.cat([tokens[:, 0], local], dim=1).numpy())
    return np.concatenate(rows)


class _Tiles(torch.utils.data.Dataset):
    def __init__(self, folder: Path, n: int, mean: Any, std: Any) -> None:
        self.folder, self.n = folder, n
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int) -> torch.Tensor:
        from PIL import Image

        tile = np.asarray(Image.open(self.folder / f"{k}.tif").rotate(-90))
        return (torch.from_numpy(tile.copy()).permute(2, 0, 1).float() / 255 - self.mean) / self.std


class Samples(torch.utils.data.Dataset):
    """Nuclei one by one from dense arrays, scaled as they are asked for."""

    def __init__(self, features: np.ndarray, counts: np.ndarray) -> None:
        self.features, self.counts = features, counts.astype(np.float32)
        filled = np.where(self.counts > 0, self.counts, np.float32(np.nan))
        with np.errstate(all="ignore"):
            self.low = np.nan_to_num(np.nanmin(filled, axis=0)).astype(np.float32)
            spread = np.nan_to_num(np.nanmax(filled, axis=0)).astype(np.float32) - self.low
        self.spread = np.where(spread > 0, spread, 1).astype(np.float32)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        counts = torch.tensor(self.counts[k])
        target = ((counts - torch.tensor(self.low)) / torch.tensor(self.spread)).clamp(min=0)
        return {"x": torch.tensor(self.features[k]), "target": target, "counts": counts}


def train_batches(
    net: torch.nn.Module, likelihood: Any, optimizer: torch.optim.Optimizer, loader: Any, n_batches: int
) -> float:
    """A plain loop over at most this many batches; the mean loss."""
    net.train()
    losses = []
    for k, batch in enumerate(loader):
        if k == n_batches:
            break
        optimizer.zero_grad()
        level, logit = net(batch["x"])
        parts = likelihood.loss((level, logit), batch["counts"])
        parts["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in parts.items()})
    return float(np.mean([parts["loss"] for parts in losses]))


def outputs(net: torch.nn.Module, loader: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Level, P(expressed) and target of all validation nuclei, each dense."""
    net.eval()
    levels, chances, targets = [], [], []
    with torch.no_grad():
        for batch in loader:
            level, logit = net(batch["x"])
            levels.append(level.numpy())
            chances.append(logit.sigmoid().numpy())
            targets.append(batch["target"].numpy())
    return np.concatenate(levels), np.concatenate(chances), np.concatenate(targets)


def metrics(level: np.ndarray, chance: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Metrics of an epoch as numpy and scikit-learn have them, gene by gene."""
    from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

    label = target > 0
    both = [g for g in range(label.shape[1]) if 0 < label[:, g].sum() < len(label)]
    return {
        "pcc": float(np.nanmean([np.corrcoef(level[:, g], target[:, g])[0, 1] for g in both])),
        "r2": float(np.mean([r2_score(target[:, g], level[:, g]) for g in both])),
        "auroc": float(np.mean([roc_auc_score(label[:, g], chance[:, g]) for g in both])),
        "accuracy": float(np.mean([accuracy_score(label[:, g], chance[:, g] > 0.5) for g in both])),
    }


def predict(net: torch.nn.Module, likelihood: Any, features: np.ndarray, genes: list[str], out: Path) -> None:
    """All nuclei at once, and AnnData writes."""
    from anndata import AnnData

    net.eval()
    with torch.no_grad():
        level, logit = net(torch.from_numpy(features))
        umi, prob = likelihood.mean((level, logit)).numpy(), logit.sigmoid().numpy()
    AnnData(umi, var=pd.DataFrame(index=genes), layers={"prob": prob}).write_h5ad(out, compression="gzip")
