"""Teaching a pipeline a concept from a few pictures (Xiao et al. 2023, §3.2 and §4.3)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...errors import SettingsError, StoreError
from ...files import home_path
from ...grad_mode import outside_inference_mode
from ...runs.checkpoints import Checkpoint, Checkpoints
from ...runs.claims import claimed_by_main
from ...runs.loop import carry_out, find_checkpoint
from ...runs.processes import Processes
from ...runs.seeding import derive_seed
from ...settings import from_keywords
from ..adapter.attach import WhereToAttach, attach, default_where, unload
from ..adapter.files import name_of, save
from ..adapter.records import Adapter, answering, records, remember
from ..draw.generate import check_sampling
from ..draw.prompts import check_other_prompts, prompts_given
from ..pipeline.failures import shortage_explained
from ..pipeline.families import family_of
from ..pipeline.noising import noising_of
from ..pipeline.residence import Idle, check_whole, computing_dtype, frozen, recomputing
from .batches import CachedSource, Stream, check_dropout
from .beforehand import check_offloaded, notes_before, notes_on_idle_settings, notes_on_prompts
from .examples import EXAMPLES, Examples, check_apart, fingerprint, notes_on_sizes, one_each, read_examples
from .latents import Rotation, check_resolution, encode
from .masks import read_masks
from .optimisation import Optimisation
from .prior import make_class_pictures
from .protection import Protection, protection
from .run_folder import Samples, check_out, class_in, folder_of, forget_pictures, write_report
from .settings import CustomizeSettings
from .token import LearnedToken


def customize(
    pipe: Any,
    images: EXAMPLES,
    *,
    prompt: str | Sequence[str],
    identifier: str = "V*",
    name: str = "default",
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Adapter:
    """Teach a pipeline a concept: low-rank terms on its attention's products (Eq. 8) learn to denoise pictures of it
    (Eq. 7).

    Latents and prompts are encoded once; the VAE and the text encoders then leave the device, unless they learn as
    well, so a step costs the denoiser alone. A denoiser that is offloaded comes and goes as it does to draw; with
    ``gradient_checkpointing`` a step then holds one block's weights at a time. Processes started with ``accelerate
    launch`` or ``torchrun`` share each batch.

    Args:
        pipe: a text-to-image pipeline of diffusers, whole, in the dtype to compute in. The adapter's own parameters are
            float32.
        images: some pictures, or what :func:`comcat.open_pictures` takes; 4 to 12 are usual.
        prompt: what the pictures show, with ``identifier`` in it, ``"a photo of V* dog"``; or one for each picture,
            ``"a photo of V* dog in the snow"``, of which the first is the one to sample with.
        name: what the adapter is called in ``pipe``.
        out: file to save to, ``dog.safetensors``. Checkpoints, samples and ``report.html`` go to a folder beside it,
            ``dog.run``. The same call goes on from the last checkpoint there; ``restart`` begins anew.
        settings: fields of :class:`CustomizeSettings`.

    Returns:
        The trained adapter, in place in ``pipe``. Everything else about the pipeline is as it was. After an error, the
        adapter is out again, too, unless all was learned and only writing it failed.

    Raises:
        SettingsError: for a prompt without the identifier, or in which it comes after what the text encoders read, and
            for a setting that does not fit. DataError: without pictures. ModelError: if the pipeline is of no supported
            family. StoreError: if ``out`` holds something made with other settings, cannot be written, or another run
            writes to it. NumericsError: if the loss is no number. MemoryShortage: if the device's memory is too small;
            says what would fit.
    """
    chosen = from_keywords(CustomizeSettings, settings)
    work = Customization(pipe, images, prompt, identifier, name, chosen, out, progress)
    for note in work.notes:
        warnings.warn(note, stacklevel=2)
    return work.run(restart)


class Customization:
    """One run of :func:`customize`, in parts. ``notes`` is what may surprise, ``facts`` what else there is to say."""

    def __init__(
        self,
        pipe: Any,
        images: EXAMPLES,
        prompt: str | Sequence[str],
        identifier: str,
        name: str,
        settings: CustomizeSettings,
        out: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        given = prompts_given(prompt, identifier)
        self.family = family_of(pipe)
        check_whole(pipe)
        self.dtype = str(computing_dtype(self.family.denoiser)).removeprefix("torch.")
        self.pipe, self.identifier, self.name = pipe, identifier, name
        self.settings, self.progress = settings, progress
        check_other_prompts(identifier, {"protect": settings.protect, "prior_prompt": [settings.prior_prompt or ""]})
        if (other := answering(pipe, identifier)) not in (None, name):
            raise SettingsError(
                f"adapter {other!r} answers to {identifier!r} already: prompts could not tell them apart; choose "
                "another identifier"
            )
        check_sampling(pipe, settings.sample_steps)
        self.noising = noising_of(pipe.scheduler, settings.snr_gamma)
        self.side = check_resolution(settings.resolution, self.family)
        self.where: WhereToAttach = settings.where or default_where(pipe)
        self.processes = Processes(cpu=self.family.device.type == "cpu")
        if settings.batch_size % self.processes.count:
            raise SettingsError(
                f"batch_size: got {settings.batch_size} for {self.processes.count} processes, expected a multiple"
            )
        check_dropout(self.family, self.where, settings.caption_dropout)
        check_offloaded(self.family, settings, self.processes)
        self.examples = read_examples(images)
        check_apart(images, {"out": out, "masks": settings.masks, "prior_images": settings.prior_images})
        self.prompts = one_each(given, len(self.examples.images))
        self.prompt = self.prompts[0]
        self.notes = [*self.examples.notes, *notes_on_sizes(self.examples.images, self.side)]
        self.notes += notes_on_prompts(self.family, given, identifier, settings)
        self.notes += notes_on_idle_settings(settings, out=out is not None)
        self.facts = notes_before(self.family, self.where, settings)
        self.class_examples = None
        if settings.prior_images is not None:
            self.class_examples = read_examples(settings.prior_images, what="pictures of the class")
            self.notes += self.class_examples.notes
        self.masks = read_masks(settings.masks, self.examples, self.side, **self._framing("concept"))
        self.out = None if out is None else check_out(home_path(out))
        self.optimisation: Optimisation | None = None

    @outside_inference_mode
    def run(self, restart: bool) -> Adapter:
        """Train, save, report."""
        with frozen(self.family), self._learner():
            pass  # what does not fit is told before anything is made or deleted
        about = self._about()
        checkpoints = None
        if self.out is not None:
            checkpoints = Checkpoints(folder_of(self.out) / "checkpoints", keep=self.settings.keep)
        with claimed_by_main(self.out, self.processes):
            since = self._found(checkpoints, about, restart)
            class_pictures = self._class_pictures()
            with frozen(self.family), self._learner() as learner:
                self._train(learner, class_pictures, checkpoints, since, about)
        return replace(learner.adapter, record=records(self.pipe)[self.name])

    @contextmanager
    def _learner(self) -> Iterator[_Learner]:
        """What learns, in its place in the pipeline; taken out again unless it ``stays``."""
        settings, family = self.settings, self.family
        with shortage_explained("attaching the adapter", [f"a rank below {settings.rank}"]):
            adapter = attach(
                self.pipe, rank=settings.rank, where=self.where, only=settings.only, text_encoder=settings.text_encoder,
                name=self.name, init=settings.init, seed=derive_seed(settings.seed, "factors"),
            )  # fmt: skip
        learner = _Learner(adapter)
        try:
            if settings.new_token is not None:
                learner.token = LearnedToken(self.pipe, family, self.name, self.identifier, settings.new_token)
            learner.protection = protection(family, adapter, self.prompts, self.identifier, settings, learner.token)
            yield learner
        finally:
            if not learner.stays:
                unload(self.pipe, self.name)

    def _train(
        self,
        learner: _Learner,
        class_pictures: Examples | None,
        checkpoints: Checkpoints | None,
        since: Checkpoint | None,
        about: dict[str, Any],
    ) -> None:
        settings, family = self.settings, self.family
        adapter, token, protection = learner.adapter, learner.token, learner.protection
        live = settings.text_encoder or token is not None
        source = self._source(class_pictures, live)
        idle = Idle(family, [family.denoiser, *(encoder for _, encoder in family.text_encoders().values() if live)])
        samples = None
        if self.out is not None:
            samples = Samples(self.pipe, folder_of(self.out), settings.sample_prompt or self.prompt, settings)

        def afterwards(done: int) -> None:
            if samples is not None and settings.sample_every and done % settings.sample_every == 0:
                with self.processes.together(), idle.back():
                    if self.processes.main:
                        samples.draw(done)
                        self._try_to_report(samples)

        parameters = adapter.named_parameters() | ({} if token is None else token.parameters)
        run = self.optimisation = Optimisation(
            family, self.noising, parameters, source, settings, self.processes,
            constrain=protection.apply if protection is not None else lambda: None,
            identity=about, afterwards=afterwards,
        )  # fmt: skip
        with ExitStack() as stack:
            stack.enter_context(recomputing(family.denoiser, settings.gradient_checkpointing))
            stack.enter_context(idle.away())
            if token is not None:
                stack.enter_context(token.learning())
            every = settings.checkpoint_every
            if since is None:
                afterwards(0)  # what the prompt gives before anything is learned
            try:
                carry_out(
                    run, self.processes, checkpoints=checkpoints if every else None, every=(every,), since=since,
                    progress=self.progress,
                )  # fmt: skip
            except StoreError as error:
                if run.progress.step < settings.steps:
                    raise
                self._say(f"The end of the run could not be kept, so that it cannot be made longer: {error}")
        learner.stays = True  # whatever happens now, nothing that was learned is lost
        if token is not None:
            token.settle()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        record = records(self.pipe)[self.name]
        made_with = {"settings": json.dumps(asdict(self.settings)), "pictures": str(len(self.examples.images))}
        known: dict[str, Any] = {"identifier": self.identifier, "prompt": self.prompt, "base": name_of(self.pipe)}
        remember(self.pipe, self.name, replace(record, **known, metadata=made_with))
        with self.processes.together():
            if self.out is not None and self.processes.main:
                self._save(token)
                self._try_to_report(samples)

    def _source(self, class_pictures: Examples | None, live: bool) -> CachedSource:
        settings = self.settings
        streams = []
        kinds = [(self.examples, self.masks, self.prompts, 1.0, settings.caption_dropout, "concept")]
        if class_pictures is not None and settings.prior_prompt is not None:
            kinds.append((class_pictures, None, [settings.prior_prompt], settings.prior_weight, 0.0, "class"))
        for pictures, masks, prompts, weight, dropout, what in kinds:
            with shortage_explained(
                "encoding the pictures", [f"a resolution below {self.side}", "a base in 16 bit (dtype bfloat16)"]
            ):
                latents = encode(self.family, pictures.images, self.side, masks=masks, **self._framing(what))
            rotation = Rotation(latents.frames_of, settings.seed, what)
            streams.append(Stream(latents, rotation, prompts, settings.batch_size, weight, dropout))
        return CachedSource(self.family, streams, live=live)

    def _framing(self, what: str) -> dict[str, Any]:
        settings = self.settings
        return {"crops": settings.crops, "flip": settings.flip, "seed": derive_seed(settings.seed, what)}

    def _class_pictures(self) -> Examples | None:
        """Pictures of the class for prior preservation: given, or made by the pipeline as it is now."""
        if self.settings.prior_prompt is None or self.class_examples is not None:
            return self.class_examples
        made = make_class_pictures(
            self.pipe, self.settings, self.side, None if self.out is None else class_in(folder_of(self.out)),
            about={"model": name_of(self.pipe), "dtype": self.dtype}, processes=self.processes, progress=self.progress,
        )  # fmt: skip
        for note in made.notes:
            self._say(note)
        return made

    def _found(self, checkpoints: Checkpoints | None, about: dict[str, Any], restart: bool) -> Checkpoint | None:
        """The checkpoint to go on from. To begin anew, what an earlier run made is deleted with its checkpoints."""
        found = find_checkpoint(checkpoints, about, self.processes, restart=restart)
        with self.processes.together():
            if self.out is not None and self.processes.main:
                if restart:
                    forget_pictures(folder_of(self.out))
                elif found is None and self.out.exists():
                    raise StoreError(
                        f"{self.out} is there already, and no run to go on with; name another file, or --restart"
                    )
        return found

    def _about(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to go on from it."""
        settings, made = self.settings, {}
        if self.class_examples is not None:
            made = {"class_pictures": self.class_examples.fingerprint}
        elif settings.prior_prompt is not None:
            made = {"sample_steps": settings.sample_steps, "sample_guidance": settings.sample_guidance}
        return {
            **made,
            **self.settings.shaping,
            "where": self.where,
            "resolution": self.side,
            "prompt": self.prompt if len({*self.prompts}) == 1 else self.prompts,
            "identifier": self.identifier,
            "pictures": self.examples.fingerprint,
            **({} if self.masks is None else {"masks": fingerprint(self.masks)}),
            "base": name_of(self.pipe),
            "dtype": self.dtype,
        }

    def _save(self, token: LearnedToken | None) -> None:
        assert self.out is not None
        try:
            save(self.pipe, self.out, name=self.name, token_embeddings=None if token is None else token.rows())
        except StoreError as error:
            raise StoreError(
                f"{error}. The adapter is learned, and acts in the pipeline as {self.name!r}: make room and save() it, "
                "or run the same again"
            ) from error

    def _say(self, note: str) -> None:
        self.notes.append(note)
        warnings.warn(note, stacklevel=5)

    def _try_to_report(self, samples: Samples | None) -> None:
        try:
            self._report(samples)
        except StoreError as error:
            self._say(f"The report could not be written, which the adapter does not need: {error}")

    def _report(self, samples: Samples | None) -> None:
        assert self.out is not None and samples is not None and self.optimisation is not None
        base = name_of(self.pipe) or type(self.pipe).__name__
        about = {"prompt": "; ".join(dict.fromkeys(self.prompts)), "base": base}
        write_report(
            self.out, replace(self.settings, resolution=self.side), self.optimisation.progress, samples=samples,
            examples=self.examples.images, identifier=self.identifier, about=about, notes=[*self.notes, *self.facts],
        )  # fmt: skip


@dataclass
class _Learner:
    """What learns: the adapter, the identifier's token if it has one of its own, and what the adapter is kept from."""

    adapter: Adapter
    token: LearnedToken | None = None
    protection: Protection | None = None
    stays: bool = False
