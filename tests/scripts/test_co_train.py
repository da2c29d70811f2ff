"""`sleuth co-train`: each stage is a command whose options exist; what a gate refuses does not serve."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from agent.evaluation.measures import evaluation_record
from agent.evaluation.records import read_records
from agent.evaluation.scores import score
from agent.trajectory import SearchRecord, Segment, SegmentKind, StopReason, Trajectory
from data.atlas.build import build_atlas
from data.errors import ConfigError, RetrieverRefused, SleuthError
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.records import Hit, Passage, Question
from retriever_server.indexes.manifest import read_manifest
from scripts import __main__ as sleuth
from scripts import co_train
from scripts.command_line import known_parser, parse
from tests.retriever_server.answering import answering

CONFIGS = Path(co_train.__file__).parent / "configs"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    build_atlas(folder, hard=True)
    assert index_atlas(folder, folder / "index") == 0
    return folder


def index_atlas(folder, out, *options):
    return sleuth.main(["index", "--corpus", str(folder / "corpus.jsonl"), "--out", str(out), *options])


def config(atlas, out, **given):
    return co_train.CoTrainConfig(**{
        "policy": "atlas", "retriever": str(atlas / "index"), "corpus": str(atlas / "corpus.jsonl"),
        "questions": str(atlas / "train.jsonl"), "dev_questions": str(atlas / "dev.jsonl"),
        "train_recipe": str(CONFIGS / "atlas.yaml"),
        "retriever_recipe": str(CONFIGS / "retriever" / "minilm.yaml"),
        "out": str(out), "rollout_questions": 8,
    } | given)  # fmt: skip


def evaluated(out, gain):
    """Leave what an evaluation leaves: EM rises with the rounds, and later searches find what they need."""
    later = int(out.parent.name.partition("-")[2])
    question = Question("q1", "Where was Eiffel born?", ("Dijon",), {"supporting_ids": ["born"]})
    hits = [Hit(Passage("born" if later else "cow", "text of it"), 1.0, "g")]
    turn = Segment(SegmentKind.POLICY, [1], "<answer>Dijon</answer>", [0.0])
    searches = [SearchRecord("Eiffel birth", hits, 0.1)]
    made = Trajectory(question, [turn], StopReason.ANSWERED, "Dijon", searches)
    write_jsonl(out / "trajectories.jsonl", [evaluation_record(made)])
    scores = score(read_records(out))
    scores["em"] = {"mean": 0.5 + gain * later, "low": 0.4, "high": 0.6}
    write_json(out / "scores.json", scores)


@cache
def parser_of(command):
    module = __import__(sleuth.COMMANDS[command].module, fromlist=["main"])
    return known_parser(module.main, command)


class Commands:
    """In the place of `run_stage`: checks the options, and leaves what each command would leave."""

    def __init__(self, passes=True, broken=None, statuses=(), oracle=0.9, gain=0.1):
        self.passes, self.broken, self.ran = passes, broken, []
        self.index: Path | None = None
        self.statuses, self.oracle, self.gain = dict(statuses), oracle, gain

    def __call__(self, argv):
        command, *options = argv
        if command == self.broken:
            return 2
        given = dict(option.removeprefix("--").split("=", 1) for option in options)
        self.ran.append((command, given))
        parse(parser_of(command), options)
        out = Path(given["out"])
        if command == "evaluate":
            evaluated(out, self.gain)
            oracle = {"oracle": {"em": {"mean": self.oracle}}} if self.oracle else {}
            if "controls" in given:
                write_json(out / "controls.json", {"controls": oracle})
        elif command in self.statuses:
            if command == "train-retriever":
                reason = "step 3: the loss is nan; the last checkpoint is kept"
                write_json(out / "run.json", {"format_version": 1, "status": "stopped", "reason": reason})
            return self.statuses[command]
        elif command == "index" and self.index:
            shutil.copytree(self.index, out)
        elif command == "gate":
            record = {"passed": self.passes, "reason": "r", "old_found": 0.1, "new_found": 0.2}
            write_json(out, record)
            return 0 if self.passes else 3
        elif command == "train":
            checkpoint = out / "checkpoints" / "step-20"
            write_json(checkpoint / "manifest.json", {"format_version": 1, "step": 20})
        elif command == "mine":
            write_jsonl(out, [])
        return 0


@pytest.fixture
def commands(monkeypatch):
    def use(**given):
        found = Commands(**given)
        monkeypatch.setattr(co_train, "run_stage", found)
        monkeypatch.setattr(
            "scripts.co_train.latest_checkpoint", lambda folder: type("C", (), {"path": folder / "last"})
        )
        return found

    return use


def test_the_normal_form_of_answers_reaches_all_that_judges_by_them(atlas, tmp_path, commands):
    found = commands()
    co_train.main(config(atlas, tmp_path, normalizer="unicode", rounds=1))
    judged = [given for command, given in found.ran if "questions" in given and "rollout" not in given["out"]]
    assert len(judged) == 4 and {given.get("normalizer") for given in judged} == {"unicode"}
    asked = list(read_jsonl(tmp_path / "round-0" / "questions.jsonl"))
    assert {row["metadata"]["normalizer"] for row in asked} == {"unicode"}


def test_the_policy_answers_everywhere_as_its_recipe_says(atlas, tmp_path, commands):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("protocol: {max_turns: 1}\ndtype: bfloat16\nsteps: 3\n")
    ran = commands()
    co_train.main(config(atlas, tmp_path / "out", train_recipe=str(recipe), labels="likelihood", rounds=1))
    asked = [given for command, given in ran.ran if command in ("evaluate", "score-searches", "train")]
    assert len(asked) == 5 and all(given["dtype"] == "bfloat16" for given in asked)
    for given in asked[:2]:
        protocol = parse(parser_of("evaluate"), [f"--{k}={v}" for k, v in given.items()])["protocol"]
        assert (protocol.max_turns, protocol.top_k) == (1, 3)


def test_the_loop_trains_on_its_own_searches_and_serves_what_passed(atlas, tmp_path, commands, capsys):
    found = commands()
    co_train.main(config(atlas, tmp_path))
    ran = [command for command, _ in found.ran]
    a_round = ["evaluate", "evaluate", "mine", "train-retriever", "index", "gate", "train"]
    assert ran == [*a_round, *a_round, "evaluate"]  # the last one says what the last round was good for
    second = found.ran[7][1]
    assert second["retriever"] == str(tmp_path / "round-0" / "index")
    assert second["policy"] == str(tmp_path / "round-0" / "policy" / "checkpoints" / "last")
    assert json.loads(found.ran[3][1]["train"])[0]["negatives"] == 1
    assert found.ran[2][1]["held_out"] == str(atlas / "dev.jsonl")
    first, later = (read_ids(tmp_path / f"round-{n}" / "questions.jsonl") for n in (0, 1))
    assert len(first) == len(later) == 8 and not first & later
    said = capsys.readouterr().out
    assert (
        "passed" in said and "headroom: EM with the oracle's passages less that at the start: +0.400" in said
    )
    page = (tmp_path / "report.html").read_text()
    for part in ("Rounds", "0.100 -&gt; 0.200", "Searches on dev", "First searches that changed", "gained"):
        assert part in page
    assert sleuth.main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page
    assert sleuth.main(["report", str(tmp_path), "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text() == page


def test_a_refused_gate_is_recorded_and_the_old_retriever_stays(atlas, tmp_path, commands):
    found = commands(passes=False)
    co_train.main(config(atlas, tmp_path, rounds=3))
    state = read_json(tmp_path / "state.json")["state"]
    assert state["round"] == 2 and state["retriever"] == str(atlas / "index")
    assert state["ended"] == "2 refused gates in a row"
    assert [entry["gate"]["passed"] for entry in state["history"]] == [False, False]
    assert found.ran[7][1]["retriever"] == str(atlas / "index")


@pytest.mark.slow
def test_a_recipe_of_another_command_is_refused_before_anything_runs(atlas, tmp_path, commands):
    ran = commands()
    for key, other, said in (
        ("train_recipe", "retriever/minilm.yaml", "unknown key model"),
        ("retriever_recipe", "atlas.yaml", "unknown key"),
    ):
        with pytest.raises(ConfigError, match=f"{other}, line .*{said}"):
            co_train.main(config(atlas, tmp_path / "out", **{key: str(CONFIGS / other)}))
    recipe, server = tmp_path / "policy.yaml", "http://127.0.0.1:9"
    recipe.write_text("deterministic: true\n")
    for more, said in (
        ({"train_recipe": str(recipe)}, "policy.yaml: deterministic needs an index in process, not server"),
        ({"admin_token_file": str(tmp_path / "none")}, "admin_token_file"),
    ):
        with pytest.raises(ConfigError, match=said):
            co_train.main(config(atlas, tmp_path / "out", server=server, **more))
    assert not ran.ran and not (tmp_path / "out").exists()


def test_a_stage_that_fails_is_named_and_taken_up_again(atlas, tmp_path, commands):
    commands(broken="index")
    with pytest.raises(SleuthError, match=r"round 0, index: sleuth index ended with status 2; mend"):
        co_train.main(config(atlas, tmp_path, rounds=1))
    found = commands()
    co_train.main(config(atlas, tmp_path, rounds=1))
    assert [command for command, _ in found.ran] == ["index", "gate", "train", "evaluate"]


@pytest.mark.slow
def test_no_label_in_a_round_is_recorded_and_the_policy_goes_on_with_the_old_retriever(
    atlas, tmp_path, commands, capsys
):
    found = commands(statuses={"mine": 3})
    co_train.main(config(atlas, tmp_path, rounds=1))
    assert [command for command, _ in found.ran] == ["evaluate", "evaluate", "mine", "train", "evaluate"]
    state = read_json(tmp_path / "state.json")["state"]
    assert state["retriever"] == str(atlas / "index") and state["refusals"] == 0
    assert state["history"][0]["refused"] == "no search has a label"
    assert "refused: no search has a label" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_diverges_is_refused_and_another_failure_is_not(atlas, tmp_path, commands):
    found = commands(statuses={"train-retriever": 2})
    co_train.main(config(atlas, tmp_path, rounds=5))
    assert [command for command, _ in found.ran].count("index") == 0
    state = read_json(tmp_path / "state.json")["state"]
    assert state["round"] == 2 and state["retriever"] == str(atlas / "index")  # two in a row end it
    assert state["history"][0]["refused"].startswith("the training diverged: step 3: the loss is nan")
    commands(broken="train-retriever")
    with pytest.raises(SleuthError, match="train-retriever ended with status 2; mend"):
        co_train.main(config(atlas, tmp_path / "other"))


@pytest.mark.slow
def test_a_round_without_gain_ends_the_loop(atlas, tmp_path, commands, capsys):
    found = commands(gain=0.0)
    co_train.main(config(atlas, tmp_path, rounds=5))
    assert [command for command, _ in found.ran].count("train") == 1
    assert "ended: no gain: EM 0.500 on dev after 0.500" in capsys.readouterr().out
    ran = len(found.ran)
    co_train.main(config(atlas, tmp_path, rounds=5))
    assert len(found.ran) == ran  # it stays ended


@pytest.mark.parametrize(
    ("oracle", "says"), [(0.6, "nothing to show: below 0.15"), (None, "headroom unknown: the dev questions")]
)
def test_the_headroom_is_said_at_every_start(oracle, says, atlas, tmp_path, commands, capsys):
    for _ in range(2):
        commands(oracle=oracle)
        co_train.main(config(atlas, tmp_path, rounds=1))
        assert says in capsys.readouterr().out


@pytest.mark.slow
def test_pairs_of_the_first_retriever_are_replayed_as_the_recipe_reads_its_own(atlas, tmp_path, commands):
    write_jsonl(tmp_path / "pairs.jsonl", [])
    recipe = (CONFIGS / "retriever" / "minilm.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(recipe.replace("- {examples:", "- {weights: true, examples:"))
    found = commands()
    recipe = {"retriever_recipe": str(tmp_path / "recipe.yaml"), "replay": str(tmp_path / "pairs.jsonl")}
    recipe["replay_corpus"] = str(atlas / "dev.jsonl")
    co_train.main(config(atlas, tmp_path / "out", rounds=1, replay_share=0.25, **recipe))
    own, old = json.loads(found.ran[3][1]["train"])
    assert (own["weight"], old["weight"], old["examples"]) == (0.75, 0.25, recipe["replay"])
    assert (own["corpus"], old["corpus"]) == (str(atlas / "corpus.jsonl"), recipe["replay_corpus"])
    assert own["negatives"] == old["negatives"] == 1 and own["weights"]


@pytest.mark.slow
def test_a_server_that_will_not_reload_keeps_the_loop_at_its_swap(atlas, tmp_path, commands):
    for number in ("1", "2"):
        assert index_atlas(atlas, tmp_path / number / "index", "--title_boost", number) == 0
    old, new = (read_manifest(tmp_path / n / "index").generation for n in "12")
    says = {"generation": old, "status": 409}

    def reload(_):
        says["generation"] = new if says["status"] == 200 else old
        return says["status"], {"detail": "not swapped: no"}

    found = commands()
    found.index = tmp_path / "2" / "index"
    with answering(healthz=lambda _: (200, says), admin__reload=reload) as server:
        place = str(tmp_path / "1" / "index")
        given = config(atlas, tmp_path / "out", retriever=place, server=server.url, rounds=1)
        with pytest.raises(RetrieverRefused, match=r"/admin/reload: answered 409: .*not swapped: no"):
            co_train.main(given)
        assert read_json(tmp_path / "out" / "state.json")["state"]["stage"] == "swap"
        says["status"] = 200
        co_train.main(given)
    assert [command for command, _ in found.ran][-2:] == ["train", "evaluate"]
    assert found.ran[-1][1]["retriever"] == server.url and found.ran[0][1]["retriever"] == server.url
    assert read_manifest(Path(place)).generation == new  # the server's place holds the new index


@pytest.mark.slow
def test_labels_by_forks_are_scored_first(atlas, tmp_path, commands):
    found = commands()
    co_train.main(config(atlas, tmp_path, rounds=1, labels="fork"))
    [scored, mined] = [given for command, given in found.ran if command in ("score-searches", "mine")]
    assert scored["by"] == '["fork"]' and scored["out"] == mined["scores"]


def test_passages_of_another_index_are_refused_before_anything_runs(atlas, tmp_path, commands):
    found, other = commands(), tmp_path / "corpus.jsonl"
    write_jsonl(other, [{"id": "1", "text": "Another."}])
    with pytest.raises(ConfigError, match=r"corpus\.jsonl: not the passages of the index .*index"):
        co_train.main(config(atlas, tmp_path / "out", corpus=str(other)))
    assert not found.ran and not (tmp_path / "out").exists()


def test_questions_to_hold_out_that_are_not_there_are_said_before_anything_runs(atlas, tmp_path, commands):
    found = commands()
    with pytest.raises(SleuthError, match=r"nope\.jsonl: no such file"):
        co_train.main(config(atlas, tmp_path, held_out=f"{atlas / 'test.jsonl'},{tmp_path / 'nope.jsonl'}"))
    assert not found.ran


def test_too_few_questions_are_said_before_anything_runs(atlas, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout_questions = 4000: 2 rounds need 8,000, .* has 4,500"):
        co_train.main(config(atlas, tmp_path, rollout_questions=4000))


def read_ids(path):
    return {json.loads(line)["id"] for line in path.read_text().splitlines()}
