"""Who sees what acts: the model's state, blocks of threads and tasks, and what may not change during a forward."""

import asyncio
import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from shared import HIDDEN, METHODS, stir

IDS = torch.arange(4 * 5).reshape(4, 5) % toys.VOCAB
ROWS = ["a", None, "b", "a"]
FORMS = {
    "disabled": lambda m: ad.disabled(m),
    "per_example": lambda m: ad.per_example(m, ROWS),
    "other rows": lambda m: ad.per_example(m, ["b", "b", "a", None]),
    "stack": lambda m: ad.composed(m, ad.Stack("a", "b")),
    "average": lambda m: ad.composed(m, ad.Average("a", "b")),
    "split": lambda m: ad.composed(m, ad.Split("a", "b", sizes=(2, None))),
    "batch": lambda m: ad.composed(m, ad.BatchSplit("a", "b", sizes=(1, 3))),
    "parallel": lambda m: ad.composed(m, ad.Parallel("a", "b")),
}


def two(method="lora:rank=2", model=None):
    model = (toys.make_llama() if model is None else model).double()
    for i, name in enumerate("ab"):
        stir(ad.attach(model, method, name=name), 0.5, seed=i)
    return model.double()


def logits(model):
    return model(IDS, use_cache=False).logits


def at_once(jobs, times=3):
    """What every job returns, each in a thread of its own, all in step."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        out = []
        for _ in range(times):
            barrier.wait(60)
            out.append(job(barrier))
        return out

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result(120) for f in [pool.submit(run, job) for job in jobs]]


@pytest.mark.parametrize("method", ["lora:rank=2", "parallel:rank=2", "adaptformer:rank=2", "prefix:places=2"])
def test_blocks_belong_to_the_thread_that_opened_them(method):
    model = two(method)
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]

    def gradients(y):
        loss = y.square().mean() + 0 * sum(p.sum() for p in parameters)
        return torch.autograd.grad(loss, parameters)

    def result(form):
        with FORMS[form](model):
            y = logits(model)
        return [y, *gradients(y)]

    want = {form: result(form) for form in FORMS}

    def job(form):
        def run(barrier):
            with FORMS[form](model):
                barrier.wait(60)
                y = logits(model)
                with ad.disabled(model):
                    base = logits(model)
                again = logits(model)
                barrier.wait(60)
                grads = gradients(y)
            return base, again, [y, *grads]

        return run

    def outside(barrier):
        barrier.wait(60)
        y = logits(model)
        barrier.wait(60)
        return y

    plain = logits(model)
    *found, free = at_once([job(form) for form in FORMS] + [outside])
    for form, runs in zip(FORMS, found, strict=True):
        for base, again, got in runs:
            torch.testing.assert_close(got, want[form], msg=form)
            torch.testing.assert_close(base, want["disabled"][0])
            assert torch.equal(again, got[0])
    assert all(torch.equal(y, plain) for y in free)
    assert all(s.blocks is None for m in model.modules() if (s := slots_of(m)) is not None), "nothing is left"


@pytest.mark.parametrize("name", HIDDEN)
def test_every_hidden_method_in_threads_of_its_own(name):
    """What a call keeps between modules, an input that is read later, its cache, its mask, is the thread's own."""
    model = two(METHODS[name])
    batches = [IDS, IDS[:2, :4], IDS[1:].flip(0), IDS[:, 1:]]

    def job(ids):
        return lambda barrier: model(ids, attention_mask=torch.ones_like(ids)).logits

    want = [job(ids)(None) for ids in batches]
    for runs, alone in zip(at_once([job(ids) for ids in batches], 5), want, strict=True):
        assert all(torch.equal(run, alone) for run in runs)


def test_raw_parameters_are_the_threads_own():
    model = toys.make_mixtral()
    stir(ad.attach(model, "lora:rank=2", targets="*.gate_up_proj"), 0.5)
    adapted = model(IDS).logits
    with ad.disabled(model):
        base = model(IDS).logits

    def inside(barrier):
        with ad.disabled(model):
            barrier.wait(60)
            return model(IDS).logits

    def outside(barrier):
        barrier.wait(60)
        return model(IDS).logits

    found = at_once([inside, outside, inside, outside], 5)
    assert all(torch.equal(y, [base, adapted][i % 2]) for i, runs in enumerate(found) for y in runs)


