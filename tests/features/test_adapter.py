"""Low-rank updates of an encoder: trained beside its weights, merged into them to predict."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prts.errors import InputError
from prts.features.adapter import LowRank, add_adapter, save_adapter
from prts.features.encoders import Classical, Timm

SIDE = 32


def vit(vit_weights: Path, **settings: object) -> Timm:
    given = {"tile_px": SIDE, "precision": "fp32", "device": "cpu", "mean": (0.5,) * 3, "std": (0.2,) * 3, **settings}
    return Timm("test_vit", vit_weights, **given)


@pytest.fixture(scope="module")
def trained(vit_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network with an adapter that does something, and its file."""
    tokens = vit(vit_weights).network()
    add_adapter(tokens.network, rank=2, alpha=3.0, blocks=2)
    generator = torch.Generator().manual_seed(1)
    for layer in tokens.modules():
        if isinstance(layer, LowRank):
            layer.B.data.normal_(0, 0.1, generator=generator)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_adapter(path, tokens.network)
    return tokens, path


def test_the_update_is_the_product_by_hand() -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    adapted = LowRank(layer, rank=1, alpha=4.0)
    adapted.A.data, adapted.B.data = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5], [-1.0]])
    # 4 / 1 * [[0.5], [-1]] [[1, 2]] = [[2, 4], [-4, -8]]
    assert adapted.weight.tolist() == [[3.0, 4.0], [-4.0, -7.0]]
    assert adapted(torch.tensor([[1.0, 1.0]])).tolist() == [[7.0, -11.0]]


def test_merged_weights_give_the_same_features(trained: tuple[nn.Module, Path], vit_weights: Path) -> None:
    tokens, path = trained
    tiles = torch.randint(0, 256, (3, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    plain, merged = vit(vit_weights).network(), vit(vit_weights, adapter=path).network()
    with torch.inference_mode():
        apart, together, before = tokens(tiles), merged(tiles), plain(tiles)
    for mine, theirs, old in zip(apart, together, before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mine, old, rtol=1e-2)
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_only_the_updates_of_the_last_blocks_are_trained(vit_weights: Path) -> None:
    tokens = vit(vit_weights).network()
    last = len(tokens.network.blocks) - 1
    add_adapter(tokens.network, rank=2, alpha=2.0, blocks=1)
    tokens(torch.zeros((1, SIDE, SIDE, 3), dtype=torch.uint8))[1].square().sum().backward()
    with_gradient = {name for name, weight in tokens.named_parameters() if weight.grad is not None}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert with_gradient == {f"network.blocks.{last}.{name}.{part}" for name in layers for part in "AB"}


def test_an_adapter_changes_the_settings_and_no_adapter_leaves_them(
    trained: tuple[nn.Module, Path], vit_weights: Path
) -> None:
    path = trained[1]
    plain, adapted = vit(vit_weights), vit(vit_weights).adapted(path)
    assert "adapter_sha256" not in plain.settings()
    assert adapted.settings() == {**plain.settings(), "adapter_sha256": adapted.adapter_sha256}
    again = Timm.from_settings(adapted.settings(), vit_weights, adapter=path)
    assert again.settings() == adapted.settings()
    with pytest.raises(InputError, match=r"^encoder adapter: has sha256 None, but the model was trained with [0-9a-f]"):
        Timm.from_settings(adapted.settings(), vit_weights)


def test_a_file_that_does_not_fit_is_one_line(
    trained: tuple[nn.Module, Path], vit_weights: Path, tmp_path: Path
) -> None:
    path, last = trained[1], len(vit(vit_weights).network().network.blocks)
    tensors = load_file(path)
    key = next(iter(tensors))
    about = {"kind": "prts adapter 1", "rank": "2", "alpha": "3.0"}
    cases = {
        "has no layer blocks": (path, {"layer": last - 1}),
        "no such file": (tmp_path / "none.safetensors", {}),
        "no safetensors file": (vit_weights.parent / "text.safetensors", {}),
        "does not say that it is one of prts": (vit_weights, {}),
        "does not state its rank": (tmp_path / "rank.safetensors", {}),
        "has not the rank 3": (tmp_path / "other.safetensors", {}),
        "is 192 x 64 here|is 64 x 64 here|x .* here": (tmp_path / "short.safetensors", {}),
    }
    (vit_weights.parent / "text.safetensors").write_text("no tensors")
    save_file(tensors, tmp_path / "rank.safetensors", {"kind": about["kind"]})
    save_file(tensors, tmp_path / "other.safetensors", {**about, "rank": "3"})
    save_file({**tensors, key: tensors[key][:, :1].contiguous()}, tmp_path / "short.safetensors", about)
    for said, (file, settings) in cases.items():
        with pytest.raises(InputError, match=f"^encoder adapter: .*{said}") as error:
            vit(vit_weights, adapter=file, **settings).network()
        assert "\n" not in str(error.value)


def test_an_encoder_without_blocks_is_refused(vit_weights: Path) -> None:
    with pytest.raises(InputError, match="ByobNet has no transformer blocks"):
        add_adapter(timm.create_model("test_byobnet", num_classes=0), rank=2, alpha=2.0, blocks=1)
    with pytest.raises(InputError, match=r"^finetune blocks: 99, but the encoder computes"):
        add_adapter(vit(vit_weights).network().network, rank=2, alpha=2.0, blocks=99)
    with pytest.raises(InputError, match="adapter"):
        from prts.features.encoders import encoders

        encoders.build({"name": Classical.name, "adapter": "x"})
