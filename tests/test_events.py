"""Training events, callbacks and their registry."""

from __future__ import annotations

import re

import pytest

from fairclip_losses.errors import CallbackError, UsageError
from fairclip_losses.integrations.events import Callback, CallbackRegistry, Event, TrainState


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
    registry = CallbackRegistry([Callback(), *(Recorder(label, heard) for label in "abc")])
    registry.fire(event, state)
    order = "cba" if event.value.endswith("_end") else "abc"
    assert heard == [(label, f"on_{event.value}", state) for label in order]
    assert event.is_after == event.name.endswith("_END")


def test_methods_and_documentation_are_those_of_the_events():
    methods = [name for name in vars(Callback) if name.startswith("on_")]
    assert methods == [f"on_{event.value}" for event in Event]
    marks = re.findall(r"^ *# ([A-Z_]+)", Event.__doc__, flags=re.MULTILINE)
    assert marks == [event.name for event in Event]
    assert [event.value for event in Event] == [event.name.lower() for event in Event]


class Fails(Callback):
    name = None

    def __init__(self, error, name="Fails"):
        self.error, self.name = error, name

    def on_batch_end(self, state):
        raise self.error


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (Fails(KeyError("column")), "callback Fails failed at batch_end: KeyError: 'column'"),
        (Fails(KeyError("x"), "a guard"), "callback a guard failed at batch_end: KeyError"),
        (Fails(SystemExit(3)), "callback Fails failed at batch_end: SystemExit: 3"),
        (Fails(StopIteration(3)), "callback Fails failed at batch_end: StopIteration: 3"),
    ],
)
def test_a_failure_names_callback_and_event_and_stops_the_delivery(failing, message):
    heard = []
    registry = CallbackRegistry([Recorder("after", heard), failing])  # an end runs backwards
    with pytest.raises(CallbackError, match=message) as caught:
        registry.fire(Event.BATCH_END, TrainState())
    assert caught.value.__cause__ is failing.error and not heard


@pytest.mark.parametrize(
    "error", [UsageError("no such column"), CallbackError("inner"), KeyboardInterrupt()]
)
def test_what_passes_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        CallbackRegistry([Fails(error)]).fire(Event.BATCH_END, TrainState())
    assert caught.value is error


def having(name, *methods):
    """A callback of a class with these methods."""
    return type(name, (Callback,), dict.fromkeys(methods, lambda self, state: None))()


ONE = Callback()


def test_register_and_unregister():
    registry = CallbackRegistry()
    first, second = Callback(), Callback()
    assert registry.register(first) is first
    registry.register(second)
    assert list(registry) == [first, second] and len(registry) == 2
    registry.unregister(first)
    registry.register(first)
    assert list(registry) == [second, first]
    for other in (Callback(), 3):
        with pytest.raises(ValueError, match=f"{getattr(other, 'name', 3)} is not registered"):
            registry.unregister(other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ONE, "callback Callback is registered already"),
        (3, "expected a Callback, got 3"),
        (Callback, "register an instance, not the class"),
        # A misspelt method would never be called, and nobody would know.
        (having("Misspelt", "on_epoch_ended"), "on_epoch_ended, .* did you mean on_epoch_end"),
        (having("Strange", "on_coffee"), "on_coffee, which no event calls"),
        (having("Saves", "state_dict"), "callback Saves must override state_dict and"),
        (having("Loads", "load_state_dict"), "callback Loads must override state_dict and"),
    ],
)
def test_register_errors(wrong, message):
    registry = CallbackRegistry([ONE])
    with pytest.raises(ValueError, match=message):
        registry.register(wrong)
    assert list(registry) == [ONE]
    with pytest.raises(ValueError, match=message):
        CallbackRegistry([ONE, wrong])


def test_a_callback_may_leave_while_it_is_called():
    heard = []

    class Leaves(Callback):
        def on_epoch_start(self, state):
            heard.append(self)
            registry.unregister(self)

    registry = CallbackRegistry([Leaves(), Leaves()])
    registry.fire(Event.EPOCH_START, TrainState())
    assert len(heard) == 2 and len(registry) == 0


class Counts(Callback):
    name = None

    def __init__(self, name="Counts"):
        self.name, self.count = name, 0

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