def test_a_switch_is_seen_by_all_threads_but_for_those_in_a_block():
    model = two()
    want = {}
    for name in ("a", "b"):
        ad.switch(model, name)
        want[name] = logits(model)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model).result(60), want["b"])
        with ad.disabled(model):
            base = logits(model)
            pool.submit(ad.switch, model, "a").result(60)
            assert torch.equal(logits(model), base), "in here nothing has changed"
            assert torch.equal(pool.submit(logits, model).result(60), want["a"])
            inherited = contextvars.copy_context()
            assert torch.equal(pool.submit(inherited.run, logits, model).result(60), base)
        assert torch.equal(logits(model), want["a"])
        assert torch.equal(pool.submit(inherited.run, logits, model).result(60), base), "that context is still inside"
    with ad.disabled(model):
        ad.switch(model, "b")
        assert torch.equal(logits(model), want["b"]), "a switch of one's own acts at once"
    assert torch.equal(logits(model), want["b"]), "and stays"


def changes(model, tmp_path):
    file = ad.adapters(model)["a"].save(tmp_path / "a.safetensors")
    return {
        "switch": lambda: ad.switch(model, "b"),
        "attach": lambda: ad.attach(model, "houlsby:rank=2", name="c"),
        "load": lambda: ad.load(model, file, name="c"),
        "detach": lambda: ad.detach(model, "a"),
        "detach all": lambda: ad.detach(model),
        "merge": lambda: ad.merge(model, allow_loss=1.0),
    }


def test_nothing_changes_while_another_thread_runs_a_forward(tmp_path):
    model = two(model=toys.make_llama())
    ad.switch(model, "a")
    want, entered, go = logits(model), threading.Event(), threading.Event()

    def stop(*_):
        entered.set()
        assert go.wait(60)

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    before = ad.status(model)
    with ThreadPoolExecutor(1) as pool:
        for part in (model, model.model, torch.nn.DataParallel(model)):  # what runs may be a part, or around it
            entered.clear(), go.clear()
            running = pool.submit(lambda part=part: part(IDS, use_cache=False)[0])
            assert entered.wait(60)
            for name, change in changes(model, tmp_path).items():
                with pytest.raises(AddendaError, match=r"thread .* runs a forward of this LlamaForCausalLM"):
                    change()
                assert ad.status(model) == before, name
            go.set()
            got = running.result(60)
        assert torch.equal(got, want)
        hook.remove()
        ad.switch(model, "b")
    assert not torch.equal(logits(model), want)


def test_a_forward_sees_one_state_whatever_is_switched_beside_it():
    model = two()
    want = []
    for name in ("a", "b", None):
        ad.switch(model, name)
        want.append(logits(model))
    done, refused = threading.Event(), 0

    def switching():
        nonlocal refused
        for i in range(300):
            try:
                ad.switch(model, ("a", "b", None)[i % 3])
            except AddendaError:
                refused += 1
        done.set()

    seen = []
    with ThreadPoolExecutor(3) as pool:
        pool.submit(switching)
        readers = [pool.submit(lambda: [logits(model) for _ in range(40) if not done.is_set()]) for _ in range(2)]
        seen = [y for r in readers for y in r.result(300)]
    assert seen and all(any(torch.equal(y, w) for w in want) for y in seen)


def test_an_adapter_that_acts_in_anothers_block_stays():
    model = two()
    inside, leave = threading.Event(), threading.Event()

    def block():
        with ad.composed(model, ad.Stack("a")):
            before = logits(model)
            inside.set()
            assert leave.wait(60)
            return torch.equal(logits(model), before)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(block)
        assert inside.wait(60)
        for change in (
            lambda: ad.detach(model, "a"),
            lambda: ad.detach(model),
            lambda: ad.merge(model, allow_loss=1.0),
        ):
            with pytest.raises(AddendaError, match="Another thread or task is in a `with` block of 'a'"):
                change()
        ad.attach(model, "houlsby:rank=2", name="c")
        ad.detach(model, "b")
        leave.set()
        assert running.result(60)
    ad.detach(model)


def test_tasks_have_blocks_of_their_own():
    model = two()
    want = {}
    for form in FORMS:
        with FORMS[form](model):
            want[form] = logits(model)
    plain = logits(model)

    async def task(form):
        with FORMS[form](model):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(logits(model), want[form]), form
                assert torch.equal(await asyncio.to_thread(logits, model), want[form]), form
        assert torch.equal(logits(model), plain)

    async def main():
        await asyncio.gather(*map(task, FORMS))

    asyncio.run(main())


