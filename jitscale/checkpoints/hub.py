"""JiT for the Hugging Face hub: `HubJiT.from_pretrained("user/name")` and `HubJiT(...).push_to_hub("user/name")`.

Needs the extra `jitscale[hub]`. The folder that `save_pretrained` writes holds config.json and model.safetensors.
"""

# No `from __future__ import annotations`: the mixin needs the argument types at run time, to rebuild them from JSON.

from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from jitscale.checkpoints.model_card import Card
from jitscale.config import Config, DiffusionConfig, ModelConfig
from jitscale.errors import CheckpointError
from jitscale.model.jit import JiT


class HubJiT(JiT, PyTorchModelHubMixin):
    """A JiT that can be loaded from and saved to a Hugging Face repository or folder; `jitscale.sample` accepts it."""

    def __init__(self, model: ModelConfig, diffusion: DiffusionConfig, weights: str = "model") -> None:
        """`weights` is the name of the weight set, for the record."""
        super().__init__(model, diffusion)
        self.weights = weights

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **options: Any) -> "HubJiT":
        """Strict, unlike the mixin's default, which leaves a missing tensor at its random initial values.

        Raises a CheckpointError if the file's tensors do not match its config.json.
        """
        try:
            return super()._from_pretrained(model_id=model_id, strict=strict, **options)
        except RuntimeError as error:
            what = f"{model_id}: the weights do not fit the network of its config.json ({' '.join(str(error).split())})"
            raise CheckpointError(f"{what}; give the folder as it was written") from error

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The card that `save_pretrained` and `push_to_hub` write if the folder has none."""
        return ModelCard(Card(Config(model=self.config, diffusion=self.diffusion), self.weights).text)
