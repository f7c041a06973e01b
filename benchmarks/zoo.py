"""Models of torchvision, timm, Hugging Face and diffusers, each with a loss: what architectures.py and the tests train.

Inputs are small, weights random, and what is not named by its size is small too, in the proportions of the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

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
    """A loss whose gradient differs from element to element, so that no normalization takes it out."""
    if isinstance(output, tuple):
        output = output[0]
    return (output * torch.arange(output.numel()).mul(0.7).cos().view_as(output)).sum()


# Of a language model; a gated MLP is 2.75 times as wide, another one four times.
_SHAPE = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {"intermediate_size": 704, "num_key_value_heads": 2}  # two queries for each key


def _hugging_face(kind: str, auto: str, **options: Any) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **options)
    return getattr(transformers, auto).from_config(config)  # type: ignore[no-any-return]


def causal(kind: str, **options: Any) -> Case:
    """A language model of Hugging Face's."""
    shape = {"intermediate_size": 1024, **_SHAPE, **_ENDS, "use_cache": False, **options}
    tokens = torch.randint(3, 512, (2, 128))
    return _hugging_face(kind, "AutoModelForCausalLM", **shape), lambda m: m(input_ids=tokens, labels=tokens).loss


def encoder(kind: str, **options: Any) -> Case:
    """An encoder of Hugging Face's, of text."""
    shape = {"intermediate_size": 1024, **_SHAPE, **options}
    tokens = torch.randint(3, 512, (2, 128))
    return _hugging_face(kind, "AutoModel", **shape), lambda m: _scalar(m(input_ids=tokens).last_hidden_state)


def translator(kind: str, **options: Any) -> Case:
    """An encoder and a decoder of Hugging Face's."""
    shape = {"vocab_size": 512, **_ENDS, "use_cache": False, "d_model": 256, **options}
    tokens = torch.randint(3, 512, (2, 128))
    return _hugging_face(kind, "AutoModelForSeq2SeqLM", **shape), lambda m: m(input_ids=tokens, labels=tokens).loss


def backbone(kind: str, **options: Any) -> Case:
    """A vision model of Hugging Face's."""
    images = torch.randn(2, 3, 64, 64)
    return _hugging_face(kind, "AutoModel", **options), lambda m: _scalar(m(pixel_values=images).last_hidden_state)


def unet() -> Case:
    """A UNet as of Stable Diffusion, conditioned on text."""
    from diffusers import UNet2DConditionModel

    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    shape = {"block_out_channels": (128, 256), "layers_per_block": 2, "cross_attention_dim": 256}
    model = UNet2DConditionModel(32, down_block_types=blocks[0], up_block_types=blocks[1], **shape)
    images, text, times = torch.randn(2, 4, 32, 32), torch.randn(2, 16, 256), torch.tensor([10, 500])
    return model, lambda m: _scalar(m(images, times, text).sample)


