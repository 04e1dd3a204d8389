"""Hand crafted inputs to the commands: every one must be refused in one line, or be read as what it is, soon and in little memory.

    python benchmarks/hostile.py                     # all kinds; prints a table, and every input that is not as it should be
    python benchmarks/hostile.py --kind config --verbose

Kinds: headers of safetensors files, configs with and without weights, indexes, records of converted folders, files of data, options.
Each input is given to a command in a process of its own (a fork of one that has imported everything), with limits of time and memory.
A refusal is an exit code that is not 0 and an error of one line. An input that is accepted says something true, if odd. A traceback,
a signal, more than 10 s or 300 MB beyond what the process had are faults.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10.0, 300 << 20
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**8, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "x" * 300, "../../etc/passwd", [], [1] * 40, {}, {"a": {}},
    [[[[[[[[[[]]]]]]]]]],
)  # fmt: skip
Case = tuple[str, Callable[[Path], list[str]]]


@dataclass(frozen=True)
class Outcome:
    """What came of one input: `refused`, `accepted`, `traceback`, `signal`, `slow`, `memory` or `lines`; and what was said."""

    kind: str
    said: str
    seconds: float
    grown: int  # bytes


class Sources:
    """Small valid files to begin from, made once."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers as tf

        import rpq_convert as rpq

        self.folder, self.models = folder, {}
        torch.manual_seed(0)
        small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
        for name, kind, config in (
            ("llama", tf.LlamaForCausalLM, tf.LlamaConfig(**small, intermediate_size=64)),
            ("bert", tf.BertModel, tf.BertConfig(**small, intermediate_size=64)),
            ("gpt2", tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)),
            ("qwen2", tf.Qwen2ForCausalLM, tf.Qwen2Config(**small, intermediate_size=64, num_key_value_heads=2)),
            ("vit", tf.ViTModel, tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16)),
        ):  # fmt: skip
            self.models[name] = folder / name
            kind(config).save_pretrained(self.models[name])
            rpq.plan(self.models[name], bits=4)  # imports what a fork would import again and again
        self.converted = folder / "converted"
        rpq.convert_checkpoint(self.models["llama"], self.converted, bits=4, grow=True, progress=False)

    def copy(self, name: str, where: Path) -> Path:
        place = where / "src"
        shutil.copytree(self.converted if name == "converted" else self.models[name], place)
        return place


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places in a JSON value; of a long list or mapping the first three."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 40 else items[:3]:
        yield (*at, key)
        yield from paths(inner, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another one in a place."""
    if not at:
        return new
    if isinstance(value, list):
        return [replaced(v, at[1:], new) if i == at[0] else v for i, v in enumerate(value)]
    return {k: replaced(v, at[1:], new) if k == at[0] else v for k, v in value.items()}


def text(value: Any) -> str:
    return json.dumps(value)


def headers(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Weight files whose header is not what it should be."""
    raw = (sources.models["llama"] / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def case(name: str, head: bytes, *, claimed: int | None = None, body: bytes = data) -> Case:
        def make(where: Path) -> list[str]:
            place = sources.copy("llama", where)
            size = len(head) if claimed is None else claimed
            (place / "model.safetensors").write_bytes(struct.pack("<Q", size) + head + body)
            return ["convert", str(place), "--bits", "8", "--no-check", "--out", str(where / "out")]

        return name, make

    for size in (0, 1, 7, 10**9, 2**63, 2**64 - 1, length + 10**6):
        yield case(f"length {size}", raw[8 : 8 + length], claimed=size)
    junk_heads = (
        b"", b"[]", b"null", b"{", b"\xff\xfe", b"{}" + b" " * 10**6, b'{"a":' * 10**5, b"[" * 10**6, b'{"a":1}', b'{"__metadata__":3}'
    )  # fmt: skip
    for junk in junk_heads:
        yield case(f"junk {junk[:12]!r}", junk)
    first = next(k for k in table if k != "__metadata__")
    for field in ("dtype", "shape", "data_offsets"):
        for value in (
            *ODD,
            [0, 2**62],
            [2**48] * 32,
            [2**63, 0],
            [0] * 33,
            [-1, -1],
            [1.5, 2],
            ["1", "2"],
            "F32",
            "F64",
            "U4",
        ):
            yield case(f"{field} {text(value)[:24]}", text(replaced(table, (first, field), value)).encode())
    yield case("huge names", text({**table, "x" * 10**6: table[first]}).encode())
    wide = {f"t{i}": {"dtype": "F32", "shape": [0, 2**47 - i], "data_offsets": [0, 0]} for i in range(30_000)}
    yield case("2 MB of empty tensors with huge dimensions", text(wide).encode(), body=b"")
    doubled = text(table)[:-1] + "," + text({first: table[first]})[1:]
    yield case("a name twice", doubled.encode())
    for cut in (1, 8, len(data) // 2):
        yield case(f"cut by {cut}", raw[8 : 8 + length], body=data[:-cut])
    for _ in range(60):
        broken = bytearray(raw[8 : 8 + length])
        for _ in range(r.choice((1, 1, 3, 20))):
            broken[r.randrange(length)] = r.randrange(256)
        yield case(f"bytes {r.random():.6f}", bytes(broken))


FIELDS = {
    "llama": (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size", "max_position_embeddings", "num_labels",
        "head_dim", "rope_parameters", "architectures", "dtype", "torch_dtype", "id2label", "tie_word_embeddings", "model_type",
        "pad_token_id", "num_key_value_heads",
    ),
    "bert": ("hidden_size", "num_hidden_layers", "max_position_embeddings", "type_vocab_size", "num_labels", "hidden_act"),
    "gpt2": ("n_positions", "n_layer", "n_head", "n_embd"),
    "qwen2": ("num_hidden_layers", "layer_types", "max_window_layers", "sliding_window"),
    "vit": ("image_size", "patch_size", "num_channels", "num_hidden_layers"),
}  # fmt: skip


def configs(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Configs with one odd field: beside their weights, alone for a plan, and alone for random codes."""
    for name, fields in FIELDS.items():
        config = json.loads((sources.models[name] / "config.json").read_text())
        for field in fields:
            values = ODD if name == "llama" else (10**8, 2**40, -1, "x", None)
            for value in values:
                for alone in (False, True) if name == "llama" or value == 10**8 else (True,):

                    def make(
                        where: Path, name: str = name, config: Any = config, field: str = field, value: Any = value, alone: bool = alone
                    ) -> list[str]:  # fmt: skip
                        place = sources.copy(name, where)
                        (place / "config.json").write_text(text({**config, field: value}))
                        if alone:
                            (place / "model.safetensors").unlink()
                        return ["plan", str(place), "--bits", "4"]

                    yield f"{name}.{field} = {text(value)[:20]}{' alone' if alone else ''}", make
    small = [
        '{"model_type":"gpt2","n_positions":1000000000000}',
        '{"model_type":"gpt2","n_positions":1000000000000,"architectures":["GPT2Model"]}',
        '{"model_type":"bert","num_labels":100000000}',
        '{"model_type":"qwen3_next","num_hidden_layers":100000000}',
        '{"model_type":"gpt_neo","max_position_embeddings":90000,"architectures":["GPTNeoModel"]}',
        '{"model_type":"gptj","n_positions":10000000,"architectures":["GPTJModel"]}',
        '{"model_type":"mixtral","num_local_experts":100000000,"architectures":["MixtralModel"]}',
        '{"model_type":"switch_transformers","num_experts":100000000,"architectures":["SwitchTransformersModel"]}',
        '{"model_type":"swin","depths":[100000000],"architectures":["SwinModel"]}',
        '{"model_type":"resnet","depths":[100000000,1,1,1],"architectures":["ResNetModel"]}',
        '{"model_type":"t5","num_layers":100000000,"architectures":["T5Model"]}',
        '{"model_type":"clip","text_config":{"num_hidden_layers":100000000},"architectures":["CLIPModel"]}',
        "[" * 100000,
        '{"a":' * 100000,
        "{}",
        "[]",
        "",
        "\0" * 100,
    ]
    for content in small:

        def bare(where: Path, content: str = content) -> list[str]:
            place = where / "src"
            place.mkdir()
            (place / "config.json").write_text(content)
            return ["convert", str(place), "--bits", "4", "--fit", "random", "--out", str(where / "out")]

        yield f"bare {content[:60]}", bare


def indexes(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Indexes of shards."""
    good = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    for where in [(), ("metadata",), ("weight_map",), ("weight_map", "a")]:
        for value in (*ODD, "/etc/passwd", "a/../b.safetensors", "model.bin", "model.safetensors\0"):

            def make(place: Path, where: Any = where, value: Any = value) -> list[str]:
                source = sources.copy("llama", place)
                (source / "model.safetensors").rename(source / "model-1.safetensors")
                (source / "model.safetensors.index.json").write_text(text(replaced(good, where, value)))
                return ["convert", str(source), "--bits", "8", "--out", str(place / "out"), "--no-check"]

            yield f"index {where} = {text(value)[:20]}", make


def records(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Records of a converted folder with one odd field, read by every command that reads them."""
    commands: dict[str, list[list[str]]] = {
        "config.json": [["verify", "SRC"], ["restore", "SRC", "OUT"]],
        "rpq_report.json": [["audit", "SRC"], ["diff", "SRC", "SRC"]],
        "rpq_manifest.json": [["verify", "SRC"]],
        "rpq_plan.json": [["restore", "SRC", "OUT"]],
    }
    for file, reads in commands.items():
        good = json.loads((sources.converted / file).read_text())
        places = list(paths(good))
        chosen = [(where, r.choice(ODD)) for where in r.sample(places, min(40, len(places)))]
        chosen += [((), value) for value in ODD]
        for where, value in chosen:
            command = r.choice(reads)

            def make(
                place: Path, file: str = file, good: Any = good, where: Any = where, value: Any = value, command: Any = command
            ) -> list[str]:  # fmt: skip
                source = sources.copy("converted", place)
                (source / file).write_text(text(replaced(good, where, value)))
                names = {"SRC": str(source), "OUT": str(place / "out")}
                return [names.get(word, word) for word in command]

            yield f"{file} {'.'.join(map(str, where))[-40:]} = {text(value)[:20]}", make


def data(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Files to calibrate on, sensitivities and presets."""
    junk = (
        b"", b"\0" * 1000, b"\xff\xfe\xfd" * 100, b"[" * 10**5, b'{"text": 3}\n' * 9, b'{"text": null}\n', b"a,b\n1\n2,3,4\n", b"PAR1" + b"\0" * 50,
        b"PK\x03\x04" + b"\0" * 50, b'"' * 10**5, b'{"text": "' + b"x" * 10**6 + b'"}', b"\n" * 10**6, "\u202e\x1b[2J".encode() * 100,
    )  # fmt: skip
    for name in ("d.txt", "d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.arrow", "d.safetensors", "d.png"):
        for content in junk:

            def make(where: Path, name: str = name, content: bytes = content) -> list[str]:
                (where / name).write_bytes(content)
                out = str(where / "out")
                return [
                    "convert",
                    str(sources.models["llama"]),
                    "--bits",
                    "4",
                    "--calibrate",
                    str(where / name),
                    "--out",
                    out,
                ]

            yield f"calibrate {name} {content[:16]!r}", make
    for content in (
        *junk,
        b"3",
        b'{"a": "b"}',
        b'{"model.embed_tokens.weight": NaN}',
        b'{"model.embed_tokens.weight": -1e400}',
    ):

        def measured(where: Path, content: bytes = content) -> list[str]:
            (where / "s.json").write_bytes(content)
            return [
                "plan",
                str(sources.models["llama"]),
                "--target-size",
                "30KB",
                "--sensitivity",
                str(where / "s.json"),
            ]

        yield f"sensitivity {content[:16]!r}", measured
    for content in (
        *junk,
        b"[settings]\nbits='x'",
        b"[settings]\nbits=1e400",
        b"[[rules]]\nmatch=3",
        b"settings=3",
        b"a=" + b"[" * 10**4,
    ):

        def preset(where: Path, content: bytes = content) -> list[str]:
            (where / "p.toml").write_bytes(content)
            return ["plan", str(sources.models["llama"]), "--preset", str(where / "p.toml")]

        yield f"preset {content[:16]!r}", preset


def options(sources: Sources, r: random.Random) -> Iterator[Case]:
    """Odd values of options."""
    values = ("", "-1", "0", "nan", "inf", "1e400", "9" * 400, "x", "\x1b[2J", "../..", "a" * 5000, "{}", "\udcff")
    names = (
        "--bits", "--dim", "--codebooks", "--target-size", "--max-error", "--seed", "--rule", "--include", "--max-shard-size", "--rotation",
        "--outliers", "--dtype", "--preset", "--fit", "--storage", "--axis", "--sensitivity", "--explain", "--factory", "--revision",
    )  # fmt: skip
    for name in names:
        for value in values:
            yield (
                f"{name} {value[:12]!r}",
                lambda where, name=name, value=value: ["plan", str(sources.models["llama"]), name, value],
            )  # type: ignore[misc]


KINDS: dict[str, Callable[[Sources, random.Random], Iterator[Case]]] = {
    "headers": headers, "configs": configs, "indexes": indexes, "records": records, "data": data, "options": options,
}  # fmt: skip


def status(what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


def run(command: list[str], told: int) -> None:
    """Run a command in this process, which is a fork, and tell what came of it."""
    from rpq_convert.cli import group

    Path("/proc/self/clear_refs").write_text("5")
    before, out, code = status("VmRSS"), io.StringIO(), 0
    try:
        with redirect_stdout(out), redirect_stderr(out):
            sys.stderr.fileno = sys.__stderr__.fileno  # type: ignore[method-assign,union-attr]
            group(command, standalone_mode=True)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException as e:  # what a user would see as a traceback
        import traceback

        code = 99
        out.write(f"Traceback\n{traceback.format_exc()}\n{e!r}")
    grown = status("VmHWM") - before
    os.write(told, json.dumps([code, grown, out.getvalue()[-8000:]]).encode())
    os._exit(0)


def tried(command: list[str], limit: float = 3 * SECONDS) -> Outcome:
    """Run a command in a fork, and return what came of it."""
    reads, writes = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reads)
        try:
            run(command, writes)
        finally:
            os._exit(98)
    os.close(writes)
    os.set_blocking(reads, False)
    said = b""
    while (over := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() - began > limit or _resident(child) > 8 * BYTES:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reads)
            grew = time.monotonic() - began <= limit
            return Outcome(
                "memory" if grew else "slow", "killed", time.monotonic() - began, _ := 8 * BYTES if grew else 0
            )
        time.sleep(0.01)
        said += _read(reads)
    said += _read(reads)
    os.close(reads)
    seconds = time.monotonic() - began
    if os.WIFSIGNALED(over[1]) or not said:
        return Outcome("signal", f"status {over[1]}", seconds, 0)
    code, grown, output = json.loads(said)
    return Outcome(_kind(code, output, seconds, grown), output, seconds, grown)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 17)
    except BlockingIOError:
        return b""


def _resident(child: int) -> int:
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _kind(code: int, output: str, seconds: float, grown: int) -> str:
    if code == 99 or "Traceback" in output:
        return "traceback"
    if seconds > SECONDS:
        return "slow"
    if grown > BYTES:
        return "memory"
    if code == 0:
        return "accepted"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    one = len(errors) == 1 and output.rstrip().endswith(errors[0])
    return "refused" if one or "Invalid value" in output else "lines"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--match", default="", help="try those whose name holds this text")
    parser.add_argument("--verbose", action="store_true", help="say of every input what came of it")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a fork has no threads of its parent
    faults: list[str] = []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        sources = Sources(Path(folder, "sources"))
        for kind in args.kind or KINDS:
            worst = 0.0
            for number, (name, make) in enumerate(KINDS[kind](sources, random.Random(0))):
                if number % args.every or args.match not in name:
                    continue
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    found = tried(make(Path(place)))
                counts[kind][found.kind] += 1
                worst = max(worst, found.seconds)
                last = next((line for line in reversed(found.said.splitlines()) if line.strip()), "")
                line = (
                    f"{found.kind:9} {found.seconds:5.1f} s {found.grown / 1e6:6.0f} MB  {kind}: {name} -> {last[:150]}"
                )
                if args.verbose:
                    print(line, flush=True)
                if found.kind not in ("refused", "accepted"):
                    faults.append(line)
            print(
                f"{kind}: {sum(counts[kind].values())} inputs, {dict(counts[kind])}, slowest {worst:.1f} s", flush=True
            )
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
