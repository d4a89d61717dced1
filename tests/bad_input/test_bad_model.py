"""Wrong bundles, predictions, weights, gene lists, tissue configs and arguments; files without permissions."""

from __future__ import annotations

import json
import os
import pickle
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import torch

from prts.cli.main import main
from prts.errors import InputError
from prts.features.weights import read_weights
from prts.io.gene_list import read_gene_list

Ask = Callable[..., tuple[int, str]]
Refused = Callable[..., None]


@pytest.mark.sampled("spoil")
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_damaged_bundle_is_named(
    predict: Ask, world: Any, tmp_path: Path, refused: Refused, spoil: Callable[[Path], object], name: str
) -> None:
    model = world.copy(world.bundle, tmp_path)
    spoil(model / name)
    refused(predict(bundle=model), str(model / name))


WRONG_BUNDLE: dict[str, tuple[Any, str]] = {
    "a list": ([], "format_version"),
    "another version": ({"format_version": 99}, "format version 99"),
    "no genes": ({"genes": []}, "0 genes"),
    "genes of numbers": ({"genes": 5}, "not laid out"),
    "a gene less": ({"genes": [{"name": "A", "id": "a"}]}, "1 genes for a network of"),
    "unknown architecture": ({"architecture": {"name": "os.system"}}, "is not one of"),
    "unknown likelihood": ({"likelihood": {"name": "eval"}}, "is not one of"),
    "negative width": ({"architecture": {"name": "mlp", "in_features": -1, "n_genes": 50}}, "model.json"),
    "other input": ({"input": {"use": ["local"], "widths": {"local": 3}}}, "do not add up"),
    "a rule of nothing": ({"output": {}}, "not laid out"),
    "another's weights": ({"weights_sha256": "0" * 64}, "SHA-256"),
    "unknown encoder": ({"encoder": {"name": "os.system"}}, "encoder"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_BUNDLE)
def test_a_wrong_bundle_is_refused(predict: Ask, world: Any, tmp_path: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_BUNDLE[case]
    model = world.copy(world.bundle, tmp_path)
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(about | change if isinstance(change, dict) else change))
    refused(predict(bundle=model), words)


def test_doctor_reports_a_damaged_bundle(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = world.copy(world.bundle, tmp_path)
    (model / "model.safetensors").unlink()
    assert main(["doctor", f"bundle={model}"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "bundle" in said.err
    assert "no such file; a bundle holds model.json" in " ".join(said.out.split())  # the table wraps its lines


@pytest.mark.sampled("spoil")
def test_a_damaged_prediction_is_named(
    evaluate: Ask, world: Any, tmp_path: Path, refused: Refused, spoil: Callable[[Path], object]
) -> None:
    prediction = world.copy(world.prediction, tmp_path)
    spoil(prediction)
    refused(evaluate(prediction=prediction), str(prediction))


WRONG_PREDICTION: dict[str, tuple[Callable[[ad.AnnData], object], str]] = {
    "no scale": (lambda p: p.uns["prts"].pop("scale"), "scale"),
    "other scale": (lambda p: p.uns["prts"].update(scale="log1p"), "['scale'] is 'log1p'"),
    "negative": (lambda p: setattr(p, "X", -np.ones(p.shape, np.float32)), "negative or non-finite"),
    "NaN": (lambda p: setattr(p, "X", np.full(p.shape, np.nan, np.float32)), "negative or non-finite"),
    "no place": (lambda p: p.obsm.clear(), "obsm['spatial']"),
    "another image's": (lambda p: p.uns["prts"].update(width=7), "its image is"),
    "another um/px": (lambda p: p.uns["prts"].update(mpp=0.25), "must agree within 2 %"),
}


@pytest.mark.sampled("case")
@pytest.mark.parametrize("case", WRONG_PREDICTION)
def test_a_wrong_prediction_is_refused(evaluate: Ask, world: Any, tmp_path: Path, refused: Refused, case: str) -> None:
    change, words = WRONG_PREDICTION[case]
    path = world.copy(world.prediction, tmp_path)
    prediction = ad.read_h5ad(path)
    change(prediction)
    prediction.write_h5ad(path)
    refused(evaluate(prediction=path), "prediction", words)


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.h5", "/X"), h5py.SoftLink("/obs")])
@pytest.mark.parametrize("kind", ["prediction", "spots"])
def test_links_in_an_h5ad_are_refused(
    evaluate: Ask, world: Any, section: Path, tmp_path: Path, refused: Refused, kind: str, link: Any
) -> None:
    path = world.copy(world.prediction, tmp_path) if kind == "prediction" else section / "spots.h5ad"
    with h5py.File(path, "r+") as file:
        file["uns/elsewhere"] = link
    refused(evaluate(**({"prediction": path} if kind == "prediction" else {"section": section})), str(path), "link")


def test_a_prediction_without_its_polygons_is_refused(
    evaluate: Ask, world: Any, tmp_path: Path, refused: Refused
) -> None:
    path = world.copy(world.prediction, tmp_path)
    path.with_suffix(".nuclei.parquet").unlink()
    refused(evaluate(prediction=path), "slide.nuclei.parquet" if "slide" in path.name else "nuclei.parquet")


def test_out_must_be_writable_for_the_result(predict: Ask, evaluate: Ask, tmp_path: Path, refused: Refused) -> None:
    refused(predict(out=tmp_path / "slide.h5"), "does not end in .h5ad")
    (tmp_path / "x" / "folder.h5ad").mkdir(parents=True)
    refused(predict(out=tmp_path / "x" / "folder.h5ad"), "is a folder")
    (tmp_path / "file").touch()
    refused(evaluate(out=tmp_path / "file"), "is a file")
    refused(predict(out=tmp_path / "file" / "slide.h5ad"), "cannot be created")


class Payload:
    """Code in a malicious checkpoint."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pickled-code-ran",)


@pytest.mark.sampled("spoil")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_weights_are_named(tmp_path: Path, spoil: Callable[[Path], object], name: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / name
    tensors = {"a": torch.zeros(300)}
    torch.save(tensors, path) if name == "w.pth" else save_file(tensors, path)
    spoil(path)
    with pytest.raises(InputError, match=r"w\.(pth|safetensors)"):
        read_weights(path)


def test_code_in_weights_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(InputError, match="read safely"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "pickled-code-ran").exists()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "[1, 2]", "{}", '["a", ', "\n\n", '{"genes": "A"}'])
def test_a_wrong_gene_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "genes.txt").write_text(text)
    with pytest.raises(InputError, match=r"genes\.txt") as caught:
        read_gene_list(tmp_path / "genes.txt")
    assert "\n" not in str(caught.value)


def test_a_gene_list_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "genes.txt", tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(InputError, match=r"cannot be read|not UTF-8"):
            read_gene_list(path)


TISSUE = "name: mine\nspecies: human\nsections: {s1: {image: a.tif, bins: b}}\ntrain: [s1]\nval: []\ntest: []\n"
WRONG_TISSUE = {
    "unknown species": (
        TISSUE.replace("human", "humann"),
        "tissue.species: 'humann' is not known, did you mean 'human'",
    ),
    "no such section": (TISSUE.replace("train: [s1]", "train: [s2]"), "'s2' is not a section"),
    "two roles": (TISSUE.replace("val: []", "val: [s1]"), "give each section one role"),
    "unknown key": (TISSUE.replace("bins: b", "bins: b, imag: c"), "imag: no such key, did you mean 'image'"),
    "text um/px": (TISSUE.replace("bins: b", "bins: b, mpp: half"), "mpp"),
    "no bins": (TISSUE.replace(", bins: b", ""), "bins: is required"),
    "a name for a list": (TISSUE.replace("train: [s1]", "train: s1"), "give a list"),
    "not YAML": (TISSUE.replace("train: [s1]", "train: [s1"), "mine"),
    "code": (TISSUE.replace("name: mine", "name: !!python/object/apply:os.mkdir [yaml-code-ran]"), "mine"),
}


@pytest.mark.parametrize("case", WRONG_TISSUE)
def test_a_wrong_tissue_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    text, words = WRONG_TISSUE[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tissue").mkdir()
    (tmp_path / "tissue" / "mine.yaml").write_text(text)
    given = ["--config-dir", str(tmp_path), "tissue=mine", "encoder=classical", f"paths.cache_dir={tmp_path / 'cache'}"]
    assert main(["prepare", *given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["tissue"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cells": 0}, "cells"),
        ({"genes": -5}, "genes"),
        ({"mpp": 9.0}, "mpp"),
        ({"stain": float("inf")}, "stain"),
        ({"species": "dog"}, "species"),
        ({"shift_um": [1.0]}, "shift_um"),
    ],
)
def test_wrong_arguments_of_simulate_are_refused(
    ask: Ask, tmp_path: Path, refused: Refused, values: dict[str, Any], words: str
) -> None:
    refused(ask("simulate", out=tmp_path / "s", **values), words)
    assert not (tmp_path / "s").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Become a user without permissions, within this process: a fork after OpenMP may never end."""
    user, groups = pwd.getpwnam("nobody"), os.getgroups()
    os.setgroups([])
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "what", ["image", "nuclei", "bundle/model.json", "bundle/model.safetensors", "bundle", "out", "cache"]
)
def test_missing_permissions_are_named(ask: Ask, world: Any, what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        given: dict[str, Path] = {
            "image": Path(shutil.copy(world.image, root / "slide.tif")),
            "nuclei": Path(shutil.copy(world.nuclei, root / "nuclei.parquet")),
            "bundle": Path(shutil.copytree(world.bundle, root / "model")),
        }
        for path in given.values():
            for part in (path, *path.glob("*")):
                part.chmod(0o755 if part.is_dir() else 0o644)
        for key in ("out", "cache"):
            (root / key).mkdir(mode=0o777)
            (root / key).chmod(0o777)
        key, _, inner = what.partition("/")
        target = given[key] / inner if key in given else root / key
        target.chmod(0o555 if target.is_dir() and key in ("out", "cache") else 0o000)

        with as_nobody():
            status, line = ask(
                "predict", **given, out=root / "out" / "slide.h5ad", mpp=0.5, paths__cache_dir=root / "cache"
            )
        assert status == 2, line
        assert "\n" not in line and str(target) in line
        assert not list((root / "out").iterdir())
