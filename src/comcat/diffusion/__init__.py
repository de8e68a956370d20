"""Teaching a frozen diffusion model a concept with low-rank terms on the products of its attention (Xiao et al. 2023, §3.2).

    pipe = StableDiffusionPipeline.from_pretrained(…)
    comcat.diffusion.load(pipe, "dog.safetensors", scale=0.8)
    comcat.diffusion.load(pipe, "teddy.safetensors")
    comcat.diffusion.set_scale(pipe, dog=0.5, teddy=1.0)
    comcat.diffusion.unload(pipe)

:func:`attach` puts fresh terms into a pipeline, to be trained and saved.
"""

from .adapter import Adapter, adapters
from .attaching import attach, unload
from .files import AdapterFile, read, save
from .fusing import fuse, unfuse
from .generating import generate, generate_to
from .inspecting import Adaptable, find_adaptable
from .loading import load
from .merging import MergeReport, merge
from .opening import load_pipeline
from .paper import import_paper
from .scales import set_scale
from .settings import CustomizeSettings, GenerateSettings
from .training import customize

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
