"""What a vLLM worker is called for when new weights lie in a folder; loaded by vLLM, in its environment.

    PYTHONPATH=agent/engines/worker ... --worker-extension-cls sleuth_worker.Reload

On a CPU vLLM multiplies by packed copies of its weights. Its `reload_weights` packs anew what it loads,
but tied embeddings have no LM head in the checkpoint: the head would go on with its old copy.
"""

from typing import Any


class Reload:
    """Mixed into vLLM's worker, which has `reload_weights` and `model_runner`."""

    def sleuth_reload(self, weights_path: str) -> None:
        """Load a folder of safetensors in place, and pack anew every head that shares its weights."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        for layer in worker.model_runner.get_model().modules():
            if type(layer).__name__ == "ParallelLMHead" and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)
