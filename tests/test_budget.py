import copy
from itertools import product

import pytest
import torch
from torch import nn

import dropit
from dropit.budget import Plan, parse_bytes
from dropit.calibration import Choice, Item, Option


@pytest.mark.parametrize(
    ("given", "nbytes"),
    [(1000, 1000), ("4 GiB", 2**32), ("1.5MiB", 3 * 2**19), ("500 mb", 500_000_000), ("12", 12), (" 1 kb ", 1000)],
)
def test_bytes_are_read_as_people_write_them(given, nbytes):
    assert parse_bytes(given) == nbytes


@pytest.mark.parametrize("given", ["", "4 GB/s", "-1", 0, "0 GiB", "many", None, float("nan")])
def test_what_is_no_number_of_bytes_is_refused(given):
    with pytest.raises(ValueError, match="budget must be a number of bytes or text such as '4 GiB'"):
        parse_bytes(given)


def item(name, *options):
    """Options as (gamma, bytes, error)."""
    return Item((name,), [Option(Choice(gamma), nbytes, error) for gamma, nbytes, error in options])


def chosen(items, spare):
    setting = Plan(items).setting(spare)
    return [setting[item.names[0]].gamma for item in items]


def test_bytes_go_where_they_lower_the_error_most():
    steep = item("a", (0.9, 0, 10.0), (0.5, 5, 5.0), (0.1, 10, 0.0))
    flat = item("b", (0.9, 0, 5.0), (0.5, 5, 2.5), (0.1, 10, 0.0))
    assert chosen([flat, steep], 0) == [0.9, 0.9]
    assert chosen([flat, steep], 10) == [0.9, 0.1]
    assert chosen([flat, steep], 15) == [0.5, 0.1]
    assert chosen([flat, steep], 99) == [0.1, 0.1]


def test_an_option_that_another_beats_is_never_chosen():
    only = item("a", (0.9, 0, 10.0), (0.5, 6, 2.0), (0.3, 7, 2.5), (0.1, 12, 0.0))
    assert [chosen([only], spare)[0] for spare in range(14)] == [0.9] * 6 + [0.5] * 6 + [0.1] * 2


def test_what_cannot_be_split_waits_until_it_fits_and_others_use_the_rest():
    whole = item("a", (0.8, 0, 100.0), (0.0, 10, 0.0))
    fine = item("b", (0.9, 0, 5.0), (0.5, 5, 2.0), (0.1, 10, 0.0))
    assert chosen([whole, fine], 6) == [0.8, 0.5]
    assert chosen([whole, fine], 10) == [0.0, 0.9]


def test_the_error_is_the_least_that_there_is_and_falls_with_more_bytes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        items = []
        for index in range(4):
            sizes = torch.randint(50, (4,), generator=generator).cumsum(0).tolist()
            errors = torch.rand(4, generator=generator).tolist()
            items.append(item(str(index), *zip((0.9, 0.6, 0.3, 0.0), sizes, errors, strict=True)))
        least = sum(each.options[0].nbytes for each in items)
        plan, before = Plan(items), float("inf")
        for spare in torch.linspace(0, 400, 30).tolist():
            setting = plan.setting(spare)
            taken = [next(o for o in each.options if o.choice == setting[each.names[0]]) for each in items]
            assert sum(option.nbytes for option in taken) <= least + spare
            error = sum(option.error for option in taken)
            assert error <= before
            # The bytes are counted in cells, of which each option may waste a part of one.
            room = least + spare - len(items) * plan.span / 10_000
            every = (options for options in product(*(each.options for each in items)))
            fits = [sum(o.error for o in options) for options in every if sum(o.nbytes for o in options) <= room]
            assert not fits or error <= min(fits) + 1e-12
            before = error


