"""A script that is being drawn, and what its writer knows of the model and the groups by then."""

from __future__ import annotations

import random
from typing import Any

from tests.random.script import Act, Spec

NUMELS = (1, 3, 31, 32, 33, 64, 70, 129, 200)


class Draft:
    """Knows which parameters there are, and in which groups.

    Args:
        way: How gradients are averaged: see `worlds.Ours.wrap`.
    """

    # Set when the first lines are drawn.
    mode: str
    max_grad_norm: float | None
    amsgrad: list[bool | None]  # by group; None where it may have been changed back
    had_amsgrad = False  # whether a group had it that is gone

    def __init__(self, rng: random.Random, number: str, ranks: int, way: dict[str, Any]) -> None:
        self.rng, self.number, self.ranks = rng, number, ranks
        self.way = way
        self.attached = self.way.get("attached", False)
        self.every = self.way.get("reduce_every_backward", False)
        self.exact = self.every or rng.random() < 0.5
        self.specs: dict[str, Spec] = {}
        self.groups: list[list[str]] = []
        self.acts: list[Act] = []
        self.seeds = 0
        self.fresh = 0
        self.has_second = False
        self.kept: set[str] = set()  # what the script has put aside
        self.looks = 0.5 if self.way.get("defer_gather") else 0.8
        self.hooked: set[str] = set()  # parameters with a hook that runs after backward passes which reach them
        self.is_new = False  # an optimizer that is not attached yet: nothing averages what DDP does not know
        self.is_wrapped = True  # whether DDP and `attach` know all parameters
        self.between = True  # whether the last thing was an update, not a backward pass

    # ------------------------------------------------------------ what there is

    def dtype(self) -> str:
        if self.mode == "native":
            return self.rng.choice(("float32", "float32", "float32", "bfloat16", "float64"))
        return self.rng.choice(("bfloat16", "bfloat16", "float32"))

    def add_spec(self, spec: Spec | None = None) -> str:
        name = f"{'abcdefgh'[self.fresh % 8]}{self.fresh // 8 or ''}"
        self.fresh += 1
        if spec is None:
            shape, layout = self.shape()
            spec = Spec(shape, self.dtype(), layout, self.rng.random() < 0.9)
        self.specs[name] = spec
        return name

    def shape(self) -> tuple[tuple[int, ...], str]:
        kind = self.rng.random()
        if kind < 0.1:
            return (), "contiguous"
        if kind < 0.16:
            return (0,), "contiguous"
        if kind < 0.3:
            return (self.rng.choice((5, 9)), self.rng.choice((7, 8))), "transposed"
        if kind < 0.36:
            return (2, 3, 4, 5), "channels_last"
        if kind < 0.5:
            return (self.rng.choice((3, 8)), self.rng.choice((11, 16))), "contiguous"
        return (self.rng.choice(NUMELS),), "contiguous"

    def hyper(self, amsgrad: bool | None = False) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {"lr": rng.choice((1e-2, 1e-2, 3e-2)), "eps": rng.choice((1e-8, 0.1))}
        options["betas"] = (0.9, 0.99)
        if rng.random() < 0.2:
            options["weight_decay"] = rng.choice((0.0, 0.1))
        if rng.random() < 0.1:
            options["maximize"] = True
        if amsgrad:
            options["amsgrad"] = True
        return options

    # ------------------------------------------------------------ tools

    def seed(self) -> int:
        self.seeds += 1
        return self.seeds

    def act(self, label: str, text: str, **more: Any) -> None:
        look = more.pop("look", self.rng.random() < self.looks)
        before, wraps, after = text.rpartition("\nwrap()")
        if not wraps or after:
            self.acts.append(Act(label, text, look=look, **more))
            return
        # By itself: where `attach` refuses gradients that are there, what precedes it has been done in both worlds.
        self.acts.append(Act(label, before, look=False, **more))
        self.acts.append(Act("wrap", "wrap()", may_refuse=self.attached, undo="wrap()", look=look))

    def name(self, among: list[str] | None = None) -> str:
        return self.rng.choice(list(self.specs) if among is None else among)

    def grouped(self) -> list[str]:
        return [name for names in self.groups for name in names if name in self.specs]

    def group(self) -> int:
        return self.rng.randrange(len(self.groups))

    def one_of(self, *texts: str) -> str:
        return self.rng.choice(texts)

    def at_once(self) -> None:
        """An update, which shows what is thought of the act before it."""
        self.act("backward", f"backward({self.seed()})", look=False)
        self.act("step", "optimizer.step()", look=True)
        self.act("zero_grad", "optimizer.zero_grad()")

    def structure(self, label: str, text: str, *, must_wrap: bool = False, **more: Any) -> None:
        """An act after which the model or the groups have other parameters.

        A DDP module is made again then, and attach called again; else a sentence is right.
        """
        wraps = self.way.get("ddp") or self.attached
        if self.ranks > 1:  # shares may be others now
            self.kept.discard("state")
        if wraps and (must_wrap or not self.attached or self.rng.random() < 0.7 or self.is_new):
            self.is_new, self.is_wrapped = False, True
            self.act(label, f"{text}\nwrap()", **more)
        else:
            self.is_wrapped = False
            undo = "\n".join(filter(None, ["wrap()" if wraps else "", more.pop("undo", "")]))
            self.act(label, text, may_refuse=more.pop("may_refuse", False) or bool(wraps), undo=undo)
