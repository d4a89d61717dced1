from __future__ import annotations

import argparse
import inspect
import shutil
import urllib.request

import numpy as np
import pytest
import shapely
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import prts._torchvision  # noqa: F401  (before timm)
from prts.cli.app import config_dir
from prts.errors import InputError
from prts.features.encoders import Classical, DinoViTS16, Timm, ViT256, encoder_from_settings, encoders, weights_status
from prts.features.encoders import tokens as tokens_module
from prts.features.pooling import patch_overlap
from prts.features.token_network import TokenNetwork
from prts.features.weights import dino_position_embedding, read_weights

# Where a tile is in a batch decides the order in which some kernels add, on Intel's AMX for one: fp32 differs in the last bits, and in bf16
# each of them may turn a rounding. Bytes are the same on one machine with the same batches (test_extract).
_FP32_TOLERANCE, _BF16_TOLERANCE = 1e-5, 0.01


def _assert_close(got, expected, tolerance):
    """Equal but for a small share of the vectors' length."""
    assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def _vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        **{"img_size": 224, "patch_size": 16, "embed_dim": 384, "num_heads": 6, "num_classes": 0, **options}
    )


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    tensors = {key: tensor.half().float() for key, tensor in _vit().state_dict().items()}
    tensors["pos_embed"] = (torch.randn(1, 197, 384) * 0.2).half().float()
    return tensors