def test_bytes_that_are_left_over_may_count_as_an_error():
    """Which is traded for one that is smaller, and not for a larger one."""
    large = item("a", (0.8, 0, 5.0), (0.0, 14, 0.0))
    small = [item(name, (0.8, 0, 8.0), (0.0, 4, 0.0)) for name in "bc"]

    def taken(unspent):
        setting = Plan([large, *small], unspent).setting(20)
        return [setting[name].gamma for name in "abc"]

    assert taken(0.0) == taken(1.0) == [0.8, 0.0, 0.0]  # 12 bytes stay
    assert sorted(taken(22.0)) == [0.0, 0.0, 0.8]  # 2 stay, for an error that is larger by 3
    assert taken(22.0)[0] == 0.0


def test_a_plan_for_nothing():
    assert Plan([]).setting(10) == {}
    assert chosen([item("a", (0.5, 7, 1.0))], 0) == [0.5]


class Net(nn.Module):
    """A convolution, normalization and attention; a functional ReLU holds what the last layer reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32)
        self.mixer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, activation=nn.GELU())
        self.head, self.last = nn.Linear(32, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.last(self.head(self.mixer(x)).relu().mean(dim=1))


def setting():
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    return Net(), x, lambda output: nn.functional.cross_entropy(output, y)


def saved_bytes(model, x):
    with dropit.CacheMeter(model, retain=False) as meter:
        y = model(x)
    del y
    return meter.total_bytes


def gradient(model, x, loss_fn):
    model.zero_grad()
    loss_fn(model(x)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("part", [0.35, 0.5, 0.7])
def test_it_fits_and_errs_less_than_one_gamma_for_all(part):
    plain, x, loss_fn = setting()
    exact = gradient(copy.deepcopy(plain), x, loss_fn)
    budget = int(part * saved_bytes(plain, x))
    ours = dropit.fit_budget(copy.deepcopy(plain), budget, x, loss_fn=loss_fn)
    size = saved_bytes(ours, x)
    assert 0.75 * budget <= size <= budget  # a layer or two of so few make up the rest
    error = (gradient(ours, x, loss_fn) - exact).norm()
    for compress in ("lossless", "int16", "int8", "int4", "int2"):
        for gamma in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98):
            other = dropit.to_dropit(copy.deepcopy(plain), gamma=gamma, compress=compress)
            if saved_bytes(other, x) <= size:
                assert error < (gradient(other, x, loss_fn) - exact).norm()
                break  # a larger gamma errs more


def test_what_the_loss_saves_counts_too():
    model, x, loss_fn = setting()
    x = x.repeat(8, 1, 1, 1)

    def heavy(output):
        return (output.exp().exp().exp().exp() * 1e-3).mean() + loss_fn(output[:8])

    budget = int(0.6 * saved_bytes(model, x))
    dropit.fit_budget(model, budget, x, loss_fn=heavy)
    with dropit.CacheMeter(model) as meter:
        heavy(model(x))
    assert 0.9 * budget < meter.total_bytes <= budget


def test_the_models_state_is_left_as_it_was():
    model, x, loss_fn = setting()
    state = copy.deepcopy(model.state_dict())
    model.head.weight.grad = torch.ones(64, 32)
    before = torch.get_rng_state()
    dropit.fit_budget(model, "1 MiB", (x,), loss_fn=loss_fn)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(model.head.weight.grad, torch.ones(64, 32))
    assert model.conv.weight.grad is None
    names = list(state)
    assert list(dropit.from_dropit(model).state_dict()) == names


def test_a_budget_of_plenty_changes_no_gradient():
    model, x, loss_fn = setting()
    exact = gradient(copy.deepcopy(model), x, loss_fn)
    dropit.fit_budget(model, "1 GiB", {"x": x}, loss_fn=loss_fn)
    torch.testing.assert_close(gradient(model, x, loss_fn), exact)


def test_gammas_stay_in_their_range_but_where_dropping_frees_nothing():
    model, x, _ = setting()
    budget = int(0.5 * saved_bytes(model, x))
    dropit.fit_budget(model, budget, x, gamma_min=0.2, gamma_max=0.9)
    assert 0.2 <= model.conv.strategy.gamma <= 0.9
    assert 0.2 <= model.mixer.linear2.strategy.gamma <= 0.9


def test_where_another_operation_holds_the_input_nothing_is_dropped():
    """A packed copy would come on top."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    model, x = Functional(), torch.randn(256, 64)
    budget = int(0.8 * saved_bytes(model, x))
    dropit.fit_budget(model, budget, x, gamma_min=0.3, filter_fn=lambda module, fqn: fqn != "")
    assert model.second.strategy.gamma == 0
    assert model.first.strategy.gamma >= 0.3


