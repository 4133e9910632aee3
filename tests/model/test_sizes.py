"""ViT sizes: recipes, model defaults, timm and the published weights agree with the one table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from maelstream.jobs.recipe import RECIPES, read_values
from maelstream.model.config import ClassifierConfig, MAEConfig
from maelstream.model.mae import MAE
from maelstream.model.memory import parameter_count, parameter_groups
from maelstream.model.optimise import weight_decay_groups
from maelstream.model.sizes import PAPER_SIZES, VIT_B16, VIT_H14, ViTSize, default_heads, family_name, paper_name

SIZED_RECIPES = sorted(path for path in RECIPES.rglob("*.yaml") if re.search(r"vit_[a-z]\d\d", path.stem))


@pytest.mark.parametrize("path", SIZED_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_named_after_an_encoder_has_the_size_of_that_encoder(path: Path) -> None:
    (name,) = re.findall(r"vit_[a-z]\d\d", path.stem)
    model = read_values(path)["model"]
    assert ViTSize(*(model[field] for field in ViTSize._fields)) == PAPER_SIZES[name]


def test_each_encoder_of_the_paper_has_a_pre_training_recipe() -> None:
    stems = {path.stem for path in SIZED_RECIPES}
    assert all(any(re.fullmatch(f"(pretrain_)?{name}", stem) for stem in stems) for name in PAPER_SIZES)


@pytest.mark.parametrize("config", [MAEConfig(), ClassifierConfig()], ids=["MAEConfig", "ClassifierConfig"])
def test_the_default_model_is_vit_b16(config: MAEConfig | ClassifierConfig) -> None:
    assert ViTSize(config.dim, config.depth, config.heads, config.patch_size) == VIT_B16


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("vit_b16", "vit_base_patch16_224"), ("vit_l16", "vit_large_patch16_224"), ("vit_h14", "vit_huge_patch14_224")],
)
def test_sizes_equal_those_of_timm(name: str, architecture: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(architecture)
    heads, patch_size = model.blocks[0].attn.num_heads, model.patch_embed.patch_size[0]
    assert ViTSize(model.embed_dim, len(model.blocks), heads, patch_size) == PAPER_SIZES[name]


def test_names_and_heads_follow_from_width_and_depth() -> None:
    assert [paper_name(size.dim, size.depth) for size in PAPER_SIZES.values()] == list(PAPER_SIZES)
    assert paper_name(384, 12) is None and family_name(384, 12) == "ViT-S"
    assert family_name(768, 11) == "ViT" and family_name(VIT_H14.dim, VIT_H14.depth) == "ViT-H"
    assert [default_heads(size.dim, size.depth) for size in PAPER_SIZES.values()] == [12, 16, 16]


@pytest.mark.parametrize(
    "config",
    [
        MAEConfig(),
        MAEConfig(**VIT_H14._asdict(), target="pca"),
        MAEConfig(encoder_mask_tokens=True, dim=264, heads=4, depth=3, mlp_ratio=2.5, decoder_depth=2, patch_size=14),
    ],
    ids=["ViT-B/16", "ViT-H/14 with PCA target", "mask tokens in the encoder"],
)
def test_parameter_groups_by_formula_equal_those_of_the_model(config: MAEConfig) -> None:
    with torch.device("meta"):
        groups = weight_decay_groups(MAE(config), 0.05)
    expected = tuple(tuple(parameter.numel() for parameter in group["params"]) for group in groups)
    assert parameter_groups(config) == expected
    assert parameter_count(config) == sum(map(sum, expected))


@pytest.mark.parametrize("module", ["config", "sizes", "flops", "memory"])
def test_modules_for_reading_and_planning_import_no_torch(module: str) -> None:
    heavy = {"torch", "timm", "deepspeed", "nvidia"}
    code = f"import sys, maelstream.model.{module}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
