"""The hooks of open_clip 4's shape on a stub host: the same events, the same callbacks."""

from __future__ import annotations

import sys

import pytest
import torch
from stub_host import make_host, recorder
from task_host import BATCH, COUNT, Pairs, Towers, make_task_host
from tiny_clip import write_pairs

from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations.events import Callback, Event
from fairclip_losses.integrations.open_clip import HOST, patch, run_training, unpatch

TASK_HOOKS = ("main", "parse_args", "create_task", "get_data", "train_one_epoch", "evaluate")


@pytest.fixture
def host(monkeypatch):
    module = make_task_host()
    monkeypatch.setitem(sys.modules, HOST, module)
    return module


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return str(write_pairs(tmp_path_factory.mktemp("pairs"), COUNT, "train"))


def test_the_hooks_are_chosen_by_what_the_host_has(host, monkeypatch):
    originals = {name: getattr(host, name) for name in TASK_HOOKS}
    with patch():
        assert all(getattr(host, name) is not originals[name] for name in TASK_HOOKS)
    assert {name: getattr(host, name) for name in TASK_HOOKS} == originals
    released = make_host()
    monkeypatch.setitem(sys.modules, HOST, released)
    original = released.create_loss
    patch()
    assert released.create_loss is not original
    unpatch()
    assert released.create_loss is original


@pytest.mark.parametrize(
    "name,replacement,message",
    [
        ("evaluate", None, r"open_clip_train\.main has no evaluate; .*4\.2\.0\.dev0"),
        ("get_data", lambda args: {}, r"main\.get_data\(args\) does not take preprocess_fns"),
    ],
)
def test_a_host_that_differs_is_refused_with_the_path_looked_for(host, name, replacement, message):
    setattr(host, name, replacement)
    with pytest.raises(ImportError, match=message):
        patch()


def test_the_events_are_those_of_the_released_versions(host, registered, monkeypatch):
    journal = []
    registered(recorder(journal))
    for accum_freq in ("1", "2"):
        monkeypatch.setitem(sys.modules, HOST, host)
        assert run_training(["--epochs", "2", "--accum-freq", accum_freq]) == 0
        of_tasks = [entry for entry in journal if entry[0] is not Event.RUN_END]
        journal.clear()
        step = [event for event, _ in of_tasks if event not in (Event.BATCH_START, Event.BATCH_END)]
        assert step[:3] == [Event.ARGS_PARSED, Event.DATA_READY, Event.LOSS_READY]
        calls = [call for event, call in of_tasks if event is Event.LOSS_START]
        assert calls == ([0] * 12 if accum_freq == "1" else [0, 1] * 6)
        # Batch for batch the order is that of the other host's loop.
        monkeypatch.setitem(sys.modules, HOST, make_host())
        run_training(["--epochs", "1", "--accum-freq", accum_freq])
        released = [event for event, _ in journal]
        journal.clear()
        first = [event for event, _ in of_tasks]
        start = released.index(Event.EPOCH_START)
        assert first[: start + 9] == released[: start + 9]


def test_without_flags_and_callbacks_the_host_keeps_its_own_objects(host):
    run_training([])
    assert type(host.task.loss).__name__ == "ClipLoss"
    assert host.batches == [{"image", "text", "text_valid"}] * 12


def test_callbacks_see_pairs_and_may_change_them_and_the_loss(host, registered):
    class Change(Callback):
        def __init__(self):
            self.shapes, self.models = [], []

        def on_batch_start(self, state):
            images, texts = state.batch
            self.shapes.append((images.shape, texts.shape))
            state.batch = (0.0 * images, texts)

        def on_loss_ready(self, state):
            inner = state.loss
            state.loss = lambda factor, **inputs: {
                name: factor * value for name, value in inner(**inputs).items()
            }

        def on_loss_start(self, state):
            self.models.append(state.model)
            self.images = state.loss_inputs["image_features"]
            state.loss_inputs["factor"] = 10.0

        def on_loss_end(self, state):
            state.losses["a_number_to_log"] = torch.tensor(1e9)

    change = registered(Change())
    run_training(["--epochs", "1"])
    assert set(change.shapes) == {((BATCH, 6), (BATCH, 6))}
    assert change.models[0] is host.task.trainable_module
    assert (change.images == change.images[0]).all()  # of zeros all alike
    assert host.batches == [{"image", "text", "text_valid"}] * 6
    last = host.losses[-1]
    assert float(last["loss"].detach()) == float(last["contrastive_loss"].detach()) > 10


