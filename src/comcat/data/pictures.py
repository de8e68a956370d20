"""A set of pictures that can be passed over, sampled and split without holding it in memory."""

from __future__ import annotations

import heapq
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count as count_up
from itertools import islice
from typing import NamedTuple, TypeVar

from PIL import Image

from ..errors import DataError, SettingsError, counted, nearest
from .decoding import content_hash
from .parts import Share, SplitSide, key_hash
from .reading import Unreadable, ahead, attempt, default_workers, shuffle_buffer
from .sources import Entry, Source, guarded, printable

T = TypeVar("T")

_HOPELESS = 100  # a stream whose first so many pictures are all unreadable is read no further


class Sample(NamedTuple):
    """A picture, upright and 8-bit (mode ``"L"`` or ``"RGB"``), its class index if it has one, its name in errors."""

    image: Image.Image
    label: int | None
    key: str


class Pictures:
    """Pictures of one source, or a part of them; :func:`~comcat.data.open_pictures` makes the first.

    Each iteration is a new pass that decodes one picture at a time. Pictures that cannot be read are left out, with one
    warning; ``skipped`` lists those of the latest pass as ``"key: reason"``. A pass raises
    :class:`~comcat.errors.DataError` as soon as it is certain that more than ``max_unreadable`` of its pictures cannot
    be read, and if there are none at all.

    ``name`` says what this is, ``class_names`` lists the classes' names where they are known, ``has_labels`` says
    whether samples have labels, ``labels_from`` where those come from and how they were matched to a model's classes
    (None: there are none), ``no_labels_because`` why there are none where some were expected, ``largest_label`` which
    is the largest, if that is known, and ``notes`` what there is to say of how the source was read. A picture's key is
    its path inside the source, or file and row; moving the source as a whole changes neither keys nor what :meth:`take`
    and :meth:`split` choose.
    """

    def __init__(self, source: Source, *, max_unreadable: float = 0.1) -> None:
        """Raises :class:`~comcat.errors.SettingsError` unless 0 ≤ ``max_unreadable`` ≤ 1."""
        if (
            isinstance(max_unreadable, bool)
            or not isinstance(max_unreadable, int | float)
            or not 0 <= max_unreadable <= 1
        ):
            raise SettingsError(f"max_unreadable: got {max_unreadable!r}, expected a fraction from 0 to 1")
        self.name = source.name
        self.class_names = source.labelling.names
        self.labels_from = source.labelling.origin
        self.no_labels_because = source.labelling.absent_because
        self.largest_label = source.labelling.largest
        self.order_note: str | None = None
        self._notes = tuple(source.notes)
        self.skipped: list[str] = []
        self._source = source
        self._max_unreadable = max_unreadable
        self._parts: tuple[SplitSide | Share, ...] = ()
        self._chosen: frozenset[str] | None = None
        self._places: tuple[int, ...] | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"Pictures({self.name!r}, count={self.count}, has_labels={self.has_labels})"

    @property
    def has_labels(self) -> bool:
        """Whether samples have labels."""
        return self.labels_from is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of how the pictures were read: what was not, why there are no labels, the order of
        classes if it was guessed and still counts."""
        return self._notes + tuple(note for note in (self.no_labels_because, self.order_note) if note)

    @property
    def unlabelled(self) -> str:
        """That the pictures have no labels, and why, as an error says it."""
        return f"{self.name} has no labels" + (f" ({self.no_labels_because})" if self.no_labels_because else "")

    def describe(self) -> dict[str, str | int | None]:
        """What a table of results should say of the pictures that it was measured on, as JSON holds it: ``name``,
        ``pictures`` (how many; None: not known before a pass) and ``labels`` (see ``labels_from``)."""
        return {"name": self.name, "pictures": self.count, "labels": self.labels_from}

    def __bool__(self) -> bool:  # else truth would ask for the length, which streams do not know
        return True

    @property
    def max_unreadable(self) -> float:
        """The share of the pictures that may be unreadable, 0 to 1."""
        return self._max_unreadable

    @cached_property
    def count(self) -> int | None:
        """How many pictures there are, unreadable ones included; None for streams that do not say."""
        if self._chosen is not None:
            return len(self._chosen)
        if not self._parts:
            return self._source.count
        return sum(1 for _ in self._keys()) if self._source.lists_keys else None

    def __len__(self) -> int:
        """``count``. Raises ``TypeError`` where that is unknown."""
        if self.count is None:
            raise TypeError(f"{self.name} is a stream of unknown length; see .count")
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        for image, entry in self.read(_same):
            yield Sample(image, entry.label, entry.key)

    def take(self, n: int, seed: int) -> Pictures:
        """``n`` of the pictures at random, without replacement, every choice equally likely; all if there are fewer.

        The choice depends on the keys and the seed alone: it is the n pictures whose hashed keys are smallest, which is
        reservoir sampling with random keys (Efraimidis and Spirakis 2006), in one pass. That pass reads names only in
        folders, parquet files and saved data sets, the headers of tar files, and all of a hub data set whose size the
        hub does not know. Unreadable pictures among the n are not replaced. Raises
        :class:`~comcat.errors.SettingsError` if n is below 1.
        """
        whole_number("n", n, least=1)
        whole_number("seed", seed)
        chosen = heapq.nsmallest(n, self._keys(), key=lambda key: key_hash(f"take/{seed}/{key}"))
        return self._view(f"{n} taken with seed {seed}", self._parts, frozenset(chosen))

    def split(self, fraction: float, seed: int) -> tuple[Pictures, Pictures]:
        """Two parts without a common picture: the rest, and the held-out part of about ``fraction`` of all pictures.

        A picture is held out if its hashed key falls below ``fraction``: it stays on its side whatever else is added,
        removed or reordered, and the held-out share is exact only on average. Copies of a picture under two keys may
        fall on both sides (see :func:`~comcat.data.overlap`). Raises :class:`~comcat.errors.SettingsError` unless
        0 < ``fraction`` < 1; iterating over a part that got no picture raises :class:`~comcat.errors.DataError`.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise SettingsError(f"fraction: got {fraction!r}, expected a number between 0 and 1")
        whole_number("seed", seed)
        # The depth keeps a part, split once more with the same seed, from coming out whole.
        salt = f"split/{seed}/{len(self._parts)}/"
        views = []
        for held_out, what in ((False, "without"), (True, "only")):
            part = SplitSide(salt, fraction, held_out)
            chosen = None if self._chosen is None else frozenset(key for key in self._chosen if part(key))
            views.append(self._view(f"{what} the {fraction:g} held out with seed {seed}", (*self._parts, part), chosen))
        return views[0], views[1]

    def share(self, process: int, processes: int) -> Pictures:
        """The part of process ``process`` (from 0) of ``processes``: together they hold every picture once.

        A picture's part is chosen by its hashed key, so that streams of unknown length can be shared as well; the parts
        are equal on average, and one of few pictures may be empty (iterating over it raises
        :class:`~comcat.errors.DataError`). The limit on unreadable pictures holds for each part. Raises
        :class:`~comcat.errors.SettingsError` unless 0 ≤ ``process`` < ``processes``.
        """
        whole_number("processes", processes, least=1)
        whole_number("process", process, least=0)
        if process >= processes:
            raise SettingsError(f"process: got {process}, expected one below {processes}, the number of processes")
        if processes == 1:
            return self
        part = Share(process, processes)
        chosen = None if self._chosen is None else frozenset(key for key in self._chosen if part(key))
        return self._view(f"part {process + 1} of {processes}", (*self._parts, part), chosen)

    def in_terms_of(self, names: Sequence[str], how: str = "by name") -> Pictures:
        """The same pictures, labelled by their class's place in ``names``, whatever its place among the pictures' own
        ``class_names``. ``how`` joins ``labels_from``.

        Raises :class:`~comcat.errors.DataError` for a class that ``names`` lacks or has twice, and where the pictures'
        classes have no names.
        """
        if self.class_names is None:
            raise DataError(
                f"{self.name}: its labels are numbers without names, so they cannot be put in terms of others"
            )
        places, counts = {name: place for place, name in enumerate(names)}, Counter(names)
        for name in self.class_names:
            if counts[name] != 1:
                what = "two classes are" if counts[name] else "no class is"
                raise DataError(f"{self.name}: {what} called {name!r}{'' if counts[name] else nearest(name, places)}")
        return self.relabelled([places[name] for name in self.class_names], names, how)

    def relabelled(
        self, places: Sequence[int], names: Sequence[str] | None, how: str, *, by_order: bool = False
    ) -> Pictures:
        """The same pictures, with label ``places[i]`` in place of i, and ``names`` for the classes so numbered.

        ``how`` joins ``labels_from``: "by name", "by number". ``by_order`` says that the order of classes counts still.
        Raises :class:`~comcat.errors.DataError` unless there is a place for each of the pictures' classes.
        """
        if not self.has_labels or len(places) != len(self.class_names or ()):
            raise DataError(
                f"{self.name}: got places for {counted(len(places), 'class')}, expected one for each of its own"
            )
        view = self._view("relabelled", self._parts, self._chosen)
        view.name = self.name
        view._places = tuple(places if self._places is None else [places[place] for place in self._places])
        view.class_names = None if names is None else tuple(names)
        view.labels_from = f"{self.labels_from}, {how}"
        view.largest_label, view.order_note = max(view._places), self.order_note if by_order else None
        return view

    def without_labels(self, because: str | None = None) -> Pictures:
        """The same pictures with no labels, ``because`` of what (see ``no_labels_because``)."""
        view = self._view("without labels", self._parts, self._chosen)
        view.name, view._places, view.class_names = self.name, (), None
        view.labels_from = view.largest_label = view.order_note = None
        view.no_labels_because = because
        return view

    def fingerprint(self, limit: int | None = 4096) -> frozenset[str]:
        """Hashes of the decoded RGB pixels of a random sample of ``limit`` pictures (None: all), to compare sets by."""
        if limit is not None:
            whole_number("limit", limit, least=1)
        pictures = self if limit is None or (self.count is not None and self.count <= limit) else self.take(limit, 0)
        hashes = frozenset(digest for digest, _ in pictures.read(content_hash, workers=default_workers()))
        self.skipped = pictures.skipped
        return hashes

    def read(
        self, work: Callable[[Image.Image], T], *, seed: int | None = None, workers: int = 1
    ) -> Generator[tuple[T, Entry], None, None]:
        """One pass: ``work`` done on each picture, with the entry it came from.

        A picture on which ``work`` raises :class:`~comcat.errors.DataError` counts as unreadable; other errors pass on.

        With ``seed``, in a random order: a full shuffle where pictures can be reached one by one (folders, saved data
        sets, digits); elsewhere row groups or shards in random order, then pictures by a shuffle buffer of 64 MiB of
        encoded pictures, which is a full shuffle of any set or sample below that size; a hub stream has the buffer
        alone. ``workers`` threads decode and work ahead; the order does not depend on them. Raises
        :class:`~comcat.errors.DataError` as the class says.
        """
        skipped = self.skipped = []
        seen = 0
        entries = self._entries(seed)
        for entry, outcome in ahead(entries, lambda entry: attempt(entry, work), workers):
            seen += 1
            if not isinstance(outcome, Unreadable):
                yield outcome, entry
                continue
            key, reason = printable(entry.key), printable(outcome.reason)
            skipped.append(f"{key}: {reason}")
            certain = self.count is not None and len(skipped) > self._max_unreadable * self.count
            if certain or (len(skipped) == seen >= _HOPELESS):
                raise self._too_many(skipped, seen)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{key} of {self.name} cannot be read ({reason}) and is left out, like all such", stacklevel=3
                )
        if not seen:
            raise DataError(f"{self.name}: no pictures")
        if len(skipped) == seen or len(skipped) > self._max_unreadable * seen:
            raise self._too_many(skipped, seen)

    def entries(
        self, seed: int | None = None, wanted: Callable[[int], bool] | None = None
    ) -> Iterator[tuple[int, Entry]]:
        """The pictures, not yet decoded, in the order of :meth:`read`, each with its position in that order.

        Only positions that ``wanted`` asks for are given (None: all). The others are not even read where pictures can
        be reached one by one; elsewhere they are read and passed over.
        """
        if wanted is None or not self._source.shuffles_fully:
            numbered = enumerate(self._entries(seed))
            return numbered if wanted is None else ((i, entry) for i, entry in numbered if wanted(i))
        positions: list[int] = []  # of the entry that the source gives next
        following = count_up()

        def keep(key: str) -> bool:
            """A source whose pictures can be reached one by one asks for each key once, in order."""
            if not self._keep(key) or not wanted(position := next(following)):
                return False
            positions.append(position)
            return True

        return ((positions.pop(), entry) for entry in self._entries(seed, keep))

    def _entries(self, seed: int | None, keep: Callable[[str], bool] | None = None) -> Iterator[Entry]:
        if keep is None and (self._parts or self._chosen is not None):
            keep = self._keep
        entries = self._source.entries(keep, seed)
        if self._chosen is not None:
            entries = islice(entries, len(self._chosen))  # streams need not be read to their end
        entries = guarded(entries, f"{self.name} cannot be read")
        if (places := self._places) is not None:
            # an entry may have no label of its own; without places none keeps one
            entries = (replace(e, label=None if e.label is None or not places else places[e.label]) for e in entries)
        return entries if seed is None or self._source.shuffles_fully else shuffle_buffer(entries, seed)

    def _keep(self, key: str) -> bool:
        return key in self._chosen if self._chosen is not None else all(part(key) for part in self._parts)

    def _keys(self) -> Iterable[str]:
        if self._chosen is not None:
            return self._chosen
        return (key for key in self._source.keys() if self._keep(key))

    def _view(self, what: str, parts: tuple[SplitSide | Share, ...], chosen: frozenset[str] | None) -> Pictures:
        view = Pictures(self._source, max_unreadable=self._max_unreadable)
        view.name = f"{self.name} ({what})"
        view._parts = parts
        view._chosen = chosen
        view._places, view.class_names, view.labels_from = self._places, self.class_names, self.labels_from
        view.no_labels_because, view.largest_label = self.no_labels_because, self.largest_label
        view._notes, view.order_note = self._notes, self.order_note
        return view

    def _too_many(self, skipped: list[str], seen: int) -> DataError:
        first = "; ".join(skipped[:3]) + ("; …" if len(skipped) > 3 else "")
        allowed = (
            f", and at most {self._max_unreadable:.0%} of {self.count or 'all'} may be unreadable (max_unreadable)"
        )
        return DataError(
            f"{len(skipped)} of the first {counted(seen, 'picture')} of {self.name} cannot be read"
            f"{'' if self._max_unreadable == 1 else allowed}: {first}"
        )


def overlap(a: Pictures, b: Pictures) -> int:
    """How many different pictures (size and RGB pixels) are in both sets. Decodes every picture of both once."""
    return len(a.fingerprint(None) & b.fingerprint(None))


def _same(image: Image.Image) -> Image.Image:
    return image


def whole_number(name: str, value: object, *, least: int | None = None) -> None:
    """Raises :class:`~comcat.errors.SettingsError`, naming the setting, unless the value is one."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise SettingsError(
            f"{name}: got {value!r}, expected a whole number{'' if least is None else f' from {least}'}"
        )
