"""Small random models of real architectures: name -> a function that builds one. Also what docs/models.md is made from."""

from __future__ import annotations

import torch
import transformers as tf

TEXT = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**TEXT, "intermediate_size": 128}
GQA = {**WIDE, "num_key_value_heads": 2, "head_dim": 16}


def _clip():
    text = {**WIDE, "bos_token_id": 0, "eos_token_id": 1}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config={**WIDE, "image_size": 32, "patch_size": 8}))


def _whisper():
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=256,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            num_mel_bins=16,
            max_source_positions=50,
            max_target_positions=40,
            decoder_start_token_id=1,
            pad_token_id=0,
        )
    )


ARCHITECTURES = {
    "BERT": lambda: tf.BertModel(tf.BertConfig(**WIDE)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64)),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**TEXT, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
    ),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE, num_key_value_heads=2)),
    "Falcon": lambda: tf.FalconForCausalLM(tf.FalconConfig(**TEXT)),
    "Gemma 3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GQA, sliding_window=16)),
    "Mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Qwen3-MoE": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**GQA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    ),
    "gpt-oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    ),
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "Whisper": _whisper,
    "CLIP": _clip,
    "ViT": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
        )
    ),
}


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
