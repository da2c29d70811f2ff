"""Run folders that the first version of Sleuth (commit 4a1e685) wrote go on, on the text they began with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from agent.policy_folder import own_protocol
from data.errors import ConfigError
from data.run_dir import read_config, read_metrics
from rl.config import ProtocolConfig
from scripts.train import train
from tests.rl.test_trainer import Killed, assert_same_weights, kill_at
from tests.toy import toy_config

CONFIG = Path(__file__).parent / "first_version.yaml"
"""A config.yaml as it wrote it."""


def begun(toy, out, name):
    """A run of three steps that was killed after two."""
    spoken = ProtocolConfig(name=name, max_turns=2, titles="unquoted")
    config = toy_config(toy, out, steps=3, save_every=1, eval_every=2, protocol=spoken)
    with pytest.raises(Killed):
        train(config, on_step=kill_at(2))
    text = CONFIG.read_text()
    for word, value in (("{toy}", toy), ("{out}", out), ("{name}", name)):
        text = text.replace(word, str(value))
    (out / "config.yaml").write_text(text)
    wrote = {"format_version": 1, "created": "2026-11-20T02:26:13+00:00", "notes": [], "status": "running"}
    (out / "run.json").write_text(json.dumps(wrote))
    for folder in (out / "checkpoints").glob("step-*"):
        (folder / "sleuth.json").write_text(json.dumps({"protocol": name}))
    return replace(config, protocol=replace(spoken, titles=None))


def test_its_configuration_has_no_titles(toy, tmp_path):
    assert "titles" not in yaml.safe_load(CONFIG.read_text())["protocol"]


@pytest.mark.slow
def test_a_run_of_search_r1_goes_on_only_where_its_text_is_chosen_by_name(toy, tmp_path):
    out = tmp_path / "run"
    config = begun(toy, out, "search_r1")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"titles without quotes: --protocol.titles unquoted goes on"):
            train(replace(config, resume=resume))
    assert "titles" not in read_config(out)["protocol"]
    unquoted = replace(config, protocol=replace(config.protocol, titles="unquoted"))
    train(unquoted)
    train(replace(unquoted, out=f"{out}-whole"))
    assert_same_weights(out, tmp_path / "run-whole", 3)
    assert own_protocol(str(out / "checkpoints" / "step-000003")).titles == "unquoted"
    with pytest.raises(ConfigError, match=r"protocol.titles: 'unquoted' -> None"):
        train(config)


@pytest.mark.slow
def test_a_run_whose_text_is_what_it_was_goes_on_without_ado(toy, tmp_path):
    out = tmp_path / "run"
    config = begun(toy, out, "compact")
    train(replace(config, out=f"{out}-whole"))
    train(config)
    assert_same_weights(out, tmp_path / "run-whole", 3)
    assert [row["step"] for row in read_metrics(out) if "reward/mean" in row] == [1, 2, 3]


@pytest.mark.slow
def test_a_folder_without_results_is_begun_on_the_text_of_now(toy, tmp_path):
    out = tmp_path / "run"
    config = begun(toy, out, "search_r1")
    for name in ("checkpoints", "metrics.jsonl"):
        (out / name).rename(tmp_path / name)
    train(replace(config, steps=1))
    assert own_protocol(str(out / "checkpoints" / "step-000001")).titles == "quoted"
