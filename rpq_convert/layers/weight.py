"""RPQWeight: the module that owns codebooks, codes and scales, and expands them to a dense parameter.

What a layer sees of it is a `ComputedWeight` (lazy_weight.py), which decodes when its values are used, or never, where an
operation can work on the codes (operations.py). The file is long because all that reads or writes a weight's tensors is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from rpq_convert import kernels
from rpq_convert.core import description
from rpq_convert.core.axes import WeightView
from rpq_convert.core.layout import Layout
from rpq_convert.core.rotation import rotate
from rpq_convert.core.spec import Spec, dtype_name
from rpq_convert.kernels import reference, torch_ops
from rpq_convert.kernels.rans import unpacked
from rpq_convert.layers.caches import Caches
from rpq_convert.layers.codes import Codes, guard, whole
from rpq_convert.running.offload import is_placed

NARROW = (torch.float16, torch.float8_e4m3fn)  # too narrow for an optimizer's steps
PACKED = ("stream", "frequencies")  # what stands for codes in some files
GUARDED = ("codes", "positions")  # buffers
TRAINED = ("codebooks", "scales", "input_scales", "outliers")  # parameters


def transformed() -> bool:
    """Whether torch.func rewrites operations just now: it looks through ordinary ones only."""
    # isinstance, as the compiler takes `is not None` for true here
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)


class RPQWeight(nn.Module):
    """One parameter as codewords.

    Args:
        spec: how it is stored.
        view: the parameter's axes.
        shape: the parameter's shape.
        dtype: dtype of the expanded weight (the codebooks may be narrower).
        zero_row: a row of an embedding that expands to zeros, whatever its codes say (an untrained padding row).

    Shape:
        codebooks [books, 256, dim], codes uint8 [blocks, n] or [n, blocks], scales [out], input_scales [inputs]; with several
        stages, codebooks and codes have a leading stage axis; outliers and positions (numbers of inputs) [out, outliers].
        Codes and positions are buffers that guard themselves (codes.py), the others parameters.
    """

    is_rpq_weight = True  # for code that must not import this file
    codebooks: nn.Parameter
    codes: Tensor
    scales: nn.Parameter | None
    input_scales: nn.Parameter | None
    outliers: nn.Parameter | None  # added to what the codes give, at `positions`
    positions: Tensor | None

    def __init__(
        self,
        spec: Spec,
        view: WeightView,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        zero_row: int | None = None,
    ) -> None:
        super().__init__()
        self.caches = Caches()
        self.spec, self.view, self.shape, self.zero_row = spec, view, tuple(shape), zero_row
        n, length = view.matrix_shape(self.shape, spec.axis)
        self.layout = Layout(
            spec.axis, n, length, spec.dim, spec.books, spec.stages
        )  # the coded matrix, as kernels see it
        self._probe = torch.empty(0, dtype=dtype, device=device)  # follows .to() and remembers the expanded dtype
        for name in TRAINED:
            self.register_parameter(name, None)
        for name in GUARDED:
            self.register_buffer(name, None)
        for name, (kind, size) in spec.tensors(view, self.shape).items():
            self.set_tensor(name, torch.zeros(size, dtype=kind, device=device))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the expanded weight."""
        return self._probe.dtype

    @property
    def trainable(self) -> bool:
        return any(p is not None and p.requires_grad for p in self._trained())

    def _trained(self) -> list[nn.Parameter | None]:
        return [getattr(self, name) for name in TRAINED]

    @property
    def backend(self) -> ModuleType:
        """What computes on the codes: compiled kernels for real tensors, where nothing records torch's operations.

        A compiler gets operators, an exporter to ONNX, a tracer and everything else ordinary torch operations.
        """
        if torch.compiler.is_compiling():
            return reference if torch.onnx.is_in_onnx_export() or transformed() else torch_ops
        codes = self.stored_tensor("codes")
        real = (
            type(codes) in (nn.Parameter, Tensor)
            and self._probe.dtype in kernels.SERVED
            and torch._C._len_torch_dispatch_stack() == 0
            and not transformed()
            and forward_ad._current_level < 0
            and torch._C._get_tracing_state() is None
        )
        return kernels.backend_for("cpu" if codes.is_cpu else codes.device.type) if real else reference

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Make a tensor one of those that the weight consists of; one of floating point can be trained."""
        if name in GUARDED:
            self._buffers[name] = guard(tensor)
        else:
            self._parameters[name] = nn.Parameter(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that the weight consists of, codes and positions as ordinary ones, by name."""
        found = {name: self.stored_tensor(name) for name in description.PARTS}  # FSDP has attributes in their place
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return parameters; and codes with them where accelerate places them: buffers would stay behind when it offloads."""
        yield from super().named_parameters(*args, **kwargs)
        if is_placed(self):
            yield from super().named_buffers(*args, **kwargs)  # type: ignore[misc]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Return codes, unless they count as parameters."""
        if not is_placed(self):
            yield from super().named_buffers(*args, **kwargs)

    def stored_tensor(self, name: str) -> Any:
        """Return `self.<name>`, half a microsecond sooner than nn.Module looks it up, codes as an ordinary tensor."""
        table = self._buffers if name in GUARDED else self._parameters
        found = table[name] if name in table else getattr(self, name, None)
        return found.plain if type(found) is Codes else found

    def stages_codes(self) -> Tensor:
        """Return the codes as [stages, blocks, n], a view."""
        codes = self.stored_tensor("codes")
        codes = codes if self.spec.stages > 1 else codes.unsqueeze(0)
        return codes if self.spec.layout == "blocks" else codes.transpose(1, 2)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (codes [stages, blocks, n], codebooks, scales) for compiled kernels; the view of codes is cached."""
        find = self.stored_tensor
        stored, codebooks, scales = find("codes"), find("codebooks"), find("scales")
        cached = self.caches.codes
        if (
            cached is None
            or cached[0] is not stored
            or cached[1] != stored.data_ptr()
            or cached[2] != codebooks.shape
            or (scales is not None and cached[3] != scales.shape)
        ):
            self.check()
            with torch.inference_mode(False):  # used later where gradients are recorded
                codes = self.stages_codes().detach()
            shape = None if scales is None else scales.shape
            cached = self.caches.codes = (stored, stored.data_ptr(), codebooks.shape, shape, codes)
        return cached[4], codebooks, scales

    def _parts_for(self, backend: ModuleType) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the same for any backend: ordinary operations and compilers take the parameters as they are."""
        slow = backend is reference or backend is torch_ops
        return (self.stages_codes(), self.codebooks, self.scales) if slow else self.parts()

    def product(self) -> Any:
        """Return what multiplies a few tokens by the weight, kept from call to call; False where the weight is no plain matrix."""
        backend, find = self.backend, self.stored_tensor
        special = self.zero_row is not None or self.spec.outliers or self.spec.rotation
        if not hasattr(backend, "Product") or special or self.view.axes != ("out", "in") or self.dtype != torch.float32:
            return False
        inputs = find("input_scales")
        codes, codebooks, scales = self.parts()
        if any(t is not None and t.is_inference() for t in (codebooks, scales, inputs)):
            return False
        return backend.Product(codes, find("codes"), codebooks, scales, inputs, self.layout)

    def check(self) -> None:
        """Raise a ValueError where the tensors are not what the spec says: compiled code would read beyond them."""
        if "codes" not in self._buffers:
            return  # one matrix of several, whose tensors were checked
        found = self.tensors()
        if wrong := description.misfit(self.spec.tensors(self.view, self.shape), found, exact=False):
            raise ValueError(f"RPQ weight {tuple(self.shape)}: {wrong}; load or convert it again")
        if any(not t.is_meta and t.numel() and not t.untyped_storage().nbytes() for t in found.values()):
            raise ValueError(f"RPQ weight {tuple(self.shape)}: the memory of its tensors was given back")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "caches"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.caches = Caches()
        self.guard()
        if "codes" in self._buffers:
            n, length = self.view.matrix_shape(self.shape, self.spec.axis)
            self.layout = Layout(self.spec.axis, n, length, self.spec.dim, self.spec.books, self.spec.stages)
            self.check()

    def forward(self) -> Tensor:
        """Expand to the dense parameter, in its stored shape, contiguous, differentiable."""
        backend, axes = self.backend, self.view.axes
        codes, codebooks, scales = self._parts_for(backend)
        if axes[0] == "out" and "expert" not in axes:
            weight = backend.decode(codes, codebooks, scales, self.layout, self.dtype)
            return self._finish(rotate(weight, self.spec.rotation, back=True).view(self.shape), scaled=True)
        weight = rotate(backend.decode(codes, codebooks, None, self.layout, self.dtype), self.spec.rotation, back=True)
        matrix = weight if self.spec.axis == "in" else weight.T
        return self._finish(self.view.from_matrix(matrix, self.shape, self.spec.axis))

    def rows(self, index: Tensor) -> Tensor:
        """Expand the rows `index [r]` of a two-axis parameter whose sub-vectors run along its inputs: [r, L]."""
        backend = self.backend
        rows = backend.decode_rows(*self._parts_for(backend), index, self.layout, self._probe.dtype)
        rows = rotate(rows, self.spec.rotation, back=True)
        plain = self.zero_row is None and not self.spec.outliers and self.input_scales is None
        return rows if plain else self._finish(rows, index, scaled=True)

    def part(self, expert: int) -> RPQWeight:
        """Return one of the matrices of a parameter whose first axis is `expert`; it shares this one's tensors."""
        self._parts_for(self.backend)  # checked here, for all of them
        part = RPQWeight.__new__(RPQWeight)
        nn.Module.__init__(part)
        part.caches = Caches()
        part.spec, part.view, part.shape, part.zero_row = self.spec, self.view.inner, self.shape[1:], None
        part._probe = self._probe
        rows = self.layout.n // self.shape[0]
        part.layout = dataclasses.replace(self.layout, n=rows)
        part.__dict__["codebooks"] = self.codebooks
        part.__dict__["codes"] = self.stored_tensor("codes")[..., expert * rows : (expert + 1) * rows]
        part.__dict__["scales"] = None if self.scales is None else self.scales[expert]
        part.__dict__["outliers"] = part.__dict__["positions"] = part.__dict__["input_scales"] = None
        return part

    def scale_matrix(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Return what rows `start` to `stop` of the matrix [n, L] that the codes describe are multiplied by; None for nothing."""
        if self.scales is None and self.input_scales is None:
            return None
        rows = (
            torch.ones((), device=self._probe.device)
            if self.scales is None
            else self.view.spread_scales(self.scales.detach())
        )
        matrix = self.view.to_matrix(rows.expand(self.shape), self.spec.axis)[start:stop]
        if self.input_scales is None:
            return matrix
        inputs = self.input_scales.detach().float()  # products of two float16 numbers may be none
        return matrix.float() * (inputs if self.spec.axis == "in" else inputs[start:stop, None])

    @torch.no_grad()
    def matrix_rows(self, start: int, stop: int) -> Tensor:
        """Expand rows `start` to `stop` of the matrix that the codes describe, rotated: [stop - start, L], not differentiable."""
        codes = self.stages_codes()[:, :, start:stop]
        part = reference.matrix(codes, self.codebooks, self.layout, self.dtype)
        scales = self.scale_matrix(start, stop)
        if scales is not None:
            part = part * scales.to(self.dtype)
        if (apart := self._apart(self.dtype)) is not None:
            at, values = apart
            if self.spec.axis == "in":
                part = part.scatter_add(1, at[start:stop], values[start:stop])
            else:
                outputs, places = ((at >= start) & (at < stop)).nonzero(as_tuple=True)
                part = part.index_put((at[outputs, places] - start, outputs), values[outputs, places], accumulate=True)
        if self.zero_row is not None and self.spec.axis == "out":
            part[:, self.zero_row] = 0
        elif self.zero_row is not None and start <= self.zero_row < stop:
            part[self.zero_row - start] = 0
        return part

    def _apart(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return outliers as (numbers of inputs, values), both [outputs, outliers]; None for none."""
        if self.outliers is None or self.positions is None:
            return None
        return self.stored_tensor("positions").long(), self.outliers.to(dtype)

    def outlier_product(self, x: Tensor) -> Tensor | None:
        """Return what outliers add to the product with inputs [tokens, inputs]: [tokens, outputs]; None for nothing."""
        if (apart := self._apart(x.dtype)) is None:
            return None
        at, values = apart
        return F.embedding_bag(at, x.T.contiguous(), per_sample_weights=values, mode="sum").T

    def to_codes(self, x: Tensor, rotate: Callable[[Tensor, int], Tensor] = rotate) -> Tensor:
        """Return inputs [tokens, inputs] as the codes take them: scaled, or rotated."""
        if self.input_scales is not None:
            return x * self.input_scales.to(x.dtype)
        return rotate(x, self.spec.rotation) if self.spec.rotation else x

    @property
    def rows_are_entries(self) -> bool:
        """Whether one row of the stored parameter is one row of `M`, so that `rows` serves lookups."""
        return self.spec.axis == "in" and self.view.axes == ("out", "in")

    def _finish(self, weight: Tensor, index: Tensor | None = None, *, scaled: bool = False) -> Tensor:
        """Apply row and input scales, outliers and the zero row to a stored-shape weight, or to the rows `index` of it."""
        if self.scales is not None and not scaled:
            scales = self.scales if index is None else self.scales[index]
            weight = weight * self.view.spread_scales(scales.to(self.dtype))
        if self.input_scales is not None:
            inputs = self.input_scales.to(weight.dtype)
            if index is None:
                matrix = self.view.to_matrix(weight, "in") * inputs
                weight = self.view.from_matrix(matrix, self.shape, "in").contiguous()
            else:
                weight = weight * inputs
        if (apart := self._apart(weight.dtype)) is not None:
            at, values = apart
            if index is None:
                matrix = self.view.to_matrix(weight, "in").scatter_add(1, at, values)
                weight = self.view.from_matrix(matrix, self.shape, "in").contiguous()
            else:
                weight = weight.scatter_add(1, at[index], values[index])
        if self.zero_row is not None:
            at = torch.arange(self.shape[0], device=weight.device) if index is None else index
            weight = weight.masked_fill((at == self.zero_row)[:, None], 0)
        return weight

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors as a file keeps them: what is wider in memory is narrow again where that is exact."""
        kept = {}
        for name, (dtype, _) in self.spec.tensors(self.view, self.shape).items():
            tensor = self.stored_tensor(name).detach()
            if tensor.dtype == torch.float32 and dtype in NARROW and not tensor.is_meta:
                narrow = tensor.to(dtype)
                tensor = narrow if torch.equal(narrow.float(), tensor) else tensor
            kept[name] = tensor
        return kept

    def given(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return those of this weight's tensors that a state dict holds, codes as whole numbers.

        Raises:
            ValueError: what does not fit, by its name there.
        """
        expected = self.spec.tensors(self.view, self.shape)
        given = {name: state[prefix + name] for name in expected if prefix + name in state}
        for name in (n for n in GUARDED if n in given):
            try:
                given[name] = whole(given[name], expected[name][0])
            except ValueError as e:
                raise ValueError(f"{prefix}{name} {e}") from None
        wrong = description.misfit({name: expected[name] for name in given}, given, exact=False)
        wrong = wrong or description.misplaced(expected, given.get("positions"), self.layout.inputs)
        if wrong:
            raise ValueError(f"{prefix}{wrong}")
        return given

    def keep_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Give what trains in place of a dense parameter the attributes that were set on that."""
        for part in self._trained():
            if part is not None:
                part.__dict__.update(attributes)

    def requires_grad_(self, requires_grad: bool = True) -> RPQWeight:
        """Freeze codebooks, scales and outliers, or let them train; codes have no gradient."""
        for part in self._trained():
            if part is not None:
                part.requires_grad_(requires_grad)
        return self

    def widen(self) -> None:
        """Hold what trains in float32 from now on where it is narrower than the weight; files hold what they held.

        The squares of gradients that Adam keeps underflow in float16, and its first step divides by zero, in `train()` or not.
        """
        for parameter in self._parameters.values():
            if parameter is not None and parameter.dtype in NARROW and parameter.dtype != self.dtype:
                parameter.data = parameter.data.float()

    def unguard(self, stored: Mapping[str, Any]) -> None:
        """Hold codes as parameters until `guard` is called, as files hold them: transformers fills and ties parameters alone.

        Args:
            stored: part -> (dtype, shape) in files.
        """
        for name in (n for n in GUARDED if self._buffers[n] is not None):
            if name in stored:
                self._parameters[name] = nn.Parameter(self.stored_tensor(name), requires_grad=False)
                del self._buffers[name]
                continue
            self._non_persistent_buffers_set.add(name)  # it stays, so that the weight can be read
            for part in PACKED:
                dtype, size = stored[part]
                self._parameters[part] = nn.Parameter(
                    torch.empty(size, dtype=dtype, device="meta"), requires_grad=False
                )

    def guard(self) -> None:
        """Make guarded buffers of codes, whatever other code has put in their place.

        Raises:
            ValueError: a damaged stream of codes.
        """
        self.caches.product = None  # what had no memory, or lay elsewhere, may be multiplied by now
        if "stream" in self._parameters and not self._parameters["stream"].is_meta:  # type: ignore[union-attr]
            held: dict[str, Any] = {part: self._parameters.pop(part) for part in PACKED}
            codes = unpacked(self.spec, self.view, self.shape, held)["codes"]
            self._buffers["codes"] = guard(codes.to(held["stream"].device))
            self._non_persistent_buffers_set.discard("codes")
        for name in GUARDED:
            table: dict[str, Any] = self._parameters if self._parameters.get(name) is not None else self._buffers
            if table.get(name) is not None:
                self._buffers[name] = guard(table.pop(name).detach())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take codebooks and scales in float32 where a checkpoint of a training has them so, and its optimizer's state.

        Codes may come as other numbers, such as the average of checkpoints, as long as they are whole.
        """
        try:
            given = self.given(state_dict, prefix)
        except ValueError as e:
            args[-1].append(str(e))
            return
        state_dict.update({prefix + name: tensor for name, tensor in given.items()})
        for name, parameter in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if tensor is not None and parameter.dtype in NARROW and tensor.dtype == torch.float32:
                parameter.data = parameter.data.float()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.guard()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RPQWeight:
        before = {name: self.stored_tensor(name) for name in GUARDED}
        super()._apply(fn, recurse)
        for name, codes in before.items():  # `.type()` casts whole numbers too
            now = self._buffers[name]
            if codes is not None and now is not None and now.dtype != codes.dtype:
                self._buffers[name] = codes.to(now.device)
        filled = self._probe.is_meta and not self.codes.is_meta  # by a loader that puts tensors in one by one
        self._probe = fn(torch.empty_like(self._probe, device="cpu") if filled else self._probe)
        self.guard()
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.spec.describe()}, {dtype_name(self.dtype)}"

    def to_config(self) -> dict[str, Any]:
        """Return the JSON-able description from which `from_config` rebuilds the module, empty."""
        return {
            **self.spec.to_dict(),
            "view": self.view.names,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "zero_row": self.zero_row,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], device: torch.device | str | None = None) -> RPQWeight:
        """Rebuild an empty module from `to_config`'s dict."""
        return cls.of(description.read(config), device)

    @classmethod
    def of(cls, what: description.Described, device: torch.device | str | None = None) -> RPQWeight:
        """Build an empty module from a description that was read."""
        return cls(what.spec, what.view, what.shape, dtype=what.dtype, device=device, zero_row=what.zero_row)
