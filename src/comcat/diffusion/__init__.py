"""Teaching a frozen diffusion model a concept with low-rank terms on the products of its attention (Xiao et al. 2023,
§3.2).

    pipe = StableDiffusionPipeline.from_pretrained(…)
    comcat.diffusion.load(pipe, "dog.safetensors", scale=0.8)
    comcat.diffusion.load(pipe, "teddy.safetensors")
    comcat.diffusion.set_scale(pipe, dog=0.5, teddy=1.0)
    comcat.diffusion.unload(pipe)

:func:`attach` puts fresh terms into a pipeline, to be trained and saved.
"""

from typing import TYPE_CHECKING

from ..lazy import attributes_of

if TYPE_CHECKING:
    from .adapter.attach import attach as attach
    from .adapter.attach import unload as unload
    from .adapter.files import AdapterFile as AdapterFile
    from .adapter.files import read as read
    from .adapter.files import save as save
    from .adapter.find import Adaptable as Adaptable
    from .adapter.find import find_adaptable as find_adaptable
    from .adapter.fuse import fuse as fuse
    from .adapter.fuse import unfuse as unfuse
    from .adapter.load import load as load
    from .adapter.lora import LoraReport as LoraReport
    from .adapter.lora import export_lora as export_lora
    from .adapter.merge import MergeReport as MergeReport
    from .adapter.merge import merge as merge
    from .adapter.paper import import_paper as import_paper
    from .adapter.records import Adapter as Adapter
    from .adapter.records import adapters as adapters
    from .adapter.scale import set_scale as set_scale
    from .draw.generate import generate as generate
    from .draw.generate import generate_to as generate_to
    from .draw.settings import GenerateSettings as GenerateSettings
    from .learn.apart import tell_apart as tell_apart
    from .learn.customize import customize as customize
    from .learn.settings import CustomizeSettings as CustomizeSettings
    from .pipeline.opening import load_pipeline as load_pipeline

_WHERE = {
    "Adaptable": "adapter.find", "Adapter": "adapter.records", "AdapterFile": "adapter.files",
    "CustomizeSettings": "learn.settings", "GenerateSettings": "draw.settings", "LoraReport": "adapter.lora",
    "MergeReport": "adapter.merge", "export_lora": "adapter.lora",
    "adapters": "adapter.records", "attach": "adapter.attach", "customize": "learn.customize",
    "find_adaptable": "adapter.find", "fuse": "adapter.fuse", "generate": "draw.generate",
    "generate_to": "draw.generate", "import_paper": "adapter.paper", "load": "adapter.load",
    "load_pipeline": "pipeline.opening", "merge": "adapter.merge", "read": "adapter.files", "save": "adapter.files",
    "set_scale": "adapter.scale", "tell_apart": "learn.apart", "unfuse": "adapter.fuse", "unload": "adapter.attach",
}  # fmt: skip

__all__ = sorted(_WHERE)

__getattr__ = attributes_of(__name__, _WHERE)


def __dir__() -> list[str]:
    return __all__
