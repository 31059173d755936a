"""The flags that fair training adds, and what stops a run before it begins."""

from __future__ import annotations

import re

import pytest

from fairclip_losses.errors import UsageError
from fairclip_losses.integrations.events import Callback
from fairclip_losses.integrations.flags import build_parser, load_callback, split_flags


class Own(Callback):
    """A callback as a user would write it."""


class Needy(Callback):
    def __init__(self, something):
        self.something = something


OWN = Own()
EVALUATION = ("--fair-eval-label", "y", "--fair-eval-prompts", "a", "b")


def test_bare_fair_loss_means_both_parts_and_the_rest_is_open_clips():
    options, rest = split_flags(["--lr", "1e-3", "--fair-loss", "--fair-attributes", "sex", "--x"])
    assert options.fair_loss == ("dbpm", "sinkhorn")
    assert options.fair_attributes == ("sex",)
    assert rest == ["--lr", "1e-3", "--x"]


def test_absent_flags_are_inactive_and_evaluation_alone_is_active():
    options, rest = split_flags(["--epochs", "3"])
    assert not options.active and options.fair_loss == ()
    assert rest == ["--epochs", "3"]
    options, _ = split_flags([*EVALUATION, "--fair-attributes", "sex"])
    assert options.active and not options.fair_loss


@pytest.mark.parametrize("parts", [("dbpm",), ("sinkhorn", "dbpm"), ("dbpm", "sinkhorn", "dbpm")])
def test_the_order_of_the_parts_is_all_the_same(parts):
    options, _ = split_flags(["--fair-attributes", "sex", "--fair-loss", *parts])
    assert options.fair_loss == ("dbpm", "sinkhorn")[: len(set(parts))]


def test_labels_may_follow_an_attribute():
    options, _ = split_flags(
        ["--fair-loss", "--fair-attributes", "race= b,a , *", "sex=-1,+1", "y=01,2", "x"]
    )
    assert options.fair_attributes == ("race", "sex", "y", "x")
    labels = {"race": ("b", "a"), "sex": ("-1", "1"), "y": ("01", "2")}  # -1 is a label if given
    assert options.fair_labels == labels
    assert options.fair_others_unknown == ("race",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "got '', which stands for an unknown value"),
        ("a,<NA>", "got '<NA>', which stands for an unknown value"),
        ("1,+1", "expected each label once"),
        ("*", r"expected labels separated by commas, and \* \(any other value is unknown\) after"),
        ("*,a", r"expected labels separated by commas, and \*"),
        ("a,*,*", r"expected labels separated by commas, and \*"),
    ],
)
def test_wrong_labels_are_one_line(labels, message):
    with pytest.raises(
        UsageError, match=f"^--fair-attributes race={re.escape(labels)}: .*{message}"
    ):
        split_flags(["--fair-loss", "--fair-attributes", f"race={labels}"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fair-loss"], "needs --fair-attributes"),
        (["--fair-loss", "sinkhorn"], "needs --fair-attributes"),
        (["--fair-loss", "both"], "invalid choice"),
        (["--fair-loss", "dbpm", "--fair-weight", "much"], "invalid float"),
        (["--fair-loss", "dbpm", "--fair-preset", "best"], "invalid choice"),
        (["--fair-loss", "--fair-attributes", "a", "a"], "twice"),
        (["--fair-eval-label", "y"], "go together"),
        (["--fair-eval-prompts", "y"], "go together"),
        (["--fair-eval-label", ""], "go together"),
        (["--fair-attributes", "a"], "--fair-attributes has no effect without --fair-loss"),
        (["--fair-fresh-state"], "--fair-fresh-state has no effect without --fair-loss"),
        (["--fair-eval-label", "y", "--fair-eval-prompts", "a"], "needs --fair-attributes"),
    ],
)
def test_wrong_combinations_are_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        split_flags(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weight", "blur", "noisy-sigma", "faulty-sigma", "queue",
                                  "warmup-epochs"])  # fmt: skip
