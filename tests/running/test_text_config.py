"""Configs with several parts for text: transformers refuses to choose, so the end is named."""

import transformers as tf
from architectures import wide

import rpq_convert as rpq
from rpq_convert.planning.heads import head_size
from rpq_convert.running.text_config import text_config


def musicgen():
    text = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    sound = tf.EncodecConfig(hidden_size=32, num_filters=4, upsampling_ratios=[4, 2], codebook_size=64, codebook_dim=32)
    decoder = {"model_type": "musicgen_decoder", "vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1}
    decoder |= {"num_attention_heads": 4, "ffn_dim": 64, "num_codebooks": 2}
    parts = {"text_encoder": text.to_dict(), "audio_encoder": sound.to_dict(), "decoder": decoder}
    return tf.MusicgenConfig(**parts, architectures=["MusicgenForConditionalGeneration"])


def test_a_model_with_two_texts_is_planned():
    config = musicgen()
    assert text_config(config, "encoder").model_type == "t5"
    assert text_config(config, "decoder").model_type == "musicgen_decoder"
    assert head_size(config) == 12
    names = {job.name for job in rpq.plan(config, bits=8, grow=True).jobs}
    assert {name.partition(".")[0] for name in names} >= {"text_encoder", "audio_encoder", "decoder"}


def test_most_configs_have_one_text_or_none():
    clip, bert = tf.CLIPConfig(), tf.BertConfig(**wide(64))
    assert text_config(clip, "encoder").model_type == "clip_text_model"
    assert text_config(bert, "decoder") is bert
    assert text_config(None, "encoder") is None
