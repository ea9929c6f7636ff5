"""The parameters of a model: shapes, dtypes, and the layers that an engine gathers one at a time.

A model comes from a factory, from a Hugging Face configuration or from a number of parameters, and is built on the meta
device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_adamw.schedule.batch import shown

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    Attributes:
        trained: Whether it has a gradient.
        layer: The index of its layer in `ModelShapes.layers`; None: it is in none, such as an embedding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True
    layer: int | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Submodule:
    """A module in the order of calls, which is taken to be the order in which modules are registered.

    Attributes:
        parameters: Indices in `ModelShapes.parameters` of those that the module has itself, tied ones included.
        is_called: False: it only lists others, as ``ModuleList`` does.
    """

    parameters: tuple[int, ...] = ()
    children: tuple[Submodule, ...] = ()
    is_called: bool = True

    def in_order(self, *, forward: bool) -> Iterator[Submodule]:
        """Yield the modules in the order in which a forward or a backward pass begins them."""
        if self.is_called:
            yield self
        for child in self.children if forward else reversed(self.children):
            yield from child.in_order(forward=forward)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The parameters of a model, each once, in the order of ``model.parameters()``.

    Attributes:
        source: The model as text.
        buffer_bytes: Bytes of the buffers.
        layers: The names of the modules that FSDP2 shards one by one.
        root: The model as modules; None: one module for each parameter.
    """

    source: str
    parameters: tuple[Parameter, ...]
    buffer_bytes: int = 0
    layers: tuple[str, ...] = ()
    root: Submodule | None = None

    @property
    def modules(self) -> Submodule:
        """The model as modules."""
        if self.root is not None:
            return self.root
        return Submodule((), tuple(Submodule((n,)) for n in range(len(self.parameters))))

    @property
    def tied(self) -> tuple[Parameter, ...]:
        """The trained parameters that several modules have."""
        uses = Counter(place for module in self.modules.in_order(forward=True) for place in module.parameters)
        return tuple(param for place, param in enumerate(self.parameters) if param.trained and uses[place] > 1)

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(param.numel for param in self.parameters)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that have a gradient."""
        return tuple(param for param in self.parameters if param.trained)

    def by_dtype(self) -> dict[torch.dtype, list[Parameter]]:
        """Return the trained parameters by dtype."""
        found: dict[torch.dtype, list[Parameter]] = {}
        for param in self.trained:
            found.setdefault(param.dtype, []).append(param)
        return found

    def as_dtype(self, dtype: torch.dtype) -> ModelShapes:
        """Return the model with parameters of ``dtype``."""
        return replace(self, parameters=tuple(replace(param, dtype=dtype) for param in self.parameters))


def read_model(
    model: nn.Module | str | float, *, dtype: str | torch.dtype | None = None, layers: str | None = None
) -> ModelShapes:
    """Return the shapes of a model. Local; nothing is downloaded and no memory is allocated for weights.

    Args:
        model: A module, best built under ``torch.device("meta")``; "package.module:factory" or "file.py:factory", a
            function without arguments that returns one; the folder or the config.json of a Hugging Face model; or a
            number of parameters, such as "1.3B", "7e9" or 7_000_000_000.
        dtype: Of the parameters: "float32" ("fp32"), "bfloat16" or "float16". None: that of the model; fp32 for a
            number of parameters.
        layers: The class of the modules that FSDP2 shards one by one, such as "Block". None: those that the Hugging
            Face model names, else the modules of one class in the largest ``ModuleList``.

    Raises:
        ValueError: the model cannot be read; says what to pass.
        ModuleNotFoundError: it is a Hugging Face model, and transformers is not installed.
    """
    return shapes_from(model, read_module(model), dtype=dtype, layers=layers)


def read_module(model: nn.Module | str | float) -> nn.Module | None:
    """Return the module that `read_model` describes; None for a number of parameters. Local.

    Raises:
        ValueError: the model cannot be read; says what to pass.
        ModuleNotFoundError: it is a Hugging Face model, and transformers is not installed.
    """
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str) or _count(model) is not None:
        return None
    if ":" in model and not Path(model).exists():
        return _from_factory(model)
    return _from_configuration(model)


def shapes_from(
    model: nn.Module | str | float,
    module: nn.Module | None,
    *,
    dtype: str | torch.dtype | None = None,
    layers: str | None = None,
) -> ModelShapes:
    """Return the shapes of ``module``, which `read_module` returned for ``model``; the rest as for `read_model`."""
    if module is not None:
        found = shapes_of(module, model if isinstance(model, str) else type(module).__name__, layers)
    else:
        numel = _count(model) if isinstance(model, str) else _whole(model)
        assert isinstance(numel, int)
        if layers is not None:
            raise ValueError(
                f"layers={layers!r} is the class of a model's modules, and a number of parameters has none. Leave "
                "layers out, or pass a model."
            )
        found = _stand_in(numel, str(model))
    return found if dtype is None else found.as_dtype(read_dtype("dtype", dtype))


def read_dtype(name: str, dtype: str | torch.dtype) -> torch.dtype:
    """Return a dtype by its name.

    Raises:
        ValueError: it is not one of fp32, bf16 and fp16.
    """
    text = str(dtype).removeprefix("torch.")
    found = DTYPES.get(_SHORT.get(text, text))
    if found is None:
        raise ValueError(f"{name} must be {', '.join(DTYPES)}, or fp32, bf16, fp16; got {shown(dtype)}.")
    return found


# ---------------------------------------------------------------- modules


def _check_whole(model: nn.Module, source: str) -> None:
    for name, param in model.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} of {source} has no shape yet. Give lazy modules their sizes in the factory.")
        if isinstance(param, DTensor) or hasattr(param, "ds_numel"):
            raise ValueError(
                f"{name} of {source} is sharded already. Plan the model before fully_shard, parallelize_module or "
                "deepspeed.initialize; meshes of two axes (HSDP) and tensor parallelism are not planned."
            )


def shapes_of(model: nn.Module, source: str, layers: str | None = None) -> ModelShapes:
    """Return the shapes of a module; tied weights count once. Local.

    Raises:
        ValueError: it has no parameters, some are not materialised, or no module is of the class ``layers``.
    """
    _check_whole(model, source)
    modules = list(_layers(model, layers))
    layer_of = {id(p): n for n, (_, module) in enumerate(modules) for p in module.parameters()}
    parameters = [
        Parameter(name, tuple(param.shape), param.dtype, param.requires_grad, layer_of.get(id(param)))
        for name, param in model.named_parameters()
    ]
    if not any(param.numel for param in parameters):
        raise ValueError(f"{source} has no parameters.")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    places = {id(param): n for n, param in enumerate(model.parameters())}
    root = _tree(model, places)
    return ModelShapes(source, tuple(parameters), buffers, tuple(name for name, _ in modules), root)


def _tree(module: nn.Module, places: dict[int, int]) -> Submodule:
    own = tuple(dict.fromkeys(places[id(param)] for param in module.parameters(recurse=False)))
    children = tuple(_tree(child, places) for child in module.children())
    return Submodule(own, children, not isinstance(module, nn.ModuleList | nn.ModuleDict))


def _layers(model: nn.Module, kind: str | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are sharded one by one, without those inside another."""
    kinds = {kind} if kind is not None else set(getattr(model, "_no_split_modules", None) or ())
    if kinds:
        found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]
        if kind is not None and not found:
            classes = sorted({type(module).__name__ for module in model.modules()})
            raise ValueError(f"no module is a {kind!r}. The model has {', '.join(classes)}.")
    else:
        found = _largest_list(model)
    inside: set[int] = set()
    for name, module in found:
        if id(module) not in inside:
            inside.update(map(id, module.modules()))
            yield name, module


