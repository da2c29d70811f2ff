"""`--help` shows the options that matter with an example and the names there are; `--help-all` shows all."""

import importlib

import pytest

from agent.protocol import PROTOCOLS
from rl.algorithm.presets import PRESETS
from rl.algorithm.rewards import REWARDS
from scripts import __main__ as sleuth
from scripts.command_line import known_keys, known_parser
from scripts.tiers import TIERS


def shown(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        sleuth.main(list(argv))
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", TIERS)
def test_the_first_tier_names_options_that_there_are_and_no_more_than_two_dozen(command):
    main = importlib.import_module(sleuth.COMMANDS[command].module).main
    assert set(TIERS[command]["options"]) <= set(known_keys(known_parser(main, command)))
    assert 5 < len(TIERS[command]["options"]) <= 24


@pytest.mark.parametrize("command", TIERS)
def test_help_is_short_with_an_example_and_help_all_is_whole(command, capsys):
    short, whole = shown(capsys, command, "--help"), shown(capsys, command, "--help-all")
    main = importlib.import_module(sleuth.COMMANDS[command].module).main
    keys = known_keys(known_parser(main, command))
    assert TIERS[command]["example"] in short and "`--help-all` lists all options." in short
    assert all(f"--{key} " in short for key in TIERS[command]["options"])
    assert all(f"--{key} " in whole for key in keys)
    assert len(short) < len(whole)


def test_h_alone_is_the_short_help(capsys):
    assert shown(capsys, "ask", "-h") == shown(capsys, "ask", "--help")


def test_names_of_presets_rewards_and_protocols_are_in_both_tiers(capsys):
    for option in ("--help", "--help-all"):
        text = shown(capsys, "train", option)
        for names in ([*REWARDS, "judge"], PRESETS, PROTOCOLS):
            assert f"Known: {', '.join(names)}." in text
