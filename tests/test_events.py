"""Training events, callbacks and their registry."""

from __future__ import annotations

import re

import pytest

from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations import events
from fairclip_losses.integrations.events import (
    Callback,
    CallbackRegistry,
    Event,
    TrainState,
    default_registry,
    register,
)


class Recorder(Callback):
    """Notes every event that it hears, with its own name before."""

    def __init__(self, label, heard):
        self.label, self.heard = label, heard

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda state: self.heard.append((self.label, name, state))
        return super().__getattribute__(name)


@pytest.mark.parametrize("event", Event)
def test_order_and_its_reverse_after(event):
    heard, state = [], TrainState()
    registry = CallbackRegistry([Recorder(label, heard) for label in "abc"])
    registry.fire(event, state)
    order = "cba" if event.value.endswith("_end") else "abc"
    assert heard == [(label, f"on_{event.value}", state) for label in order]
    assert event.is_after == event.name.endswith("_END")


def test_callback_methods_are_those_of_the_events():
    methods = [name for name in vars(Callback) if name.startswith("on_")]
    assert methods == [f"on_{event.value}" for event in Event]
    for event in Event:
        CallbackRegistry([Callback()]).fire(event, TrainState())  # does nothing


def test_the_docstring_marks_every_event_once():
    marks = re.findall(r"^ *# ([A-Z_]+)", Event.__doc__, flags=re.MULTILINE)
    assert marks == [event.name for event in Event]
    assert [event.value for event in Event] == [event.name.lower() for event in Event]


class Fails(Callback):
    def __init__(self, error):
        self.error = error

    def on_batch_end(self, state):
        raise self.error


class Named(Fails):
    name = "the loader's guard"


def test_a_failure_names_the_callback_and_the_event():
    error = KeyError("column")
    with pytest.raises(CallbackError, match="callback Fails failed at batch_end: KeyError: 'colu"):
        CallbackRegistry([Fails(error)]).fire(Event.BATCH_END, TrainState())
    with pytest.raises(CallbackError, match="callback the loader's guard failed") as caught:
        CallbackRegistry([Named(error)]).fire(Event.BATCH_END, TrainState())
    assert caught.value.__cause__ is error
    for error in (SystemExit(3), StopIteration(3)):
        message = f"callback Fails failed at batch_end: {type(error).__name__}: 3"
        with pytest.raises(CallbackError, match=message):
            CallbackRegistry([Fails(error)]).fire(Event.BATCH_END, TrainState())


@pytest.mark.parametrize(
    "error", [UsageError("no such column"), CallbackError("inner"), KeyboardInterrupt()]
)
def test_what_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        CallbackRegistry([Fails(error)]).fire(Event.BATCH_END, TrainState())
    assert caught.value is error


def test_a_failure_stops_the_delivery():
    heard = []
    after = Recorder("after", heard)
    registry = CallbackRegistry([after, Fails(ValueError("x"))])  # after-events run backwards
    with pytest.raises(CallbackError):
        registry.fire(Event.BATCH_END, TrainState())
    assert heard == []


def test_register_and_unregister():
    registry = CallbackRegistry()
    first, second = Callback(), Callback()
    assert registry.register(first) is first
    registry.register(second)
    assert list(registry) == [first, second] and len(registry) == 2
    registry.unregister(first)
    assert list(registry) == [second]
    registry.register(first)
    assert list(registry) == [second, first]


def test_register_errors():
    callback = Callback()
    registry = CallbackRegistry([callback])
    with pytest.raises(ValueError, match="callback Callback is registered already"):
        registry.register(callback)
    with pytest.raises(ValueError, match="expected a Callback, got 3"):
        registry.register(3)
    with pytest.raises(ValueError, match="register an instance, not the class"):
        registry.register(Callback)
    with pytest.raises(ValueError, match="registered already"):
        CallbackRegistry([callback, callback])
    with pytest.raises(ValueError, match="Callback is not registered"):
        registry.unregister(Callback())
    with pytest.raises(ValueError, match="3 is not registered"):
        registry.unregister(3)
    assert list(registry) == [callback]


