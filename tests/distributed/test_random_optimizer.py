"""Scripts of users between updates, on two ranks: some that once failed, and a few random ones.

``python -m tests.random.optimizer --ranks 2`` draws others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.random.actions import draw
from tests.random.optimizer import judge, outcomes_of
from tests.random.script import Act, Sequence, Spec

PLAIN: dict[str, Any] = {"attached": True}
EVERY: dict[str, Any] = {"attached": True, "reduce_every_backward": True}
ASIDE: dict[str, Any] = {"ddp": True, "attached": True}
DEFERRED: dict[str, Any] = {"ddp": True, "attached": True, "defer_gather": True}
BUCKETS: dict[str, Any] = {"ddp": True, "attached": True, "aside": False}
TWO = {"a": Spec((5, 8)), "b": Spec((48,))}

ON_ONE_RANK_ALONE = """
del optimizer.param_groups[1]
wrap()
backward(1, unused=('a',) if rank else ())
optimizer.step()
optimizer.zero_grad()
backward(2)
backward(3, unused=('a',) if rank else ())
optimizer.step()
"""

SCRIPTS: dict[str, tuple[dict[str, Any], str]] = {
    "memory of a gradient, set to zero": (
        BUCKETS,
        """
        backward(1)
        model.b.grad.data = noise(model.b, 7)
        optimizer.zero_grad(set_to_none=False)
        backward(2)
        optimizer.step()
        """,
    ),
    "zeros for a parameter without a gradient, set to zero": (
        PLAIN,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        backward(2, unused=('b',))
        optimizer.zero_grad(set_to_none=False)
        backward(3, unused=('b',))
        optimizer.step()
        """,
    ),
    "two updates by the gradient of a new parameter": (
        PLAIN,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.a = optimizer.param_groups[0]['params'][0] = parameter(Spec((7, 5)), 5)
        wrap()
        backward(2)
        optimizer.step()
        optimizer.step()
        """,
    ),
    "a parameter that comes between two backward passes of the first update": (
        EVERY,
        """
        backward(1)
        model.c = parameter(Spec((31,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        backward(2)
        optimizer.step()
        """,
    ),
    "a gradient without elements when the layout changes": (
        EVERY,
        """
        model.c = parameter(Spec((0,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        wrap()
        backward(1)
        model.a = optimizer.param_groups[0]['params'][0] = parameter(Spec((7, 5)), 5)
        model.b = optimizer.param_groups[1]['params'][0] = parameter(Spec((7, 5)), 6)
        wrap()
        optimizer.step()
        """,
    ),
    "zeros in place of gradients that were let go of": (
        EVERY,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        backward(2, unused=('b',))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        backward(3)
        optimizer.zero_grad(set_to_none=False)
        backward(4, unused=('b',) if rank else ('a',))
        optimizer.step()
        """,
    ),
    "a backward pass that reaches the optimizer's parameters on one rank alone": (PLAIN, ON_ONE_RANK_ALONE),
    "a gradient of another optimizer, whose parameter leaves when the layout changes": (
        PLAIN,
        """
        second = make([{"params": [model.a], "lr": 0.01}])
        wrap()
        backward(1)
        optimizer.step()
        second.step()
        optimizer.zero_grad()
        second.zero_grad()
        optimizer.param_groups.pop(0)
        wrap()
        backward(2)
        optimizer.step()
        second.step()
        """,
    ),
    "a gradient of another optimizer when the layout changes, into the shard": (
        EVERY,
        """
        second = make([{"params": [model.b], "lr": 0.01}])
        wrap()
        backward(1)
        optimizer.step()
        second.step()
        optimizer.zero_grad()
        second.zero_grad()
        model.c = parameter(Spec((31,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        wrap()
        backward(2)
        optimizer.step()
        second.step()
        """,
    ),
    "gradients of a new parameter are clipped, into the shard": (
        EVERY,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.c = parameter(Spec((31,)), 4)
        optimizer.add_param_group({'params': [model.c], 'lr': 0.01})
        backward(2)
        optimizer.clip_grad_norm_(1e6)
        optimizer.step()
        optimizer.zero_grad()
        backward(3)
        optimizer.step()
        """,
    ),
    "memory of state of which one rank's share is empty": (
        PLAIN,
        """
        model.c = parameter(Spec((1,)), 4)
        optimizer.add_param_group({'params': [model.c], 'lr': 0.01})
        wrap()
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.state[model.c]['exp_avg'].data = optimizer.state[model.c]['exp_avg'] * 0.5
        optimizer.state[model.c]['exp_avg_sq'].set_(optimizer.state[model.c]['exp_avg_sq'] * 0.5)
        backward(2)
        optimizer.step()
        """,
    ),
    "a local gradient of a new parameter is changed": (
        {"attached": True, "overlap": False},
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.b = optimizer.param_groups[1]['params'][0] = parameter(Spec((31,)), 4)
        wrap()
        backward(2)
        nn.utils.clip_grad_norm_([model.b], 0.25)
        optimizer.step()
        """,
    ),
    "the same on one rank alone, into the shard": (
        EVERY,
        ON_ONE_RANK_ALONE,
    ),
    "two updates by the same averages, one bucket of two optimizers": (
        PLAIN,
        """
        optimizer.param_groups[0]['params'].append(optimizer.param_groups.pop()['params'][0])
        second = make([{'params': [model.b], 'lr': 0.01}])
        wrap()
        backward(1)
        optimizer.step()
        optimizer.step()
        """,
    ),
    "a parameter that leaves the optimizer: DDP averages it in the next backward pass": (
        ASIDE,
        """
        drop(optimizer, model.a)
        backward(1)
        optimizer.step()
        optimizer.param_groups[0]['params'].append(model.a)
        wrap()
        optimizer.step()
        """,
    ),
    "DDP woken: what was used while it stood aside": (
        ASIDE,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.a = optimizer.param_groups[0]['params'][0] = parameter(Spec((7, 5)), 5)
        backward(2)
        backward(3)
        optimizer.step()
        """,
    ),
    "a parameter that comes back after the backward pass, and clipping": (
        PLAIN,
        """
        model.c = parameter(Spec((70,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        wrap()
        backward(1)
        optimizer.zero_grad()
        optimizer.param_groups[0]['params'] = [model.a]
        backward(2)
        optimizer.param_groups[1]['params'].append(model.c)
        optimizer.clip_grad_norm_(1e6)
        optimizer.step()
        """,
    ),
    "a gradient of a new parameter that DDP does not know, on one rank alone": (
        ASIDE,
        """
        optimizer.step()
        model.c = parameter(Spec((8, 11)), 4)
        optimizer.param_groups[1]['params'].append(model.c)
        backward(1, unused=('c',) if rank else ())
        optimizer.step()
        """,
    ),
    "empty shares are each parameter's own": (
        BUCKETS,
        """
        model.c, model.d = parameter(Spec((1,)), 4), parameter(Spec((90,)), 5)
        optimizer.param_groups[0]['params'] += [model.c, model.d]
        wrap()
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        drop(optimizer, model.c)
        backward(2)
        optimizer.step()
        optimizer.zero_grad()
        backward(3)
        optimizer.step()
        """,
    ),
    "a frozen parameter, and gradients that are clipped": (
        ASIDE,
        """
        model.b.requires_grad_(False)
        model.b.grad = None
        backward(1)
        optimizer.clip_grad_norm_(1e6)
        optimizer.step()
        """,
    ),
    "another memory format than DDP's buckets have": (
        BUCKETS,
        """
        model.a.data = model.a.data.t().contiguous().t()
        backward(1, unused=('a',) if rank else ())
        optimizer.step()
        backward(2)
        optimizer.step()
        optimizer.zero_grad()
        backward(3)
        optimizer.step()
        """,
    ),
    "another memory format after the backward pass": (
        BUCKETS,
        """
        model.a.data = model.a.data.t().contiguous().t()
        wrap()
        backward(1)
        model.a.data = model.a.data.contiguous()
        optimizer.step()
        """,
    ),
    "another memory format, and two updates by the same gradients": (
        {"attached": True, "overlap": False},
        """
        model.a.data = model.a.data.t().contiguous().t()
        wrap()
        backward(1)
        model.a.data = model.a.data.contiguous()
        optimizer.step()
        optimizer.step()
        """,
    ),
    "zeros for a parameter that DDP has in its buckets": (
        ASIDE,
        """
        model.c = parameter(Spec((31,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        wrap()
        model.a.requires_grad_(False)
        backward(4)
        del optimizer.param_groups[1]
        wrap()
        optimizer.zero_grad()
        backward(5, unused=('c',) if rank else ())
        optimizer.step()
        """,
    ),
    "a parameter of several buckets, of which some have been sent": (
        BUCKETS,
        """
        model.a, model.b = parameter(Spec((129,)), 4), parameter(Spec((31,)), 5)
        optimizer = make([{'params': [model.b, model.a], 'lr': 0.01, 'eps': 0.1}])
        optimizer.bucket_numel = 64
        wrap()
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.b.requires_grad_(False)
        wrap()
        backward(2)
        backward(3)
        optimizer.step()
        """,
    ),
    "two backward passes for two optimizers that share a bucket": (
        BUCKETS,
        """
        second = make([{'params': [model.b], 'lr': 0.01, 'eps': 0.1}])
        wrap()
        backward(1)
        backward(2)
        optimizer.step()
        second.step()
        """,
    ),
    "a gradient that comes inside no_sync only, after zeros were sent for it": (
        PLAIN,
        """
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        backward(2, unused=('b',))
        backward(3, sync=False)
        backward(4, unused=('b',))
        optimizer.step()
        """,
    ),
    "a gradient without elements on one rank alone, and gradients that are changed": (
        ASIDE,
        """
        model.c = parameter(Spec((0,)), 4)
        optimizer.param_groups[0]['params'].append(model.c)
        wrap()
        backward(1, unused=('c',) if rank else ())
        for p in model.parameters(): p.grad = p.grad if p.grad is None else p.grad.mul_(0.5)
        optimizer.accept_gradients()
        optimizer.step()
        """,
    ),
    "another optimizer of a parameter that is frozen": (
        EVERY,
        """
        model.b.requires_grad_(False)
        model.b.grad = None
        second = make([{'params': [model.b], 'lr': 0.01}])
        wrap()
        backward(1)
        optimizer.step()
        second.step()
        optimizer.zero_grad()
        """,
    ),
    "an optimizer replaced while its last update travels": (
        DEFERRED,
        """
        backward(1)
        optimizer.step()  # not looked at
        optimizer.zero_grad()  # not looked at
        optimizer = make([{'params': list(model.parameters()), 'lr': 0.01}])  # not looked at
        backward(2)
        optimizer.step()
        """,
    ),
    "buckets of DDP's own that fill at another time on each rank": (
        ASIDE,
        """
        model.c, model.d, model.e = (parameter(Spec((size,)), size) for size in (33, 34, 129))
        for param in (model.c, model.d, model.e): optimizer.add_param_group({'params': [param]})
        wrap()
        del optimizer.param_groups[4]
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        backward(2, unused=('d',) if rank else ())
        optimizer.step()
        """,
    ),
    "buckets that are not sent yet when the layout changes": (
        BUCKETS,
        """
        model.c, model.d = parameter(Spec((31,)), 4), parameter(Spec((33,)), 5)
        optimizer.param_groups[0]['params'].append(model.c)
        optimizer.add_param_group({'params': [model.d]})
        wrap()
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        model.a.requires_grad_(False)
        wrap()
        drop(optimizer, model.b)
        backward(2)
        optimizer.step()
        """,
    ),
}


def sequence_of(case: str) -> Sequence:
    way, text = SCRIPTS[case]
    lines = [line.strip() for line in text.strip().splitlines()]
    acts = [
        Act(
            "step" if line.startswith("optimizer.step()") else "line",
            line,
            may_refuse=line.startswith("nn.utils.clip"),
            look=not line.endswith("# not looked at"),
        )
        for line in lines
    ]
    groups = [(["a"], {"lr": 0.01, "eps": 0.1}), (["b"], {"lr": 0.01, "eps": 0.1})]
    return Sequence(case, TWO, groups, {}, acts, ranks=2, way=way)


@pytest.mark.parametrize("case", SCRIPTS)
def test_scripts_that_went_wrong_once(case: str, tmp_path: Path) -> None:
    (outcome,) = outcomes_of([sequence_of(case)], tmp_path)
    assert outcome.failure is None, outcome.failure
    assert not outcome.invalid
    assert outcome.updates + outcome.sentences.total() == SCRIPTS[case][1].count("optimizer.step()")


def test_gradients_that_are_local_cannot_be_accepted(tmp_path: Path) -> None:
    acts = [
        Act("line", "backward(1)\noptimizer.step()\noptimizer.zero_grad()"),
        Act("line", "model.c = parameter(Spec((31,)), 4)\noptimizer.param_groups[0]['params'].append(model.c)"),
        Act("line", "backward(2)"),
        Act(
            "line", "nn.utils.clip_grad_value_(model.parameters(), 0.5)\noptimizer.accept_gradients()", may_refuse=True
        ),
        Act("step", "optimizer.step()"),
    ]
    groups = [(["a"], {"lr": 0.01, "eps": 0.1}), (["b"], {"lr": 0.01, "eps": 0.1})]
    (outcome,) = outcomes_of([Sequence("accept", TWO, groups, {}, acts, ranks=2, way=ASIDE)], tmp_path)
    assert outcome.failure is None, outcome.failure
    assert any(text.startswith("accept_gradients() was called for gradients") for text in outcome.sentences)


SEED, SEQUENCES = 3, 12


def test_random_sequences(tmp_path: Path) -> None:
    tally = judge([draw(SEED, number, 2) for number in range(SEQUENCES)], tmp_path)
    again = f"python -m tests.random.optimizer --seed {SEED} --sequences {SEQUENCES} --ranks 2"
    print(again)
    for sequence, failure in tally.failures[:1]:
        text = f"{sequence.readable()}\n=> {failure.kind} at act {failure.act}: {failure.what}"
        raise AssertionError(f"{len(tally.failures)} of `{again}` differ, one of them:\n{text}")
    assert tally.sequences == SEQUENCES
    assert tally.updates > 3 * SEQUENCES
    assert sum(tally.sentences.values()) > 5
    assert not tally.invalid
