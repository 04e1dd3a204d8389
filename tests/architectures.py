"""Small random models of real architectures: name -> a function that builds one. Also what docs/models.md is made from."""

from __future__ import annotations

import torch
import transformers as tf


def text(width: int) -> dict[str, int]:
    return {"vocab_size": 4 * width, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 16}


def wide(width: int) -> dict[str, int]:
    return {**text(width), "intermediate_size": 2 * width}


def gqa(width: int) -> dict[str, int]:
    return {**wide(width), "num_key_value_heads": width // 32, "head_dim": 16}


def _clip(width: int) -> torch.nn.Module:
    language = {**wide(width), "bos_token_id": 0, "eos_token_id": 1}
    vision = {**wide(width), "image_size": 32, "patch_size": 8}
    return tf.CLIPModel(tf.CLIPConfig(text_config=language, vision_config=vision, projection_dim=width))


def _whisper(width: int) -> torch.nn.Module:
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=4 * width, d_model=width, encoder_layers=2, decoder_layers=2, num_mel_bins=16,
            encoder_attention_heads=width // 16, decoder_attention_heads=width // 16, encoder_ffn_dim=2 * width,
            decoder_ffn_dim=2 * width, max_source_positions=50, max_target_positions=40, decoder_start_token_id=1,
            pad_token_id=0,
        )
    )  # fmt: skip


def _gpt2(width: int) -> torch.nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=4 * width, n_embd=width, n_layer=2, n_head=width // 16, n_positions=64)
    )


def _opt(width: int) -> torch.nn.Module:
    config = {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "max_position_embeddings": 64}
    return tf.OPTForCausalLM(tf.OPTConfig(**text(width), **config))


def _t5(width: int) -> torch.nn.Module:
    config = {"vocab_size": 4 * width, "d_model": width, "d_kv": 16, "d_ff": 2 * width, "num_layers": 2}
    return tf.T5ForConditionalGeneration(tf.T5Config(**config, num_heads=width // 16, decoder_start_token_id=0))


EXPERTS = {"num_experts_per_tok": 2}
# name -> a function of the hidden width
ARCHITECTURES = {
    "BERT": lambda w: tf.BertModel(tf.BertConfig(**wide(w))),
    "GPT-2": _gpt2,
    "OPT": _opt,
    "Llama": lambda w: tf.LlamaForCausalLM(tf.LlamaConfig(**wide(w), num_key_value_heads=w // 32)),
    "Falcon": lambda w: tf.FalconForCausalLM(tf.FalconConfig(**text(w))),
    "Gemma 3": lambda w: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**gqa(w), sliding_window=16)),
    "Mixtral": lambda w: tf.MixtralForCausalLM(
        tf.MixtralConfig(**wide(w), num_key_value_heads=w // 32, num_local_experts=4, **EXPERTS)
    ),
    "Qwen3-MoE": lambda w: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**gqa(w), num_experts=4, moe_intermediate_size=w, **EXPERTS)
    ),
    "gpt-oss": lambda w: tf.GptOssForCausalLM(
        tf.GptOssConfig(**gqa(w), num_local_experts=4, sliding_window=16, **EXPERTS)
    ),
    "T5": _t5,
    "Whisper": _whisper,
    "CLIP": _clip,
    "ViT": lambda w: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=w, num_hidden_layers=2, num_attention_heads=w // 16, intermediate_size=2 * w, image_size=32,
            patch_size=8,
        )
    ),
}  # fmt: skip


def inputs(model) -> dict[str, torch.Tensor]:
    """Return arguments for one forward pass of any of the architectures."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 250, (2, 12), generator=g)
    kind = model.config.model_type
    pixels = torch.randn(2, 3, 32, 32, generator=g)
    if kind == "vit":
        return {"pixel_values": pixels}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if kind == "whisper":
        return {"input_features": torch.randn(2, 16, 100, generator=g), "decoder_input_ids": ids}
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def outputs(model) -> torch.Tensor:
    """Return what one forward pass gives, as one flat vector."""
    with torch.no_grad():
        out = model(**inputs(model)).to_tuple()
    return torch.cat([t.flatten().float() for t in out if isinstance(t, torch.Tensor)])
