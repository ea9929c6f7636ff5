"""Keys of a DeepSpeed configuration that DeepSpeed does not have.

DeepSpeed ignores unknown keys at the top of its configuration, and raises for some below. The keys are read from the
source of the installed DeepSpeed, since importing it takes seconds; without it, nothing is reported.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_adamw.checking.inputs import Finding, Inputs
from dist_adamw.recipes.source import Place

# Its pydantic models forbid other keys.
_MODELS: Mapping[Place, tuple[str, str]] = {
    ("zero_optimization",): ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    ("zero_optimization", "offload_param"): ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    ("zero_optimization", "offload_optimizer"): (
        "runtime/zero/offload_config.py",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    ("fp16",): ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    ("bf16",): ("runtime/precision_config.py", "DeepSpeedBF16Config"),
}
_WORD = re.compile(r"""["']([A-Za-z_][A-Za-z0-9_]*)["']""")


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of the installed DeepSpeed.

    Attributes:
        top: Every word that DeepSpeed's own code has in quotes where it reads its configuration. These are more than
            its keys, so that none is reported that it reads.
        below: By section, the exact keys.
    """

    top: frozenset[str]
    below: Mapping[Place, frozenset[str]]


def check_deepspeed_keys(inputs: Inputs) -> Iterator[Finding]:
    """Yield the keys of a DeepSpeed JSON that the installed DeepSpeed does not have. Local."""
    if inputs.deepspeed is None or inputs.deepspeed_place or not inputs.uses_deepspeed():
        return
    keys = _installed_keys()
    if keys is not None:
        yield from _check_top(inputs, keys)
        yield from _check_below(inputs, keys)


def _check_top(inputs: Inputs, keys: _Keys) -> Iterator[Finding]:
    for key in map(str, inputs.deepspeed_config()):
        if key in keys.top or key.startswith(("_", "//", "#")):  # or a comment
            continue
        homes = [".".join(place) for place, known in keys.below.items() if key in known]
        hint = f"It belongs in {' or '.join(homes)}." if homes else _hint(key, keys.top)
        sentence = f"DeepSpeed has no {key!r} here, and ignores it. {hint}"
        yield inputs.in_deepspeed("error", "key", (key,), sentence)


def _check_below(inputs: Inputs, keys: _Keys) -> Iterator[Finding]:
    for place, known in keys.below.items():
        section = inputs.of_deepspeed(*place)
        unknown = [key for key in section if key not in known] if isinstance(section, dict) else []
        for key in unknown:
            sentence = f"DeepSpeed has no {key!r} in {place[-1]}, and raises. {_hint(str(key), known)}"
            yield inputs.in_deepspeed("error", "key", (*place, key), sentence)


def _hint(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
    return f"Did you mean {near[0]}?" if near else "Leave it out."


@functools.lru_cache(maxsize=1)
def _installed_keys() -> _Keys | None:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    below = {place: _fields(root / file, name) for place, (file, name) in _MODELS.items()}
    words = _words(root)
    if "train_batch_size" not in words:  # another layout of the package
        return None
    return _Keys(words, {place: fields for place, fields in below.items() if fields})


def _words(root: Path) -> frozenset[str]:
    files = [root / "__init__.py", root / "runtime" / "engine.py"]
    files += [path for path in root.rglob("*.py") if "config" in path.name or "constants" in path.name]
    texts = [path.read_text(errors="replace") for path in files if path.is_file()]
    return frozenset(word for text in texts for word in _WORD.findall(text))


def _fields(path: Path, name: str) -> frozenset[str]:
    """Return the names and aliases of the fields of a pydantic model; empty if it is not there."""
    if not path.is_file():
        return frozenset()
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for one in node.body:
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                    found |= {one.target.id, *_aliases(one.value)}
    return frozenset(found)


def _aliases(value: Any) -> Iterator[str]:
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if keyword.arg == "alias" and isinstance(keyword.value, ast.Constant):
            yield str(keyword.value.value)
