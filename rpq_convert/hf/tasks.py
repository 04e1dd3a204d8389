"""Which Auto class of transformers loads an architecture, and which task of the hub it serves.

One line per task, from transformers' own tables; the first that lists the architecture counts, so the more telling ones
stand first (a BART is listed as a masked language model too).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpq_convert.hf import torchvision

torchvision.fix()

from transformers.models.auto import modeling_auto  # noqa: E402

TASKS = (  # Auto class, transformers' table of its architectures, task
    ("ForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "image-text-to-text"),
    ("ForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", None),  # translation, summarization: the config does not say
    ("ForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ", "automatic-speech-recognition"),
    ("ForCTC", "MODEL_FOR_CTC", "automatic-speech-recognition"),
    ("ForCausalLM", "MODEL_FOR_CAUSAL_LM", "text-generation"),
    ("ForMaskedLM", "MODEL_FOR_MASKED_LM", "fill-mask"),
    ("ForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "text-classification"),
    ("ForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION", "token-classification"),
    ("ForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING", "question-answering"),
    ("ForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE", None),
    ("ForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION", "image-classification"),
    ("ForZeroShotImageClassification", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION", "zero-shot-image-classification"),
    ("ForObjectDetection", "MODEL_FOR_OBJECT_DETECTION", "object-detection"),
    ("ForSemanticSegmentation", "MODEL_FOR_SEMANTIC_SEGMENTATION", "image-segmentation"),
    ("ForUniversalSegmentation", "MODEL_FOR_UNIVERSAL_SEGMENTATION", "image-segmentation"),
    ("ForMaskGeneration", "MODEL_FOR_MASK_GENERATION", "mask-generation"),
    ("ForDepthEstimation", "MODEL_FOR_DEPTH_ESTIMATION", "depth-estimation"),
    ("ForVideoClassification", "MODEL_FOR_VIDEO_CLASSIFICATION", "video-classification"),
    ("ForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION", "audio-classification"),
    ("ForTextToWaveform", "MODEL_FOR_TEXT_TO_WAVEFORM", "text-to-audio"),
    ("ForMaskedImageModeling", "MODEL_FOR_MASKED_IMAGE_MODELING", None),
    ("ForPreTraining", "MODEL_FOR_PRETRAINING", None),
    ("", "MODEL", None),
)


def task_of(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the class that loads a config.json's architecture (`AutoModelFor…`, or its own), and its task if known."""
    kind, architecture = config.get("model_type"), next(iter(config.get("architectures") or ()), None)
    for auto, table, task in TASKS:
        listed = getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}).get(kind, ())
        if architecture in ((listed,) if isinstance(listed, str) else listed):
            return f"AutoModel{auto}", task or _of_base(config, auto)
    return architecture or "AutoModel", None


def _of_base(config: Mapping[str, Any], auto: str) -> str | None:
    """A bare text encoder gives features."""
    text = "vocab_size" in config and not config.get("is_encoder_decoder")
    return "feature-extraction" if not auto and text else None
