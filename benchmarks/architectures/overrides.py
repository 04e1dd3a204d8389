"""What the rules of `tiny.py` cannot know of a model type: numbers that must agree, parts that have no default."""

from __future__ import annotations

from typing import Any

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_state": 16}
SERIES = {"prediction_length": 8, "context_length": 16}
RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DETECTOR: dict[str, Any] = {"backbone_config": RESNET}
VQ = {
    "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "latent_channels": 16,
    "embed_dim": 16, "num_embeddings": 64,
}  # fmt: skip
MELTED = {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2}
WAVES = {"conv_dim": [16, 16, 16], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
CODEC = {"num_filters": 4, "upsampling_ratios": [4, 2], "codebook_dim": 32}

OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 64},
    "autoformer": SERIES,
    "bamba": MAMBA,
    "beit": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "bit": {"num_groups": 8},
    "bridgetower": {"num_attention_heads": 4, "contrastive_hidden_size": 32, "logit_scale_init_value": 2.6},
    "bridgetower_vision_model": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 9}},
    "cohere_compass_text": {"num_hidden_layers": 4, "head_dim": 8},
    "conditional_detr": DETECTOR,
    "cosmos3_edge_text": {
        "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "csm": {"codebook_size": 64},
    "d_fine": {"decoder_in_channels": [32, 32, 32]},
    "dab-detr": DETECTOR,
    "data2vec-audio": WAVES,
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "deformable_detr": DETECTOR,
    "detr": DETECTOR,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "efficientloftr": {"hidden_size": 256},
    "emu3": {"vocabulary_map": {"<image>": 9}},
    "encodec": CODEC,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], "moe_num_experts": 4},
    "esm": MELTED,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n_text": SHARED,
    "gemma4_unified_assistant": {"text_config": {"num_hidden_layers": 4}},
    "glm5_next": {"text_config": {"index_topk": 16}},
    "glm5_next_text": {"index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 32}},
    "granite_speech5_encoder": {"context_size": 32},
    "granitemoehybrid": MAMBA,
    "hiera": {"embed_dim": 16},
    "hubert": WAVES,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "informer": SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16},
    "mimi": {"upsample_groups": 32, "num_filters": 4, "vector_quantization_hidden_dimension": 32, "codebook_dim": 32},
    "mimi_decoder": {"upsample_groups": 32},
    "ministral": {"head_dim": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neomme": {"head_dim": 16},
    "omdet-turbo": {"backbone_config": {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 32},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "is_decoder": True},
    "speecht5": WAVES,
    "table-transformer": DETECTOR,
    "time_series_transformer": SERIES,
    "unispeech": WAVES,
    "unispeech-sat": WAVES,
    "upernet": DETECTOR,
    "wav2vec2": WAVES,
    "wav2vec2-bert": {"vocab_size": 64, "tdnn_dim": [32, 32, 32]},
    "wav2vec2-conformer": {**WAVES, "vocab_size": 64},
    "wavlm": WAVES,
    "xlnet": {"d_model": 32, "n_head": 4, "d_head": 8},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "n_mamba_heads": 8},
}  # fmt: skip