def _largest_list(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of the ``ModuleList`` or ``Sequential`` with most elements, if they are of one class."""
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for prefix, module in model.named_modules():
        if module is model or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        items = [(f"{prefix}.{name}", item) for name, item in module.named_children()]
        numel = sum(p.numel() for p in module.parameters())
        if len(items) > 1 and len({type(item) for _, item in items}) == 1 and numel > most:
            best, most = items, numel
    return best


# ---------------------------------------------------------------- factories and configurations


def _from_factory(text: str) -> nn.Module:
    """Call "module:factory" or "file.py:factory" on the meta device."""
    place, _, name = text.rpartition(":")
    factory = _attribute(_module(place, text), name, text)
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:
        raise ValueError(
            f"{text} raised {type(error).__name__}: {error}. It is called without arguments, on the meta device, where "
            "weights have no values: leave out loading them."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} must return a torch.nn.Module, got {shown(model)}.")
    return model


def _module(place: str, text: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise ValueError(f"{place} is not a file.")
        spec = importlib.util.spec_from_file_location(f"_planned_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{text!r}: {place} cannot be imported ({type(error).__name__}: {error}). Pass module:factory or "
            "file.py:factory."
        ) from error


def _attribute(module: Any, name: str, text: str) -> Callable[[], Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        place = text.rpartition(":")[0]
        raise ValueError(f"{text!r}: {place} has no function or class {name!r}.")
    return found  # type: ignore[no-any-return]


def _from_configuration(text: str) -> nn.Module:
    """Build the model of a Hugging Face configuration on the meta device."""
    path = Path(text)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise ValueError(
            f"{text!r} is not a model: pass module:factory, file.py:factory, the folder or config.json of a Hugging "
            'Face model, or a number of parameters ("1.3B", "7e9"). Nothing is downloaded, so a name on the hub does '
            "not work: download its config.json."
        )
    try:
        import transformers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading {text!r}, a Hugging Face model, needs transformers: pip install 'dist_adamw[transformers]'."
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(text, local_files_only=True)
        named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
        kind = next((one for one in named if one is not None), None)
        with torch.device("meta"):
            build: Any = transformers.AutoModel.from_config if kind is None else kind
            model = build(config)
    except Exception as error:  # a configuration may fail in any way
        raise ValueError(f"{text} is not a configuration that transformers can build: {error}") from error
    assert isinstance(model, nn.Module)
    return model


# ---------------------------------------------------------------- a number of parameters


def _count(text: str) -> int | None:
    """Return a number of parameters, or None if the text is something else."""
    match = re.fullmatch(r"([+-]?\.?[0-9][0-9_,.]*(?:e\+?[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or os.path.exists(text):
        return None
    # Commas are separators of thousands: "1,3B" may mean 1.3.
    if match[2] not in _UNITS or not re.fullmatch(r"[+-]?(\d{1,3}(,\d{3})+|[\d_]*)(\.\d*)?(e\+?\d+)?", match[1]):
        raise ValueError(
            f"{text!r} is not a number of parameters. Write it as 1.3B, 350M, 7e9 or 1_300_000_000; it may end in K, "
            "M, B or T (10^3 to 10^12)."
        )
    return _whole(float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2]])


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or not 1 <= number < 1e15:
        raise ValueError(f"a number of parameters must be from 1 to 1e15, got {shown(number)}.")
    return round(number)


def _stand_in(numel: int, text: str) -> ModelShapes:
    """Return a transformer of ``numel`` parameters: L layers of 12 h^2 elements with h = 128 L, and an embedding.

    128 is the ratio of width to depth of GPT-3 and of Llama; Kaplan et al., arXiv:2001.08361, section 3.1.
    """
    layers = round((numel / (12 * 128**2)) ** (1 / 3))
    width = int((numel / (12 * max(layers, 1))) ** 0.5 * 0.975) // 64 * 64  # 5% is left to the embedding
    if layers < 1 or width < 64:
        return ModelShapes(f"{text} parameters, as one tensor", (Parameter("weight", (numel,), torch.float32),))
    shapes: Sequence[tuple[int, int]] = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    parameters = [
        Parameter(f"layers.{n}.{k}", shape, torch.float32, layer=n)
        for n in range(layers)
        for k, shape in enumerate(shapes)
    ]
    rows, rest = divmod(numel - 12 * layers * width**2, width)
    parameters.insert(0, Parameter("embedding", (rows, width), torch.float32))
    if rest:
        parameters.append(Parameter("norm", (rest,), torch.float32))
    names = tuple(f"layers.{n}" for n in range(layers))
    source = f"{text} parameters, as a transformer of {layers} layers of width {width}"
    return ModelShapes(source, tuple(parameters), 0, names)
