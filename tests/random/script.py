"""A random sequence as data: a model, an optimizer, and the lines of a user's training script."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A parameter of the model.

    Attributes:
        layout: "contiguous"; "transposed": strides of the transpose; "channels_last": of a 4-d one.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    requires_grad: bool = True


@dataclass(frozen=True)
class Act:
    """One action of a user.

    Attributes:
        label: What it is called in tables.
        text: The lines, run in both worlds.
        may_refuse: Whether a sentence is an answer to it, at once or at the next update.
        undo: What the user does after that sentence, in both worlds, besides ``zero_grad``.
        look: Whether the worlds are compared afterwards. Looking reads everything, which may hide a mistake.
        alone: Done by one rank alone, and not by torch: every rank must raise within two updates.
    """

    label: str
    text: str
    may_refuse: bool = False
    undo: str = ""
    look: bool = True
    alone: bool = False


@dataclass(frozen=True)
class Sequence:
    """Everything that a run depends on.

    Attributes:
        params: By attribute of the model.
        groups: Names and options of each parameter group.
        options: Of the constructor, besides ``params``.
        way: How gradients are averaged on several ranks: see `worlds.Ours.wrap`.
        exact: Gradients are numbers of few bits, so that sums of them are exact in any order.
    """

    number: str
    params: dict[str, Spec]
    groups: list[tuple[list[str], dict[str, Any]]]
    options: dict[str, Any]
    acts: list[Act]
    ranks: int = 1
    way: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    def with_acts(self, acts: list[Act]) -> Sequence:
        return replace(self, acts=acts)

    @property
    def is_attached(self) -> bool:
        """Whether gradients are reduced to their owners: then ``p.grad`` is no whole average."""
        return self.way.get("attached", False)

    def readable(self) -> str:
        """Return it as a script."""
        lines = [f"# sequence {self.number}: {self.ranks} rank(s), {self.way or 'one process'}, exact={self.exact}"]
        for name, spec in self.params.items():
            more = "" if spec.layout == "contiguous" else f", {spec.layout}"
            more += "" if spec.requires_grad else ", frozen"
            lines.append(f"model.{name}: {spec.dtype}{list(spec.shape)}{more}")
        groups = ", ".join(
            "{" + ", ".join([f"params: [{', '.join(names)}]", *(f"{k}: {v!r}" for k, v in options.items())]) + "}"
            for names, options in self.groups
        )
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        lines.append(f"optimizer = DistAdamW([{groups}]{options})")
        for act in self.acts:
            mark = "" if act.look else "  # not looked at"
            alone = "if rank == 1: " if act.alone else ""
            lines += [alone + line + mark for line in act.text.splitlines()]
        return "\n".join(lines)
