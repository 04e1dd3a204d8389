"""Small random models of real architectures: name -> a function that builds one. Also what docs/models.md is made from.

The names are those under which people know the families; every builder takes the hidden width.
"""

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


def image(width: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 16, "image_size": 32, "patch_size": 8,
    }  # fmt: skip


def both(width: int) -> dict[str, int]:
    """Encoder and decoder in BART's words."""
    sides = ("encoder", "decoder")
    return {
        "vocab_size": 4 * width, "d_model": width, "max_position_embeddings": 64,
        **{f"{side}_layers": 2 for side in sides}, **{f"{side}_ffn_dim": 2 * width for side in sides},
        **{f"{side}_attention_heads": width // 16 for side in sides},
    }  # fmt: skip


def _deepseek(width: int) -> torch.nn.Module:
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    ranks = {"kv_lora_rank": width // 2, "q_lora_rank": width // 2}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": width}
    return tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **wide(width), **sizes, **ranks, **experts, **EXPERTS, first_k_dense_replace=1,
            num_key_value_heads=width // 16,
        )
    )  # fmt: skip


def _sam(width: int) -> torch.nn.Module:
    size = {"image_size": 32, "patch_size": 4}
    vision = {
        **image(width),
        **size,
        "output_channels": 32,
        "mlp_dim": 2 * width,
        "window_size": 4,
        "num_pos_feats": 16,
    }
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    return tf.SamModel(
        tf.SamConfig(
            vision_config={**vision, "global_attn_indexes": [1]},
            prompt_encoder_config={"hidden_size": 32, "mask_input_channels": 16, **size},
            mask_decoder_config=decoder,
        )
    )


def _siglip(width: int) -> torch.nn.Module:
    language = {**wide(width), "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    return tf.SiglipModel(
        tf.SiglipConfig(text_config=language, vision_config={**image(width), "intermediate_size": 2 * width})
    )


def _llava(width: int) -> torch.nn.Module:
    language = {"model_type": "llama", **wide(width), "num_key_value_heads": width // 32}
    vision = {"model_type": "clip_vision_model", **image(width), "intermediate_size": 2 * width}
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=language, vision_config=vision, image_token_id=1)
    )


