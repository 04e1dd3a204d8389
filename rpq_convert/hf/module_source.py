"""A transformers checkpoint's tensors under the names of the model, and an account of every one of them.

Checkpoint keys are not module names: prefixes differ, old names remain, and mixture-of-experts files keep one tensor per expert
where the model has one fused parameter. transformers knows the mapping (`get_model_conversion_mapping`). Its own rename and
conversion steps run here for one parameter at a time, so nothing larger is in memory.

What is taken is what `from_pretrained` takes: tied names that a file holds with different values are untied, and what a class fills
by itself need not be there. What the model has no place for is kept as it is where it belongs to a part that the class does not build
(heads for multi-token prediction), and named as left out where it is a leftover of a module that the model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from rpq_convert.core import description
from rpq_convert.core.spec import dtype_name
from rpq_convert.errors import SourceError
from rpq_convert.layers import surgery
from rpq_convert.layers.initial import initial
from rpq_convert.planning.announced import refuse_config
from rpq_convert.planning.quantized import refuse_parts
from rpq_convert.planning.slots import Slot
from rpq_convert.report.schema import Dropped
from rpq_convert.storage.pickles import PickleSource
from rpq_convert.storage.reader import SafetensorsSource, read_header

POOLER = r"(^|\.)pooler\."  # encoders are often saved without the one that their class adds; nothing but a pooled output reads it


class ModuleSource(Mapping[str, Tensor]):
    """A checkpoint's tensors under the names of the model's state dict, renamed and converted one parameter at a time.

    Args:
        model: the empty model; names that the checkpoint fills with different values are untied in it.
        source: checkpoint key -> tensor.
        at_hand: whether tensors can be read; of a repository only the headers may be.

    Attributes:
        unused: checkpoint key -> the model's name for it, of what has no place in the model.
        filled: names that the checkpoint lacks and transformers fills by itself.
        untied: names that are tied by the config, and have a tensor of their own in the checkpoint.
        unresolved: names for which there is nothing.
    """

    def __init__(self, model: Any, source: Mapping[str, Tensor], *, at_hand: bool = True) -> None:
        self.model, self.source = model, source
        self.state: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        self.unused: dict[str, str] = {}
        self.filled: list[str] = []
        self.kept: list[str] = []
        self.plans: dict[str, tuple[str, Any, list[tuple[str, str]]]] = {}
        self.found: dict[str, Any] = {}  # name -> its dtype and shape in the checkpoint
        for first, (transform, parts) in self._groups().items():
            if type(transform) is WeightRenaming:
                made = {first: self.source.infos[parts[-1][0]]}  # type: ignore[attr-defined]
            else:
                made = self._run(first, transform, parts, shapes=True)
            self.found |= {n: m for n, m in made.items() if n in self.state}
            self.plans |= {n: (first, transform, parts) for n in made if n in self.state}
        self.untied = self._untie() if at_hand else []
        for names in self._tied():
            home = next((n for n in names if n in self.plans), None)
            if home:
                self.plans |= {
                    n: self.plans[home] if n == home else ("", home, []) for n in names if n not in self.plans
                }
        absent = [n for n in self.state if n not in self.plans]
        fills = [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()), POOLER]
        self.filled = [n for n in absent if any(re.search(pattern, n) for pattern in fills)]
        self.unresolved = [n for n in absent if n not in self.filled]
        self.kept = [key for key, name in self.unused.items() if not self._has_module_of(name)]

    def _groups(self) -> dict[str, tuple[Any, list[tuple[str, str]]]]:
        """Return first name -> (step, [(checkpoint key, pattern)]), and note what is unused."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix, state = self.model.base_model_prefix, self.state
        groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for key in sorted(self.source, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
            if name not in state:
                self.unused[key] = name
            elif pattern is not None:
                groups.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern))
            else:
                groups.setdefault(name, (WeightRenaming(key, name), []))[1].append((key, key))
        return groups

    def _tied(self) -> list[list[str]]:
        """Return the names of every tensor that has several, that of which transformers ties the others first."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        targets = getattr(self.model, "all_tied_weights_keys", {})
        return [sorted(g, key=lambda n: n in targets) for g in groups.values() if len(g) > 1]

    def _untie(self) -> list[str]:
        """Give tied names that the checkpoint fills with different values a parameter each, as transformers does."""
        untied = []
        for names in self._tied():
            home, *others = [n for n in names if n in self.plans] or [""]
            for name in others:
                dtype = self.state[name].dtype
                if torch.equal(self[home].to(dtype), self[name].to(dtype)):
                    continue
                module, key = surgery.find(self.model, name)
                own: Any = module._parameters[key]
                module._parameters[key] = nn.Parameter(torch.empty_like(own), requires_grad=own.requires_grad)
                untied.append(name)
        ties = getattr(self.model, "all_tied_weights_keys", {})
        for name in untied:
            ties.pop(name, None)
        return untied

    def _has_module_of(self, name: str) -> bool:
        """Return whether the model has the module that a tensor of this name would be in."""
        try:
            self.model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return False
        return True

    def _run(self, first: str, transform: Any, parts: list[tuple[str, str]], *, shapes: bool) -> dict[str, Any]:
        """Run one conversion; with `shapes` on meta tensors, to learn its names."""
        transform = deepcopy(transform)
        for key, pattern in parts:
            transform.add_tensor(first, key, pattern, partial(self._meta if shapes else self.source.__getitem__, key))
        info = LoadStateDictInfo(
            missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), conversion_errors={}, error_msgs=[],
            skipped_pp_keys=set(),
        )  # fmt: skip
        out = transform.convert(first, model=self.model, config=self.model.config, loading_info=info)
        if info.conversion_errors:
            raise SourceError(f"{first}: {next(iter(info.conversion_errors.values()))}")
        return {n: v[0] if isinstance(v, list) else v for n, v in out.items()}

    def _meta(self, key: str) -> Tensor:
        info = self.source.infos[key]  # type: ignore[attr-defined]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def check(self) -> None:
        """Raise before the first tensor is read if the checkpoint is quantized or does not fill the model."""
        self.refuse_quantized()
        if self.unresolved:
            raise SourceError(
                f"the checkpoint has no tensor for {len(self.unresolved)} of {type(self.model).__name__}'s: "
                f"{', '.join(self.unresolved[:4])}; convert the architecture that the checkpoint was saved from"
            )
        for name, found in self.found.items():
            description.check_dense(name, found, self.state[name])

    def refuse_quantized(self) -> None:
        """Raise if the checkpoint holds scales, zero points or packed weights that the model has no place for."""
        infos = self.source.infos  # type: ignore[attr-defined]
        unused = {name: SimpleNamespace(shape=infos[k].shape, dtype=infos[k].dtype) for k, name in self.unused.items()}
        used = {name: (found, self.state[name]) for name, found in self.found.items()}
        refuse_parts(unused, used, self.state, "the checkpoint")

    def extra_slots(self) -> list[Slot]:
        """Return what is kept though the model has no place for it."""
        infos = self.source.infos  # type: ignore[attr-defined]
        why = f"{type(self.model).__name__} has no place for it; kept as it is"
        return [Slot(k, (), "", (), tuple(infos[k].shape), infos[k].dtype, reason=why) for k in self.kept]

    def dropped(self) -> tuple[Dropped, ...]:
        """Return what is left out."""
        infos = self.source.infos  # type: ignore[attr-defined]
        why = f"its module in {type(self.model).__name__} has no such tensor"
        left = [k for k in self.unused if k not in self.kept]
        return tuple(Dropped(k, tuple(infos[k].shape), dtype_name(infos[k].dtype), why) for k in left)

    def notes(self) -> list[str]:
        """Return what a user should know of tensors that are not simply read."""
        kind = type(self.model).__name__
        said = []
        if self.kept:
            said.append(f"kept as they are, though {kind} has no place for them: {_some(self.kept)}")
        if left := self.dropped():
            said.append(f"left out, since {kind} has no place for them: {_some([d.name for d in left])}")
        if self.untied:
            said.append(
                f"tied by the config, but with values of their own in the checkpoint, so not tied: {_some(self.untied)}"
            )
        if poolers := [n for n in self.filled if re.search(POOLER, n)]:
            said.append(
                f"the checkpoint lacks {_some(poolers)}: random, as transformers makes them; train them before use"
            )
        return said

    def __len__(self) -> int:
        return len(self.plans) + len(self.filled) + len(self.kept)

    def __iter__(self) -> Iterator[str]:
        yield from (*self.plans, *self.filled, *self.kept)

    def __contains__(self, name: object) -> bool:
        return name in self.plans or name in self.filled or name in self.kept

    def __getitem__(self, name: str) -> Tensor:
        if name in self.filled:
            return initial(self.model, name)
        if name not in self.plans and name in self.kept:
            return self.source[name]
        first, transform, parts = self.plans[name]
        if not first:
            return self[transform]
        return self._run(first, transform, parts, shapes=False)[name]


def account(model: Any, files: Sequence[str | Path]) -> ModuleSource | None:
    """Return the account of files that transformers is about to load, or None where it loads none.

    Args:
        model: the empty model, tied; names that the files fill with different values are untied in it.

    Raises:
        SourceError: they are quantized already.
    """
    paths = [Path(f) for f in files]
    if not paths:
        return None
    refuse_config({}, [p.name for p in paths[0].parent.iterdir()], paths[0].parent)
    plain = all(p.suffix == ".safetensors" for p in paths)
    with torch.device("cpu"):  # transformers builds models with meta as the default
        source = SafetensorsSource(map(read_header, paths)) if plain else PickleSource(paths)
        found = ModuleSource(model, source)
    found.refuse_quantized()
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
