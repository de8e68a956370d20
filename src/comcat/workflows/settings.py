"""The settings of a whole compression."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace

from ..errors import SettingsError
from ..methods.search.settings import SearchOptions, SearchSettings
from ..methods.settings import CompressSettings, check_forms
from ..settings import expect
from ..tuning.settings import TuneSettings


@dataclass(frozen=True, kw_only=True)
class CompressToSettings(CompressSettings):
    """What to compress and how, and what else to do on the way to a folder."""

    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    batch_size: int = 32
    """Pictures a batch, for calibration, evaluation and timing."""
    bench: bool = True
    """Time the model before and after."""
    stock: bool = False
    """Save a checkpoint that plain transformers loads (attention at one uniform rank only)."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""
    epochs: float | None = None
    """Tune for so many epochs afterwards, the model before compression being the teacher; the pictures then need
    labels, or all is learned from the teacher.
    """
    search: SearchOptions = field(default_factory=SearchOptions)
    """How to search, with ranks 'search'."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """How to tune, with epochs (or tune.steps)."""
    restart: bool = False
    """Forget the checkpoints of an earlier search or tuning and begin anew."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_stock()
        expect(self, "eval_limit", "batch_size", least=1)
        expect(self, "epochs", least=0)

    def _check_stock(self) -> None:
        """What no stock checkpoint can hold, as far as settings say it."""
        if self.stock and "tokens" in check_forms(self.forms):
            raise SettingsError(
                "got stock and forms with tokens: no config of transformers or timm says that a block runs on fewer "
                "tokens; leave tokens out of forms, or save without stock (comcat.load reads it)"
            )

    @property
    def tuning(self) -> TuneSettings | None:
        """How to tune afterwards, if that is asked for."""
        chosen = self.tune if self.epochs is None else replace(self.tune, epochs=self.epochs)
        return None if chosen.epochs is None and chosen.steps is None else chosen

    @property
    def searching(self) -> SearchSettings | None:
        """How to search, if that is asked for. Raises SettingsError where nothing says how much to save."""
        if self.ranks != "search":
            return None
        if self.reduce is None:
            raise SettingsError("ranks 'search' needs reduce, the share to save")
        own = {f.name for f in fields(SearchSettings)} - {f.name for f in fields(SearchOptions)} - {"multiple"}
        asked = {name: getattr(self, name) for name in own}
        return SearchSettings(**asdict(self.search), **asked, multiple=self.multiple or 1)
