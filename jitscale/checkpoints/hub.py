"""JiT for the Hugging Face hub: `HubJiT.from_pretrained("user/name")` and `HubJiT(...).push_to_hub("user/name")`.

Needs the extra `jitscale[hub]`. The folder that `save_pretrained` writes holds config.json and model.safetensors.
"""

# No `from __future__ import annotations`: the mixin reads the types of the arguments to rebuild them from JSON.

from huggingface_hub import PyTorchModelHubMixin

from jitscale.config import DiffusionConfig, ModelConfig
from jitscale.model.jit import JiT


class HubJiT(
    JiT,
    PyTorchModelHubMixin,
    library_name="jitscale",
    pipeline_tag="unconditional-image-generation",
    paper_url="https://arxiv.org/abs/2511.13720",
    tags=["jit", "diffusion"],
):
    """A JiT that loads from, and is stored in, a Hugging Face repository or folder; `jitscale.sample` takes it."""

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig, weights: str = "model") -> None:
        """`weights` is the name of the weight set, for the record."""
        super().__init__(model, diffusion)
        self.weights = weights
