"""Extension of vLLM's worker that loads new weights from a folder; runs in vLLM's environment.

    PYTHONPATH=agent/engines/worker ... --worker-extension-cls sleuth_worker.Reload

On a CPU vLLM multiplies by packed copies of its weights. Its `reload_weights` packs anew what it loads,
but tied embeddings have no LM head in the checkpoint: the head would go on with its old copy.
"""

from typing import Any


class Reload:
    """Mixed into vLLM's worker, which has `reload_weights`, `model_runner`, `add_lora` and `list_loras`."""

    def sleuth_reload(self, weights_path: str) -> None:
        """Load a folder of safetensors in place, and pack anew every head that shares its weights."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        for layer in worker.model_runner.get_model().modules():
            if type(layer).__name__ == "ParallelLMHead" and hasattr(layer, "cpu_linear"):
                layer.quant_method.process_weights_after_loading(layer)

    def sleuth_adapter(self, name: str, path: str) -> None:
        """Put the adapter of a folder in the place of the one that is loaded; what is being written goes on.

        Its request is ours alone: one that vLLM keeps with `load_inplace` is read again for every batch.
        """
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        worker: Any = self
        numbers = worker.list_loras()
        if len(numbers) != 1:
            raise ValueError(f"{len(numbers)} adapters are loaded, of which one should be replaced")
        worker.add_lora(LoRARequest(name, *numbers, path, load_inplace=True))