def test_a_budget_that_cannot_be_met_says_what_the_least_is():
    model, x, _ = setting()
    with pytest.raises(
        ValueError, match=r"budget of 0\.0 MiB cannot be met: the least that this model saves is 0\.\d MiB"
    ):
        dropit.fit_budget(model, "1 kB", x)


def test_the_range_of_gamma_is_checked():
    model, x, _ = setting()
    with pytest.raises(ValueError, match=r"0 <= gamma_min <= gamma_max < 1 is needed, got 0\.9 and 0\.5"):
        dropit.fit_budget(model, "1 MiB", x, gamma_min=0.9, gamma_max=0.5)


def test_layers_that_read_one_tensor_are_given_one_gamma():
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x):
            return self.out(self.q(x) * self.k(x))

    torch.manual_seed(0)
    model, x = Projections(), torch.randn(64, 64)
    dropit.fit_budget(model, int(0.7 * saved_bytes(model, x)), x)
    assert repr(model.q.saver) == repr(model.k.saver)
    assert saved_bytes(model, x) <= 0.7 * saved_bytes(dropit.from_dropit(model), x)


def test_a_head_that_starts_at_zero_hides_no_error():
    """It lets no gradient through at first, so that nothing before it would seem to matter."""
    model, x, loss_fn = setting()
    nn.init.zeros_(model.last.weight)
    budget = int(0.6 * saved_bytes(model, x))
    dropit.fit_budget(model, budget, x, loss_fn=loss_fn)
    assert 0.9 * budget <= saved_bytes(model, x) <= budget
    assert not model.last.weight.any()


def test_what_rounds_worst_gets_most_bits():
    """Beside one large value the others of a group are rounded coarsely; as much gradient passes through the other."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 256), nn.Linear(16, 256)
            self.coarse, self.fine = nn.GELU(), nn.GELU()

        def forward(self, x):
            coarse = torch.where(torch.arange(256) % 32 == 0, 500.0, self.first(x))
            return self.coarse(coarse) + self.fine(self.second(x))

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(256, 16)
    dropit.fit_budget(model, int(0.4 * saved_bytes(model, x)), x, loss_fn=torch.sum)
    assert (model.coarse.saver.bits, model.fine.saver.bits) == (16, 8)


def choices(model):
    return {fqn: repr(getattr(module, "saver", None)) for fqn, module in model.named_modules()}


def test_steps_that_do_not_fit_are_taken_with_the_hosts_memory(monkeypatch):
    """Who needs a budget often has no room for the exact step that it is measured by."""
    model, x, loss_fn = setting()
    budget = int(0.5 * saved_bytes(model, x))
    roomy = dropit.fit_budget(copy.deepcopy(model), budget, x, loss_fn=loss_fn)
    offloading = []

    def backward(grad):
        if not offloading:
            raise torch.OutOfMemoryError

    def tight(output):
        output.register_hook(backward)
        return loss_fn(output)

    def offload():
        offloading.append(True)
        return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved)  # copies, as from a GPU

    monkeypatch.setattr(dropit.calibration, "save_on_cpu", offload)
    steps = []
    dropit.fit_budget(model, budget, x, loss_fn=tight, on_step=lambda step, steps_: steps.append((step, steps_)))
    assert len(offloading) == len(steps)
    assert choices(model) == choices(roomy)
    assert model.conv.weight.grad is None


def test_it_tells_of_each_step():
    model, x, loss_fn = setting()
    seen = []
    budget = int(0.5 * saved_bytes(model, x))
    dropit.fit_budget(model, budget, x, loss_fn=loss_fn, on_step=lambda *step: seen.append(step))
    taken, every = zip(*seen, strict=True)
    assert taken == tuple(range(1, every[0] + 1))
    assert set(every) == {len(seen)}