def diffusion_transformer() -> Case:
    """DiT, with four heads and two layers."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        4, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=16, num_embeds_ada_norm=10
    )
    images, labels, times = torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), torch.tensor([10, 500])
    return model, lambda m: _scalar(m(images, times, labels).sample)


def segmentation(name: str) -> Case:
    """A torchvision segmentation model."""
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    images = torch.randn(2, 3, 64, 64)
    return model, lambda m: _scalar(m(images)["out"])


def video(name: str) -> Case:
    """A torchvision video classifier."""
    model = torchvision.models.get_model(name, num_classes=10)
    clips = torch.randn(1, 3, 4, 64, 64)
    return model, lambda m: _scalar(m(clips))


_BART = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 1024))
}
_T5 = {"d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 352, "shared_expert_intermediate_size": 352}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}

ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "resnet18": lambda: image_classifier("resnet18"),
    "resnet50": lambda: image_classifier("resnet50"),
    "resnext50_32x4d": lambda: image_classifier("resnext50_32x4d"),
    "wide_resnet50_2": lambda: image_classifier("wide_resnet50_2"),
    "mobilenet_v2": lambda: image_classifier("mobilenet_v2"),
    "mobilenet_v3_small": lambda: image_classifier("mobilenet_v3_small"),
    "mnasnet0_5": lambda: image_classifier("mnasnet0_5"),
    "efficientnet_b0": lambda: image_classifier("efficientnet_b0", batch=8),
    "efficientnet_v2_s": lambda: image_classifier("efficientnet_v2_s", batch=8),
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
    "timm vit_small": lambda: timm_classifier("vit_small_patch16_224", 224),
    "timm mixer_s32": lambda: timm_classifier("mixer_s32_224", 224),
    "timm eva02_tiny": lambda: timm_classifier("eva02_tiny_patch14_224", 224),
    "timm tf_efficientnet_b0": lambda: timm_classifier("tf_efficientnet_b0", batch=8),
    "timm nf_resnet50": lambda: timm_classifier("nf_resnet50"),
    "hf bert": bert,
    "hf gpt2": gpt2,
    "hf vit": hugging_face_vit,
    "nn.TransformerEncoder": transformer_encoder,
    "fasterrcnn_mobilenet": faster_rcnn,
    "inception_v3": lambda: image_classifier("inception_v3", 96, aux_logits=False, init_weights=False),
    "deeplabv3_mobilenet": lambda: segmentation("deeplabv3_mobilenet_v3_large"),
    "fcn_resnet50": lambda: segmentation("fcn_resnet50"),
    "r3d_18": lambda: video("r3d_18"),
    "swin3d_t": lambda: video("swin3d_t"),
    "timm convnextv2_atto": lambda: timm_classifier("convnextv2_atto"),
    "timm caformer_s18": lambda: timm_classifier("caformer_s18"),
    "timm beit_base, 2 layers": lambda: timm_classifier("beit_base_patch16_224", 224, depth=2),
    "timm nfnet_f0": lambda: timm_classifier("nfnet_f0", 96),
    "timm resnetv2_50x1_bit": lambda: timm_classifier("resnetv2_50x1_bit"),
    "timm pvt_v2_b0": lambda: timm_classifier("pvt_v2_b0"),
    "timm xcit_nano": lambda: timm_classifier("xcit_nano_12_p16_224"),
    "diffusers UNet2DCondition": unet,
    "diffusers DiT": diffusion_transformer,
    "hf llama": lambda: causal("llama", **_GROUPED),
    "hf mistral": lambda: causal("mistral", **_GROUPED),
    "hf qwen2": lambda: causal("qwen2", **_GROUPED),
    "hf qwen3": lambda: causal("qwen3", head_dim=64, **_GROUPED),
    "hf gemma": lambda: causal("gemma", head_dim=64, **_GROUPED),
    "hf gemma2": lambda: causal("gemma2", head_dim=64, **_GROUPED),
    "hf phi": lambda: causal("phi"),
    "hf phi3": lambda: causal("phi3", **_GROUPED),
    "hf olmo2": lambda: causal("olmo2", **_GROUPED),
    "hf mixtral": lambda: causal("mixtral", num_local_experts=4, **_GROUPED),
    "hf qwen2_moe": lambda: causal("qwen2_moe", **_GROUPED, **_EXPERTS),
    "hf gpt_neox": lambda: causal("gpt_neox"),
    "hf opt": lambda: causal("opt", ffn_dim=1024, word_embed_proj_dim=256, max_position_embeddings=128),
    "hf bloom": lambda: causal("bloom", n_layer=2, n_head=4),
    "hf falcon": lambda: causal("falcon"),
    "hf gptj": lambda: causal("gptj", n_embd=256, n_layer=2, n_head=4, rotary_dim=32),
    "hf mamba": lambda: causal("mamba"),
    "hf roberta": lambda: encoder("roberta"),
    "hf distilbert": lambda: encoder("distilbert", dim=256, n_layers=2, n_heads=4, hidden_dim=1024),
    "hf deberta-v2": lambda: encoder("deberta-v2"),
    "hf modernbert": lambda: encoder("modernbert", pad_token_id=0),
    "hf t5": lambda: translator("t5", **_T5),
    "hf bart": lambda: translator("bart", decoder_start_token_id=2, max_position_embeddings=128, **_BART),
    "hf dinov2": lambda: backbone("dinov2", image_size=64, patch_size=8, **_SHAPE),
    "hf segformer": lambda: backbone("segformer"),
    "hf swin": lambda: backbone("swin", **_SWIN),
}
