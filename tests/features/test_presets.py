"""Presets of published encoders: their networks are the published ones, and a local file loads without a network connection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

import prts._torchvision  # noqa: F401  (before timm)
from prts.cli.app import config_dir
from prts.errors import InputError
from prts.features.encoders import Timm, encoder_from_settings
from prts.features.encoders.timm_model import _built
from prts.features.weights import as_dinov2

# As the model cards have them: million parameters, width, tokens before those of the patches, patches along a side at 224 px.
PUBLISHED = {
    "phikon_v2": (303, 1024, 1, 14),
    "hibou_b": (86, 768, 5, 16),
    "hibou_l": (304, 1024, 5, 16),
    "h0_mini": (86, 768, 5, 16),
    "h_optimus_0": (1134, 1536, 5, 16),
    "h_optimus_1": (1134, 1536, 5, 16),
    "uni": (303, 1024, 1, 14),
    "uni2_h": (681, 1536, 9, 16),
    "virchow2": (631, 1280, 5, 16),
    "midnight": (1136, 1536, 1, 16),
    "gigapath": (1135, 1536, 1, 14),
    "lunit_vits16": (22, 384, 1, 14),
    "lunit_vits8": (22, 384, 1, 28),
}
SWIN = "ctranspath"


def preset(name: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", ["tissue=lung", f"encoder={name}"]).encoder, resolve=True)
    assert config.pop("name") == "timm"
    assert config.pop("augment") == 0  # of training, not of the encoder
    return config


def network(config: dict[str, Any], **kwargs: Any) -> torch.nn.Module:
    import timm

    given = {**(config["kwargs"] or {}), **kwargs}
    return timm.create_model(config["model_name"], img_size=config["tile_px"], num_classes=0, **_built(given))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any way to the hub fails."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models.load_model_config_from_hf", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_is_the_published_one(name: str) -> None:
    """On torch's meta device, which computes shapes and no numbers."""
    millions, width, prefix, grid = PUBLISHED[name]
    config = preset(name)
    with torch.device("meta"):
        made: Any = network(config)
        tokens = made.forward_features(torch.empty(1, 3, 224, 224))
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert tokens.shape == (1, prefix + grid**2, width)
    assert made.num_prefix_tokens == prefix
    assert config["mpp"] == 0.5 and config["tile_px"] == 224 and config["hub"].count("/") == 1
    # registers share no position with patches; LayerScale is there if the weights have it
    has_scale = any(key.endswith("ls1.gamma") for key in made.state_dict())
    assert has_scale != name.startswith("lunit")


def in_transformers(made: Any) -> dict[str, torch.Tensor]:
    """A DINOv2 network in the layout of `transformers`, whose class token has a position of its own."""
    out = {}
    for key, tensor in made.state_dict().items():
        name = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        if hasattr(made.blocks[0].mlp, "gate_last"):
            name = name.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out")
        if "attn.qkv" in key:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[name.replace("attn.qkv", f"attention.attention.{part}")] = piece.clone()
        elif key == "reg_token":
            out["embeddings.register_tokens"] = tensor
        elif key not in ("cls_token", "pos_embed"):
            out[name.replace("norm.", "layernorm.") if key.startswith("norm.") else name] = tensor
    cls, positions = made.state_dict()["cls_token"], made.state_dict()["pos_embed"]
    if made.reg_token is not None:
        own = torch.full_like(cls, 0.25)
        cls, positions = cls - own, torch.cat([own, positions], dim=1)
    out |= {"embeddings.cls_token": cls, "embeddings.position_embeddings": positions}
    return {**out, "embeddings.mask_token": torch.zeros_like(cls[0])}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as version 5 of `transformers` names them."""
    out = {}
    for key, tensor in tensors.items():
        for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            key = key.replace(f"attention.attention.{old}", f"attention.{new}")
        key = key.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        if "weights_in" in key:
            gate, up = tensor.chunk(2)
            out |= {key.replace("weights_in", "gate_proj"): gate, key.replace("weights_in", "up_proj"): up}
        else:
            out[key] = tensor
    return out


def in_transformers_5(made: Any) -> dict[str, torch.Tensor]:
    return renamed(in_transformers(made))


@pytest.mark.parametrize("name", ["phikon_v2", "hibou_b", "hibou_l", "midnight"])
def test_files_of_transformers_have_every_tensor_of_the_network(name: str) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    with torch.device("meta"):
        made: Any = network(preset(name))
        tensors = checkpoint_filter_fn(as_dinov2(in_transformers(made)), made)
    found = {key: tensor.shape for key, tensor in tensors.items()}
    assert found == {key: tensor.shape for key, tensor in made.state_dict().items()}


def encoded(encoder: Timm, made: torch.nn.Module, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder gives for a tile, and the tokens of the network fed by hand."""
    tile = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(tile / 255.0) - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    with torch.inference_mode():
        tokens = made.eval().forward_features(pixels.permute(0, 3, 1, 2).float())
    pooled, _ = encoder.encode(tile, np.array([shapely.box(100, 100, 124, 124)]))
    return pooled[0], tokens.numpy()


