"""``comcat eval``: accuracy of a model, and agreement with another."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ...settings import expect
from ..common import Common, Positional, load
from ..terminal import LABELS, number, table


@dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Accuracy of a model on pictures, and agreement with another."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures, with labels for accuracy."""
    against: str | None = None
    """A model to compare predictions with."""
    batch_size: int = 32
    """Pictures a batch."""
    limit: int | None = None
    """Use so many pictures only, drawn at random."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        expect(self, "batch_size", "limit", least=1)


def run(command: Eval) -> int:
    from ...data import batches
    from ...measure import evaluate
    from ...models import preprocess_of
    from ...workflows.places import pictures_for, said_of_skipped

    model = load(command, command.model)
    against = None if command.against is None else load(command, command.against)
    notes: list[str] = []
    pictures = pictures_for(model, command.data, notes)
    if not pictures.has_labels and not notes:
        notes.append(f"No accuracy: {pictures.unlabelled}.")
    if command.limit is not None:
        pictures = pictures.take(command.limit, command.seed)
    shown = batches(pictures, preprocess_of(model), batch_size=command.batch_size)
    result = {
        k: v
        for k, v in evaluate(model, shown, against=against, progress=not command.json).to_dict().items()
        if v is not None
    }
    if command.json:
        said = {"notes": notes} if notes else {}
        print(json.dumps({"model": command.model, "data": command.data, **result, **said}, indent=1))
        return 0
    table(["measure", "value"], [[LABELS.get(k, k), number(k, v)] for k, v in result.items()])
    for note in [*notes, *said_of_skipped(pictures)]:
        print(note)
    return 0
