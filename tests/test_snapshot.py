import gc
import weakref

import pytest
import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from dropit import snapshot
from dropit.snapshot import Scope, Snapshot

reads_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch 2.8 or later tells its hooks"
)
CHANGES = {
    "in place": lambda x: x.mul_(2),
    "a view in place": lambda x: x[1:].view(-1)[3:5].zero_(),
    "one element through .data": lambda x: x.data.view(-1)[7].add_(1e-3),
    "all signs through .data": lambda x: x.data.neg_(),
    "elements swapped through .data": lambda x: x.data.copy_(x.detach().flip(1)),
    "through NumPy": lambda x: x.detach().numpy().fill(0),
    "through DLPack": lambda x: torch.from_dlpack(x.detach()).zero_(),
    "to NaN through .data": lambda x: x.data[0, 0].fill_(torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9), (40, 64), (3, 1001)], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_whichever_way_it_is_made(name, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    taken = Snapshot.of(x)
    assert taken.matches(x)
    CHANGES[name](x)
    assert not taken.matches(x)


def test_autocast_makes_no_digest_coarser():
    x = torch.randn(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        taken = Snapshot.of(x)
        x.data[3, 3] += 1e-3
        assert not taken.matches(x)


def test_the_same_elements_match_whatever_their_order_in_memory():
    for x in (torch.randn(40, 64).t(), torch.randn(80, 128)[::2, ::2], torch.randn(64).expand(40, 64)):
        assert Snapshot.of(x).matches(x)
    x = torch.full((300,), torch.nan)
    assert Snapshot.of(x).matches(x)


def test_integers_and_empty_tensors_are_known_by_their_version():
    for x in (torch.arange(5), torch.empty(0), torch.empty(3, 0)):
        taken = Snapshot.of(x)
        assert taken.matches(x)
        x.zero_()
        assert not taken.matches(x)


@reads_hooks
def test_a_scope_ends_where_saved_tensors_hooks_begin():
    outside = Scope.current()
    assert outside.is_current()
    with save_on_cpu():
        inside = Scope.current()
        assert inside.is_current()
        assert not outside.is_current()
    assert outside.is_current()
    assert not inside.is_current()
    with save_on_cpu():
        assert not inside.is_current()


@pytest.mark.parametrize("by_stack", [False, True], ids=["hooks", "call stack"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_each_run_of_a_checkpointed_region_is_a_scope_of_its_own(use_reentrant, by_stack, monkeypatch):
    if by_stack:
        monkeypatch.setattr(snapshot, "_innermost_hook", snapshot._innermost_checkpoint)
    scopes = []

    def region(x):
        scopes.append(Scope.current())
        assert scopes[-1].is_current()
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    y = checkpoint(region, checkpoint(region, x, use_reentrant=use_reentrant), use_reentrant=use_reentrant)
    if not use_reentrant:  # a reentrant region's first run saves nothing, and its scope does not matter
        assert not any(scope.is_current() for scope in scopes)
    y.sum().backward()
    assert len(scopes) == 4
    assert not any(scope.is_current() for scope in scopes[2:])


@reads_hooks
def test_a_scope_does_not_keep_its_hooks_alive():
    hooks = save_on_cpu()
    with hooks:
        scope = Scope.current()
    alive = weakref.ref(hooks)
    del hooks
    gc.collect()
    assert alive() is None
    assert not scope.is_current()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_change_next_to_what_is_not_finite_is_noticed(value):
    x = torch.randn(8, 256)
    x[:, 0] = value
    taken = Snapshot.of(x)
    assert taken.matches(x)
    x.data[:, 1:] = x.data[:, 1:].flip(0)
    assert not taken.matches(x)


def test_another_order_of_the_same_elements_is_noticed():
    x = torch.randn(16, 16)
    taken = Snapshot.of(x)
    x.data = x.data.t()
    assert not taken.matches(x)
