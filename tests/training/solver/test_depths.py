import pytest
import torch

from dropit.training.model.architectures import build_model
from dropit.training.solver.depths import layer_depths
from tests.training.solver.reference import network

DEPTHS = {
    # blocks, and the depth of some parameters
    "vit_b_16": (12, {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.weight": 0, "heads.head.weight": 13}),
    "vit_tiny": (4, {"encoder.layers.encoder_layer_2.mlp.0.weight": 3, "encoder.ln.weight": 5}),
    "resnet18": (
        8,
        {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 8, "fc.bias": 9},
    ),
    "resnet50": (16, {"layer2.0.downsample.0.weight": 4, "fc.weight": 17}),
    "convnext_tiny": (18, {"features.0.0.weight": 0, "features.2.1.weight": 3, "features.3.0.layer_scale": 4}),
    "swin_t": (15, {"features.1.0.attn.qkv.weight": 1, "features.2.reduction.weight": 3, "head.weight": 16}),
    "timm/vit_tiny_patch16_224": (
        12,
        {"pos_embed": 0, "blocks.3.attn.qkv.weight": 4, "norm.bias": 13, "head.bias": 13},
    ),
    "timm/convnext_tiny": (18, {"stem.0.weight": 0, "stages.3.blocks.2.gamma": 18, "head.fc.weight": 19}),
    "hf/vit": (12, {"vit.embeddings.cls_token": 0, "vit.layers.0.mlp.fc1.weight": 1, "classifier.weight": 13}),
    "hf/swin": (15, {"swin.encoder.layers.0.blocks.1.attention.q_proj.weight": 2, "classifier.weight": 16}),
    "densenet121": (7, {"features.conv0.weight": 0, "classifier.weight": 8}),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_counted_in_blocks(name):
    with torch.device("meta"):
        depths = layer_depths(build_model(name, 10, 224))
    blocks, some = DEPTHS[name]
    assert {key: depths[key] for key in some} == some
    assert set(depths.values()) == set(range(blocks + 2))


def test_a_model_without_blocks_is_counted_in_layers():
    depths = layer_depths(network())
    assert list(depths.values()) == [1, 1, 2, 2, 3, 3]
