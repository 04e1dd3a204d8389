"""RPQ inside transformers: `from_pretrained` and `save_pretrained` of converted models.

A converted folder loads through any class of transformers as soon as `rpq_convert` is imported: before weights are read, the
empty model gets empty RPQ weights in the places that config.json lists (`placing`), and transformers fills them like any
parameter. A dense checkpoint with `quantization_config=RPQConfig(bits=4)` is converted while it is loaded, a parameter at a time
(`on_load`). Whatever holds a converted layer says so when it is saved (`attaching`). Nothing here runs code that a checkpoint names.

This package is imported right after `transformers.quantizers.auto`, and registers with it.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from rpq_convert.integrations.transformers.attaching import attach
from rpq_convert.integrations.transformers.config import METHOD, RPQConfig
from rpq_convert.integrations.transformers.quantizer import RPQQuantizer
from rpq_convert.layers.surgery import AFTER

__all__ = ["RPQConfig", "RPQQuantizer", "attach"]

AFTER.append(attach)
register_quantizer(METHOD)(RPQQuantizer)
register_quantization_config(METHOD)(RPQConfig)