@pytest.fixture(scope="module")
def checkpoint(tensors, tmp_path_factory):
    """A random ViT-S/16 in the layout of a DINO training checkpoint."""
    path = tmp_path_factory.mktemp("weights") / "dino vit,s=16.pth"
    teacher = {f"module.backbone.{key}": tensor.half() for key, tensor in tensors.items()}
    teacher["module.head.mlp.0.weight"] = torch.zeros(3)
    torch.save({"teacher": teacher, "student": {}, "args": argparse.Namespace(arch="vit_small"), "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def nuclei():
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    return tiles, shapely.buffer(shapely.points(rng.uniform(122, 134, (5, 2))), rng.uniform(4, 25, 5))


def _by_hand(tensors, tiles, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """CLS and patch tokens (b, 16, 16, 384) from timm's own network, built and fed separately."""
    network = _vit(img_size=256).eval()
    network.load_state_dict({**tensors, "pos_embed": dino_position_embedding(tensors["pos_embed"], 16)})
    pixels = (torch.from_numpy(tiles / 255.0) - torch.tensor(mean)) / torch.tensor(std)
    with torch.inference_mode():
        tokens = network.forward_features(pixels.permute(0, 3, 1, 2).float()).numpy()
    return tokens[:, 0], tokens[:, 1:].reshape(-1, 16, 16, 384)


def test_a_layer_ends_the_network_after_that_block(tmp_path, nuclei):
    import timm

    name = "test_vit.r160_in1k"
    torch.manual_seed(1)
    whole = timm.create_model(name, pretrained=False, img_size=256).eval()
    torch.save(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "w.pth")
    tiles, polygons = nuclei
    depth = len(whole.blocks)
    made = {layer: Timm(name, tmp_path / "w.pth", precision="fp32", layer=layer) for layer in (1, depth, None)}
    vectors = {layer: encoder.encode(tiles, polygons) for layer, encoder in made.items()}
    for of_all, of_last in zip(vectors[None], vectors[depth], strict=True):
        np.testing.assert_array_equal(of_all, of_last)
    network = made[None]._network.network
    scaled = (torch.from_numpy(tiles / 255.0).float() - torch.tensor(made[1].mean)) / torch.tensor(made[1].std)
    with torch.inference_mode():
        # the first block by hand, then the network's last norm
        x = network._pos_embed(network.patch_embed(scaled.permute(0, 3, 1, 2)))
        x = network.norm(network.blocks[0](network.norm_pre(x)))
    _assert_close(vectors[1][0], x[:, 0].numpy(), _FP32_TOLERANCE)
    assert len(made[1]._network.network.blocks) == 1  # the others are not computed
    assert made[1].settings()["layer"] == 1 and "layer" not in made[None].settings()
    assert encoder_from_settings(made[1].settings(), tmp_path / "w.pth").layer == 1
    with pytest.raises(InputError, match=f"^encoder.layer: {depth + 1} is not one of the {depth} blocks"):
        Timm(name, tmp_path / "w.pth", layer=depth + 1).load()
    with pytest.raises(InputError, match=r"^encoder.layer: 13 is not a block of this network; choose 1 to 12"):
        ViT256(tmp_path / "w.pth", layer=13)
    torch.save(timm.create_model("test_convnext", pretrained=False).state_dict(), tmp_path / "c.pth")
    with pytest.raises(InputError, match=r"^encoder.layer: ConvNeXt has no transformer blocks in a row; omit it"):
        Timm("test_convnext", tmp_path / "c.pth", layer=1).load()


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "local_width"), [("nucleus", 192), ("center2x2", None)])
def test_vit256_equals_timm_fed_by_hand(checkpoint, tensors, nuclei, pooling, local_width):
    encoder = ViT256(checkpoint, pooling=pooling, local_width=local_width, precision="fp32", batch_size=4)
    assert (encoder.global_width, encoder.local_width) == (384, local_width or 384)
    pooled, local = encoder.encode(*nuclei)
    cls, patches = _by_hand(tensors, nuclei[0])
    np.testing.assert_allclose(pooled, cls, atol=1e-4)
    if pooling == "nucleus":
        mask = patch_overlap(nuclei[1])
        expected = np.stack(
            [p[m].mean(axis=0).reshape(192, 2).mean(axis=1) for p, m in zip(patches, mask, strict=True)]
        )
    else:
        expected = patches[:, 7:9, 7:9].mean(axis=(1, 2))
    np.testing.assert_allclose(local, expected, atol=1e-4)
    assert pooled.dtype == local.dtype == np.float32


@pytest.mark.parametrize(
    "kind",
    ["small", pytest.param("vit256", marks=pytest.mark.slow), pytest.param("vit256 bf16", marks=pytest.mark.nightly)],
)
def test_same_vector_wherever_in_a_batch(kind, request, nuclei, tmp_path):
    tiles, polygons = nuclei
    if kind == "small":
        path = _timm_weights("test_vit.r160_in1k", tmp_path / "vit.pth")
        encoder = Timm("test_vit.r160_in1k", path, batch_size=4)
    else:
        precision = "bf16" if "bf16" in kind else "fp32"
        encoder = ViT256(request.getfixturevalue("checkpoint"), precision=precision, batch_size=4)
    tolerance = _BF16_TOLERANCE if encoder.precision == "bf16" else _FP32_TOLERANCE
    pooled, local = encoder.encode(tiles, polygons)
    for got, whole in zip(encoder.encode(tiles, polygons), (pooled, local), strict=True):
        np.testing.assert_array_equal(got, whole)  # the same batches
    order = np.array([4, 2, 0, 1, 3])
    for got, whole in zip(encoder.encode(tiles[order], polygons[order]), (pooled, local), strict=True):
        for k, j in enumerate(order):
            _assert_close(got[k], whole[j], tolerance)
    for got, whole in zip(encoder.encode(tiles[3:4], polygons[3:4]), (pooled, local), strict=True):
        _assert_close(got[0], whole[3], tolerance)
    none = encoder.encode(tiles[:0], polygons[:0])
    assert [part.shape for part in none] == [(0, encoder.global_width), (0, encoder.local_width)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_attention_is_fused_attention(checkpoint, nuclei, precision, monkeypatch):
    results = []
    for plain in (True, False):
        monkeypatch.setattr(tokens_module, "plain_attention_is_faster", lambda *_, plain=plain: plain)
        encoder = ViT256(checkpoint, precision=precision, batch_size=5)
        encoder.load()
        assert [block.attn.fused_attn for block in encoder._network.network.blocks] == [not plain] * 12
        results.append(encoder.encode(*nuclei))
    for a, b in zip(*results, strict=True):
        assert np.linalg.norm(a - b) < {"fp32": 1e-5, "bf16": 0.02}[precision] * np.linalg.norm(a)


@pytest.fixture
def small_weights(tmp_path):
    return _timm_weights("test_vit.r160_in1k", tmp_path / "vit.pth")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_is_the_same_network(small_weights, nuclei):
    plain, compiled = (
        Timm("test_vit.r160_in1k", small_weights, precision="fp32", batch_size=4, compile=compile)
        for compile in (False, True)
    )
    for encoder in (plain, compiled):
        encoder.compile_for(5)
    assert (plain.compiled, compiled.compiled) == (False, True)
    for a, b in zip(plain.encode(*nuclei), compiled.encode(*nuclei), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # the same wherever in a batch, as without
    _assert_close(
        compiled.encode(nuclei[0][3:4], nuclei[1][3:4])[0][0], compiled.encode(*nuclei)[0][3], _FP32_TOLERANCE
    )


def test_compiling_is_decided_by_the_number_of_tiles(small_weights, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    encoder = Timm("test_vit.r160_in1k", small_weights, batch_size=4, device="cpu")
    for n_tiles, expected in (
        (tokens_module._COMPILE_FROM - 1, False),
        (tokens_module._COMPILE_FROM, True),
        (5, False),
    ):
        encoder.compile_for(n_tiles)
        assert encoder.compiled is expected


def test_where_nothing_can_be_compiled(small_weights, nuclei, monkeypatch, caplog):
    def no_compiler(*_, **__):
        raise RuntimeError("no g++\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    asked = Timm("test_vit.r160_in1k", small_weights, batch_size=4, device="cpu", compile=True)
    with pytest.raises(InputError, match=r"^encoder.compile: torch cannot compile here \(no g\+\+\)"):
        asked.compile_for(5)
    auto = Timm("test_vit.r160_in1k", small_weights, batch_size=4, device="cpu")
    auto.compile_for(tokens_module._COMPILE_FROM)
    assert "continuing without" in caplog.text and not auto.compiled
    auto.encode(*nuclei)


@pytest.mark.slow
def test_bf16_is_close_to_fp32(checkpoint, nuclei):
    exact, rounded = (ViT256(checkpoint, precision=p, batch_size=5).encode(*nuclei) for p in ("fp32", "bf16"))
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)


def test_patch_tokens_are_row_by_row():
    """One bright patch in row 3, column 11 lights up that token, through a network that only averages patches."""
    network = _vit(img_size=256, depth=0, final_norm=False)
    torch.nn.init.zeros_(network.pos_embed)
    torch.nn.init.constant_(network.patch_embed.proj.weight, 1.0 / (3 * 256))
    torch.nn.init.zeros_(network.patch_embed.proj.bias)
    tiles = torch.zeros((1, 256, 256, 3), dtype=torch.uint8)
    tiles[0, 3 * 16 : 4 * 16, 11 * 16 : 12 * 16] = 255
    with torch.inference_mode():
        _, patches = TokenNetwork(network, (0.5,) * 3, (0.5,) * 3, 256)(tiles)
    assert patches.shape == (1, 16, 16, 384)
    torch.testing.assert_close(patches[0, 3, 11], torch.ones(384))
    assert (patches > 0).sum() == 384


def test_position_embedding_is_interpolated_as_in_dino():
    from timm.layers import resample_abs_pos_embed

    embedding = torch.randn(1, 197, 8, generator=torch.Generator().manual_seed(0))
    ours = dino_position_embedding(embedding, 16)
    torch.testing.assert_close(ours[:, 0], embedding[:, 0])
    assert dino_position_embedding(embedding, 14) is embedding

    # Cubic convolution (a = -0.75) by hand, along one axis and then the other; output i is sampled at (i + .5) * 14 / 16.1 - .5.
    def kernel(d):
        d, a = np.abs(d), -0.75
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    weights = np.zeros((16, 14))
    for i in range(16):
        at = (i + 0.5) * 14 / 16.1 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), 13)] += kernel(at - j)
    grid = embedding[0, 1:].numpy().reshape(14, 14, 8)
    by_hand = np.einsum("ia,jb,abc->ijc", weights, weights, grid).reshape(256, 8)
    np.testing.assert_allclose(ours[0, 1:].numpy(), by_hand, atol=1e-5)

    # Smooth embeddings, such as trained ones, come out of timm's resampling nearly the same.
    y, x = torch.meshgrid(torch.linspace(0, 3, 14), torch.linspace(0, 3, 14), indexing="ij")
    smooth = torch.cat([torch.zeros(1, 1, 2), torch.stack([x.sin(), y.cos()], dim=-1).reshape(1, 196, 2)], dim=1)
    timms = resample_abs_pos_embed(smooth, [16, 16])
    assert (dino_position_embedding(smooth, 16) - timms).norm() < 0.03 * timms.norm()


def test_weights_file_layouts_are_equal(checkpoint, tensors, tmp_path):
    from safetensors.torch import save_file

    flat, safe = tmp_path / "flat.pth", tmp_path / "vit.safetensors"
    torch.save({f"backbone.{key}": tensor for key, tensor in tensors.items()}, flat)
    save_file(tensors, safe)
    for path in (flat, safe, checkpoint):
        read = {key: tensor for key, tensor in read_weights(path, "teacher").items() if not key.startswith("head.")}
        assert read.keys() == tensors.keys()
        assert all(
            torch.equal(read[key], tensor) and read[key].dtype == torch.float32 for key, tensor in tensors.items()
        )


class _Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda t: {"teacher": {k: v for k, v in t.items() if k != "norm.bias"}}, "lacks norm.bias"),
        (lambda t: {"teacher": {**t, "fc_norm.weight": t["norm.bias"]}}, "also has fc_norm.weight"),
        (
            lambda t: {"teacher": {**t, "cls_token": torch.zeros(1, 1, 768)}},
            r"cls_token \(1, 1, 768\) instead of \(1, 1, 384\)",
        ),
        (lambda t: {"state_dict": t}, "it holds state_dict; set `checkpoint_key`"),
        (lambda t: {"teacher": _Evil()}, "not a checkpoint that can be read safely"),
        (lambda t: {"teacher": {**t, 1: torch.zeros(3)}}, "names a tensor 1"),
        (lambda t: [1, 2], "it holds list"),
        (None, "not a checkpoint that can be read safely"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(tensors, tmp_path, content, why, capsys):
    path = tmp_path / "weights.pth"
    if content is None:
        path.write_text("<html>not found</html>")
    else:
        # A number seen as a tensor of each shape: a small file.
        torch.save(content({key: torch.zeros(()).expand(tensor.shape) for key, tensor in tensors.items()}), path)
    with pytest.raises(InputError, match=why) as caught:
        ViT256(path).load()
    assert "weights.pth" in str(caught.value) and "\n" not in str(caught.value)
    assert "run" not in capsys.readouterr().out


def test_no_weights_says_where_they_are(tmp_path):
    with pytest.raises(
        InputError, match=r"encoder.weights: not given.*vit256_small_dino.pth.*github.com/mahmoodlab/HIPT"
    ):
        ViT256().settings()
    with pytest.raises(InputError, match=r"gone.pth: no such file.*HIPT"):
        ViT256(tmp_path / "gone.pth").load()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pooling": "mean"}, "encoder.pooling: 'mean'"),
        ({"local_width": 100}, "encoder.local_width: 100"),
        ({"precision": "fp16"}, "encoder.precision: 'fp16'"),
        ({"device": "gpu"}, "encoder.device: 'gpu'"),
        ({"mean": [0.5]}, "encoder.mean"),
        ({"std": [0.5, 0.0, 0.5]}, "encoder.std"),
        ({"batch_size": 0}, "encoder.batch_size"),
        ({"compile": "yes"}, "encoder.compile: 'yes'"),
        ({"mpp": 0.0}, "encoder.mpp: 0.0"),
        ({"tile_px": 16}, "encoder.tile_px: 16"),
        ({"tile_px": 250}, "encoder.tile_px: 250 is not a multiple of the patch, 16 px"),
        ({"sampling": "grid", "tile_px": 64}, "encoder.stride: 128 leaves gaps between tiles of 64 px"),
        ({"poling": "nucleus"}, "encoder.poling: vit256 has no such setting, did you mean 'pooling'"),
    ],
)
def test_wrong_options_are_refused(checkpoint, options, why):
    with pytest.raises(InputError, match=why):
        ViT256(checkpoint, **options)


