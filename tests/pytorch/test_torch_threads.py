"""Other threads: they run the model as it is, whatever one thread watches or proves on it."""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from processes import HANGS
from torch import nn
from torch_models import EXACT, digest, gemma, gpt2, ids, llama, mixtral

from blockkit import BadInput
from blockkit.backends.pytorch import absorb, generate
from blockkit.backends.pytorch.blocks.traced import trace


def elsewhere(work: Callable[[], Any]) -> Any:
    """What the work gives in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=HANGS)


@contextmanager
def runs_meanwhile(model: nn.Module) -> Iterator[list[Any]]:
    """Plain forwards of the model, one after the other in another thread; what they give, or why they failed."""
    found: list[Any] = []
    done = threading.Event()

    def run() -> None:
        while not done.is_set() or len(found) < 5:
            try:
                with torch.no_grad():
                    found.append(model(ids(1, 6, seed=7)).logits)
            except BaseException as error:
                found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("make", [llama, gemma, gpt2, mixtral])
def test_a_plain_forward_is_not_touched_by_an_absorbing_thread(make: Any, merge: bool) -> None:
    model, context, query = make(), ids(1, 12), ids(1, 3, seed=2)
    wanted, before = model(ids(1, 6, seed=7)).logits, digest(model)
    trace(model)  # while torch exports, the whole process may take other kernels
    with runs_meanwhile(model) as found:
        for tokens in ("last", "all"):
            for _ in range(3):
                patch = absorb(model, context, query, tokens=tokens, merge=merge)
    assert [f for f in found if not isinstance(f, torch.Tensor) or not torch.equal(f, wanted)] == []
    assert digest(model) == before and patch.measured["linf"] < EXACT


def test_a_plain_forward_is_not_touched_by_a_generating_thread() -> None:
    model = llama()
    wanted = model(ids(1, 6, seed=7)).logits
    trace(model)
    with runs_meanwhile(model) as found:
        for tokens in ("each", "all"):
            generate(model, ids(1, 8), tokens=tokens, max_new_tokens=6).finish()
    assert [f for f in found if not isinstance(f, torch.Tensor) or not torch.equal(f, wanted)] == []


def in_the_midst(model: nn.Module, work: Callable[[], Any]) -> Any:
    """What the work gives in another thread while this one is in the middle of the runs of `absorb`."""
    found: list[Any] = []
    traced = threading.Event()
    me, last = threading.get_ident(), list(model.children())[-1]

    def hook(*args: Any) -> None:
        if threading.get_ident() == me and traced.is_set():
            found.append(elsewhere(work))

    with last.register_forward_pre_hook(hook):
        trace(model)  # one at a time can
        traced.set()
        absorb(model, ids(1, 12), ids(1, 3, seed=2))
    return found


@pytest.mark.parametrize("make", [llama, gpt2])
def test_forwards_copies_and_state_dicts_in_the_midst_are_the_models_own(make: Any) -> None:
    model = make()
    wanted, before = model(ids(1, 6, seed=7)).logits, digest(model)
    found = in_the_midst(model, lambda: (model(ids(1, 6, seed=7)).logits, copy.deepcopy(model), digest(model)))
    assert len(found) >= 2
    for logits, copied, state in found:
        assert torch.equal(logits, wanted) and state == before and digest(copied) == before
        assert all(type(p) is nn.Parameter for p in copied.parameters())


def test_another_thread_may_not_absorb_meanwhile_not_even_a_part() -> None:
    model = llama()
    trace(model.model)

    def other(held: nn.Module) -> str:
        with pytest.raises(BadInput, match="in another thread") as caught:
            absorb(held, torch.randn(1, 4, 32), torch.randn(1, 2, 32))
        return str(caught.value)

    assert in_the_midst(model, lambda: other(model.model))


def test_a_patch_comes_off_when_another_thread_is_done() -> None:
    """The end of `with patch.applied(model)` waits for a thread that absorbs on the patched model."""
    model = llama()
    patch = absorb(model, ids(1, 12), ids(1, 3, seed=2))
    before = digest(model)
    inside, go = threading.Event(), threading.Event()
    main = threading.get_ident()

    def hold(*args: Any) -> None:
        if threading.get_ident() != main and not inside.is_set():
            inside.set()
            go.wait(HANGS)

    for merge in (False, True):
        inside.clear()
        go.clear()
        with ThreadPoolExecutor(1) as pool, model.lm_head.register_forward_pre_hook(hold):
            with patch.applied(model, merge=merge):
                other = pool.submit(lambda: absorb(model, ids(1, 9, seed=4), ids(1, 2, seed=5)))
                assert inside.wait(HANGS)
                threading.Timer(0.3, go.set).start()
            assert other.done() or other.result(timeout=HANGS)
        assert digest(model) == before and all(type(p) is nn.Parameter for p in model.parameters())


# -- what a process says meanwhile -------------------------------------------------------------------


def test_tracing_silences_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    said, streams = [], []
    real = torch.export.export

    def export(*args: Any, **kwargs: Any) -> Any:
        if not said:
            said.append(True)
            elsewhere(lambda: logging.getLogger("torch.mine").warning("from another thread"))
            logging.getLogger("app").warning("from an application")
            logging.getLogger("torch.own").warning("from the tracing thread")
            streams.extend([sys.stdout, sys.stderr, logging.root.manager.disable])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    trace(llama())
    assert streams == [sys.stdout, sys.stderr, 0]
    heard = [record.message for record in caplog.records]
    assert "from another thread" in heard and "from an application" in heard
    assert "from the tracing thread" not in heard
