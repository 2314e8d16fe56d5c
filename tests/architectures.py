"""Tiny models with random weights, one for each way in which a real architecture holds or reads its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

BATCH, CLASSES, IMAGE, VOCABULARY, LENGTH = 4, 10, 32, 96, 8
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A small model, its inputs and what is particular about it.

    Args:
        make: returns the model; called under a fixed seed.
        inputs: returns random keyword arguments of `forward` for a batch.
        ties: number of parameter names that are another name of an earlier parameter.
        huggingface: whether the model can be rebuilt from its own `config.json`.
        own_forward: whether its layers compute something else than PyTorch's with the same weight (a weight that is
            standardized first, for instance), so that two plain layers cannot take the place of one.
        slow: whether only the slow tests run it.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    ties: int = 0
    huggingface: bool = False
    own_forward: bool = False
    slow: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """Return the model with the random weights of a seed, in training mode."""
        torch.manual_seed(seed)
        return self.make().train()

    def batch(self, seed: int = 0) -> Inputs:
        """Return the inputs of a seed."""
        torch.manual_seed(1_000 + seed)
        return self.inputs()


def logits_of(outputs: Any) -> Tensor:
    """Return the logits of any of these models' outputs."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return every floating tensor of a nested output, in order."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def loss_of(outputs: Any, seed: int = 0) -> Tensor:
    """Return the cross-entropy of the logits against random labels of a seed."""
    logits = logits_of(outputs).flatten(0, -2)
    generator = torch.Generator().manual_seed(2_000 + seed)
    return functional.cross_entropy(logits, torch.randint(logits.shape[-1], logits.shape[:1], generator=generator))


class EncoderClassifier(nn.Module):
    """PyTorch's own transformer encoder, whose evaluation takes the fused path of `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, input_ids: Tensor) -> Any:
        return self.head(self.encoder(self.embedding(input_ids)).mean(1))


class RecurrentClassifier(nn.Module):
    """An embedding, a recurrent network and a linear head on its last output."""

    def __init__(self, recurrent: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size * (2 if recurrent.bidirectional else 1), CLASSES)

    def forward(self, input_ids: Tensor) -> Any:
        return self.head(self.recurrent(self.embedding(input_ids))[0][:, -1])


def tokens() -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}


def masked_tokens() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, LENGTH // 2 :] = 0
    return tokens() | {"attention_mask": mask}


def token_pairs() -> Inputs:
    return tokens() | {"decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH // 2))}


def pixel_values() -> Inputs:
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def images() -> Inputs:
    return {"x": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def audio() -> Inputs:
    return {
        "input_features": torch.randn(BATCH, 16, 2 * LENGTH),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH // 2)),
    }


def _vit() -> Any:
    config = transformers.ViTConfig(
        image_size=IMAGE, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _swin() -> Any:
    config = transformers.SwinConfig(
        image_size=IMAGE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4,
        num_labels=CLASSES,
    )  # fmt: skip
    return transformers.SwinForImageClassification(config)


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _albert() -> Any:
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.AlbertForSequenceClassification(config)


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=32,
        num_labels=CLASSES,
    )  # fmt: skip
    return transformers.DistilBertForSequenceClassification(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1,
        use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=LENGTH, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, use_cache=False,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def _bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        use_cache=False,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _gemma() -> Any:
    config = transformers.GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.GemmaForCausalLM(config)


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


TIMM_VIT = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
# Scales that start near 0 would hide a block's compression from the outputs.
TIMM_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "ls_init_value": 1.0}
TIMM_RESNET = {"channels": (8, 16, 24, 32), "stem_width": 8, "zero_init_last": False}
TIMM_SWIN = {
    "img_size": IMAGE,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}

ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture(_vit, pixel_values, huggingface=True),
    "swin": Architecture(_swin, pixel_values, huggingface=True),
    "bert": Architecture(_bert, masked_tokens, huggingface=True),
    "albert": Architecture(_albert, masked_tokens, huggingface=True),
    "distilbert": Architecture(_distilbert, masked_tokens, huggingface=True),
    "gpt2": Architecture(_gpt2, tokens, ties=1, huggingface=True),
    "llama": Architecture(_llama, tokens, huggingface=True),
    "mixtral": Architecture(_mixtral, tokens, huggingface=True),
    "whisper": Architecture(_whisper, audio, ties=1, huggingface=True),
    "t5": Architecture(_t5, token_pairs, ties=3, huggingface=True),
    "opt": Architecture(_opt, tokens, ties=1, huggingface=True),
    "bart": Architecture(_bart, token_pairs, ties=3, huggingface=True),
    "gemma": Architecture(_gemma, tokens, ties=1, huggingface=True),
    "timm_vit": Architecture(_timm("vit_tiny_patch16_224", **TIMM_VIT), images),
    "timm_swin": Architecture(_timm("swin_tiny_patch4_window7_224", **TIMM_SWIN), images),
    "timm_convnext": Architecture(_timm("convnext_atto", **TIMM_CONVNEXT), images),
    "timm_resnet": Architecture(_timm("resnet10t", **TIMM_RESNET), images),
    "timm_efficientnet": Architecture(_timm("test_efficientnet"), images),
    "timm_efficientnet_lite0": Architecture(_timm("efficientnet_lite0"), images, slow=True),
    "timm_nfnet": Architecture(_timm("test_nfnet"), images, own_forward=True),
    "encoder": Architecture(EncoderClassifier, tokens),
    "lstm": Architecture(lambda: RecurrentClassifier(nn.LSTM(24, 32, num_layers=2, batch_first=True)), tokens),
    "gru": Architecture(lambda: RecurrentClassifier(nn.GRU(24, 32, batch_first=True, bidirectional=True)), tokens),
}
