"""Thirty-one architectures train a step: at gamma 0 with plain gradients, and never holding more than plain."""

import copy

import pytest
import torch

import dropit
from benchmarks.architectures import ARCHITECTURES


def step(model, loss_of):
    """Loss, bytes held and gradients of a step with the same random numbers and buffers each time."""
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    with dropit.CacheMeter(model) as meter:
        loss = loss_of(model)
    model.zero_grad()
    loss.backward()
    model.load_state_dict(before)
    return loss.detach(), meter.total_bytes, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_trains_a_step_and_holds_no_more_than_plain(make):
    torch.manual_seed(0)
    model, loss_of = make()
    model.train()
    keys = list(model.state_dict())
    loss, plain_bytes, plain_grads = step(model, loss_of)

    dropit.to_dropit(model, gamma=0.0)
    same_loss, _, grads = step(model, loss_of)
    assert torch.equal(same_loss, loss)
    for name, grad in plain_grads.items():
        if grad is None:
            assert grads[name] is None
        else:
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6 * grad.abs().max().item(), msg=name)

    dropit.to_dropit(model, gamma=0.9)
    loss, ours, grads = step(model, loss_of)
    assert torch.equal(loss, same_loss)
    assert ours < plain_bytes
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)

    dropit.from_dropit(model)
    again, restored, grads = step(model, loss_of)
    assert torch.equal(again, loss)
    assert restored == plain_bytes
    assert list(model.state_dict()) == keys
    assert not [name for name, grad in plain_grads.items() if grad is not None and not torch.equal(grad, grads[name])]