def test_a_batch_of_another_form_is_refused(host, registered):
    class Leave(Callback):
        def on_batch_start(self, state):
            state.batch = (*state.batch, "one more")

    registered(Leave())
    with pytest.raises(ValueError, match=r"must be \(image, text\) .* got 3 values"):
        run_training([])


def test_a_callbacks_own_pass_over_the_loader_fires_nothing(host, registered):
    class Look(Callback):
        seen = 0

        def on_epoch_end(self, state):
            self.seen += sum(1 for batch in state.data["train"].dataloader if "image" in batch)

        def on_batch_start(self, state):
            assert isinstance(state.batch, tuple)

    look = registered(Look())
    run_training([])
    assert look.seen == 12


def test_a_failing_callback_stops_the_run_with_its_name(host, registered):
    class Faulty(Callback):
        def on_loss_start(self, state):
            raise KeyError("gone")

    registered(Faulty())
    with pytest.raises(CallbackError, match="callback Faulty failed at loss_start"):
        run_training([])


def fair_run(host, table, *more):
    flags = ["--train-data", table, "--fair-loss", "--fair-attributes", "sex", "site", *more]
    assert run_training(flags) == 0
    return host.task.loss.inner


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_the_fair_loss_sees_each_pair_once_with_its_own_loss(host, table, accum_freq):
    loss = fair_run(host, table, "--epochs", "2", "--accum-freq", str(accum_freq))
    report = loss.miner.report()
    assert report.ids.tolist() == list(range(COUNT))
    assert report.visits.tolist() == [2] * COUNT
    assert host.batches == [{"image", "text", "text_valid"}] * 12
    assert set(host.losses[-1]) - {"loss"} == {"contrastive_loss", "fairness_loss"}
    # The pairs of the last step, from the model as it is: one step of small size behind.
    assert loss.last.pair_losses.shape == (accum_freq * BATCH,)


def test_the_recorded_loss_is_that_of_its_row(host, table):
    """Before the first step each pair's loss is known from the model's first weights."""
    first = {}

    class Rows(Callback):
        def on_batch_start(self, state):
            first.setdefault("rows", state.batch[-1])

        def on_batch_end(self, state):
            first.setdefault("losses", state.loss.last.pair_losses)

    from fairclip_losses.integrations import events

    rows = events.register(Rows())
    try:
        fair_run(host, table, "--epochs", "1")
    finally:
        events.default_registry.unregister(rows)
    pairs, chosen = Pairs(), first["rows"]
    out = Towers()(pairs.image[chosen], pairs.text[chosen])
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].t()
    own = torch.arange(BATCH)
    both = [
        torch.nn.functional.cross_entropy(x, own, reduction="none") for x in (logits, logits.t())
    ]
    torch.testing.assert_close(first["losses"], ((both[0] + both[1]) / 2).detach())


def test_with_nothing_to_do_the_weights_are_those_of_plain_training(host, table, monkeypatch):
    fair_run(host, table, "--fair-weight", "0", "--fair-warmup-epochs", "9")
    fair = host.task.trainable_module.state_dict()
    plain_host = make_task_host()
    monkeypatch.setitem(sys.modules, HOST, plain_host)
    run_training([])
    for name, value in plain_host.task.trainable_module.state_dict().items():
        assert torch.equal(fair[name], value), name


def test_a_task_without_a_loss_is_refused_and_its_callbacks_go_without(
    table,
    monkeypatch,
    registered,
):
    monkeypatch.setitem(sys.modules, HOST, make_task_host(loss=None))
    with pytest.raises(UsageError, match=r"Task, of --model towers, has none"):
        fair_run(None, table)
    journal = []
    registered(recorder(journal))
    run_training(["--epochs", "1"])
    events = [event for event, _ in journal]
    assert Event.BATCH_END in events and Event.LOSS_READY not in events
