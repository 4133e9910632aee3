"""Classifiers: logits and drop path equal the reference; initial weights; linear probes and partial fine-tuning."""

import json
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from maelstream.model.classifier import (
    FeatureNorm,
    build_classifier,
    drop_path_rates,
    encoder_weights,
    fresh_parameters,
    make_linear_probe,
    train_last_blocks,
)
from maelstream.model.config import ClassifierConfig, MAEConfig, Pool
from maelstream.model.mae import MAE
from maelstream.model.patches import normalise
from maelstream.model.position import interpolate_table

Golden = Callable[[str], Mapping[str, np.ndarray]]

SMALL = ClassifierConfig(classes=10, image_size=(64, 64), dim=64, depth=3, heads=4, drop_path=0.0)
POOLS: dict[str, Pool] = {"gp0": "class_token", "gp1": "mean"}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def small_mae(image_size: tuple[int, int] = (64, 64)) -> MAE:
    return MAE(MAEConfig(image_size, dim=64, depth=3, heads=4, decoder_dim=32, decoder_depth=1, decoder_heads=4))


@pytest.mark.parametrize("pool", POOLS)
def test_logits_and_names_equal_the_reference(golden: Golden, pool: str) -> None:
    vectors = golden("f64/vit_small")
    model = build_classifier(ClassifierConfig(**(vars(SMALL) | {"pool": POOLS[pool]}))).double().eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == json.loads(str(vectors[f"vit_small_{pool}_keys"]))
    for name, parameter in model.named_parameters():
        scale = name.endswith(".weight") and parameter.ndim == 1
        parameter.data.copy_(torch.from_numpy((0.05 * drawn(name, parameter.shape) + scale).astype(np.float32)))
    images = torch.from_numpy(drawn("images", (3, 3, 64, 64)).astype(np.float32)).double()
    np.testing.assert_allclose(model(images).detach(), vectors[f"vit_small_{pool}_logits_f64"], rtol=0, atol=1e-10)


def test_drop_path_grows_linearly_from_0(golden: Golden) -> None:
    with torch.device("meta"):
        rates = drop_path_rates(build_classifier(ClassifierConfig(drop_path=0.1)))
    np.testing.assert_allclose(rates, golden("f64/vit_small")["drop_path_base_0.1"], rtol=1e-6)


def test_a_new_classifier_depends_only_on_its_seed_and_starts_with_a_near_zero_head() -> None:
    model, same, other = build_classifier(SMALL, 1), build_classifier(SMALL, 1), build_classifier(SMALL, 2)
    for (name, parameter), again, different in zip(
        model.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, again)
        if parameter.ndim > 1:
            assert not torch.equal(parameter, different), name
            assert parameter.std().item() == pytest.approx(2e-5 if name == "head.weight" else 0.02, rel=0.15), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    assert model.pos_embed.requires_grad


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_a_classifier_starts_from_the_encoder_of_mae_weights(pool: Pool) -> None:
    """All but the new parameters come from the MAE weights, and features equal those of `MAE.encode`."""
    mae, config = small_mae().double(), ClassifierConfig(**(vars(SMALL) | {"pool": pool}))
    model = build_classifier(config).double()
    result = model.load_state_dict(encoder_weights(mae.state_dict(), config, (4, 4)), strict=False)
    assert set(result.missing_keys) == fresh_parameters(config) and not result.unexpected_keys
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        tokens = model.forward_features(normalise(images, mae.config.mean, mae.config.std).double())  # (B, 1+L, D)
        if pool == "mean":
            tokens = mae.norm(tokens)
        assert (tokens - mae.encode(images)).abs().max() < 1e-12


def test_another_image_size_gets_an_interpolated_table() -> None:
    mae, config = small_mae(), ClassifierConfig(**(vars(SMALL) | {"image_size": (96, 128)}))
    weights = encoder_weights(mae.state_dict(), config, (4, 4))
    assert torch.equal(weights["pos_embed"], interpolate_table(mae.pos_embed, (4, 4), (6, 8)))
    model = build_classifier(config)
    assert set(model.load_state_dict(weights, strict=False).missing_keys) == fresh_parameters(config)
    assert model(torch.zeros(1, 3, 96, 128)).shape == (1, 10)


def test_a_linear_probe_trains_only_a_linear_layer_after_a_batch_norm() -> None:
    model = build_classifier(ClassifierConfig(**(vars(SMALL) | {"pool": "class_token"})))
    make_linear_probe(model, seed=3)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.1.weight",
        "head.1.bias",
    ]
    norm, linear = model.head
    assert norm.eps == 1e-6 and not norm.affine and norm.momentum == 0.1
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1) and not linear.bias.any()
    images = torch.randn(8, 3, 64, 64)
    features = model.forward_head(model.forward_features(images), pre_logits=True)  # (B, D)
    logits = model.train()(images)
    spread = features.var(0, correction=0, keepdim=True).add(1e-6).sqrt()
    expected = linear((features - features.mean(0, keepdim=True)) / spread)
    assert (logits - expected).abs().max() < 1e-5
    logits.sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_a_probe_with_stochastic_depth_raises() -> None:
    with pytest.raises(ValueError, match=r"drop_path 0, not 0\.1"):
        make_linear_probe(build_classifier(ClassifierConfig(**(vars(SMALL) | {"drop_path": 0.1}))))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": (60, 64)}, r"image_size \(60, 64\) is not divisible"),
        ({"heads": 5}, "heads 5 does not divide dim 64"),
        ({"pool": "max"}, "pool 'max' is not one of mean, class_token"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
        ({"classes": 0}, "at least 1"),
    ],
)
def test_invalid_values_of_a_classifier_raise(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**(vars(SMALL) | values))


def test_feature_norm_uses_the_features_of_all_ranks() -> None:
    """Two ranks with equal features: the sum over ranks is twice the sum of one rank."""
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    shared, alone = FeatureNorm(4, torch.device("cpu")), torch.nn.BatchNorm1d(4, 1e-6, affine=False)
    shared.sum_over_ranks = lambda tensor: 2 * tensor
    for _ in range(3):
        expected = alone(torch.cat([features, features]))
        torch.testing.assert_close(shared(features), expected[:6])
    torch.testing.assert_close(shared.running_mean, alone.running_mean)
    torch.testing.assert_close(shared.running_var, alone.running_var)
    assert shared.eval()(features.bfloat16()).dtype == torch.bfloat16


def test_parallel_probes_start_from_equal_weights() -> None:
    model = build_classifier(ClassifierConfig(**(vars(SMALL) | {"pool": "class_token"})))
    make_linear_probe(model, seed=3, heads=2)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 2, 10) and torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("count", "trained"),
    [
        (0, {"head"}),
        (0.5, {"blocks.2.norm2", "blocks.2.mlp", "fc_norm", "head"}),
        (2, {"blocks.1", "blocks.2", "fc_norm", "head"}),
        (3, {"blocks.0", "blocks.1", "blocks.2", "fc_norm", "head"}),
    ],
)
def test_partial_fine_tuning_trains_only_the_last_blocks_and_the_head(count: float, trained: set[str]) -> None:
    model = build_classifier(SMALL)
    train_last_blocks(model, count)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if any(name.startswith(f"{part}.") for part in trained)}
    assert names == expected


@pytest.mark.parametrize("count", [-1, 1.5, 4])
def test_a_wrong_number_of_blocks_raises(count: float) -> None:
    with pytest.raises(ValueError, match=r"0, 0\.5 or a whole number up to 3"):
        train_last_blocks(build_classifier(SMALL), count)