def _qwen_vl(width: int) -> torch.nn.Module:
    rope = {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    language = {**wide(width), "num_key_value_heads": width // 32, "rope_parameters": rope}
    vision = {
        "depth": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": width // 16, "out_hidden_size": width,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=language, vision_config=vision))


def _wav2vec(width: int) -> torch.nn.Module:
    convolutions = {
        "conv_dim": (width,) * 3,
        "conv_stride": (5, 2, 2),
        "conv_kernel": (10, 3, 3),
        "num_feat_extract_layers": 3,
    }
    return tf.Wav2Vec2ForCTC(
        tf.Wav2Vec2Config(**wide(width), **convolutions, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    )


def _segformer(width: int) -> torch.nn.Module:
    return tf.SegformerForSemanticSegmentation(
        tf.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[width // 2, width], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=width,
        )
    )  # fmt: skip


EXPERTS = {"num_experts_per_tok": 2}
# name -> a function of the hidden width
# One of every kind: encoder, decoder, experts, state space, convolutions, encoder and decoder, sound, pictures, several at once.
EACH_KIND = ("BERT", "GPT-2", "gpt-oss", "Mamba 2", "T5", "EnCodec", "CLIP")

ARCHITECTURES = {
    # encoders of text
    "BERT": lambda w: tf.BertModel(tf.BertConfig(**wide(w))),
    "RoBERTa": lambda w: tf.RobertaForMaskedLM(tf.RobertaConfig(**wide(w), max_position_embeddings=64)),
    "DistilBERT": lambda w: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=4 * w, dim=w, n_layers=2, n_heads=w // 16, hidden_dim=2 * w)
    ),
    "DeBERTa": lambda w: tf.DebertaForMaskedLM(
        tf.DebertaConfig(**wide(w), relative_attention=True, pos_att_type=["p2c", "c2p"], max_position_embeddings=64)
    ),
    "DeBERTa-v2": lambda w: tf.DebertaV2ForTokenClassification(
        tf.DebertaV2Config(**wide(w), relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16)
    ),
    "ELECTRA": lambda w: tf.ElectraForPreTraining(tf.ElectraConfig(**wide(w), embedding_size=w // 2)),
    "ALBERT": lambda w: tf.AlbertForMaskedLM(tf.AlbertConfig(**wide(w), embedding_size=w // 2)),
    "MPNet": lambda w: tf.MPNetModel(tf.MPNetConfig(**wide(w))),
    "XLNet": lambda w: tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=4 * w, d_model=w, n_layer=2, n_head=w // 16, d_inner=2 * w)
    ),
    "Funnel": lambda w: tf.FunnelForMaskedLM(
        tf.FunnelConfig(
            vocab_size=4 * w, block_sizes=[1, 1], num_decoder_layers=1, d_model=w, n_head=w // 16, d_head=16, d_inner=2 * w
        )
    ),
    "I-BERT": lambda w: tf.IBertForMaskedLM(tf.IBertConfig(**wide(w), max_position_embeddings=64)),
    "ModernBERT": lambda w: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(
            **wide(w), pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1
        )
    ),
    # language models
    "GPT-2": _gpt2,
    "GPT-J": lambda w: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=4 * w, n_embd=w, n_layer=2, n_head=w // 16, rotary_dim=8, n_positions=64)
    ),
    "GPT-NeoX": lambda w: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**wide(w))),
    "OPT": _opt,
    "BLOOM": lambda w: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=4 * w, hidden_size=w, n_layer=2, n_head=w // 16)
    ),
    "MPT": lambda w: tf.MptForCausalLM(
        tf.MptConfig(vocab_size=4 * w, d_model=w, n_layers=2, n_heads=w // 16, max_seq_len=64)
    ),
    "Falcon": lambda w: tf.FalconForCausalLM(tf.FalconConfig(**text(w))),
    "Llama": lambda w: tf.LlamaForCausalLM(tf.LlamaConfig(**wide(w), num_key_value_heads=w // 32)),
    "Mistral": lambda w: tf.MistralForCausalLM(tf.MistralConfig(**wide(w), num_key_value_heads=w // 32)),
    "Qwen2": lambda w: tf.Qwen2ForCausalLM(tf.Qwen2Config(**wide(w), num_key_value_heads=w // 32)),
    "Qwen3": lambda w: tf.Qwen3ForCausalLM(tf.Qwen3Config(**gqa(w))),
    "Gemma 3": lambda w: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**gqa(w), sliding_window=16)),
    "Phi": lambda w: tf.PhiForCausalLM(tf.PhiConfig(**wide(w))),
    "Phi-3": lambda w: tf.Phi3ForCausalLM(tf.Phi3Config(**wide(w), num_key_value_heads=w // 32, pad_token_id=0)),
    "OLMo 2": lambda w: tf.Olmo2ForCausalLM(tf.Olmo2Config(**wide(w))),
    "Cohere": lambda w: tf.CohereForCausalLM(tf.CohereConfig(**wide(w))),
    "StarCoder 2": lambda w: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**wide(w), num_key_value_heads=w // 32)),
    "Mamba": lambda w: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=4 * w, hidden_size=w, num_hidden_layers=2)),
    "Mamba 2": lambda w: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            vocab_size=4 * w, hidden_size=w, num_hidden_layers=2, num_heads=w // 8, head_dim=16, state_size=16,
            n_groups=2, chunk_size=8,
        )
    ),
    "RecurrentGemma": lambda w: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(
            **{**text(w), "num_hidden_layers": 3}, num_key_value_heads=1, intermediate_size=4 * w, lru_width=w,
            attention_window_size=16,
        )
    ),
    "RWKV": lambda w: tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=4 * w, hidden_size=w, num_hidden_layers=2, context_length=64)
    ),
    # mixtures of experts
    "Mixtral": lambda w: tf.MixtralForCausalLM(
        tf.MixtralConfig(**wide(w), num_key_value_heads=w // 32, num_local_experts=4, **EXPERTS)
    ),
    "Qwen3-MoE": lambda w: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**gqa(w), num_experts=4, moe_intermediate_size=w, **EXPERTS)
    ),
    "gpt-oss": lambda w: tf.GptOssForCausalLM(
        tf.GptOssConfig(**gqa(w), num_local_experts=4, sliding_window=16, **EXPERTS)
    ),
    "DeepSeek-V3": _deepseek,
    "Granite-MoE": lambda w: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**wide(w), num_key_value_heads=w // 32, num_local_experts=4, **EXPERTS)
    ),
    "Llama 4": lambda w: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **gqa(w), intermediate_size_mlp=2 * w, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    ),
    "JetMoE": lambda w: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(
            vocab_size=4 * w, hidden_size=w, num_hidden_layers=2, num_key_value_heads=w // 32, kv_channels=16,
            intermediate_size=2 * w, num_local_experts=4, **EXPERTS,
        )
    ),
    "Jamba": lambda w: tf.JambaForCausalLM(
        tf.JambaConfig(
            **wide(w), num_key_value_heads=w // 32, num_experts=4, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
        )
    ),
    # encoders with decoders
    "T5": _t5,
    "BART": lambda w: tf.BartForConditionalGeneration(tf.BartConfig(**both(w))),
    "Pegasus": lambda w: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**both(w))),
    "Whisper": _whisper,
    # sound and images
    "Wav2Vec2": _wav2vec,
    "EnCodec": lambda w: tf.EncodecModel(
        tf.EncodecConfig(
            hidden_size=w, num_filters=w // 8, upsampling_ratios=[4, 2], num_lstm_layers=1, codebook_size=64, codebook_dim=w
        )
    ),
    "CLIP": _clip,
    "SigLIP": _siglip,
    "LLaVA": _llava,
    "Qwen2.5-VL": _qwen_vl,
    "SAM": _sam,
    "ViT": lambda w: tf.ViTForImageClassification(tf.ViTConfig(**image(w), intermediate_size=2 * w)),
    "DINOv2": lambda w: tf.Dinov2ForImageClassification(tf.Dinov2Config(**image(w), mlp_ratio=2)),
    "BEiT": lambda w: tf.BeitForImageClassification(
        tf.BeitConfig(**image(w), intermediate_size=2 * w, use_relative_position_bias=True)
    ),
    "Swin": lambda w: tf.SwinForImageClassification(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=w // 2, depths=[2, 2], num_heads=[2, 4], window_size=4)
    ),
    "SegFormer": _segformer,
    "ConvNeXt": lambda w: tf.ConvNextForImageClassification(
        tf.ConvNextConfig(hidden_sizes=[w, 2 * w], depths=[1, 2], num_stages=2, image_size=32)
    ),
    "ResNet": lambda w: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=w, hidden_sizes=[w, 2 * w], depths=[1, 2])
    ),
}  # fmt: skip


def inputs(model) -> dict[str, torch.Tensor]:
    """Return arguments for one forward pass of any of the architectures."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 250, (2, 12), generator=g)
    pixels = torch.randn(2, 3, 32, 32, generator=g)
    main = {
        "pixel_values": pixels, "input_values": torch.randn(2, 800, generator=g), "input_ids": ids,
        "input_features": torch.randn(2, 16, 100, generator=g),
    }  # fmt: skip
    given = {model.main_input_name: main[model.main_input_name]}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    if model.config.model_type in ("clip", "siglip"):
        given = {"input_ids": ids, "pixel_values": pixels}
    if model.config.model_type == "encodec":
        given["input_values"] = given["input_values"][:, None]
    if model.config.model_type == "sam":
        given["input_points"] = torch.rand(2, 1, 3, 2, generator=g) * 32
    return given


def outputs(model) -> torch.Tensor:
    """Return what one forward pass gives, as one flat vector."""
    with torch.no_grad():
        out = model(**inputs(model)).to_tuple()
    return torch.cat([t.flatten().float() for t in out if isinstance(t, torch.Tensor)])