def test_a_misspelt_event_method_is_refused():
    """It would never be called, and nobody would know."""

    class Misspelt(Callback):
        def on_epoch_ended(self, state):
            pass

    class Strange(Callback):
        def on_coffee(self, state):
            pass

    with pytest.raises(ValueError, match=r"on_epoch_ended, .* did you mean on_epoch_end"):
        CallbackRegistry([Misspelt()])
    with pytest.raises(ValueError, match="on_coffee, which no event calls"):
        CallbackRegistry([Strange()])


def test_a_callback_may_leave_while_it_is_called():
    heard = []

    class Leaves(Callback):
        def on_epoch_start(self, state):
            heard.append(self)
            registry.unregister(self)

    registry = CallbackRegistry([Leaves(), Leaves()])
    registry.fire(Event.EPOCH_START, TrainState())
    assert len(heard) == 2 and len(registry) == 0


def test_the_default_registry():
    assert len(default_registry) == 0
    callback = Callback()
    try:
        assert register(callback) is callback
        assert list(events.default_registry) == [callback]
    finally:
        default_registry.unregister(callback)
    assert len(default_registry) == 0


class Counts(Callback):
    def __init__(self, label="Counts"):
        self.label, self.count = label, 0

    @property
    def name(self):
        return self.label

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        if state["count"] < 0:
            raise UsageError("a count is 0 or more")
        self.count = state["count"]


def test_states_are_saved_and_loaded_by_name():
    registry = CallbackRegistry([Counts("a"), Callback(), Counts("b"), Callback()])
    assert list(registry.stateful) == ["a", "b"]
    registry.stateful["a"].count = 3
    states = registry.state_dict()
    assert states == {"a": {"count": 3}, "b": {"count": 0}}
    other = CallbackRegistry([Counts("b"), Counts("a")])
    other.load_state_dict(states)
    assert other.state_dict() == states
    assert CallbackRegistry([Callback()]).state_dict() == {} == Callback().state_dict()
    CallbackRegistry([Callback()]).load_state_dict(states)
    Callback().load_state_dict({})


def test_a_missing_state_is_refused_before_any_is_loaded():
    registry = CallbackRegistry([Counts("a"), Counts("b")])
    message = re.escape("no saved state of b (there is one of: a)")
    with pytest.raises(UsageError, match=message):
        registry.load_state_dict({"a": {"count": 3}})
    assert registry.stateful["a"].count == 0
    registry.load_state_dict({"a": {"count": 3}}, fresh=["b"])
    assert registry.stateful["a"].count == 3
    registry.load_state_dict({}, fresh=["a", "b"])
    with pytest.raises(UsageError, match="there is one of: none"):
        registry.load_state_dict({})


def test_what_a_state_method_raises_has_the_callbacks_name():
    registry = CallbackRegistry([Counts()])
    with pytest.raises(CallbackError, match="Counts failed at load_state_dict: KeyError: 'count'"):
        registry.load_state_dict({"Counts": {}})
    with pytest.raises(UsageError, match="a count is 0 or more"):
        registry.load_state_dict({"Counts": {"count": -1}})
    del next(iter(registry)).count
    with pytest.raises(CallbackError, match="Counts failed at state_dict: AttributeError"):
        registry.state_dict()


def test_two_states_of_one_name_are_refused():
    registry = CallbackRegistry([Counts(), Callback(), Callback()])
    with pytest.raises(ValueError, match="two callbacks named Counts keep state; give each a"):
        registry.register(Counts())
    registry.register(Counts("another"))


def test_half_of_the_protocol_is_refused():
    class Saves(Callback):
        def state_dict(self):
            return {}

    class Loads(Callback):
        def load_state_dict(self, state):
            pass

    for half in (Saves(), Loads()):
        with pytest.raises(ValueError, match=f"callback {half.name} must override state_dict and"):
            CallbackRegistry().register(half)
