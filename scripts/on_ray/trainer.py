"""One trainer of a run that is placed by Ray: `python -m scripts.on_ray.trainer --config OUT/ray/train.yaml`.

The launcher starts it, and writes where its engines and its retriever are into OUT/ray/places.json.
"""

from dataclasses import replace
from pathlib import Path

from data.jsonl import read_json
from rl.config import TrainConfig
from scripts.__main__ import configure_process, run_script
from scripts.train import conclude, train


def main(config: TrainConfig) -> None:
    """Take part in the training of `config` with what the launcher has started."""
    places = read_json(Path(config.out) / "ray" / "places.json")
    engine = replace(config.engine, urls=places["engines"], sync_folder=places["weights"])
    here = replace(config, engine=engine, retriever=places["retriever"])
    conclude(config, train(config, here=here))


if __name__ == "__main__":
    configure_process()
    run_script(main)