def filled(made: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random: those that start at 0 or 1 would hide a wrong name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).mul_(0.05).add_(0.1))
    return made


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "layout", "smaller"),
    [
        ("lunit_vits16", None, {}),
        ("h0_mini", None, {"depth": 2}),
        ("virchow2", None, {"depth": 1}),
        ("phikon_v2", in_transformers, {"depth": 2}),
        ("hibou_b", in_transformers, {"depth": 2}),
        ("midnight", in_transformers, {"depth": 1}),
        ("hibou_b", in_transformers_5, {"depth": 1}),
        pytest.param("h0_mini", None, {}, marks=pytest.mark.nightly),
        pytest.param("hibou_b", in_transformers, {}, marks=pytest.mark.nightly),
        pytest.param("phikon_v2", in_transformers, {}, marks=pytest.mark.nightly),
    ],
)
def test_a_local_file_loads_without_the_hub(
    name: str, layout: Callable[[Any], dict[str, torch.Tensor]] | None, smaller: dict[str, int], tmp_path: Path
) -> None:
    config = preset(name)
    made = filled(network(config, **smaller))
    tensors = made.state_dict() if layout is None else layout(made)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "w.safetensors")
    config |= {"weights": tmp_path / "w.safetensors", "precision": "fp32", "device": "cpu", "batch_size": 1}
    config["kwargs"] = {**(config["kwargs"] or {}), **smaller} or None
    encoder = Timm(**config)
    pooled, tokens = encoded(encoder, made, config)
    np.testing.assert_allclose(pooled, tokens[0, 0], rtol=1e-3, atol=1e-4)
    assert encoder.local_width == PUBLISHED[name][1]
    again = encoder_from_settings(encoder.settings(), tmp_path / "w.safetensors", device="cpu")
    assert again.settings() == encoder.settings()


@pytest.mark.usefixtures("offline")
def test_ctranspath_loads_its_own_file(tmp_path: Path) -> None:
    """Swin-T as timm 0.5 named it: a stage's reduction is at its end, and buffers are kept."""
    config = preset(SWIN)
    made: Any = filled(network(config))
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e6, 1) == 27.5
    old = {}
    for key, tensor in made.state_dict().items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        old[key] = tensor
    assert {old[f"patch_embed.proj.{k}.weight"].shape[:2] for k in (0, 3, 6)} == {(12, 3), (24, 12), (96, 24)}
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": old}, tmp_path / "ctranspath.pth")
    config |= {"weights": tmp_path / "ctranspath.pth", "precision": "fp32", "device": "cpu", "batch_size": 1}
    encoder = Timm(**{**config, "checkpoint_key": "model"})
    pooled, tokens = encoded(encoder, made, config)
    assert tokens.shape == (1, 7, 7, 768)
    np.testing.assert_allclose(pooled, tokens.mean(axis=(0, 1, 2)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"checkpoint_path": "w.pth"}, "checkpoint_path is not an argument of the network but set by prts; omit it"),
        ({"pretrained_cfg": {}}, "pretrained_cfg is not an argument of the network"),
        ({"mlp_layer": "SwiGLUPackd"}, "mlp_layer 'SwiGLUPackd' is not known, did you mean 'SwiGLUPacked'"),
        ({"embed_layer": "os.system"}, "embed_layer 'os.system' is not known.*choose one of ConvStem"),
    ],
)
def test_arguments_that_are_not_the_networks_are_refused(kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=f"encoder.kwargs: {why}"):
        Timm("vit_small_patch16_224", kwargs=kwargs)


def test_a_mistyped_argument_is_refused_when_the_network_is_built(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"encoder.kwargs: test_vit cannot be built with these \(.*depht"):
        Timm("test_vit", tmp_path / "w.safetensors", kwargs={"depht": 3}, device="cpu").load()
