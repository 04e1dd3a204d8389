"""Convert a synthetic checkpoint of any size under a limit of memory: print the peak, and CPU seconds a billion parameters.

    python benchmarks/scale.py                                # 2 layers of a 13B Llama, 4 bits, 4 GiB, 1 and 2 workers
    python benchmarks/scale.py --layers 31 --workers 2        # 20 GB of source
    python benchmarks/scale.py --hidden 8192 --ffn 28672 --vocab 128256 --layers 1 --limit 3GiB
    python benchmarks/scale.py --model opt-66b                # from a config alone, random codes

The source is written to a folder that is deleted at the end: normal numbers, tensor by tensor. Each conversion runs in a process of its own
under RLIMIT_DATA, which counts all private memory whether it is touched or not, and a peak that the system measures (VmHWM). The
process is told the limit as `--max-memory` as well, but for `--untold`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rpq_convert.core.safetensors import header, in_file_order
from rpq_convert.core.sizes import parse_size

OPT_66B = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 9216, "num_hidden_layers": 64, "num_attention_heads": 72,
    "ffn_dim": 36864, "vocab_size": 50272, "word_embed_proj_dim": 9216, "max_position_embeddings": 2048, "torch_dtype": "float16",
    "init_std": 0.006,
}  # fmt: skip
FLOAT16 = 2  # bytes
RUN = "from rpq_convert.cli import group; group()"


def llama(hidden: int, ffn: int, vocab: int, layers: int) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """Return a config, and name -> shape of its tensors."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "vocab_size": vocab, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128, "torch_dtype": "float16", "max_position_embeddings": 4096,
    }  # fmt: skip
    square, wide = (hidden, hidden), (ffn, hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        own: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": square, "self_attn.k_proj": square, "self_attn.v_proj": square, "self_attn.o_proj": square,
            "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in own.items()}
    return config, shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write(folder: Path, config: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a checkpoint of normal numbers in float16, one shard for every eight tensors."""
    (folder / "config.json").write_text(json.dumps(config))
    if not shapes:
        return
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    names, index = list(shapes), {}
    for start in range(0, len(names), 8):
        file = f"model-{start // 8:05d}.safetensors"
        entries = {name: (torch.float16, shapes[name]) for name in names[start : start + 8]}
        head = header(entries)
        with open(folder / file, "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for at, name in enumerate(in_file_order(entries)):
                left = math.prod(shapes[name])
                while left:
                    part = numbers.roll(at + left)[:left]
                    f.write(part.numpy().data)
                    left -= len(part)
                index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def convert(source: Path, out: Path, options: list[str], limit: int, untold: bool, workers: int) -> str:
    """Run the command; return a line of figures."""
    command = [
        sys.executable,
        "-c",
        RUN,
        "convert",
        str(source),
        "--out",
        str(out),
        "--no-check",
        "--workers",
        str(workers),
    ]
    command += options if untold else [*options, "--max-memory", f"{limit}B"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(
        command, preexec_fn=limited, env=alone, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _, said = process.communicate()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        return f"{workers} workers: FAILED with {process.returncode}: {said.strip().splitlines()[-1]}"
    rows = json.loads((out / "rpq_report.json").read_text())["rows"]
    billions = sum(math.prod(row["shape"]) for row in rows) / 1e9
    stated = next((line for line in said.splitlines() if line.startswith("needs about")), "")
    return (
        f"{workers} workers: peak {used.ru_maxrss / 1e6:.2f} GB, {seconds:.0f} CPU s ({seconds / billions:.0f} a billion), "
        f"{time.monotonic() - began:.0f} s; stated: {stated}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 5120), ("ffn", 13824), ("vocab", 32000), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=["opt-66b"], help="instead of a shape: a config alone, and random codes")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--limit", type=parse_size, default=parse_size("4GiB"))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--untold", action="store_true", help="let the process find its limit by itself")
    parser.add_argument("--where", type=Path, help="the folder for source and output; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.where) as place:
        source = Path(place, "source")
        source.mkdir()
        if args.model:
            write(source, OPT_66B, {})
            options = ["--codebooks", "heads", "--fit", "random"]
        else:
            config, shapes = llama(args.hidden, args.ffn, args.vocab, args.layers)
            write(source, config, shapes)
            options = ["--bits", args.bits, "--effort", "fast"]
            numbers = sum(math.prod(s) for s in shapes.values())
            print(
                f"{numbers / 1e9:.2f} billion parameters, {numbers * FLOAT16 / 1e9:.1f} GB; limit {args.limit / 2**30:.1f} GiB"
            )
        for workers in args.workers:
            print(convert(source, Path(place, f"out{workers}"), options, args.limit, args.untold, workers), flush=True)


if __name__ == "__main__":
    main()
