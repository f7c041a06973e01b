"""Hugging Face's models with gradient checkpointing, of both kinds, measured by a CacheMeter meanwhile."""

import copy

import pytest
import torch

import dropit

transformers = pytest.importorskip("transformers")
SIZES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SIZES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "vocab_size": 64}


def words():
    return torch.randint(3, 64, (2, 12))


def bart():
    config = transformers.BartConfig(**SIZES, **TOKENS, forced_eos_token_id=2, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config), {"input_ids": words(), "labels": words()}


def roberta():
    config = transformers.RobertaConfig(**ENCODER, vocab_size=64, max_position_embeddings=40, pad_token_id=1)
    return transformers.RobertaForMaskedLM(config), {"input_ids": words(), "labels": words()}


def whisper():
    positions = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    unused = {"suppress_tokens": None, "begin_suppress_tokens": None}
    config = transformers.WhisperConfig(**SIZES, **TOKENS, **positions, **unused)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(2, 8, 40), "labels": words()}


def detr():
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**resnet, out_features=["stage2"])
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone}
    model = transformers.DetrForObjectDetection(transformers.DetrConfig(**SIZES, **own, num_queries=5, num_labels=4))
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def wav2vec2():
    conv = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    conv |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = transformers.Wav2Vec2Config(**ENCODER, **conv, vocab_size=32, layerdrop=0.0, mask_time_prob=0.0)
    return transformers.Wav2Vec2ForCTC(config), {
        "input_values": torch.randn(2, 1000),
        "labels": torch.randint(1, 30, (2, 5)),
    }


MODELS = {"BART": bart, "RoBERTa": roberta, "Whisper": whisper, "DETR": detr, "Wav2Vec2": wav2vec2}


def built(name):
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # or normalization would give its normalized input, and no more
                parameter.normal_(1.0, 0.3)
    return model.train(), inputs


def loss_of(output):
    loss = getattr(output, "loss", None)
    return output.logits.square().mean() + output.pred_boxes.square().mean() if loss is None else loss


def gradients(model, inputs):
    torch.manual_seed(5)
    with dropit.CacheMeter(model):
        loss = loss_of(model(**inputs))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("compress", "tolerance"), [("lossless", 1e-6), ("int8", 0.02)])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_with_checkpointing_are_those_without(name, use_reentrant, compress, tolerance):
    model, inputs = built(name)
    dropit.to_dropit(model, gamma=0.9, compress=compress)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant and "input_ids" in inputs:
        checkpointed.enable_input_require_grads()
    expected, got = gradients(model, inputs), gradients(checkpointed, inputs)
    assert got.keys() == expected.keys()
    floor = 1e-6 * max(grad.norm() for grad in expected.values())
    for key, grad in expected.items():
        assert (got[key] - grad).norm() <= tolerance * grad.norm() + floor, key
