"""An epoch of training in the paper's setting: against its bare matrix products, and against a plain fp32 loop over dense samples.

In float32, which is this setting's default, and in what `trainer.precision=auto` comes to on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from benchmarks.harness import QUICK_SIZES, SIZES, Part, child, growth, interleave

NEEDS_DATA = False
NUCLEI, FEATURES, GENES, VALIDATION = 56_761, 576, 1_820, 10_000
BATCH = 256
FP32 = "32-true"


def run(quick: bool) -> Part:
    part = Part()
    size = {"n": 600, "genes": 50, "n_val": 100} if quick else {"n": NUCLEI, "genes": GENES, "n_val": VALIDATION}
    timed = child(compare, **size, rounds=1 if quick else 3).result
    seconds, precision = timed["seconds"], timed["precision"]
    chosen = seconds[f"{precision} with validation"]
    slow = child(straightforward_epoch, **size, n_batches=2 if quick else 20).result
    peak, slow_peak = (child(way, **size).peak_gb for way in (fit, hold_dense))
    part.figures = {
        "train/over_matmul": seconds[FP32] / seconds[f"{FP32} products"],
        "train/speedup": slow["seconds"] / chosen,
        "train/peak_gb": peak,
    }
    part.row(
        f"an epoch, {size['n']:,} x {FEATURES} -> {size['genes']:,}, the paper's network, in fp32, through Lightning",
        f"{seconds[FP32]:.1f} s",
        "",
        _limit(timed, FP32),
        ["train/over_matmul"],
    )
    if precision != FP32:
        part.row(
            f"the same with `trainer.precision=auto` (not the default of this setting), {precision} here",
            f"{seconds[precision]:.1f} s",
            limit=_limit(timed, precision),
        )
    part.row(
        f"the same with validation of {size['n_val']:,} nuclei, `trainer.precision=auto` (straightforward: fp32, {slow['batches']} of "
        f"{slow['of']} batches timed and metrics of {slow['timed']:,} genes, scaled)",
        f"{chosen:.1f} s, {peak:.1f} GB"
        + (f"; in fp32 {seconds[f'{FP32} with validation']:.1f} s" if precision != FP32 else ""),
        f"{slow['seconds']:.0f} s, of which metrics {slow['metrics']:.0f}; {slow_peak:.1f} GB",
        keys=["train/speedup", "train/peak_gb"],
    )
    sizes = QUICK_SIZES if quick else (*SIZES[:-1], NUCLEI)
    by_size = {n: child(fit, **{**size, "n": n}).result for n in sizes}
    part.row(f"growth with nuclei (an epoch without validation, in {precision})", growth(by_size))
    return part


def _limit(timed: dict[str, Any], precision: str) -> str:
    seconds = timed["seconds"][f"{precision} products"]
    return (
        f"{seconds:.1f} s: its bare matrix products, forward and backward "
        f"({timed['flop'] / seconds / 1e9:.0f} GFLOP/s; 4096²: {timed['rates'][precision] / 1e9:.0f})"
    )


def compare(n: int, genes: int, n_val: int, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch with and without validation and of its matrix products in each precision, interleaved."""
    from functools import partial

    from benchmarks.machine import matmul_rate

    data, trained = _data(n, genes, n_val), _module(genes)
    loaders = data.train_dataloader(), data.val_dataloader()
    chosen = _precision()
    ways: dict[str, Callable[[], float | None]] = {}
    rates = {}
    for precision in dict.fromkeys((FP32, chosen)):
        dtype = "float32" if precision == FP32 else "bfloat16"
        products, flop = _products(n, genes, dtype)
        ways[precision] = partial(_epoch, trained, loaders[0], None, precision)
        ways[f"{precision} products"] = products
        ways[f"{precision} with validation"] = partial(_epoch, trained, *loaders, precision)
        rates[precision] = matmul_rate(dtype)
    interleave(ways, 1)  # the first products of a process are slower
    return {"seconds": interleave(ways, rounds), "flop": flop, "rates": rates, "precision": chosen}


def fit(n: int, genes: int, n_val: int) -> float:
    """Seconds of one epoch without validation; training needs the memory of both sets."""
    data, trained = _data(n, genes, n_val), _module(genes)
    return _epoch(trained, data.train_dataloader(), None, _precision())