def _timm_weights(name, path):
    import timm

    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False)
    torch.save(network.state_dict(), path)
    return path


def test_widths_of_a_timm_vit_follow_from_it(tmp_path, nuclei):
    import timm

    path = _timm_weights("test_vit.r160_in1k", tmp_path / "vit.pth")
    encoder = Timm(
        "test_vit.r160_in1k", path, mean=(0.1, 0.2, 0.3), precision="fp32", batch_size=4, pair_channels=False
    )
    pooled, local = encoder.encode(*nuclei)
    network = timm.create_model("test_vit.r160_in1k", pretrained=False, img_size=256, num_classes=0).eval()
    tensors = {k: v for k, v in read_weights(path).items() if not k.startswith("head.")}
    from timm.layers import resample_abs_pos_embed

    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [16, 16])
    network.load_state_dict(tensors)
    std = timm.get_pretrained_cfg("test_vit.r160_in1k").std
    pixels = (torch.from_numpy(nuclei[0] / 255.0) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(std)
    with torch.inference_mode():
        tokens = network.forward_features(pixels.permute(0, 3, 1, 2).float()).numpy()
    assert (encoder.global_width, encoder.local_width) == (64, 64)
    np.testing.assert_allclose(pooled, tokens[:, 0], atol=1e-4)
    mask = patch_overlap(nuclei[1])
    np.testing.assert_allclose(local[2], tokens[2, 1:].reshape(16, 16, 64)[mask[2]].mean(axis=0), atol=1e-4)


def test_a_feature_map_serves_as_tokens(tmp_path, nuclei):
    name = "test_resnet.r160_in1k"
    encoder = Timm(name, _timm_weights(name, tmp_path / "r.pth"), precision="fp32", batch_size=5)
    pooled, local = encoder.encode(*nuclei)
    assert pooled.shape[1] == encoder.global_width == 2 * encoder.local_width
    with torch.inference_mode():
        features = encoder._network(torch.from_numpy(nuclei[0]))[1].numpy()
    np.testing.assert_allclose(pooled, features.mean(axis=(1, 2)), atol=1e-4)
    mask = patch_overlap(nuclei[1], 256, 256 / features.shape[1])
    expected = features[0][mask[0]].mean(axis=0).reshape(-1, 2).mean(axis=1)
    np.testing.assert_allclose(local[0], expected, atol=1e-5)


def test_timm_weights_of_another_model_are_refused(tmp_path):
    path = _timm_weights("test_resnet.r160_in1k", tmp_path / "r.pth")
    with pytest.raises(InputError, match=r"r\.pth: does not fit test_vit\.r160_in1k"):
        Timm("test_vit.r160_in1k", path).load()


def test_a_mistyped_model_gets_the_nearest_name(tmp_path):
    with pytest.raises(InputError, match=r"'vit_smal_patch16_224'; did you mean .*vit_small_patch16_224"):
        Timm("vit_smal_patch16_224").settings()


def test_without_a_network_the_way_around_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(
        InputError, match=r"encoder.weights: vit_small_patch16_224.dino.*cannot be reached.*`weights`"
    ) as caught:
        DinoViTS16().settings()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_dino_from_a_file_is_the_same_network(checkpoint, nuclei):
    """The two read the same checkpoint; only the interpolation of the position embedding differs, by about 1 %."""
    ours = ViT256(checkpoint, precision="fp32", batch_size=5).encode(*nuclei)[0]
    timms = DinoViTS16(
        checkpoint, mean=(0.5,) * 3, std=(0.5,) * 3, checkpoint_key="teacher", precision="fp32", batch_size=5
    )
    assert np.linalg.norm(timms.encode(*nuclei)[0] - ours) < 0.2 * np.linalg.norm(ours)


def test_an_encoder_is_made_again_from_its_settings(checkpoint, tmp_path):
    encoder = ViT256(
        checkpoint, mean=(0.4, 0.5, 0.6), pooling="center2x2", local_width=None, precision="fp32", batch_size=5
    )
    settings = encoder.settings()
    again = encoder_from_settings(settings, checkpoint, batch_size=5)
    assert again.settings() == settings
    classical = encoder_from_settings(Classical().settings())
    assert classical.settings() == Classical().settings()

    other = tmp_path / "other.pth"
    other.write_bytes(b"other weights")
    with pytest.raises(
        InputError, match=rf"encoder.weights: .*other.pth has sha256 {'[0-9a-f]' * 64}, .*{settings['weights_sha256']}"
    ):
        encoder_from_settings(settings, other)
    with pytest.raises(InputError, match=r"not given.*HIPT"):
        encoder_from_settings(settings)
    with pytest.raises(
        InputError, match="encoder: 'resnet9000' is not registered; choose one of classical, dino_vits16"
    ):
        encoder_from_settings({"name": "resnet9000"})
    for odd in (
        {key: value for key, value in Classical().settings().items() if key != "pooling"},
        {**settings, "mean": 3},
        {**settings, "std": "0.5"},
    ):
        with pytest.raises(InputError, match="encoder"):
            encoder_from_settings(odd, checkpoint)
    assert weights_status(Classical().settings()).found
    assert weights_status(settings, str(checkpoint)) == (True, f"vit256: {checkpoint}")
    found, text = weights_status(settings, str(other))
    assert not found and settings["weights_sha256"] in text and "other.pth" in text


def test_classical_features_of_another_version_are_refused():
    with pytest.raises(
        InputError,
        match=r"version of the classical features is 1 .* 0 in the model; predict with the version",
    ):
        encoder_from_settings({**Classical().settings(), "version": 0})


@pytest.mark.parametrize(
    ("trained", "here", "warned"), [("bf16", "fp32", True), ("bf16", "bf16", False), ("fp32", "fp32", False)]
)
def test_features_in_another_precision_than_in_training_are_warned_of(
    checkpoint, monkeypatch, caplog, trained, here, warned
):
    settings = ViT256(checkpoint, precision=trained).settings()
    monkeypatch.setattr("prts.features.encoders.tokens.encoding_precision", lambda precision, device: here)
    assert encoder_from_settings(settings, checkpoint).precision == here
    assert ("trained on features in bf16" in caplog.text) == warned


def test_settings_follow_what_changes_the_features(checkpoint):
    def settings(**options):
        return ViT256(checkpoint, **{"precision": "fp32", **options}).settings()

    base = settings()
    for options in (
        {"mean": (0, 0, 0)},
        {"std": (1, 1, 1)},
        {"pooling": "center2x2"},
        {"local_width": None},
        {"precision": "bf16"},
        {"mpp": 1.0},
        {"tile_px": 224},
    ):
        assert settings(**options) != base
    assert settings(batch_size=3) == base


@pytest.mark.parametrize(
    ("name", "kind"), [("vit256", ViT256), ("dino_vits16", DinoViTS16), ("timm", Timm), ("classical", Classical)]
)
def test_configs_hold_the_constructors_defaults(name, kind):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", ["tissue=lung", f"encoder={name}"]).encoder, resolve=True)
    assert encoders[config.pop("name")] is kind
    assert config.pop("augment") == 0  # of training, not of the encoder
    parameters = inspect.signature(kind).parameters
    assert set(config) == set(parameters)
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert config[key] == default, key


@pytest.mark.real
def test_real_weights_on_real_tissue(prts_data):
    """Released-size weights: CLS and centre tokens equal timm's network fed by hand, on tissue."""
    import tifffile

    path = prts_data / "weights" / "vits16_dinov2_fp16.pth"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    page = tifffile.imread(prts_data / "her2st_hd" / "C2" / "tissue_image.tif")
    tiles = np.stack([page[y : y + 256, 2600:2856] for y in (2000, 2400)])
    polygons = shapely.buffer(shapely.points([[128, 128]] * 2), 10)
    encoder = ViT256(path, mean=mean, std=std, precision="fp32", batch_size=2)
    pooled, local = encoder.encode(tiles, polygons)
    cls, patches = _by_hand(read_weights(path, "teacher"), tiles, mean, std)
    np.testing.assert_allclose(pooled, cls, atol=2e-3 * np.abs(cls).max())
    centre = patches[:, 7:9, 7:9].mean(axis=(1, 2)).reshape(2, 192, 2).mean(axis=2)
    np.testing.assert_allclose(
        local, centre, atol=2e-3 * np.abs(centre).max()
    )  # a disc of 10 px overlaps the central four
    rounded = ViT256(path, mean=mean, std=std, precision="bf16", batch_size=2).encode(tiles, polygons)[0]
    assert np.linalg.norm(rounded - cls) < 0.03 * np.linalg.norm(cls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu(checkpoint, nuclei):
    cpu = ViT256(checkpoint, precision="fp32", device="cpu", batch_size=5).encode(*nuclei)
    cuda = ViT256(checkpoint, precision="bf16", device="cuda", batch_size=5).encode(*nuclei)
    for a, b in zip(cpu, cuda, strict=True):
        assert np.linalg.norm(a - b) < 0.03 * np.linalg.norm(a)
