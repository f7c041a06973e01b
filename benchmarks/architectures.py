"""What thirty-one architectures of torchvision, timm and Hugging Face save for backward, plain and with DropIT.

    python benchmarks/architectures.py [--gamma 0.9]

Inputs are small and weights random: the ratio is what matters. The tests train each of them a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import dropit

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def image_classifier(name: str, size: int = 64, batch: int = 2, **options: Any) -> Case:
    """A torchvision classifier."""
    model = torchvision.models.get_model(name, num_classes=10, **options)
    images = torch.randn(batch, 3, size, size)
    return model, lambda m: _scalar(m(images))


def timm_classifier(name: str, size: int = 64, batch: int = 2, **options: Any) -> Case:
    """A timm classifier."""
    import timm

    model = timm.create_model(name, num_classes=10, **options)
    images = torch.randn(batch, 3, size, size)
    return model, lambda m: _scalar(m(images))


def bert() -> Case:
    """Hugging Face's BERT, small."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    tokens = torch.randint(100, (4, 32))
    return BertModel(config), lambda m: _scalar(m(tokens).last_hidden_state)


def gpt2() -> Case:
    """Hugging Face's GPT-2, small."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = torch.randint(100, (4, 32))
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4, **ends))
    return model, lambda m: nn.functional.cross_entropy(m(tokens).logits.flatten(0, 1), tokens.flatten())


def hugging_face_vit() -> Case:
    """Hugging Face's ViT, small."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    images = torch.randn(4, 3, 32, 32)
    return ViTModel(config), lambda m: _scalar(m(images).last_hidden_state)


def transformer_encoder() -> Case:
    """nn.TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    x = torch.randn(4, 32, 64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), lambda m: _scalar(m(x))


def faster_rcnn() -> Case:
    """torchvision's Faster R-CNN on MobileNet."""
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96
    )
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 96)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 50.0], [20.0, 30.0, 80.0, 70.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    return model, lambda m: sum(m(images, targets).values())


def _scalar(output: Any) -> Tensor:
    """A loss with a gradient in every output."""
    if isinstance(output, tuple):
        output = output[0]
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: image_classifier("resnet18"),
    "resnet50": lambda: image_classifier("resnet50"),
    "resnext50_32x4d": lambda: image_classifier("resnext50_32x4d"),
    "wide_resnet50_2": lambda: image_classifier("wide_resnet50_2", 32),
    "mobilenet_v2": lambda: image_classifier("mobilenet_v2"),
    "mobilenet_v3_small": lambda: image_classifier("mobilenet_v3_small"),
    "mnasnet0_5": lambda: image_classifier("mnasnet0_5"),
    "efficientnet_b0": lambda: image_classifier("efficientnet_b0"),
    "efficientnet_v2_s": lambda: image_classifier("efficientnet_v2_s"),
    "densenet121": lambda: image_classifier("densenet121"),
    "regnet_y_400mf": lambda: image_classifier("regnet_y_400mf"),
    "shufflenet_v2_x0_5": lambda: image_classifier("shufflenet_v2_x0_5"),
    "squeezenet1_1": lambda: image_classifier("squeezenet1_1"),
    "alexnet": lambda: image_classifier("alexnet", 96),
    "vgg11_bn": lambda: image_classifier("vgg11_bn", 32),
    "googlenet": lambda: image_classifier("googlenet", 64, aux_logits=False, init_weights=False),
    "convnext_tiny": lambda: image_classifier("convnext_tiny"),
    "swin_t": lambda: image_classifier("swin_t"),
    "swin_v2_t": lambda: image_classifier("swin_v2_t"),
    "maxvit_t": lambda: image_classifier("maxvit_t", 224, 1),
    "vit_b_32": lambda: image_classifier("vit_b_32", 224),
    "timm deit_tiny": lambda: timm_classifier("deit_tiny_patch16_224", 224),
    "timm mixer_s32": lambda: timm_classifier("mixer_s32_224", 224),
    "timm eva02_tiny": lambda: timm_classifier("eva02_tiny_patch14_224", 224),
    "timm tf_efficientnet_b0": lambda: timm_classifier("tf_efficientnet_b0"),
    "timm nf_resnet50": lambda: timm_classifier("nf_resnet50"),
    "hf bert": bert,
    "hf gpt2": gpt2,
    "hf vit": hugging_face_vit,
    "nn.TransformerEncoder": transformer_encoder,
    "fasterrcnn_mobilenet": faster_rcnn,
}


def cache_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Bytes that a forward pass saves for backward."""
    with dropit.CacheMeter(model, retain=False) as meter:
        value = loss(model)
    del value
    return meter.total_bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.9)
    args = parser.parse_args()
    print(f"fastmink, gamma {args.gamma}; torch {torch.__version__}, torchvision {torchvision.__version__}\n")
    print("| model | plain, MiB | dropping | int8 | layers converted |\n|---|---:|---:|---:|---:|")
    for name, make in ARCHITECTURES.items():
        torch.manual_seed(0)
        model, loss = make()
        plain = cache_bytes(model.train(), loss)
        cells = []
        for compress, gamma in (("lossless", args.gamma), ("int8", 0)):
            ours = cache_bytes(dropit.to_dropit(model, gamma=gamma, compress=compress), loss)
            cells.append(f"{ours / 2**20:.2f} ({ours / plain - 1:+.0%})")
        report = dropit.coverage(model)
        print(
            f"| {name} | {plain / 2**20:.2f} | {' | '.join(cells)} | {report.converted} of {len(report)} |", flush=True
        )


if __name__ == "__main__":
    main()
