"""Rows and columns of bins that capture more or fewer UMIs: found where they are, left off where not, and an offset in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import toeplitz

from prts.api.training_plan import DataSettings, TrainingPlan
from prts.data.batches import DeviceBatches, NucleusBatches
from prts.errors import ParameterError
from prts.io.nuclei import load_nuclei
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.poisson import Poisson
from prts.platforms.array_effects import fit_array_effects, umi_of_bins
from prts.platforms.bin_counts import count_bins, exposure_of_nuclei
from prts.platforms.bin_matrix import BinMatrix
from prts.platforms.bin_owners import assign_bins
from prts.platforms.bin_positions import matrix_path, read_positions
from prts.simulate.section import BINS, SimulationSettings, _capture, simulate_section

SHAPE = (260, 300)


def tissue(seed: int) -> tuple[np.ndarray, np.random.Generator]:
    """UMIs that bins of a tissue would capture without effects, which vary slowly, and the generator for the rest."""
    rng = np.random.default_rng(seed)
    smooth = np.exp(0.5 * ndimage.gaussian_filter(rng.standard_normal(SHAPE), 12) * 12 * np.sqrt(4 * np.pi))
    return 2 * smooth, rng


def drawn(spread: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """UMIs of a tissue, which bins are listed, and the effects of rows and columns."""
    smooth, rng = tissue(seed)
    row, col = (np.exp(spread * rng.standard_normal(n)) for n in SHAPE)
    y, x = np.indices(SHAPE)
    listed = np.hypot(y - 130, x - 150) < 125
    umi = rng.poisson(smooth * np.multiply.outer(row, col)) * listed
    return umi.astype(np.float32), listed, row, col


def permitted(noise: np.ndarray, variance: float, width: int = 1) -> float:
    """Expected correlation of the best linear prediction of independent effects, or of the mean of `width` neighbors, with the truth.

    `noise` is the (n_rows,) covariance, by distance, of what tissue and counts add to the UMIs of a row, as a share of these.
    """
    mean = toeplitz(np.r_[1, np.zeros(len(noise) - width)], np.r_[np.ones(width), np.zeros(len(noise) - width)]) / width
    explained = variance**2 * np.einsum(
        "ij,ji->i", mean, np.linalg.solve(toeplitz(noise) + variance * np.eye(len(noise)), mean.T)
    )
    return float(np.sqrt(explained.mean() / (variance / width)))


def noise_of_tissue(umi_of_row: np.ndarray, width: int) -> np.ndarray:
    """Covariance, by distance, of the noise of rows of `tissue` that are `width` bins long."""
    y, x = np.arange(len(umi_of_row))[:, None], np.arange(1 - width, width)
    # the covariance of exp(0.5 g), relative to its mean, for noise g that was smoothed with a standard deviation of 12 bins
    shared = np.exp(0.25 * np.exp(-(y**2 + x**2) / (4 * 12**2))) - 1
    noise = shared @ (width - np.abs(x)) / width**2
    noise[0] += np.mean(1 / umi_of_row)
    return noise


def test_planted_effects_are_found() -> None:
    for seed in (1, 3):
        umi, listed, row, col = drawn(0.15, seed)
        effects = fit_array_effects(umi, listed)
        for found, true, n, umis in (
            (effects.row, row, listed.sum(1), umi.sum(1)),
            (effects.col, col, listed.sum(0), umi.sum(0)),
        ):
            used = n > 60
            limit = permitted(noise_of_tissue(umis[used], round(n[used].mean())), 0.15**2)
            # three standard errors of a correlation and of a standard deviation
            three = 3 * np.array([1 - limit**2, np.sqrt(0.5)]) / np.sqrt(used.sum())
            assert np.exp(np.log(found[n > 0]).mean()) == pytest.approx(1.0, abs=1e-3)
            assert np.corrcoef(np.log(found[used]), np.log(true[used]))[0, 1] > limit - three[0]
            assert np.std(np.log(found[used] / true[used])) < 0.15 * np.sqrt(1 - limit**2) * (1 + three[1])
        # every part of a row is fitted on one half of its bins and checked on the other
        of_half = permitted(noise_of_tissue(umi.sum(1)[listed.sum(1) > 60] / 2, round(listed.sum(1).mean())), 0.15**2)
        assert effects.stripes_before == pytest.approx(0.15, abs=0.02)
        assert effects.stripes_after < np.sqrt(1 - of_half**2) * effects.stripes_before
        assert effects.helps


def test_no_effects_are_left_off() -> None:
    umi, listed, _, _ = drawn(0.0, seed=2)
    effects = fit_array_effects(umi, listed)
    assert effects.stripes_before < 0.02
    assert not effects.helps
    assert np.abs(np.log(effects.row)).max() < 0.15


def test_exposure_is_the_mean_over_the_bins_of_a_unit() -> None:
    umi, listed, _, _ = drawn(0.15, seed=3)
    effects = fit_array_effects(umi, listed)
    unit = np.full(SHAPE, -1, np.int32)
    unit[100:104, 50:53], unit[200, 10] = 0, 2
    expected = [
        np.mean([float(effects.row[r]) * float(effects.col[c]) for r in range(100, 104) for c in range(50, 53)]),
        1.0,
        float(effects.row[200]) * float(effects.col[10]),
    ]
    assert effects.exposure(unit, 3) == pytest.approx(expected)


def test_stripes_of_a_simulated_section_are_its_exposure(tmp_path: Path) -> None:
    settings = SimulationSettings(cells=500, genes=50, seed=6, stripes=0.25, name="s")
    section = simulate_section(tmp_path / "s", settings)
    plain = simulate_section(tmp_path / "p", replace(settings, stripes=0.0))
    for name in ("tissue_image.tif", "truth_nuclei.parquet"):
        assert (section / name).read_bytes() == (plain / name).read_bytes()
    nuclei = load_nuclei(section / "truth_nuclei.parquet")
    before = count_bins(section / BINS, nuclei)
    exposure, effects = exposure_of_nuclei(section / BINS, nuclei)
    assert effects.stripes_before == pytest.approx(settings.stripes, abs=0.05)
    assert effects.helps and effects.stripes_after < 0.6 * effects.stripes_before
    assert before.X.dtype == np.int32 and before.X.sum() < count_bins(plain / BINS, nuclei).X.sum()

    grid = read_positions(section / BINS)
    row, col = _capture(grid.n_rows, grid.n_cols, settings)  # type: ignore[misc]
    owner = assign_bins(nuclei.geometry.to_numpy(), grid).unit
    true = np.array(
        [(np.multiply.outer(row, col)[owner == k]).mean() if (owner == k).any() else 1.0 for k in range(len(nuclei))]
    )
    counted = np.bincount(owner[owner >= 0], minlength=len(nuclei)) > 5
    # a nucleus spans a few rows and columns, over which their effects are averaged
    rows = np.array([len(np.unique(np.nonzero(owner == k)[0])) for k in np.flatnonzero(counted)])
    limits = [
        permitted(noise_of_section(plain, section, axis), settings.stripes**2, round(rows.mean())) for axis in (1, 0)
    ]
    limit = np.sqrt(np.mean(np.square(limits)))
    found = np.corrcoef(np.log(exposure[counted]), np.log(true[counted]))[0, 1]
    independent = (len(row) + len(col)) / rows.mean()
    assert found > limit - 2 * (1 - limit**2) / np.sqrt(independent)


def noise_of_section(plain: Path, striped: Path, axis: int) -> np.ndarray:
    """Covariance, by distance, of the noise of rows (axis 1) or columns: measured where no effects were planted, for fewer UMIs."""
    umi = []
    for section in (plain, striped):
        grid = read_positions(section / BINS)
        with BinMatrix(matrix_path(section / BINS)) as matrix:
            umi.append(umi_of_bins(matrix, (grid.n_rows, grid.n_cols))[0].sum(axis=axis))
    inner = umi[0] > 0.3 * np.max(umi[0])
    n, fewer = (each[inner].astype(float) for each in umi)
    excess = np.log(n / ndimage.gaussian_filter1d(n, 12))
    noise = np.correlate(excess, excess, "full")[len(n) - 1 :] / len(n) * np.cos(np.linspace(0, np.pi / 2, len(n)))
    noise[0] += np.mean(1 / fewer) - np.mean(1 / n)
    return noise


def test_poisson_takes_exposure_as_an_offset() -> None:
    rng = np.random.default_rng(0)
    rate, exposure = np.array([0.5, 2.0, 6.0]), np.exp(0.5 * rng.standard_normal((4000, 1)))
    counts = torch.from_numpy(rng.poisson(rate * exposure).astype(np.float64))
    level = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    likelihood, offset = Poisson(), torch.from_numpy(exposure)
    optimizer = torch.optim.LBFGS([level], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        outputs = (level.expand_as(counts), torch.zeros_like(counts))
        value: torch.Tensor = likelihood.loss(likelihood.exposed(outputs, offset), counts)["loss"]
        value.backward()
        return value

    optimizer.step(closure)
    # the maximum of the likelihood in closed form
    closed = counts.sum(dim=0) / exposure.sum()
    torch.testing.assert_close(level.detach().exp(), closed, rtol=1e-4, atol=0)
    assert closed.numpy() == pytest.approx(rate, rel=0.05)
    assert not Poisson(offset="library").takes_exposure and not Paper().takes_exposure


def test_batches_carry_exposures(make_nuclei) -> None:
    first, second = (make_nuclei(np.ones((n, 2)), np.ones((n, 3)), section) for n, section in ((4, "a"), (3, "b")))
    assert NucleusBatches([first, second])[np.arange(2)].exposure is None
    first = replace(first, exposure=np.array([0.5, 1.0, 2.0, 4.0], np.float32))
    at = np.array([5, 3, 0])
    for batches in (NucleusBatches([first, second]), DeviceBatches([first, second], torch.device("cpu"))):
        assert batches[at].exposure is not None
        assert batches[at].exposure.tolist() == [[1.0], [4.0], [0.5]]
    assert first.take(np.array([2])).exposure.tolist() == [2.0]  # type: ignore[union-attr]


def test_other_likelihoods_refuse_exposures() -> None:
    preparation = SimpleNamespace(exposure=True)
    for likelihood, baseline in ((Paper(), None), (Poisson(offset="library"), None), (Poisson(), "ridge")):
        recipe = SimpleNamespace(likelihood=likelihood, baseline=baseline)
        with pytest.raises(
            ParameterError, match=r"^counts.exposure: needs a network with the Poisson likelihood; use loss=poisson"
        ):
            TrainingPlan(prepare=None, preparation=preparation, data=DataSettings(), recipe=recipe)  # type: ignore[arg-type]
