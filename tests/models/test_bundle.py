from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from prts.data.slide_scale import SlideScale
from prts.errors import InputError
from prts.io.cache import sha256_file
from prts.models.bundle import load_bundle, save_bundle
from prts.models.likelihoods import Likelihood
from prts.models.likelihoods.hurdle import Hurdle
from prts.models.likelihoods.paper import Paper
from prts.models.likelihoods.poisson import Poisson
from prts.models.network import PRTSNet
from prts.models.output import OutputRule

GENES = [("Plp1", "ENSMUSG1"), ("Ttr", "ENSMUSG2"), ("Snap25", "ENSMUSG3")]


def metadata(**changes: object) -> dict[str, object]:
    return {
        "encoder": {"name": "vit256", "weights_sha256": "ab" * 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        "encoder_weights": None,
        "segmentation": {"name": "watershed", "arguments": {}},
        "qc": {"min_umi": 20},
        "tissue": "demo",
        "species": "human",
        "mpp": 0.5,
        "tile": 256,
        "pooling": "nucleus",
        "input": {"use": ["local", "global"], "widths": {"local": 2, "global": 3}},
        "train_sections": ["a"],
        "split": {"name": "by_section"},
        "seed": 0,
        "validation": {"pcc": [0.5, np.nan, 0.25], "ceiling": None},
        **changes,
    }


def save(folder: Path, *, target: str = "minmax", heads: str = "dual", standardize: bool = False) -> PRTSNet:
    torch.manual_seed(0)
    net = PRTSNet(5, 3, hidden=(7, 6), heads=heads, standardize=standardize)
    net(torch.randn(64, 5))  # moves the running statistics of batch normalisation
    if standardize:
        net.set_input_scaling(torch.randn(5), torch.rand(5) + 0.5)
    likelihood = Paper(target=target).fit([sp.csr_matrix([[1, 0, 7], [4, 2, 0]])])
    save_bundle(folder, net=net, likelihood=likelihood, rule=OutputRule("soft", 0.3), genes=GENES, metadata=metadata())
    return net.eval()


@pytest.mark.parametrize("target", ["minmax", "log1p", "counts"])
@pytest.mark.parametrize(("heads", "standardize"), [("dual", False), ("single", True)])
def test_a_bundle_predicts_what_the_network_did(tmp_path: Path, target: str, heads: str, standardize: bool) -> None:
    net = save(tmp_path / "model", target=target, heads=heads, standardize=standardize)
    bundle = load_bundle(tmp_path / "model")
    features = torch.randn(10, 5)
    with torch.no_grad():
        level, logit = net(features)
    inverse = {
        "minmax": lambda y: y * torch.tensor([3.0, 1.0, 1.0]) + torch.tensor([1.0, 2.0, 7.0]),
        "log1p": torch.expm1,
        "counts": lambda y: y,
    }[target]
    umi, prob = bundle.predict(features)
    torch.testing.assert_close(prob, logit.sigmoid())
    torch.testing.assert_close(umi, logit.sigmoid() * inverse(level).clamp(min=0))
    parts = [bundle.predict(chunk)[0] for chunk in features.split(3)]
    torch.testing.assert_close(torch.cat(parts), umi)


def test_what_slides_are_matched_to_travels_with_the_model(tmp_path: Path) -> None:
    assert save(tmp_path / "model") and load_bundle(tmp_path / "model").slide_scale is None
    net, likelihood = PRTSNet(5, 3, hidden=(4,), rank=2), Poisson().allocate(3)
    scale = SlideScale(5)
    scale.mean[:], scale.spread[:] = torch.arange(5.0), torch.arange(1.0, 6.0)
    about = metadata()
    about["input"] = {**about["input"], "scale": "slide"}
    parts = {"net": net, "likelihood": likelihood, "rule": OutputRule("none", 0.3), "genes": GENES}
    save_bundle(tmp_path / "matched", **parts, metadata=about, slide_scale=scale)
    loaded = load_bundle(tmp_path / "matched")
    assert loaded.slide_scale.mean.tolist() == [0, 1, 2, 3, 4] and loaded.slide_scale.spread.tolist() == [1, 2, 3, 4, 5]
    assert loaded.net.rank == 2
    with pytest.raises(ValueError, match="do not belong together"):
        save_bundle(tmp_path / "other", **parts, metadata=metadata(), slide_scale=scale)


def test_what_the_bundle_says(tmp_path: Path) -> None:
    save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    bundle = load_bundle(tmp_path / "model")
    assert bundle.genes == ["Plp1", "Ttr", "Snap25"]
    assert bundle.gene_ids == ["ENSMUSG1", "ENSMUSG2", "ENSMUSG3"]
    assert bundle.input_use == ("local", "global")
    assert bundle.input_widths == {"local": 2, "global": 3}
    assert (bundle.rule.gate, bundle.rule.threshold) == ("soft", 0.3)
    np.testing.assert_array_equal(bundle.val_pcc, [0.5, np.nan, 0.25])
    assert np.isnan(bundle.ceiling).all()
    assert bundle.predictable is None
    assert bundle.metadata["encoder"]["weights_sha256"] == "ab" * 32
    assert bundle.metadata["versions"]["torch"]


def test_saving_again_replaces_and_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "model", heads="single")
    save(tmp_path / "model")
    save(tmp_path / "again")
    assert load_bundle(tmp_path / "model").net.heads == "dual"
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_features_of_another_width_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "model")
    with pytest.raises(InputError, match="4 wide, but the model takes 5"):
        load_bundle(tmp_path / "model").predict(torch.randn(2, 4))


