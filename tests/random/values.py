"""Actions of users on weights, gradients and optimizer state."""

from __future__ import annotations

from tests.random.draft import Draft


class Values(Draft):
    """Acts that change values."""

    # ------------------------------------------------------------ weights

    def write_weights(self) -> None:
        name, seed = self.name(), self.seed()
        of = f"model.{name}"
        texts = [
            f"with torch.no_grad(): {of}.mul_(0.5)",
            f"with torch.no_grad(): {of}.copy_(noise({of}, {seed}))",
            f"with torch.no_grad(): {of}.fill_(0.25)",
            f"nn.init.constant_({of}, 0.25)",
            f"{of}.data.copy_(noise({of}, {seed}))",
            f"{of}.data = noise({of}, {seed})",
            f"{of}.data.clamp_(-0.25, 0.25)",
            f"{of}.data.mul_(0.75)",
            f"{of}.data = {of}.data * 0.75",
            f"{of}.data = {of}.data.clone()",
            f"{of}.detach().mul_(0.5)",
            "torch._foreach_mul_([p.data for p in model.parameters()], 0.5)",
            "model.load_state_dict({name: p * 0.5 for name, p in model.state_dict().items()})",
        ]
        if self.specs[name].shape not in ((), (0,)):
            texts.append(f"with torch.no_grad(): {of}[..., :1] = 0.5")
        if self.specs[name].dtype != "bfloat16":
            texts.append(f"{of}.detach().numpy().fill(0.5)")
        if self.mode == "int16":
            return  # a remainder stays below what is written: half of the last bit of bf16 is anyone's
        self.act("write weights", self.rng.choice(texts))

    def exchange_weights(self) -> None:
        """A moving average that takes the model's place for a while."""
        if self.mode == "int16":
            return
        if "ema" not in self.kept:
            self.kept.add("ema")
            self.act("keep weights", "ema = {name: p.detach().clone() for name, p in model.named_parameters()}")
            return
        self.act(
            "swap weights",
            "for name, p in model.named_parameters():\n"
            "    if name in ema and ema[name].shape == p.shape:\n"
            "        p.data, ema[name] = ema[name], p.data",
        )

    def change_layout(self) -> None:
        names = [name for name, spec in self.specs.items() if spec.layout == "transposed"]
        if not names:
            return
        of = f"model.{self.name(names)}"
        undo = f"{of}.data = {of}.data.t().contiguous().t()"
        self.act("change layout", f"{of}.data = {of}.data.contiguous()", may_refuse=True, undo=undo)

    # ------------------------------------------------------------ gradients

    def write_gradient(self) -> None:
        if self.every:
            return  # there is none to be seen
        name, seed = self.name(), self.seed()
        of = f"model.{name}"
        there = f"if {of}.grad is not None: "
        # DDP itself sends what its bucket holds, and not what such a gradient is.
        by_ddp = self.way.get("ddp") and (self.is_new or not self.attached)
        memory = [] if by_ddp else [f"{there}{of}.grad.data = noise({of}, {seed})"]
        text = self.one_of(
            *memory,
            f"{there}{of}.grad.mul_(0.5)",
            f"{there}{of}.grad = {of}.grad * 0.5",
            f"{there}{of}.grad.data.mul_(0.5)",
            f"{there}{of}.grad.data.copy_(noise({of}, {seed}))",
            f"{there}{of}.grad.zero_()",
            f"{of}.grad = None",
            f"{of}.grad = torch.zeros_like({of})",
            f"{of}.grad = noise({of}, {seed})",
            f"{there}{of}.grad.detach().mul_(0.5)",
            f"{of}.grad, kept_grad = None, {of}.grad\n{of}.grad = kept_grad",
        )
        self.act("write gradient", text, may_refuse=self.attached)

    def write_all_gradients(self) -> None:
        if self.every:
            return
        text = self.one_of(
            "nn.utils.clip_grad_value_(model.parameters(), 0.5)",
            "for p in model.parameters():\n    if p.grad is not None: p.grad.mul_(0.5)",
            "for p in model.parameters():\n    if p.grad is not None: p.grad = p.grad * 0.5",
            "for p in model.parameters():\n    if p.grad is not None: p.grad.data.mul_(0.5)",
            "torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)",
        )
        if self.attached and set(self.grouped()) != set(self.specs):  # of a parameter in no group, local ones
            text = text.replace(
                "model.parameters()", "[p for group in optimizer.param_groups for p in group['params']]"
            )
        accepts = self.attached and "= p.grad" not in text and self.rng.random() < 0.3
        if accepts:
            text += "\noptimizer.accept_gradients()" + ("\nsecond.accept_gradients()" if self.has_second else "")
        self.act("write all gradients", text, may_refuse=self.attached)

    def clip(self) -> None:
        if self.has_second or set(self.grouped()) != set(self.specs):
            return
        norm = self.rng.choice((0.25, 1e6))
        text = self.one_of(
            f"optimizer.clip_grad_norm_({norm})", f"nn.utils.clip_grad_norm_(model.parameters(), {norm})"
        )
        if self.every and "nn.utils" in text:
            return
        self.act("clip", text, may_refuse=self.attached and "nn.utils" in text)

    def infinite_gradient(self) -> None:
        if self.max_grad_norm is None or self.attached:
            return
        of = f"model.{self.name()}"
        self.act("inf gradient", f"if {of}.grad is not None: {of}.grad.fill_(float('inf'))")

    def hook(self) -> None:
        name = self.name()
        of = f"model.{name}"
        hooked = f"if {of}.requires_grad: {of}."
        if self.rng.random() < 0.5:
            self.act("gradient hook", f"{hooked}register_hook(lambda grad: grad * 0.5)")
        elif not self.every and not (self.ranks > 1 and self.specs[name].dtype == "bfloat16"):
            # Halved at every pass, a sum would lose bits of bf16, and ranks' sums others than the average does.
            handle = f"handle_{self.seed()}"
            self.hooked.add(name)
            self.act(
                "gradient hook",
                f"if {of}.requires_grad: {handle} = {of}.register_post_accumulate_grad_hook(halve)",
                may_refuse=self.attached,
                undo=f"if '{handle}' in globals(): {handle}.remove()",
            )

    # ------------------------------------------------------------ state

    def write_state(self) -> None:
        name, seed = self.name(), self.seed()
        if name not in self.grouped():
            return
        of = f"optimizer.state[model.{name}]"
        # Several ranks lay out zeros for a parameter that has had no gradient, of which torch has no entry.
        has_state = "'exp_avg' in state" if self.ranks == 1 else "state.get('step')"
        got = f"state = optimizer.state.get(model.{name}, {{}})\nif {has_state}: "
        each = f"for state in optimizer.state.values():\n    if {has_state}: "
        texts = [
            "optimizer.state.clear()",
            f"{of} = {{}}",
            f"optimizer.state.pop(model.{name}, None)",
            f'{got}state["exp_avg"] = torch.zeros_like(state["exp_avg"])',
            f'{got}state["exp_avg"] = state["exp_avg"] * 0.5',
            f'{got}state["exp_avg"].zero_()',
            f'{got}state["exp_avg_sq"].mul_(0.5)',
            f'{got}state["step"] = torch.zeros(())',
            f'{got}state["step"].fill_(7.0)',
            f'{got}state["step"] = state["step"] + 1',
            f'{got}state.update(exp_avg=state["exp_avg"] * 0.5, exp_avg_sq=state["exp_avg_sq"] * 0.5)',
            f"{each}state['exp_avg'].zero_()",
            f"{each}state['exp_avg'] = torch.zeros_like(state['exp_avg'])",
            "for p in list(optimizer.state): optimizer.state[p] = {}",
            "optimizer.state = type(optimizer.state)(dict)",
            "optimizer.state = type(optimizer.state)(dict, optimizer.state)",
        ]
        if self.mode != "native":  # a step without moments, or moments without their master, are half a state
            texts = [text for text in texts if "step" not in text]
        if self.ranks == 1 and self.mode == "native" and self.amsgrad_of(name) is not None:
            more = f', "max_exp_avg_sq": noise(model.{name}, {seed}).abs()' if self.amsgrad_of(name) else ""
            texts.append(
                f'{of} = {{"step": torch.tensor(3.0), "exp_avg": noise(model.{name}, {seed}), '
                f'"exp_avg_sq": noise(model.{name}, "{seed} sq").abs(){more}}}'
            )
            texts.append(f'{got}state["exp_avg"] = noise(model.{name}, {seed})')
        self.act("write state", self.rng.choice(texts))

    def amsgrad_of(self, name: str) -> bool | None:
        return next(amsgrad for names, amsgrad in zip(self.groups, self.amsgrad, strict=True) if name in names)

    def replace_state_memory(self) -> None:
        has_state = "'exp_avg' in state" if self.ranks == 1 else "state.get('step')"  # as in `write_state`
        state = f"state = optimizer.state.get(model.{self.name()}, {{}})\nif {has_state}:"
        texts = [
            f'{state} state["exp_avg_sq"].data = state["exp_avg_sq"] * 0.5',
            f'{state} state["exp_avg"].data = torch.zeros_like(state["exp_avg"])',
            f'{state} state["exp_avg"].set_(state["exp_avg"] * 0.5)',
        ]
        if self.mode == "native":
            texts.append(f'{state} state["step"].data = torch.full((), 5.0)')
        self.act("replace state memory", self.rng.choice(texts))

    def hold_state(self) -> None:
        """A moment that the user holds is the state as long as it is in ``state``, and keeps its values afterwards."""
        if self.ranks > 1:  # a share, of a layout that may be another by then
            return
        name = self.name()
        state = f"state = optimizer.state.get(model.{name}, {{}})\n"
        held = f"held_{name}"
        if held not in self.kept:
            self.kept.add(held)
            self.act("hold state", f"{held} = None\n{state}if 'exp_avg' in state: {held} = state['exp_avg']")
            return
        text = self.one_of(
            f"if {held} is not None: {held}.mul_(0.5)",
            f"{state}if {held} is not None and 'exp_avg' in state and {held}.shape == state['exp_avg'].shape: "
            f"state['exp_avg'] = {held}",
            f"{state}if {held} is not None and 'exp_avg' in state and {held}.shape == state['exp_avg'].shape:\n"
            f"    state['exp_avg'].data, {held} = {held}.clone(), state['exp_avg'].data",
            f"{state}if 'exp_avg' in state: state['exp_avg'] = torch.zeros_like(state['exp_avg'])",
        )
        self.act("write held state", text)

    def keep_state(self) -> None:
        if self.mode == "int16":
            return  # as in `write_weights`: a remainder goes with the parameter of its time
        if "state" not in self.kept:
            self.kept.add("state")
            self.act(
                "keep state",
                "kept = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items() if s.get('step')}",
            )
            return
        self.act(
            "put state back",
            "for p, s in kept.items():\n"
            "    if p in optimizer.state: optimizer.state[p] = {k: v.clone() for k, v in s.items()}",
        )

    def half_a_state(self) -> None:
        """Do what torch refuses with a KeyError, or worse."""
        if self.mode != "native" or not self.grouped() or not self.between:
            return
        name = self.name(self.grouped())
        of = f"optimizer.state[model.{name}]"
        wrong = self.one_of(
            f'{of} = {{"step": torch.tensor(1.0)}}',
            f'{of} = {{"step": torch.ones(()), "exp_avg": torch.zeros(3, 3, 3), "exp_avg_sq": torch.zeros(3, 3, 3)}}',
        )
        self.act("half a state", wrong, may_refuse=True, undo=f"{of} = {{}}")
        self.at_once()
