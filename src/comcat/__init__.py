"""Attention-based vision models, smaller, faster and personal.

    small = comcat.compress(model, calibration=loader, reduce=0.5)
    comcat.save(small, "small/")
    small = comcat.load("small/")

Step by step: :func:`find_sites`, :func:`calibrate`, :func:`allocate` or :func:`search`, :func:`apply_` and
``handle.revert()``; then :func:`tune`. Diffusion models are personalised in :mod:`comcat.diffusion`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .lazy import attributes_of

_WHERE = {
    "Origin": "models", "Plan": "plan", "SitePlan": "plan", "Statistics": "statistics", "allocate": "methods.allocate",
    "apply_": "apply", "batches": "data", "calibrate": "statistics", "compress": "methods.compress",
    "compress_to": "workflows.compress", "evaluate": "measure", "explore": "methods.exploring",
    "explore_to": "workflows.explore", "benchmark": "measure", "count_macs": "measure",
    "count_parameters": "measure", "export": "deployment.export", "find_sites": "hosts", "load": "store",
    "load_model": "store", "open_exported": "deployment.runtimes",
    "prune": "methods.gating", "prune_to": "workflows.prune",
    "merge": "methods.merging.merge", "merge_to": "workflows.merge", "open_pictures": "data", "import_paper": "store",
    "preprocess_of": "models", "push_to_hub": "store", "save": "store", "search": "methods.search",
    "tune": "tuning.tune", "search_to": "workflows.search", "tune_to": "workflows.tune", "ComcatError": "errors",
}  # fmt: skip

_PARTS = ("diffusion", "scoring")

__all__ = ["__version__", *sorted([*_WHERE, *_PARTS])]

if TYPE_CHECKING:
    from . import diffusion as diffusion
    from . import scoring as scoring
    from .apply import apply_ as apply_
    from .data import batches as batches
    from .data import open_pictures as open_pictures
    from .deployment.export import export as export
    from .deployment.runtimes import open_exported as open_exported
    from .errors import ComcatError as ComcatError
    from .hosts import find_sites as find_sites
    from .measure import benchmark as benchmark
    from .measure import count_macs as count_macs
    from .measure import count_parameters as count_parameters
    from .measure import evaluate as evaluate
    from .methods.allocate import allocate as allocate
    from .methods.compress import compress as compress
    from .methods.exploring import explore as explore
    from .methods.gating import prune as prune
    from .methods.merging.merge import merge as merge
    from .methods.search import search as search
    from .models import Origin as Origin
    from .models import preprocess_of as preprocess_of
    from .plan import Plan as Plan
    from .plan import SitePlan as SitePlan
    from .statistics import Statistics as Statistics
    from .statistics import calibrate as calibrate
    from .store import import_paper as import_paper
    from .store import load as load
    from .store import load_model as load_model
    from .store import push_to_hub as push_to_hub
    from .store import save as save
    from .tuning.tune import tune as tune
    from .workflows.compress import compress_to as compress_to
    from .workflows.explore import explore_to as explore_to
    from .workflows.merge import merge_to as merge_to
    from .workflows.prune import prune_to as prune_to
    from .workflows.search import search_to as search_to
    from .workflows.tune import tune_to as tune_to


_attribute = attributes_of(__name__, _WHERE)


def __getattr__(name: str) -> Any:
    return import_module(f".{name}", __name__) if name in _PARTS else _attribute(name)


def __dir__() -> list[str]:
    return __all__