def straightforward_epoch(n: int, genes: int, n_val: int, n_batches: int) -> dict[str, Any]:
    """Seconds of the plain loop's epoch, from some batches, and of its validation, whose metrics are timed on a tenth of the genes."""
    import torch

    from benchmarks import straightforward

    torch.manual_seed(0)
    config = _config()
    of = -(-n // BATCH)
    n_batches, timed = min(n_batches, of), max(genes // 10, 1)
    train, val = (
        straightforward.Samples(*_dense(count, genes, seed))
        for seed, count in enumerate(((n_batches + 1) * BATCH, n_val))
    )
    net, loss = _net(config, genes), _likelihood(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.05)
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    straightforward.train_batches(net, loss, optimizer, loader, 1)
    marks = [time.perf_counter()]
    straightforward.train_batches(net, loss, optimizer, loader, n_batches)
    marks.append(time.perf_counter())
    outputs = straightforward.outputs(net, torch.utils.data.DataLoader(val, batch_size=BATCH))
    marks.append(time.perf_counter())
    straightforward.metrics(*(values[:, :timed] for values in outputs))
    marks.append(time.perf_counter())
    batches, passed, measured = (stop - start for start, stop in pairwise(marks))
    metrics = measured * genes / timed
    seconds = batches * n / (n_batches * BATCH) + passed + metrics
    return {"seconds": seconds, "metrics": metrics, "batches": n_batches, "of": of, "timed": timed}


def hold_dense(n: int, genes: int, n_val: int) -> float:
    """What the plain loop holds: both sets dense, and one batch's step."""
    import torch

    from benchmarks import straightforward

    train, val = (straightforward.Samples(*_dense(count, genes, seed)) for seed, count in enumerate((n, n_val)))
    config = _config()
    net, loss = _net(config, genes), _likelihood(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.05)
    loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    return straightforward.train_batches(net, loss, optimizer, loader, 2) + len(val)


def _precision() -> str:
    """What `trainer.precision=auto` comes to on this machine."""
    import torch

    from prts.precision import training_precision

    return str(training_precision("auto", torch.device("cpu")))


def _epoch(trained: Any, train: Any, val: Any, precision: str) -> float:
    """Seconds of an epoch of Lightning's, from its start to its end, validation included where there is any."""
    import pytorch_lightning as pl

    class Clock(pl.Callback):
        start = stop = 0.0

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.stop = time.perf_counter()

    clock = Clock()
    config = _config().trainer
    config.max_epochs, config.precision = 1, precision
    trainer = _instantiate(config, callbacks=[clock], logger=False)
    trainer.fit(trained, train, val)
    return clock.stop - clock.start


def _module(genes: int) -> Any:
    import torch

    from prts.models.module import PRTSModule

    torch.manual_seed(0)
    config = _config()
    return PRTSModule(
        _net(config, genes),
        _likelihood(config).allocate(genes),
        _instantiate(config.model.optimizer),
    )


def _likelihood(config: Any) -> Any:
    from omegaconf import OmegaConf

    from prts.models.likelihoods import likelihoods

    settings = OmegaConf.to_container(config.loss)
    return likelihoods[settings.pop("name")](**settings)


def _net(config: Any, genes: int) -> Any:
    return _instantiate(config.model.net)(in_features=FEATURES, n_genes=genes)


def _config() -> Any:
    """The paper's setting, on a CPU."""
    from hydra import compose, initialize_config_dir

    from prts.cli.config import config_dir

    with initialize_config_dir(str(config_dir()), version_base=None):
        return compose("train", ["experiment=paper", "trainer=cpu"])


def _instantiate(node: Any, **arguments: Any) -> Any:
    from hydra.utils import instantiate

    return instantiate(node, **arguments)


def _data(n: int, genes: int, n_val: int) -> Any:
    """Training and validation nuclei with random features and counts, as the data module holds them."""
    from prts.data.datamodule import PRTSDataModule

    def never() -> Any:
        raise AssertionError("nothing is prepared here")

    data = PRTSDataModule(never, never, batch_size=BATCH)
    data.train_sets, data.val_sets = [_nuclei(n, genes, 0)], [_nuclei(n_val, genes, 1)]
    return data


def _nuclei(n: int, genes: int, seed: int) -> Any:
    import numpy as np

    from prts.data.nucleus_set import NucleusSet

    counts = _counts(n, genes, seed)
    return NucleusSet(
        section=f"random {seed}",
        cell_id=np.arange(n).astype(str).astype(object),
        xy_um=np.zeros((n, 2)),
        features=_features(n, seed),
        counts=counts,
        total_counts=np.asarray(counts.sum(axis=1)).ravel(),
        area_um2=np.full(n, 50.0),
    )


def _features(n: int, seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).standard_normal((n, FEATURES), dtype=np.float32)


def _counts(n: int, genes: int, seed: int) -> Any:
    """About 8 % of the pairs hold UMI, as in a panel on Visium HD."""
    import numpy as np
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng((2, seed))
    per_nucleus = rng.binomial(genes, 0.08, n)
    gene = rng.integers(0, genes, int(per_nucleus.sum()), dtype=np.int32)
    indptr = np.concatenate([[0], np.cumsum(per_nucleus)])
    matrix = csr_matrix((rng.geometric(0.7, len(gene)).astype(np.int32), gene, indptr), shape=(n, genes))
    matrix.sum_duplicates()
    return matrix


def _dense(n: int, genes: int, seed: int) -> tuple[Any, Any]:
    return _features(n, seed), _counts(n, genes, seed).toarray()


def _products(n: int, genes: int, dtype: str) -> tuple[Callable[[], None], float]:
    """The epoch's matrix products, each layer's forward, and backward for weights and (but for the first layer) inputs; and their FLOP."""
    import torch

    widths = (FEATURES, 512, 512, 1024, 1024)
    layers = [*pairwise(widths), (widths[-1], genes), (widths[-1], genes)]
    kind = getattr(torch, dtype)
    triples = [
        (*(torch.randn(shape, dtype=kind) for shape in ((BATCH, a), (b, a), (BATCH, b))), number)
        for number, (a, b) in enumerate(layers)
    ]
    outs = [[torch.empty(shape, dtype=kind) for shape in ((BATCH, b), (b, a), (BATCH, a))] for a, b in layers]
    batches = n / BATCH

    def products() -> None:
        for _ in range(round(batches)):
            for (x, weight, gradient, number), (forward, of_weight, of_input) in zip(triples, outs, strict=True):
                torch.mm(x, weight.T, out=forward)
                torch.mm(gradient.T, x, out=of_weight)
                if number:
                    torch.mm(gradient, weight, out=of_input)

    flop = sum(2.0 * a * b * (3 if number else 2) for number, (a, b) in enumerate(layers)) * BATCH * round(batches)
    return products, flop
