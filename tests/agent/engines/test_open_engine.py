"""An engine of one's own: named by class_path, nothing else of Sleuth knows it."""

import copy
from dataclasses import asdict

import pytest
import yaml

from agent.engines.config import EngineConfig
from agent.policy import load_policy
from data.errors import ConfigError
from data.run_dir import read_config, read_metrics
from scripts import __main__ as sleuth
from scripts.train import train
from tests.fake_sglang import FakeSGLang
from tests.retriever_server.running import serving
from tests.toy import toy_config

CLASS = "tests.fake_sglang.SGLangEngine"


@pytest.fixture
def sglang(toy):
    """A fake server of the toy policy, with its URL as `url`."""
    policy = load_policy(str(toy / "policy"), "cpu")
    fake = FakeSGLang(copy.deepcopy(policy))
    with serving(fake.app) as fake.url:
        yield fake


@pytest.mark.slow
def test_a_run_with_an_engine_of_ones_own_is_the_run_in_process(sglang, toy, tmp_path):
    config = toy_config(toy, tmp_path / "theirs", steps=2, deterministic=False)
    recipe = asdict(config) | {"engine": {"class_path": CLASS, "init_args": {"url": sglang.url}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert sleuth.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert sglang.versions == [0, 0, 1, 2]  # its own, then the run's from the start on
    assert read_config(tmp_path / "theirs")["engine"]["class_path"] == CLASS
    train(toy_config(toy, tmp_path / "ours", steps=2, deterministic=False))
    theirs, ours = (read_metrics(tmp_path / run) for run in ("theirs", "ours"))
    for name in ("reward/mean", "policy/entropy", "policy/grad_norm", "rollout/searches"):
        assert [row[name] for row in theirs] == pytest.approx([row[name] for row in ours], rel=1e-3)
    assert all(row["sync/probe_largest_difference"] < 1e-4 for row in theirs)


def test_an_engine_of_ones_own_answers_and_is_evaluated(sglang, toy, tmp_path, capsys):
    options = ["--policy", str(toy / "policy"), "--retriever", str(toy / "index")]
    engine = ["--engine", f'{{"class_path": "{CLASS}", "init_args": {{"url": "{sglang.url}"}}}}']
    assert sleuth.main(["ask", "Who?", *options, *engine]) == 3  # no answer: the policy is random
    out = tmp_path / "out"
    argv = ["evaluate", *options, *engine, "--questions", str(toy / "dev.jsonl"), "--out", str(out)]
    assert sleuth.main(argv) == 0
    assert f'"engine": "{CLASS}"' in (out / "evaluation.json").read_text()
    assert sglang.asked > 12 and sglang.versions == [0]
    sglang.engine.model.get_output_embeddings().weight.data.mul_(0.7)
    assert sleuth.main(["ask", "Who?", *options, *engine]) == 2
    assert f"engine {CLASS}: {sglang.url} does not have the policy's weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"class_path": CLASS}, "engine.init_args: missing: url"),
        ({"class_path": CLASS, "init_args": {"uri": 1}}, "engine.init_args.uri: unknown key"),
        ({"class_path": "tests.fakes.DictRetriever"}, "tests.fakes.DictRetriever is no Engine"),
        ({"class_path": "tests.fakes.None"}, "engine.class_path: 'tests.fakes.None'"),
        ({"class_path": CLASS, "name": "vllm"}, "given without engine.name and engine.urls"),
        ({"init_args": {"url": 1}}, "none without engine.class_path"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_said_before_anything_loads(toy, tmp_path, engine, said):
    with pytest.raises(ConfigError) as raised:
        train(toy_config(toy, tmp_path, deterministic=False, engine=EngineConfig(**engine)))
    assert said in str(raised.value)
