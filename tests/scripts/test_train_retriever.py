"""`sleuth train-retriever` as a process: resumed after a kill, in two processes, one line for an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.run_dir import read_metrics, read_run
from scripts import __main__ as sleuth
from tests.retriever_server.training.recipes import base, component, settings

COMMAND = [sys.executable, "-m", "scripts", "train-retriever", "--config"]


def write(path, fields):
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def test_the_command_trains_resumes_and_keeps_the_resolved_recipe(rivers, tmp_path, capsys):
    dev = {"queries": str(rivers / "dev.jsonl"), "qrels": str(rivers / "qrels.tsv"), "shared": "all"}
    config = write(tmp_path / "r.yaml", settings(rivers, tmp_path / "run", steps=2, dev=dev))
    command = ["train-retriever", "--config", config, "--model.init_args.pooling", "cls"]
    assert sleuth.main(command) == 0
    assert f"trained: {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert resolved["model"]["init_args"]["pooling"] == "cls" and "changes" not in resolved
    rows = read_metrics(tmp_path / "run")
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(rows[1])
    assert [row["step"] for row in rows if "dev/nDCG@10" in row] == [0, 2]
    assert read_run(tmp_path / "run")["status"] == "finished"
    for part, name in ((resolved, "sharding"), (resolved["train"][0], "weights"), (resolved["dev"], "limit")):
        del part[name]  # as in a run that was begun before these fields were there
    write(tmp_path / "run/config.yaml", resolved)
    assert sleuth.main(command) == 0
    assert sleuth.main([*command, "--steps", "3"]) == 2
    assert "another configuration (steps: 2 -> 3)" in capsys.readouterr().err
    assert sleuth.main([*command, "--steps", "3", "--resume", "true"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "dev/nDCG@10" in row] == [0, 2, 3]


@pytest.mark.slow
def test_a_run_goes_on_with_its_data_alone(rivers, tmp_path, capsys):
    lines = (rivers / "examples.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    train = [{"examples": str(tmp_path / "mine.jsonl"), "corpus": str(rivers / "corpus.jsonl")}]
    config = write(tmp_path / "r.yaml", settings(rivers, tmp_path / "run", steps=2, train=train))
    assert sleuth.main(["train-retriever", "--config", config]) == 0
    (tmp_path / "mine.jsonl").write_text("".join(reversed(lines)))
    assert sleuth.main(["train-retriever", "--config", config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"train.0.examples: {tmp_path}/mine.jsonl holds something else than then" in error
    assert "--resume true goes on with these changes" in error
    assert sleuth.main(["train-retriever", "--config", config, "--resume", "true"]) == 0


def resolved(argv, capsys):
    with pytest.raises(SystemExit):
        sleuth.main(["train-retriever", *argv, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.slow
def test_a_model_or_a_loss_on_the_line_takes_the_place_of_the_one_in_the_file(rivers, tmp_path, capsys):
    config = write(tmp_path / "r.yaml", settings(rivers, tmp_path / "run", steps=2))
    other = write(tmp_path / "other.yaml", {"model": component("splade", base="x")})
    loss = {"class_path": "CachedMultipleNegativesRankingLoss", "init_args": {"mini_batch_size": 4}}
    both = ["--config", config, "--config", other]
    assert resolved(both, capsys)["model"] == component("splade", base="x")
    assert resolved([*both, "--loss", json.dumps(loss)], capsys)["loss"] == loss
    assert resolved([*both, f"--loss={json.dumps(loss)}"], capsys)["loss"] == loss
    alone = {"class_path": "a", "init_args": {}}
    assert resolved(["--model", '{"class_path": "a", "init_args": {}}', *both[:2]], capsys)["model"] != alone
    model = component("dense", base=base(rivers), pooling="cls")
    words = ["--model", json.dumps(model), "--loss", json.dumps(loss), "--model.init_args.max_tokens", "8"]
    assert sleuth.main(["train-retriever", "--config", config, *words]) == 0
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert kept["model"] == component("dense", base=base(rivers), pooling="cls", max_tokens=8)
    assert kept["loss"] == loss


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batchsize", "3"], "unknown key batchsize; did you mean batch_size"),
        (["--batch_size", "many"], "batch_size: got 'many', expected"),
        (
            ["--model.init_args.poolin", "cls"],
            "init_args.poolin: unknown key; dense takes base",
        ),
        (["--train", "[]"], "train = []: must be a list of at least one set of examples"),
        (["--loss", "MultipleNegativesRankingLoss"], "loss: got 'MultipleNegativesRankingLoss', expected"),
        (["--loss", "{class: Mine}"], "loss: must be a mapping of class_path and init_args"),
        (["--model", "{class_path: dense"], "model: got '{class_path: dense', expected"),
        (["--serves", "nowhere"], "nowhere: no such folder"),
        (
            ["--sharding", "fsdp", "--dev.queries", "d.jsonl", "--dev.qrels", "q.tsv"],
            "sharding = 'fsdp': must be none with dev.queries (score OUT/model afterwards)",
        ),
        (["--sharding", "fsdp"], "sharding = fsdp: one process trains; several do by accelerate launch"),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_status_2(words, says, rivers, tmp_path, capsys):
    config = write(tmp_path / "r.yaml", settings(rivers, tmp_path / "run"))
    assert sleuth.main(["train-retriever", "--config", config, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error


def test_examples_of_a_corpus_that_has_changed_are_refused_before_a_model_loads(rivers, tmp_path, capsys):
    rows = [json.loads(line) for line in (rivers / "examples.jsonl").read_text().splitlines()]
    mined = tmp_path / "mined.jsonl"
    mined.write_text("".join(json.dumps({**row, "provenance": {"corpus": "0" * 16}}) + "\n" for row in rows))
    train = [{"examples": str(mined), "corpus": str(rivers / "corpus.jsonl")}]
    config = write(
        tmp_path / "r.yaml",
        settings(rivers, tmp_path / "run", train=train, model=component("pretrained", base="atlas")),
    )
    assert sleuth.main(["train-retriever", "--config", config]) == 2
    assert "another corpus, or changed since" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_by_the_kernel_and_started_again_equals_unbroken(rivers, tmp_path):
    for name in ("whole", "broken"):
        write(tmp_path / f"{name}.yaml", settings(rivers, tmp_path / name, steps=40, save_every=5))
    subprocess.run([*COMMAND, str(tmp_path / "whole.yaml")], check=True)
    broken = subprocess.Popen([*COMMAND, str(tmp_path / "broken.yaml")])
    while not list((tmp_path / "broken").glob("checkpoints/step-*/checkpoint.json")):
        assert broken.poll() is None
        time.sleep(0.01)
    os.kill(broken.pid, signal.SIGKILL)
    broken.wait()
    assert not (tmp_path / "broken/model").exists()
    subprocess.run([*COMMAND, str(tmp_path / "broken.yaml")], check=True)
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    numbers = [
        [(row["step"], row.get("train/loss")) for row in read_metrics(tmp_path / name)][:-1]
        for name in ("whole", "broken")
    ]
    assert numbers[0] == numbers[1]


def twice(rivers, tmp_path, two, **given):
    """The weights that one process trains, and two with half the batch each and the options `two`."""
    common = {"no_duplicates": False, "steps": 3, "save_every": 3, **given}
    write(tmp_path / "one.yaml", settings(rivers, tmp_path / "one", **{**common, "batch_size": 16}))
    write(tmp_path / "two.yaml", settings(rivers, tmp_path / "two", **{**common, "batch_size": 8, **two}))
    subprocess.run([*COMMAND, str(tmp_path / "one.yaml")], check=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts"]
    command = [sys.executable, *launch, "train-retriever", "--config", str(tmp_path / "two.yaml")]
    subprocess.run(command, check=True)
    return weights(tmp_path / "one"), weights(tmp_path / "two")


def apart(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_what_one_does_with_twice_the_batch(sharding, rivers, tmp_path):
    still = base(rivers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = component("dense", base=still, max_tokens=24)
    alone, together = twice(rivers, tmp_path, {"sharding": sharding}, model=model)
    start = load_file(f"{still['folder']}/model.safetensors")
    assert (
        apart({n: w for n, w in alone.items() if f"bert.{n}" in start}, {n[5:]: w for n, w in start.items()})
        > 1e-3
    )
    assert apart(alone, together) < 1e-4


@pytest.mark.slow
def test_two_processes_train_a_reranker(rivers, tmp_path):
    still = base(rivers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    files = {"examples": str(rivers / "examples.jsonl"), "corpus": str(rivers / "corpus.jsonl")}
    given = {"model": component("cross_encoder", base=still, max_tokens=24), "passage_template": "{contents}"}
    given |= {"loss": component("BinaryCrossEntropyLoss"), "train": [{**files, "form": "pair"}]}
    alone, together = twice(rivers, tmp_path, {}, **given)
    assert apart(alone, together) < 1e-4
