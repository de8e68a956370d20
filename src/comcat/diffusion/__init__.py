"""Teaching a frozen diffusion model a concept with low-rank terms on the products of its attention (Xiao et al. 2023,
§3.2).

    pipe = StableDiffusionPipeline.from_pretrained(…)
    comcat.diffusion.load(pipe, "dog.safetensors", scale=0.8)
    comcat.diffusion.load(pipe, "teddy.safetensors")
    comcat.diffusion.set_scale(pipe, dog=0.5, teddy=1.0)
    comcat.diffusion.unload(pipe)

:func:`attach` puts fresh terms into a pipeline, to be trained and saved.
"""

from .adapter.attach import attach, unload
from .adapter.files import AdapterFile, read, save
from .adapter.find import Adaptable, find_adaptable
from .adapter.fuse import fuse, unfuse
from .adapter.load import load
from .adapter.merge import MergeReport, merge
from .adapter.paper import import_paper
from .adapter.records import Adapter, adapters
from .adapter.scale import set_scale
from .draw.generate import generate, generate_to
from .draw.settings import GenerateSettings
from .learn.customize import customize
from .learn.settings import CustomizeSettings
from .pipeline.opening import load_pipeline

__all__ = [
    "Adaptable",
    "Adapter",
    "AdapterFile",
    "CustomizeSettings",
    "GenerateSettings",
    "MergeReport",
    "adapters",
    "attach",
    "customize",
    "find_adaptable",
    "fuse",
    "generate",
    "generate_to",
    "import_paper",
    "load",
    "load_pipeline",
    "merge",
    "read",
    "save",
    "set_scale",
    "unfuse",
    "unload",
]
