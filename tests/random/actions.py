"""Draw random sequences: what users do to parameters, groups, gradients and state between updates."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import torch

from tests.random.groups import Groups
from tests.random.script import Act, Sequence, Spec
from tests.random.values import Values

WAYS: list[dict[str, Any]] = [
    {},  # the user averages by hand
    {"ddp": True},
    {"ddp": True, "attached": True},
    {"ddp": True, "attached": True, "aside": False},
    {"ddp": True, "attached": True, "defer_gather": True},
    {"ddp": True, "attached": True, "overlap": False},
    {"attached": True},
    {"attached": True, "overlap": False},
    {"attached": True, "defer_gather": True},
    {"attached": True, "reduce_every_backward": True},
]


def draw(seed: int, number: int, ranks: int = 1, without: frozenset[str] = frozenset()) -> Sequence:
    """Sequence ``number`` of ``seed``, ``without`` some of the acts that `BETWEEN` and `GRADIENTS` name."""
    rng = random.Random(f"{seed} {number} {ranks}")
    drawer = _Drawer(rng, f"{seed} {number}", ranks, rng.choice(WAYS) if ranks > 1 else {})
    drawer.without = without
    return drawer.sequence()


class _Drawer(Values, Groups):
    """Writes a script update by update."""

    without: frozenset[str]
    averages = False  # whether the optimizer keeps an average of the weights

    def sequence(self) -> Sequence:
        options = self.options()
        self.extra = random.Random(f"averages {self.number} {self.ranks}")  # apart: other sequences stay what they were
        if self.extra.random() < 0.4 and "averages" not in self.without:
            self.averages = True
            options["averages"] = {"ema": {"decay": 0.5}, "last": {"last": 2, "every": None}}
        for _ in range(self.rng.randint(2, 5)):
            self.add_spec()
        if not any(spec.requires_grad for spec in self.specs.values()):
            self.add_spec(Spec((33,)))
        names = list(self.specs)
        params = dict(self.specs)
        self.rng.shuffle(names)
        cuts = sorted(self.rng.sample(range(1, len(names)), min(self.rng.choice((0, 0, 1, 2)), len(names) - 1)))
        self.groups = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
        self.amsgrad = [self.rng.random() < 0.15 for _ in self.groups]
        groups = [(list(names), self.hyper(amsgrad)) for names, amsgrad in zip(self.groups, self.amsgrad, strict=True)]
        for _ in range(self.rng.randint(2, 6)):
            self.update()
        if self.ranks > 1 and self.rng.random() < 0.06 and "alone" not in self.without:
            self.alone()
        self.plain_update()
        return Sequence(self.number, params, groups, options, self.acts, self.ranks, self.way, self.exact)

    def options(self) -> dict[str, Any]:
        rng = self.rng
        options: dict[str, Any] = {}
        self.mode = rng.choice(("native", "native", "native", "float32", "int16", "state"))
        if self.mode == "float32":
            options["master_dtype"] = torch.float32
        elif self.mode == "int16":
            options["master_dtype"] = torch.int16
        if self.mode == "state" or (self.mode != "native" and rng.random() < 0.3):
            options["state_dtype"] = rng.choice((torch.float32, torch.bfloat16))
        self.wide_state = options.get("state_dtype")
        self.max_grad_norm = rng.choice((None, None, None, 1e6, 0.5))
        if self.max_grad_norm is not None:
            options["max_grad_norm"] = self.max_grad_norm
        if self.ranks > 1 or rng.random() < 0.5:
            options["bucket_numel"] = rng.choice((64, 128, 1 << 20))
        return options

    # ------------------------------------------------------------ updates

    def update(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 1, 1, 2))):
            self.something(BETWEEN)
        self.between = False
        if rng.random() < 0.06:
            self.act("step", f"optimizer.step(closure({self.seed()}))")
            self.zero_grad()
        else:
            self.backward_passes()
            if rng.random() < 0.35:
                self.something(GRADIENTS)
            if not self.attached and rng.random() < 0.2:
                self.something(BETWEEN)
            if rng.random() < 0.95:
                self.act("step", "optimizer.step()")
                if self.has_second:
                    self.act("step second", "second.step()")
                if rng.random() < 0.05 and not self.every:  # where no gradient is left
                    self.act("step", "optimizer.step()")
            self.zero_grad()
        self.between = True
        if self.averages and self.extra.random() < 0.5:
            look = self.extra.random() < self.looks
            self.acts.append(Act("average", "show_average()", look=look))

    def plain_update(self) -> None:
        self.act("backward", f"backward({self.seed()})")
        self.act("step", "optimizer.step()", look=True)

    def backward_passes(self) -> None:
        rng = self.rng
        passes = rng.choice((1, 1, 1, 2, 3))
        for i in range(passes):
            last = i == passes - 1
            # With gradients that are not exact, sums are rounded in an order: one synchronised pass then.
            sync = last or (self.exact and rng.random() < 0.5)
            unused = ""
            name = self.name()
            others = any(spec.requires_grad for other, spec in self.specs.items() if other != name)
            if others and rng.random() < 0.2:
                unused = f", unused=({name!r},)"
                # On ranks that a pass does not reach, the hook does not change the averages of the passes before. With
                # DDP each rank has all of those, after attach() its own.
                if self.ranks > 1 and rng.random() < 0.5 and name not in self.hooked:
                    unused = f", unused=({name!r},) if rank else ()"
            self.act("backward", f"backward({self.seed()}{unused}{'' if sync else ', sync=False'})")

    def zero_grad(self) -> None:
        text = self.one_of(
            *["optimizer.zero_grad()"] * 5,
            "optimizer.zero_grad(set_to_none=False)",
            "" if self.every or not self.exact else "pass",
            "" if self.every else "model.zero_grad()",
            "" if self.every else "for p in model.parameters(): p.grad = None",
        )
        text = text or "optimizer.zero_grad()"
        self.act("zero_grad", text)
        if self.has_second:
            self.act("zero_grad", "second.zero_grad()")

    def something(self, choices: Collection[tuple[float, str]]) -> None:
        weights, names = zip(*choices, strict=True)
        name = self.rng.choices(names, weights)[0]
        method: Callable[[], None] = getattr(self, name)
        if name not in self.without:
            method()

    # ------------------------------------------------------------ one rank alone

    def alone(self) -> None:
        # Without attach() a rank that skips is not seen: the others' step() meets a collective of DDP's, or of the
        # script's. Both end with an error of gloo's. With two optimizers the rank that skipped may wait for the other
        # one's gradients until the rank that has raised ends.
        skips = self.attached and not self.is_new and not self.has_second
        kinds = ("lr", "betas", "add", "replace", "remove", *(("skip",) if skips else ()))
        kind = self.rng.choice(kinds)
        name = self.name(self.grouped() or None)
        of, group = f"model.{name}", "optimizer.param_groups[0]"
        texts = {
            "lr": f'{group}["lr"] = 0.5',
            "betas": f'{group}["betas"] = (0.5, 0.5)',
            "add": 'optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(40))]})',
            "replace": f"group, i = find(optimizer, {of})\n{of} = group['params'][i] = nn.Parameter(noise({of}, 1))",
            "remove": f"drop(optimizer, {of})",
        }
        if kind == "skip":
            self.act("backward", f"backward({self.seed()})")
            self.act("alone: skip", "skipped = True", alone=True)
            self.act("step", "if 'skipped' not in globals(): optimizer.step()")
            self.act("zero_grad", "optimizer.zero_grad()")
        else:
            self.act(f"alone: {kind}", texts[kind], alone=True)
        for _ in range(3):
            self.act("backward", f"backward({self.seed()})")
            self.act("step", "optimizer.step()")
            self.act("zero_grad", "optimizer.zero_grad()")


BETWEEN = [
    (5, "write_weights"), (2, "exchange_weights"), (1, "change_layout"), (6, "write_state"), (2, "keep_state"),
    (0.5, "replace_state_memory"), (1, "hold_state"),
    (1, "half_a_state"), (4, "change_options"), (1, "flip_amsgrad"), (1, "reorder_groups"), (1, "reorder_in_group"),
    (2, "add_group"), (2, "add_to_group"), (4, "replace_parameter"), (3, "remove_parameter"), (2, "move_parameter"),
    (2, "delete_group"), (1, "rebuild_groups"), (3, "freeze"), (1, "bad_group"), (2, "save_and_load"),
    (3, "copy_job"), (1, "copy_aside"), (2, "state_dicts"), (1, "keep_state_dict"), (2, "through_torch"),
    (2, "second_optimizer"), (1, "new_optimizer"), (1, "attach_in_one_process"), (1, "hook"), (1, "read"),
]  # fmt: skip
GRADIENTS = [(4, "write_gradient"), (2, "write_all_gradients"), (2, "clip"), (1, "infinite_gradient"), (1, "hook")]
