"""CLIP on pictures and on prompts, in one space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data import Preprocess
from ..errors import ModelError
from ..files import home_path
from ..models.failures import loading_failure, required
from ..models.inputs import processor_settings
from ..models.transformers import image_processor
from ..runs.seeding import seeded
from .features import AS_PUBLISHED, Extractor, Opening


class Clip:
    """A CLIP model (Radford et al. 2021) of transformers: ``images`` is its extractor of pictures, ``texts`` encodes
    prompts.

    Raises:
        ModelError: if ``spec`` (hf:NAME or a folder written by ``save_pretrained``, tokenizer and image processor
            included) is not found, or is no CLIP model.
    """

    def __init__(self, spec: str, opening: Opening = AS_PUBLISHED) -> None:
        transformers = required("transformers")
        name, self._opening = spec.removeprefix("hf:"), opening
        local = home_path(name).is_dir()
        name = str(home_path(name)) if local else name
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            if config.model_type != "clip":
                raise ModelError(f"{spec} is a {config.model_type!r} model, expected 'clip', with its text encoder")
            with seeded(opening.seed):
                self._model = (
                    transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
                    if opening.pretrained
                    else transformers.CLIPModel(config)
                )
            self._model = self._model.to(opening.device, opening.dtype).eval()
            self._tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
        except ModelError:
            raise
        except Exception as error:  # transformers raises many kinds
            raise loading_failure(spec, error, local=local) from error
        side = config.vision_config.image_size
        settings = processor_settings(image_processor(name), (side, side), 3)
        if settings is None:
            raise ModelError(f"{spec} has no preprocessor_config.json, which says how its pictures are prepared")
        self._length = config.text_config.max_position_embeddings
        self.images = Extractor(spec, Preprocess(**settings), self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) → (batch, features)."""
        seen = self._model.vision_model(pixel_values=images.to(self._opening.device, self._opening.dtype))
        return self._model.visual_projection(seen.pooler_output)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(prompts, features) float64 on the CPU; each different prompt is encoded once, the rest of long ones is cut
        off.
        """
        different = list(dict.fromkeys(prompts))
        tokens: Any = self._tokenizer(
            different, padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._opening.device)
        read = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        encoded = self._model.text_projection(read.pooler_output).double().cpu()
        return encoded[[different.index(prompt) for prompt in prompts]]
