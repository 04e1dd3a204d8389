"""llama.cpp: k- and i-quants through the library of llama-cpp-python, decoded by the gguf package.

A GGUF is written from the dense model (16 bits), quantized by `llama_model_quantize`, and read back. K- and i-quants need rows of
a multiple of 256; SmolLM2's are 576 (and 1536), MiniLM's 384, and llama.cpp then falls back to a format of 32 by itself,
which is why its small formats come out larger here than their names. `embedding` overrides the type of the token embedding;
with `imatrix` the quantizer weighs errors by the mean square of each input channel over the calibration text.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TITLE, ENVIRONMENT = "llama.cpp", None  # llama-cpp-python comes with the package of the language model
SETTINGS = {
    "smollm2": [
        *({"type": t, "imatrix": True, "embedding": "Q4_0"} for t in ("IQ2_XXS", "IQ3_XXS", "IQ4_XS")),
        *({"type": t, "imatrix": i} for t in ("Q2_K", "Q4_K_M") for i in (True, False)),
        *({"type": t, "imatrix": True} for t in ("Q3_K_M", "IQ4_XS", "Q5_K_M")),
        *({"type": t, "imatrix": False} for t in ("Q4_0", "Q6_K", "Q8_0")),
    ],
    "smollm2-as-shipped": [{"type": t, "imatrix": False} for t in ("Q4_0", "Q4_1", "Q4_K_M")],
}


def compress(model: nn.Module, settings: dict[str, Any], data: Any) -> int:
    import gguf
    import llama_cpp

    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)

    def name_of(path: str) -> str:
        return names.get_name(path.removesuffix(".weight")) + ".weight"

    with tempfile.TemporaryDirectory() as folder:
        dense, small = (str(Path(folder) / f) for f in ("dense.gguf", "small.gguf"))
        _write(model, name_of, dense)
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread = torch.get_num_threads()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{settings['type']}")
        if "embedding" in settings:
            params.token_embedding_type = gguf.GGMLQuantizationType[settings["embedding"]].value
        keep = []  # what the C structures point into
        if settings["imatrix"]:
            powers = {
                name_of(path + ".weight"): p.numpy() for path, p in _input_powers(model, data.calibration).items()
            }
            entries = (llama_cpp.llama_model_imatrix_data * (len(powers) + 1))()  # ends with an empty name
            for entry, (name, power) in zip(entries, powers.items(), strict=False):
                keep.append((name.encode(), power))
                entry.name, entry.size = keep[-1][0], len(power)
                entry.data = power.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            params.imatrix = entries
        if llama_cpp.llama_model_quantize(dense.encode(), small.encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp does not quantize to {settings['type']}")
        found = {t.name: t for t in gguf.GGUFReader(small).tensors}
        kinds = sorted({t.tensor_type.name for t in found.values()})
        print("types in the file:", ", ".join(kinds))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                tensor = found[name_of(path)]
                values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
                parameter.copy_(_heads(values.view(parameter.shape), path, config, back=True))
        return sum(int(t.n_bytes) for t in found.values())


def _write(model: Any, name_of: Any, file: str) -> None:
    """Write the dense model with 16-bit matrices, and only what the quantizer reads: shapes, no vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for path, parameter in model.named_parameters():
        tensor = _heads(parameter.detach(), path, config)
        writer.add_tensor(name_of(path), (tensor.half() if tensor.ndim == 2 else tensor.float()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(weight: Tensor, path: str, config: Any, back: bool = False) -> Tensor:
    """Reorder the rows of a query or key weight: transformers turns halves of a head, GGUF pairs of neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.split(".")[-2])
    if heads is None:
        return weight
    half = weight.shape[0] // heads // 2
    shape = (heads, half, 2, -1) if back else (heads, 2, half, -1)
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


@torch.inference_mode()
def _input_powers(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """Return the mean square of every input channel of every Linear but the tied head: path -> [in] float32."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):

            def watch(_: nn.Module, args: Any, path: str = path) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1])
                sums[path] = sums.get(path, 0) + rows.double().square().sum(0)
                counts[path] = counts.get(path, 0) + len(rows)

            hooks.append(module.register_forward_pre_hook(watch))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {path: (total / counts[path]).float() for path, total in sums.items()}
