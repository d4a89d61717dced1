from __future__ import annotations

import pytest
import torch
from torch import nn

from prts.errors import ParameterError
from prts.models.network import PRTSNet


def n_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameter_counts_are_the_papers() -> None:
    single = PRTSNet(576, 1820, heads="single")
    assert n_parameters(single) == 4_004_636 + 2 * 1820
    dual = PRTSNet(576, 1820, heads="dual")
    assert n_parameters(dual) == 4_004_636 + 1024 * 1820 + 1820 == 5_870_136


@pytest.mark.parametrize(
    ("order", "kinds"),
    [
        ("paper", [nn.Linear, nn.LeakyReLU, nn.BatchNorm1d, nn.Dropout]),
        ("released", [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]),
    ],
)
def test_hidden_layers_come_in_the_stated_order(order: str, kinds: list[type[nn.Module]]) -> None:
    net = PRTSNet(5, 3, hidden=(7, 6), order=order, dropout=0.3)
    assert [[type(layer) for layer in block] for block in net.body] == [kinds, kinds]
    assert [block[0].out_features for block in net.body] == [7, 6]
    assert net.body[0][3].p == 0.3


def test_forward_is_the_composition_of_its_layers() -> None:
    torch.manual_seed(0)
    net = PRTSNet(5, 3, hidden=(7,)).eval()
    net.body[0][2].running_mean.uniform_(-1, 1)
    net.body[0][2].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 5)
    linear, norm = net.body[0][0], net.body[0][2]
    hidden = x @ linear.weight.T + linear.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    hidden = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    level, logit = net(x)
    torch.testing.assert_close(level, hidden @ net.level.weight.T + net.level.bias)
    torch.testing.assert_close(logit, hidden @ net.logit.weight.T + net.logit.bias)


def test_a_single_head_derives_the_logit_from_the_level() -> None:
    net = PRTSNet(5, 3, hidden=(7,), heads="single").eval()
    with torch.no_grad():
        net.logit_slope.copy_(torch.tensor([1.0, 2.0, -1.0]))
        net.logit_offset.copy_(torch.tensor([0.0, 0.5, 3.0]))
    level, logit = net(torch.randn(4, 5))
    torch.testing.assert_close(logit, level * torch.tensor([1.0, 2.0, -1.0]) + torch.tensor([0.0, 0.5, 3.0]))
    logit.sum().backward()
    assert net.logit_slope.grad is not None and net.logit_offset.grad.tolist() == [4, 4, 4]


def test_a_rank_puts_factors_that_all_genes_share_before_the_outputs() -> None:
    torch.manual_seed(0)
    net = PRTSNet(5, 30, hidden=(7,), rank=2).eval()
    factors, (level, logit) = net.factors(net.body[0](x := torch.randn(9, 5))), net(x)
    torch.testing.assert_close(level, factors @ net.level.weight.T + net.level.bias)
    torch.testing.assert_close(logit, factors @ net.logit.weight.T + net.logit.bias)
    assert torch.linalg.matrix_rank(level - level.mean(dim=0)) == 2
    assert n_parameters(net) == n_parameters(PRTSNet(5, 30, hidden=(7,))) - 2 * 30 * (7 - 2) + 7 * 2 + 2


def test_standardised_input_equals_scaling_it_before() -> None:
    torch.manual_seed(0)
    plain = PRTSNet(5, 3, hidden=(7,)).eval()
    scaled = PRTSNet(5, 3, hidden=(7,), standardize=True).eval()
    scaled.load_state_dict(plain.state_dict(), strict=False)
    mean, scale = torch.randn(5) * 100, torch.rand(5) * 50 + 1
    scaled.set_input_scaling(mean, scale)
    x = torch.randn(4, 5)
    torch.testing.assert_close(scaled(x * scale + mean)[0], plain(x)[0], rtol=1e-4, atol=1e-4)
    assert "input_mean" in scaled.state_dict() and "input_mean" not in plain.state_dict()


def test_settings_rebuild_the_same_shape() -> None:
    net = PRTSNet(5, 3, hidden=(7, 9), order="released", dropout=0.2, heads="single", standardize=True, rank=4)
    again = PRTSNet(**net.settings())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert again.settings() == net.settings()


@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "other"},
        {"heads": "triple"},
        {"hidden": (7, -1)},
        {"hidden": (0,)},
        {"dropout": 1.0},
        {"hidden": 5},
        {"rank": 0},
        {"outputs": ("level", "body")},
    ],
)
def test_bad_options_name_their_key(arguments: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=rf"^network {next(iter(arguments))}: "):
        PRTSNet(5, 3, **arguments)
