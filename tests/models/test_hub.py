"""Models that travel over a hub: `scripts/hub_server.py` answers as the real one does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import tifffile
import torch

import prts
from prts.cli.app import run
from prts.cli.cohort import plan_multirun
from prts.cli.config import compose
from prts.errors import InputError
from prts.features.no_encoder import NoEncoder
from prts.models.bundle import load_bundle, save_bundle
from prts.models.bundle_description import GIVEN_KEYS
from prts.models.hub import parse_reference
from prts.models.likelihoods.paper import Paper
from prts.models.network import PRTSNet
from prts.models.output import OutputRule
from prts.simulate.section import simulate_section
from scripts.hub_server import TOKEN, Hub, Repository

REPO, PLACE = "lab/kidney", "hf://lab/kidney"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    torch.manual_seed(0)
    save_bundle(
        folder,
        net=PRTSNet(21, 2, hidden=(4,)),
        likelihood=Paper(target="log1p").allocate(2),
        rule=OutputRule("none", 0.5),
        genes=[("A", "idA"), ("B", "idB")],
        metadata={
            "encoder": NoEncoder().settings(),
            "encoder_weights": None,
            "mpp": 0.5,
            "tile": None,
            "pooling": None,
            "input": {"use": ["morphology"], "widths": {"morphology": 21}},
            "segmentation": {"name": "watershed", "arguments": {}},
            "qc": {},
            "tissue": "kidney",
            "species": "human",
            "train_sections": ["s1"],
            "split": {},
            "seed": 0,
            "validation": {},
        },
    )
    return folder


@dataclass
class Client:
    """A hub, and the settings of huggingface_hub on this machine."""

    hub: Hub
    cache: Path
    monkeypatch: pytest.MonkeyPatch

    def set(self, **constants: object) -> None:
        for name, value in constants.items():
            self.monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    def connect(self, endpoint: str) -> None:
        self.set(
            ENDPOINT=endpoint, HUGGINGFACE_CO_URL_TEMPLATE=f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )

    def use_cache(self, folder: Path) -> None:
        self.set(HF_HUB_CACHE=str(folder))

    @property
    def repository(self) -> Repository:
        return self.hub.repositories[REPO]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    hub = Hub()
    found = Client(hub, tmp_path / "hub cache", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found.set(HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_IMPLICIT_TOKEN=False)
    found.use_cache(found.cache)
    with hub.serve() as endpoint:
        found.connect(endpoint)
        yield found


@pytest.fixture
def push(model: Path) -> Callable[..., int]:
    return lambda *more: run("push", [f"bundle={model}", f"repo={REPO}", *more])


def refused(place: str) -> str:
    with pytest.raises(InputError) as caught:
        load_bundle(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_pushed_pulled_and_predicts_the_same_also_without_a_network(
    client: Client, push: Callable[..., int], model: Path, tmp_path: Path
) -> None:
    assert push() == 0
    (commit,) = {sha for branch, sha in client.repository.branches.items() if branch == "main"}
    files = client.repository.commits[commit]
    assert sorted(files) == [".gitattributes", "README.md", "model.json", "model.safetensors"]
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert client.repository.private
    client.repository.commit({"pytorch_model.bin": b"\x80\x04 a pickle"})
    commit = client.repository.branches["main"]

    slide = simulate_section(tmp_path / "s", cells=60, genes=50, seed=5) / "tissue_image.tif"
    client.use_cache(tmp_path / "other cache")

    def predicted(name: str, bundle: str) -> ad.AnnData:
        paths = [f"image={slide}", f"out={tmp_path / name}", f"paths.cache_dir={tmp_path / 'c'}"]
        assert run("predict", [f"bundle={bundle}", *paths]) == 0
        return ad.read_h5ad(tmp_path / name)

    near, far = predicted("near.h5ad", str(model)), predicted("far.h5ad", PLACE)
    np.testing.assert_array_equal(near.X.toarray(), far.X.toarray())
    about = far.uns["prts"]["bundle"]
    assert about["origin"] == f"{PLACE}@{commit}"
    assert about["sha256"] == hashlib.sha256((model / "model.json").read_bytes()).hexdigest()
    assert "origin" not in near.uns["prts"]["bundle"]
    pulled = tmp_path / "other cache" / "models--lab--kidney" / "snapshots" / commit
    assert sorted(path.name for path in pulled.iterdir()) == ["model.json", "model.safetensors"]

    client.set(HF_HUB_OFFLINE=True)
    asked = len(client.hub.requests)
    assert load_bundle(PLACE).origin == f"{PLACE}@{commit}"
    assert prts.Model.load(f"{PLACE}@{commit}").genes == ["A", "B"]
    assert len(client.hub.requests) == asked

    client.use_cache(client.cache / "empty")
    assert re.fullmatch(
        rf"{PLACE}: model.json is not available offline \(HF_HUB_OFFLINE is set\) and not in the cache .*empty; unset HF_HUB_OFFLINE .*",
        refused(PLACE),
    )


def test_a_model_on_a_hub_that_does_not_answer_is_read_from_the_cache(client: Client, push: Callable[..., int]) -> None:
    assert push() == 0
    load_bundle(PLACE)
    client.connect("http://127.0.0.1:9")
    assert load_bundle(PLACE).genes == ["A", "B"]
    assert "http://127.0.0.1:9 cannot be reached" in refused("hf://lab/liver")


def test_a_trained_encoder_travels_with_the_model(
    client: Client, push: Callable[..., int], model: Path, tmp_path: Path
) -> None:
    known, adapter = load_bundle(model), tmp_path / "any name"
    adapter.write_bytes(b"updates")
    sha256 = hashlib.sha256(b"updates").hexdigest()
    given = {key: value for key, value in known.metadata.items() if key in GIVEN_KEYS}
    save_bundle(
        tmp_path / "tuned",
        net=known.net,
        likelihood=known.likelihood,
        rule=known.rule,
        genes=[("A", "idA"), ("B", "idB")],
        metadata={**given, "encoder": {**given["encoder"], "adapter_sha256": sha256}},
        adapter=adapter,
    )
    assert push(f"bundle={tmp_path / 'tuned'}") == 0
    pulled = load_bundle(PLACE)
    assert pulled.adapter is not None and pulled.adapter.read_bytes() == b"updates"
    card = client.repository.commits[client.repository.branches["main"]]["README.md"].decode()
    assert f"adapter.safetensors, the changes of the encoder: `{sha256}`" in card
    client.repository.commit({"adapter.safetensors": b"others"})
    assert "adapter.safetensors is not the file that model.json names" in refused(PLACE)


def test_revisions_are_branches_or_commits(client: Client, push: Callable[..., int], model: Path) -> None:
    assert push() == 0 and push("revision=v1") == 0
    first = client.repository.branches["v1"]
    client.repository.commit({"model.json": b"{}"})
    assert load_bundle(f"{PLACE}@v1").origin == load_bundle(f"{PLACE}@{first}").origin == f"{PLACE}@{first}"
    assert refused(f"{PLACE}@v2") == "hf://lab/kidney@v2: there is no revision 'v2'; choose from main, v1"
    broken = client.repository.branches["main"]
    assert refused(PLACE).startswith(f"{PLACE}@{broken}/model.json: has no format_version")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hf:lab/kidney", "write hf://owner/name"),
        ("hf://kidney", "write hf://owner/name"),
        ("hf://lab/kidney/model", "write hf://owner/name"),
        ("hf://lab/kidney@", "write hf://owner/name"),
        ("HF://lab/kidney", "write hf://owner/name"),
        ("https://huggingface.co/lab/kidney", "write hf://owner/name"),
        ("hf://lab/kid--ney", "is not the name of a repository"),
        ("hf://lab/kidny", "there is no such repository on"),
        ("hf://lab/other", "has no model.json, so it is not a prts model"),
    ],
)
def test_a_wrong_address_is_refused_in_one_line(client: Client, place: str, said: str) -> None:
    client.hub.repositories["lab/other"] = Repository()
    client.hub.repositories["lab/other"].commit({"config.json": b"{}", "model.safetensors": b"x" * 100})
    assert said in refused(place)


def test_damaged_weights_are_downloaded_again_and_changed_ones_refused(
    client: Client, push: Callable[..., int]
) -> None:
    assert push() == 0
    weights = load_bundle(PLACE).folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.resolve().write_bytes(whole[:-1] + b"?")
    client.set(HF_HUB_OFFLINE=True)
    assert "is damaged; run it again with a network connection" in refused(PLACE)
    client.set(HF_HUB_OFFLINE=False)
    assert load_bundle(PLACE).genes == ["A", "B"] and weights.read_bytes() == whole

    client.repository.commit({"model.safetensors": whole[:-1] + b"?"})
    assert "model.safetensors is not the file that model.json names" in refused(PLACE)


def test_workers_of_a_cohort_use_the_same_commit(client: Client, push: Callable[..., int], tmp_path: Path) -> None:
    assert push() == 0
    first = f"{PLACE}@{client.repository.branches['main']}"
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "a.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    given = [f"bundle='{PLACE}'", f"slides='{tmp_path / 'slides'}'", f"out='{tmp_path / 'out'}'"]
    cohort, overrides = plan_multirun([*given, "worker=0,1"], [])
    assert cohort is not None and cohort.bundle.origin == first
    assert compose("predict", [each for each in overrides if each != "worker=0,1"]).bundle == first


def test_private_models_and_uploads_need_a_login(
    client: Client, push: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push() == 0
    monkeypatch.setenv("HF_TOKEN", "hf_someone_else")
    assert "log in with `hf auth login`" in refused(PLACE)
    capsys.readouterr()
    assert push() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "log in with `hf auth login`" in error
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push("revision=public", "private=false") == 0
    assert client.repository.private, "a repository that exists stays as it is"


def test_another_repository_is_not_overwritten(
    client: Client, push: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    client.hub.repositories[REPO] = Repository()
    before = client.repository.commit({"config.json": b"{}"})
    assert push() == 2
    assert "lab/kidney: holds config.json and is not a prts model" in capsys.readouterr().err
    assert client.repository.branches == {"main": before}


def test_a_card_is_written_for_a_look_and_uploaded_as_edited(
    client: Client, push: Callable[..., int], model: Path
) -> None:
    card = model / "README.md"
    try:
        assert push("dry_run=true", "license=mit") == 0
        assert client.hub.requests == [] and "license: mit" in card.read_text()
        card.write_text(card.read_text() + "\nMine.\n")
        assert push("private=false") == 0
        assert client.repository.commits[client.repository.branches["main"]]["README.md"] == card.read_bytes()
        assert not client.repository.private
    finally:
        card.unlink()


def test_only_a_folder_is_pushed(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("push", [f"bundle={PLACE}", f"repo={REPO}"]) == 2
    assert "is on the hub already" in capsys.readouterr().err
    assert run("push", ["bundle=nowhere", "repo=kidney"]) == 2
    assert "repo: 'kidney'" in capsys.readouterr().err
    assert client.hub.requests == []


def test_a_revision_may_hold_slashes() -> None:
    assert parse_reference("hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")