@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_value_out_of_range_is_one_line(name, value):
    argv = ["--fair-loss", "--fair-attributes", "sex", f"--fair-{name}={value}"]
    if (name, value) in (("noisy-sigma", "inf"), ("faulty-sigma", "inf")):
        split_flags(argv)  # flags no pair
        return
    message = f"^--fair-{name} must be a (finite )?number >= 0, got {float(value):g}"
    if name in ("queue", "warmup-epochs") and value != "-1":
        message = f"argument --fair-{name}: invalid int value"
    with pytest.raises(UsageError, match=message):
        split_flags(argv)


MINING = {
    "--fair-warmup-epochs": ["0"], "--fair-noisy-sigma": ["2"], "--fair-faulty-sigma": ["0"],
    "--fair-save-pairs": [], "--fair-weighting": ["relative"],
}  # fmt: skip
DISTANCE = {
    "--fair-weight": ["0"], "--fair-blur": ["0"], "--fair-p": ["2"], "--fair-score": ["loss"],
    "--fair-queue": ["0"], "--fair-start-epoch": ["0"],
}  # fmt: skip
BOTH = {"--fair-preset": ["aligned"], "--fair-id-key": ["id"]}
ANYWHERE = {
    "--fair-loss", "--fair-attributes", "--fair-eval-label", "--fair-eval-prompts",
    "--fair-callback", "--fair-fresh-state",
}  # fmt: skip


def test_each_flag_is_of_a_part_of_the_loss_or_of_none():
    actions = build_parser()._actions
    flags = {action.option_strings[0] for action in actions if action.help}
    assert flags == MINING.keys() | DISTANCE.keys() | BOTH.keys() | ANYWHERE


@pytest.mark.parametrize("flag", [*MINING, *DISTANCE, *BOTH])
def test_a_flag_that_would_have_no_effect_is_refused(flag):
    """Whatever its value: one that is false, or that the preset has, was typed all the same."""
    words = [flag, *(MINING | DISTANCE | BOTH)[flag]]
    for argv in (words, [*words, *EVALUATION, "--fair-attributes", "sex"]):
        with pytest.raises(UsageError, match=f"^{flag} has no effect without --fair-loss; add it"):
            split_flags(argv)
    for part, other, own in (("dbpm", "sinkhorn", DISTANCE), ("sinkhorn", "dbpm", MINING)):
        argv = ["--fair-attributes", "sex", "--fair-loss", part, *words]
        if flag not in own:
            split_flags(argv)
            continue
        message = f"^{flag} needs --fair-loss {other}, whose option it is, got --fair-loss {part}; "
        with pytest.raises(UsageError, match=message + f"add {other} or drop {flag}$"):
            split_flags(argv)
    split_flags(["--fair-attributes", "sex", "--fair-loss", *words])


@pytest.mark.parametrize("part", ["dbpm", "sinkhorn"])
@pytest.mark.parametrize("preset", ["aligned", "paper", "official"])
def test_what_a_preset_says_of_an_absent_part_is_no_ones_mistake(part, preset):
    argv = ["--fair-attributes", "sex", "--fair-loss", part, "--fair-preset", preset]
    assert split_flags(argv)[0].fair_loss == (part,)


def test_the_pairs_of_a_preset_that_remembers_none_cannot_be_saved():
    split_flags(["--fair-loss", "dbpm", "--fair-save-pairs", "--fair-preset", "paper"])
    with pytest.raises(UsageError, match="--fair-preset official keeps none; drop one of the two"):
        split_flags(["--fair-loss", "dbpm", "--fair-save-pairs", "--fair-preset", "official"])


@pytest.mark.parametrize("name", ["Own", "OWN"])
def test_a_callback_is_loaded_as_class_or_instance(name):
    assert isinstance(load_callback(f"{__name__}:{name}"), Own)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "MODULE:NAME"),
        (":Own", "MODULE:NAME"),
        ("no.such.module:Own", "cannot be imported"),
        (f"{__name__}:Missing", "cannot be imported"),
        (f"{__name__}:pytest", "must be a fairclip_losses Callback"),
        (f"{__name__}:Needy", "test_flags:Needy cannot be made without arguments: TypeError"),
    ],
)
def test_a_wrong_callback_is_one_line(spec, message):
    with pytest.raises(UsageError, match=message):
        load_callback(spec)
