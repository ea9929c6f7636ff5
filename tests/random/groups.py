"""Actions of users on parameter groups and on whole jobs: save, load, copy, start another optimizer."""

from __future__ import annotations

from typing import Any

from tests.random.draft import Draft
from tests.random.script import Spec


class Groups(Draft):
    """Acts that change which parameters there are, and where."""

    # ------------------------------------------------------------ groups

    def change_options(self) -> None:
        g = self.group()
        group = f"optimizer.param_groups[{g}]"
        text = self.one_of(
            f'{group}["lr"] = 0.02',
            "for group in optimizer.param_groups: group['lr'] *= 0.5",
            f'{group}["betas"] = (0.8, 0.95)',
            f'{group}["eps"] = 1e-3',
            f'{group}["weight_decay"] = 0.3',
            f'{group}["maximize"] = not {group}["maximize"]',
            f"{group}.update(lr=0.005, weight_decay=0.0)",
            f"optimizer.param_groups[{g}] = dict({group})",
            f'optimizer.param_groups[{g}] = {{**{group}, "lr": 0.02}}',
            "optimizer.param_groups = [dict(group) for group in optimizer.param_groups]",
            f'{group}["params"] = list({group}["params"])',
            f'{group}["lr"] = torch.tensor(0.02, dtype=torch.float64)' if self.ranks == 1 else f'{group}["lr"] = 0.0',
        )
        self.act("change options", text)

    def flip_amsgrad(self) -> None:
        g = self.group()
        if not self.between or self.amsgrad[g] is None:
            return
        line, to = f'optimizer.param_groups[{g}]["amsgrad"] = ', not self.amsgrad[g]
        self.act("flip amsgrad", f"{line}{to}", may_refuse=True, undo=f"{line}{not to}")
        self.amsgrad[g] = None  # who knows
        self.at_once()

    def reorder_groups(self) -> None:
        if len(self.groups) < 2:
            return
        text = self.one_of(
            "optimizer.param_groups.reverse()", "optimizer.param_groups = list(reversed(optimizer.param_groups))"
        )
        self.groups.reverse()
        self.amsgrad.reverse()
        self.structure("reorder groups", text)

    def reorder_in_group(self) -> None:
        g = self.group()
        group = f"optimizer.param_groups[{g}]"
        self.groups[g].reverse()
        text = self.one_of(f'{group}["params"].reverse()', f'{group}["params"] = {group}["params"][::-1]')
        self.structure("reorder parameters", text)

    def new_parameter(self) -> tuple[str, str]:
        name = self.add_spec()
        return name, f"model.{name} = parameter({self.specs[name]!r}, {self.seed()})"

    def add_group(self) -> None:
        outside = [name for name in self.specs if name not in self.grouped()]
        if outside and self.rng.random() < 0.5:
            name, text = self.name(outside), ""
        else:
            name, text = self.new_parameter()
        amsgrad = self.rng.random() < 0.15
        options = "".join(f", {k!r}: {v!r}" for k, v in self.hyper(amsgrad).items())
        self.groups.append([name])
        self.amsgrad.append(amsgrad)
        line = f'optimizer.add_param_group({{"params": [model.{name}]{options}}})'
        self.structure("add group", f"{text}\n{line}".strip(), **self.may_change_amsgrad(name, text))

    def add_to_group(self) -> None:
        outside = [name for name in self.specs if name not in self.grouped()]
        if outside and self.rng.random() < 0.5:
            name, text = self.name(outside), ""
        else:
            name, text = self.new_parameter()
        g = self.group()
        params = f'optimizer.param_groups[{g}]["params"]'
        self.groups[g].append(name)
        line = self.one_of(
            f"{params}.append(model.{name})", f"{params} = [*{params}, model.{name}]", f"{params} += [model.{name}]"
        )
        self.structure("add to group", f"{text}\n{line}".strip(), **self.may_change_amsgrad(name, text))

    def may_change_amsgrad(self, name: str, text: str) -> dict[str, Any]:
        """Handle a parameter that comes back, perhaps with state, to a group that may be of the other kind."""
        if text or (all(amsgrad is False for amsgrad in self.amsgrad) and not self.had_amsgrad):
            return {}
        return {"may_refuse": True, "undo": f"optimizer.state[model.{name}] = {{}}"}

    def replace_parameter(self) -> None:
        names = self.grouped()
        if not names:
            return
        name, seed = self.name(names), self.seed()
        old, of = self.specs[name], f"model.{name}"
        kind = self.rng.choice(("same", "other", "grown", "moved"))
        put = self.one_of(
            'group["params"][i] = NEW', 'group["params"] = [NEW if p is old else p for p in group["params"]]'
        )
        put = put.replace("NEW", of)
        start = f"group, i = find(optimizer, {of})\nold = {of}\n"
        forget = self.one_of("", "\noptimizer.state.pop(old, None)")
        more: dict[str, Any] = {}
        if kind == "same":
            text = f"{start}{of} = nn.Parameter(noise(old, {seed}))\n{put}{forget}"
            self.specs[name] = Spec(old.shape, old.dtype, old.layout)
        elif kind == "moved":
            text = (
                f"{start}{of} = nn.Parameter(old.detach().clone())\n{put}\n"
                f"if old in optimizer.state: optimizer.state[{of}] = optimizer.state.pop(old)"
            )
            self.specs[name] = Spec(old.shape, old.dtype, old.layout)
            if self.ranks > 1:  # a share, of a layout that may be another by then
                more = {"may_refuse": True, "undo": f"optimizer.state[{of}] = {{}}"}
        elif kind == "grown" and old.layout == "contiguous" and old.shape and self.ranks == 1 and self.mode == "native":
            extra = self.rng.choice((3, 32))
            text = (
                f"{start}extra = torch.zeros({(extra, *old.shape[1:])}, dtype=old.dtype)\n"
                f"{of} = nn.Parameter(torch.cat([old.detach(), extra]))\n{put}\n"
                "state = optimizer.state.pop(old, None)\n"
                "if state:\n"
                "    for key in list(state):\n"
                "        if key != 'step': state[key] = torch.cat([state[key], extra])\n"
                f"    optimizer.state[{of}] = state"
            )
            self.specs[name] = Spec((old.shape[0] + extra, *old.shape[1:]), old.dtype)
        else:
            shape, layout = self.shape()
            self.specs[name] = Spec(shape, old.dtype, layout)
            text = f"{start}{of} = parameter({self.specs[name]!r}, {seed})\n{put}{forget}"
        self.kept.discard("ema")
        self.structure(f"replace parameter, {kind}", text, **more)

    def remove_parameter(self) -> None:
        if len(self.grouped()) < 2:
            return
        name = self.name(self.grouped())
        text = self.one_of(
            f"drop(optimizer, model.{name})",
            f"for group in optimizer.param_groups:\n"
            f'    group["params"] = [p for p in group["params"] if p is not model.{name}]',
        )
        for names in self.groups:
            if name in names:
                names.remove(name)
        if self.rng.random() < 0.4 and sum(spec.requires_grad for spec in self.specs.values()) > 1:
            text += f"\nif model.{name} in optimizer.state: del optimizer.state[model.{name}]\ndel model.{name}"
            del self.specs[name]
        self.structure("remove parameter", text)

    def move_parameter(self) -> None:
        if len(self.groups) < 2 or not self.grouped():
            return
        name = self.name(self.grouped())
        g = self.group()
        source = next(i for i, names in enumerate(self.groups) if name in names)
        if None in self.amsgrad or self.amsgrad[source] != self.amsgrad[g]:
            return
        self.groups[source].remove(name)
        self.groups[g].append(name)
        text = f'drop(optimizer, model.{name})\noptimizer.param_groups[{g}]["params"].append(model.{name})'
        self.structure("move parameter", text)

    def delete_group(self) -> None:
        if len(self.groups) < 2:
            return
        g = self.group()
        if not any(names for i, names in enumerate(self.groups) if i != g):
            return
        self.had_amsgrad |= self.amsgrad[g] is not False
        del self.groups[g], self.amsgrad[g]
        self.structure(
            "delete group", self.one_of(f"del optimizer.param_groups[{g}]", f"optimizer.param_groups.pop({g})")
        )

    def rebuild_groups(self) -> None:
        if not all(self.groups):
            return
        self.structure(
            "rebuild groups",
            "groups = list(optimizer.param_groups)\noptimizer.param_groups.clear()\n"
            "for group in groups: optimizer.add_param_group(group)",
        )

    def freeze(self) -> None:
        name = self.name()
        spec = self.specs[name]
        if spec.requires_grad and sum(s.requires_grad for s in self.specs.values()) < 2:
            return
        to = not spec.requires_grad
        self.specs[name] = Spec(spec.shape, spec.dtype, spec.layout, to)
        text = f"model.{name}.requires_grad_({to})"
        if not to and (self.attached or self.rng.random() < 0.7):
            text += f"\nmodel.{name}.grad = None"
        self.structure("unfreeze" if to else "freeze", text)

    def bad_group(self) -> None:
        """Do what torch refuses too."""
        text = self.one_of(
            f'optimizer.add_param_group({{"params": [model.{self.name(self.grouped() or None)}]}})',
            'optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0})',
            'optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.complex64))]})',
            'optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True) * 2]})',
            'optimizer.add_param_group({"params": {nn.Parameter(torch.zeros(3))}})',
        )
        # torch checks an lr in its constructor alone.
        self.act("bad group", text, may_refuse="lr" in text or "complex" in text)

    # ------------------------------------------------------------ jobs

    def names_match(self) -> bool:
        """Whether the optimizer has parameters of the model alone."""
        return all(name in self.specs for names in self.groups for name in names) and all(self.groups)

    def save_and_load(self) -> None:
        if not self.names_match():
            return
        self.has_second = False
        self.kept.clear()
        self.act("save and load", "save_and_load()")

    def copy_job(self) -> None:
        names = "model, optimizer, second" if self.has_second else "model, optimizer"
        text = self.one_of(
            f"{names} = copy.deepcopy(({names}))\nwrap()", f"{names} = pickle.loads(pickle.dumps(({names})))\nwrap()"
        )
        self.kept.clear()
        # What ranks must do together cannot be done by copying.
        self.act("copy", text, may_refuse=self.ranks > 1)

    def copy_aside(self) -> None:
        text = self.one_of("aside = copy.deepcopy(optimizer)", "aside = pickle.dumps(optimizer)", "repr(optimizer)")
        # A copy has whole groups and state, for which ranks follow changes together.
        self.act("copy aside", text, may_refuse=self.ranks > 1 and "aside" in text)

    def state_dicts(self) -> None:
        if not self.names_match():
            return
        refuses = self.ranks > 1
        text = self.one_of(
            "optimizer.load_state_dict(optimizer.state_dict())",
            "optimizer.load_state_dict(through_file(optimizer.state_dict()))",
            "optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))",
            "saved = optimizer.state_dict()\noptimizer = make_alike()\noptimizer.load_state_dict(saved)\nwrap()",
        )
        self.act("state dict", text, may_refuse=refuses)

    def keep_state_dict(self) -> None:
        if self.ranks > 1:
            return
        if "state_dict" not in self.kept:
            self.kept.add("state_dict")
            # Remainders are worth something beside the weights that they are the rest of.
            weights = "\nsaved_weights = {n: p.detach().clone() for n, p in model.named_parameters()}"
            self.act(
                "keep state dict",
                f"saved_before = copy.deepcopy(optimizer.state_dict()){weights if self.mode == 'int16' else ''}",
            )
            return
        weights = (
            "\n    for n, p in model.named_parameters():\n"
            "        if n in saved_weights and p.shape == saved_weights[n].shape: p.data.copy_(saved_weights[n])"
        )
        self.act(
            "go back to state dict",
            "if [len(g['params']) for g in saved_before['param_groups']] == "
            "[len(g['params']) for g in optimizer.param_groups]:\n"
            f"    optimizer.load_state_dict(copy.deepcopy(saved_before)){weights if self.mode == 'int16' else ''}",
            may_refuse=True,  # of a parameter that has another shape since; torch's next update would read beyond it
        )

    def through_torch(self) -> None:
        if self.ranks > 1 or self.mode != "native" or self.max_grad_norm is not None or self.has_second:
            return
        if self.names_match() and all(amsgrad is False for amsgrad in self.amsgrad):
            self.act("through torch", f"through_torch({self.seed()})")

    def second_optimizer(self) -> None:
        if self.has_second:
            self.has_second = False
            self.act("drop second", "second = None")
            return
        if self.mode == "int16":
            return  # as in `write_weights`: the other optimizer may write a parameter of this one, now or later
        outside = [name for name in self.specs if name not in self.grouped()]
        names = outside if outside and self.rng.random() < 0.5 else self.rng.sample(list(self.specs), 1)
        self.has_second = True
        params = ", ".join(f"model.{name}" for name in names)
        text = f'second = make([{{"params": [{params}], "lr": 0.01}}])'
        # Of a plain module that it is not attached to, gradients are local ones, as in torch.
        self.structure("second optimizer", text, must_wrap=not self.way.get("ddp") or not self.is_wrapped)

    def new_optimizer(self) -> None:
        """Phase 2 of a fine-tune."""
        names = list(self.specs)
        self.groups, self.amsgrad = [names], [False]
        text = 'optimizer = make([{"params": list(model.parameters()), "lr": 0.01}])'
        # Nothing would average the gradients of a parameter that DDP does not know.
        self.structure("new optimizer", text, must_wrap=not self.way.get("ddp") or not self.is_wrapped)
        self.is_new = self.attached and "wrap()" not in self.acts[-1].text

    def attach_in_one_process(self) -> None:
        if self.ranks == 1:
            self.act("attach", "optimizer.attach(model)")
        elif self.attached or self.way.get("ddp"):
            self.act("wrap again", "wrap()", may_refuse=self.attached, undo="wrap()")

    def read(self) -> None:
        self.act(
            "read",
            self.one_of(
                "[p.sum().item() for p in model.parameters()]",
                "[v.sum() for s in optimizer.state.values() for v in s.values()]",
                "list(optimizer.state.items())",
                "optimizer.state[nn.Parameter(torch.zeros(2))]" if self.ranks == 1 else "len(optimizer.state)",
            ),
        )