def test_blocks_that_end_out_of_order_and_errors_in_them():
    model = two()
    plain = logits(model)

    def held(form):
        with FORMS[form](model):
            y = logits(model)
            yield y
            yield logits(model)

    one, two_ = held("stack"), held("disabled")
    stacked, base = next(one), next(two_)
    assert not torch.equal(stacked, base)
    one.close()
    assert torch.equal(logits(model), base), "the inner one goes on"
    two_.close()
    assert torch.equal(logits(model), plain)
    with pytest.raises(ZeroDivisionError), ad.per_example(model, ROWS), ad.disabled(model):
        raise ZeroDivisionError
    with ad.per_example(model, ["a"]), pytest.raises(AddendaError, match="each of 1 examples"):
        logits(model)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_checkpoint_computes_again_uses_what_its_forward_used(form):
    """Also in another thread, behind the end of the block, after a switch, and beside another forward."""
    model = two("houlsby:rank=2")
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]
    whole, layers = type(model.model.layers[0]).forward, model.model.layers

    def loss():
        return model.lm_head(model.model(IDS, use_cache=False)[0]).square().mean()

    def grads(make):
        with FORMS[form](model):
            y = make()
        other = make()
        ad.switch(model, "a")
        with ThreadPoolExecutor(1) as pool, ad.disabled(model):
            found = pool.submit(torch.autograd.grad, y + 2 * other, parameters, allow_unused=True).result(120)
        ad.switch(model, "b")
        return found

    want = grads(loss)
    for layer in layers:  # pyright: ignore[reportGeneralTypeIssues]
        own = layer.forward
        layer.forward = lambda *a, own=own, **k: checkpoint(own, *a, use_reentrant=False, **k)
    torch.testing.assert_close(grads(loss), want)
    assert whole


CHANGES = {  # what comes between a forward with "a" and its backward, and whether another arrangement acts by then
    "nothing": (lambda m, forward: None, False),
    "there and back": (lambda m, forward: (ad.switch(m, "b"), ad.switch(m, "a")), False),
    "another forward": (lambda m, forward: inside(ad.disabled(m), forward), False),
    "forwards of a task": (lambda m, forward: asyncio.run(awaited(m, forward)), False),
    "a block of another thread": (lambda m, forward: at_once([lambda b: inside(ad.disabled(m), forward)]), False),
    "switch": (lambda m, forward: ad.switch(m, "b"), True),
    "none": (lambda m, forward: ad.switch(m, None), True),
    "merge": (lambda m, forward: ad.merge(m), True),
}


def inside(block, forward):
    with block:
        return forward()


async def awaited(model, forward):
    inside(ad.composed(model, ad.Average("a", "b")), forward)


def again(method):
    """A function of the input through two adapted layers that is computed again in backward, in torch's old way."""
    model = two(method, toys.Tiny())
    ad.switch(model, "a")
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    return model, lambda: checkpoint(model.layers[0], x, use_reentrant=True).square().sum()


@pytest.mark.parametrize(
    ("change", "method"),
    [*((c, "lora:rank=2") for c in CHANGES), *((c, "adaptformer:rank=2") for c in CHANGES if c != "merge")],
)
def test_a_reentrant_checkpoint_refuses_to_run_again_with_other_adapters(change, method):
    model, forward = again(method)
    own = ad.adapters(model)["a"].parameters()

    def backward(between):
        loss = forward()
        between(model, forward)
        loss.backward()
        found = [p.grad for p in own]
        for p in own:
            p.grad = None
        return found

    want, (between, other) = backward(CHANGES["nothing"][0]), CHANGES[change]
    if other:
        with pytest.raises(AddendaError, match=r"other adapters acted than do now.*before switch.*use_reentrant=False"):
            backward(between)
    else:
        torch.testing.assert_close(backward(between), want)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("per_example", "other rows", "split", "batch")])
def test_a_reentrant_checkpoint_runs_again_inside_of_its_block_alone(form):
    model, forward = again("lora:rank=2")
    with FORMS[form](model):
        late, later = forward(), forward()
        forward().backward()
    with pytest.raises(AddendaError, match="other adapters acted than do now"):
        late.backward()
    with FORMS[form](model), pytest.raises(AddendaError, match="other adapters acted than do now"):
        later.backward()  # another block


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("per_example", "other rows")])
def test_compiled_forwards_know_the_blocks_of_their_thread(form):
    model = two("lora:rank=2", toys.Tiny())
    plain = model(IDS)
    with FORMS[form](model):
        want = model(IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), plain)
    with FORMS[form](model):
        torch.testing.assert_close(compiled(IDS), want)
    if form in ("disabled", "stack"):
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                torch.testing.assert_close(compiled(IDS), plain)
                with FORMS[form](model), ThreadPoolExecutor(1) as pool:
                    torch.testing.assert_close(compiled(IDS), want)
                    torch.testing.assert_close(pool.submit(compiled, IDS).result(120), plain)
    torch._dynamo.reset()


def test_copies_and_replicas():
    model = two()
    plain = logits(model)
    with ad.disabled(model):
        base = logits(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin), plain), "nobody is in a block of a copy"
        replica = model.lm_head if slots_of(model.lm_head) else model.model.layers[0].self_attn.q_proj
        slots = slots_of(replica)._replicate_for_data_parallel()
    assert not torch.equal(base, plain)
    assert not any(slots.own.live.values()), "a replica does what acts where it is made"