def edit_json(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        change(content)
        (folder / "model.json").write_text(json.dumps(content))

    return apply


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


DAMAGE = {
    "no json": (lambda folder: (folder / "model.json").unlink(), "model.json: no such file"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "broken json": (lambda folder: (folder / "model.json").write_text('{"format_version": 1,'), "not readable as JSON"),
    "not text": (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"), "not readable as JSON"),
    "lists in lists": (lambda folder: (folder / "model.json").write_text("[" * 100_000), "not readable as JSON"),
    "not ours": (lambda folder: (folder / "model.json").write_text("[1]"), "has no format_version"),
    "newer": (edit_json(lambda j: j.update(format_version=5)), "format version 5, this prts reads 1 to 4"),
    "no encoder": (edit_json(lambda j: j.pop("encoder")), "lacks encoder"),
    **{
        f"no {key}": (edit_json(lambda j, key=key: j.pop(key)), f"lacks {key}")
        for key in ("encoder_weights", "segmentation", "qc", "tissue", "species")
    },
    "other network": (
        edit_json(lambda j: j["architecture"].update(name="os.system")),
        "architecture 'os.system' is not",
    ),
    "other likelihood": (
        edit_json(lambda j: j["likelihood"].update(name="zinb")),
        "likelihood 'zinb' is not one of .*; install the package that provides it",
    ),
    "odd likelihood": (
        edit_json(lambda j: j["likelihood"].update(rank=1)),
        "not laid out.*rank: paper has no such setting",
    ),
    "no likelihood": (edit_json(lambda j: j.pop("likelihood")), "lacks likelihood"),
    "odd argument": (edit_json(lambda j: j["architecture"].update(depth=3)), "not laid out as prts writes it"),
    "genes a number": (edit_json(lambda j: j.update(genes=3)), "not laid out as prts writes it"),
    "a gene less": (edit_json(lambda j: j["genes"].pop()), "lists 2 genes for a network of 3"),
    "a pcc less": (edit_json(lambda j: j["validation"]["pcc"].pop()), "lists 3 genes"),
    "a flag less": (edit_json(lambda j: j["validation"].update(predictable=[True])), "lists 3 genes"),
    "a pcc a word": (edit_json(lambda j: j["validation"].update(pcc=["a", 1, 2])), "not laid out as prts writes it"),
    "endless width": (
        edit_json(lambda j: j["input"]["widths"].update(local=float("inf"))),
        "not laid out as prts writes it",
    ),
    "um/px a word": (edit_json(lambda j: j.update(mpp="0.5")), r"not laid out as prts writes it \(mpp is '0.5'\)"),
    "um/px too long for a float": (edit_json(lambda j: j.update(mpp=10**400)), r"prts writes it \(mpp"),
    "intervals in lists": (
        edit_json(
            lambda j: j.update(intervals={"level": 0.9, **dict.fromkeys(("scale", "dispersion", "mass"), [[1.0]] * 3)})
        ),
        r"not laid out as prts writes it \(intervals\.scale",
    ),
    "an interval's scale": (
        edit_json(
            lambda j: j.update(
                intervals={"level": 0.9, "scale": [1.0, 1e308, 1.0], "dispersion": [0.1] * 3, "mass": [0.9] * 3}
            )
        ),
        "scale of intervals must be between 0.0001 and 10000",
    ),
    "encoder a list": (edit_json(lambda j: j.update(encoder=["a"])), r"not laid out as prts writes it \(encoder"),
    "a gene twice": (edit_json(lambda j: j["genes"][0].update(name="Ttr")), "lists a gene twice"),
    "a block twice": (edit_json(lambda j: j["input"].update(use=["global", "local", "local"])), "do not add up"),
    "a pcc no list": (edit_json(lambda j: j["validation"].update(pcc=3)), "not laid out as prts writes it"),
    "unknown order": (edit_json(lambda j: j["architecture"].update(order="odd")), "model.json: is not laid out.*order"),
    "widths": (edit_json(lambda j: j["input"]["widths"].update(local=9)), "do not add up to the network's 5 inputs"),
    "unknown gate": (edit_json(lambda j: j["output"].update(gate="firm")), "gate"),
    "wider": (edit_json(lambda j: j["architecture"].update(hidden=[8, 6])), "do not belong together"),
    "huge": (edit_json(lambda j: j["architecture"].update(hidden=[10**6, 10**6])), "do not belong together"),
    "tensor missing": (edit_tensors(lambda t: t.pop("net.level.bias")), "lacks net.level.bias"),
    "tensor too many": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "has unknown extra"),
    "tensor shape": (
        edit_tensors(lambda t: t.update({"net.level.bias": torch.zeros(4)})),
        r"net.level.bias is torch.float32 \(4,\)",
    ),
    "tensor type": (
        edit_tensors(lambda t: t.update({"net.level.bias": torch.zeros(3).half()})),
        "net.level.bias is torch.float16",
    ),
    "tensor value": (edit_tensors(lambda t: t["net.level.bias"].add_(1)), "its SHA-256 differs"),
    "cut short": (truncate, "damaged or cut short"),
    "bit flipped": (flip_a_bit, "its SHA-256 differs"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "model")
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "model")
    with pytest.raises(InputError, match=message) as caught:
        load_bundle(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_no_folder_says_what_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder; a bundle is"):
        load_bundle(tmp_path / "nothing")


def test_the_weights_sum_is_that_of_the_file(tmp_path: Path) -> None:
    save(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    assert content["weights_sha256"] == sha256_file(tmp_path / "model" / "model.safetensors")


def test_incomplete_metadata_is_a_bug_and_writes_nothing(tmp_path: Path) -> None:
    incomplete = metadata()
    del incomplete["mpp"]
    with pytest.raises(ValueError, match="mpp"):
        save_bundle(
            tmp_path / "model",
            net=PRTSNet(5, 3, hidden=(4,)),
            likelihood=Paper(target="log1p").allocate(3),
            rule=OutputRule("none", 0.5),
            genes=GENES,
            metadata=incomplete,
        )
    assert not list(tmp_path.iterdir())


def to_format_2(folder: Path, target: str) -> None:
    """Rewrite a bundle as prts wrote it before likelihoods were objects."""
    tensors = load_file(folder / "model.safetensors")
    prefix = "likelihood.scaler." if target in ("minmax", "log1p", "counts") else "likelihood."
    save_file(
        {name.replace(prefix, "scaler."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    content = json.loads((folder / "model.json").read_text())
    del content["likelihood"], content["architecture"]["outputs"]
    content |= {"format_version": 2, "target": {"name": target}, "loss": {"_target_": "prts.models.losses.AnyLoss"}}
    content["weights_sha256"] = sha256_file(folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("target", "likelihood"),
    [
        ("minmax", Paper()),
        ("log1p", Paper(target="log1p")),
        ("counts", Paper(target="counts")),
        ("log_rate", Poisson()),
        ("log_share", Poisson(offset="library")),
        ("log_truncated", Hurdle()),
        ("log_positive", Hurdle(level="lognormal")),
    ],
)
def test_a_bundle_of_format_2_predicts_what_it_did(tmp_path: Path, target: str, likelihood: Likelihood) -> None:
    torch.manual_seed(0)
    fitted = likelihood.fit([sp.csr_matrix([[1, 0, 7], [4, 2, 0]])])
    net, rule = PRTSNet(5, 3, hidden=(7,)), OutputRule("none", 0.3)
    save_bundle(tmp_path / "model", net=net, likelihood=fitted, rule=rule, genes=GENES, metadata=metadata())
    features = torch.randn(10, 5)
    expected = load_bundle(tmp_path / "model").predict(features)
    to_format_2(tmp_path / "model", target)
    assert any("scaler." in name for name in load_file(tmp_path / "model" / "model.safetensors")) == (
        target in ("minmax", "log_share", "log_positive")
    )
    bundle = load_bundle(tmp_path / "model")
    assert bundle.likelihood.target == target
    for found, before in zip(bundle.predict(features), expected, strict=True):
        torch.testing.assert_close(found, before)


def test_a_target_of_format_2_that_never_was_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model")
    to_format_2(tmp_path / "model", "rank")
    with pytest.raises(InputError, match="target 'rank' is not one of minmax, log1p"):
        load_bundle(tmp_path / "model")
