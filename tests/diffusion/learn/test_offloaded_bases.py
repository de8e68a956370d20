"""A pipeline whose parts something else moves, casts or leaves out under training: offloaded ones learn what they learn
in place, what cannot be right is refused before the work. Quantised ones stand in ``test_quantised_bases.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import comcat.diffusion as cd
from comcat.diffusion.learn.beforehand import check_offloaded, holdings_of, notes_before
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.components import denoiser_of
from comcat.diffusion.pipeline.families import family_of
from comcat.diffusion.pipeline.residence import Idle, computing_dtype
from comcat.errors import ModelError, SettingsError
from comcat.measure.memory import LiveBytes

from .. import tiny
from ..newer import NEWER

CPU = torch.device("cpu")
PROMPT = "a photo of V* dog"


def models_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def in_place(pipe: Any) -> None: ...


def sequential(pipe: Any, folder: Path | None = None) -> None:
    """What ``enable_sequential_cpu_offload`` does on a card: weights come for one layer at a time, and are on the meta
    device in between.
    """
    from accelerate import cpu_offload

    for part in models_of(pipe).values():
        cpu_offload(part, execution_device=CPU)


def whole(pipe: Any, folder: Path | None = None) -> None:
    """What ``enable_model_cpu_offload`` does on a card: a part comes when it is called."""
    from accelerate import cpu_offload_with_hook

    hook = None
    for part in models_of(pipe).values():
        _, hook = cpu_offload_with_hook(part, execution_device=CPU, prev_module_hook=hook)


def blocks(pipe: Any, folder: Path | None = None) -> None:
    denoiser: Any = denoiser_of(pipe).model
    denoiser.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def leaves_in_files(pipe: Any, folder: Path) -> None:
    in_files(pipe, folder, offload_type="leaf_level")


def blocks_in_files(pipe: Any, folder: Path) -> None:
    in_files(pipe, folder, offload_type="block_level", num_blocks_per_group=1)


def in_files(pipe: Any, folder: Path, **how: Any) -> None:
    """Group offloading to files: what a parameter holds between two calls is not its value."""
    from diffusers.hooks import apply_group_offloading

    for name, part in models_of(pipe).items():
        if hasattr(part, "bn"):
            continue
        apply_group_offloading(part, CPU, CPU, offload_to_disk_path=str(folder / name), **how)
        for parameter in part.parameters():
            parameter.data.fill_(torch.nan)


OFFLOADING = [sequential, whole, blocks, leaves_in_files, blocks_in_files]
BY_BLOCKS = (blocks, blocks_in_files)


def learned(pipe: Any, **settings: Any) -> dict[str, torch.Tensor]:
    adapter = cd.customize(pipe, tiny.pictures(2), prompt=PROMPT, steps=3, resolution=16, lr=1e-2, **settings)
    return {name: factor.detach().clone() for name, factor in adapter.named_parameters().items()}


def drawn(pipe: Any) -> list[bytes]:
    return [one.image.tobytes() for one in cd.generate(pipe, PROMPT, steps=2, seed=3, size=16)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", [NEWER["flux2"], tiny.stable_diffusion], ids=["flux2", "sd"])
@pytest.mark.parametrize("offload", OFFLOADING)
def test_an_offloaded_pipeline_learns_the_same(
    offload: Callable[[Any, Path], None], family: Callable[[Path], Any], checkpointing: bool, tmp_path: Path
) -> None:
    pipe = family(tmp_path / "parts")
    expected = learned(pipe, gradient_checkpointing=checkpointing)
    before = drawn(pipe)
    pipe = family(tmp_path / "parts")
    offload(pipe, tmp_path / "files")
    if checkpointing and hasattr(pipe, "unet") and offload in BY_BLOCKS:
        with pytest.raises(SettingsError, match=r"offloaded, since a block's weights .*: offload_type='leaf"):
            learned(pipe, gradient_checkpointing=True)
        return
    found = learned(pipe, gradient_checkpointing=checkpointing)
    assert found.keys() == expected.keys()
    for name, factor in found.items():
        torch.testing.assert_close(factor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert drawn(pipe) == before


def ahead(pipe: Any) -> None:
    """As with ``use_stream``, which needs a card."""
    blocks(pipe)
    for module in pipe.transformer.modules():
        if "_diffusers_hook" in vars(module) and (hook := module._diffusers_hook.get_hook("group_offloading")):
            hook.config.stream = object()


def spread(pipe: Any) -> None:
    """As ``device_map`` does where there are several cards."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.transformer.x_embedder, AlignDevicesHook("cpu"))
    add_hook_to_module(pipe.transformer.proj_out, AlignDevicesHook("meta"))


def statistics_in_files(pipe: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    with TemporaryDirectory() as folder:
        apply_group_offloading(pipe.vae, CPU, CPU, offload_type="leaf_level", offload_to_disk_path=folder)


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def cached(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))


def rounded(pipe: Any) -> None:
    pipe.transformer.to(torch.float8_e4m3fn)


CASES: list[tuple[Callable[[Any], None], str]] = [
    (ahead, "the transformer fetches its blocks ahead .*use_stream.* gradients need them in the reverse order: "),
    (spread, "the transformer is spread over cpu, meta, expected one device: .* without device_map"),
    (statistics_in_files, r"the vae keeps its weights in files .*offload it to memory, or not at all"),
    (cast, r"the transformer keeps its weights in another type .*layerwise casting.* quantised to 8 bit"),
    (cached, r"hooks of diffusers act in the transformer \(.*\), .*disable_cache"),
    (rounded, "weights in float8_e4m3fn, in which nothing can be computed: load it in bfloat16"),
]


@pytest.mark.parametrize(("change", "said"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_it_is_refused_before_the_work(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    change(pipe)
    pipe.transformer.forward = None  # any work would fail otherwise
    with pytest.raises(ModelError, match=said):
        cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)
    assert cd.adapters(pipe) == {}


def test_several_blocks_that_come_together_are_not_computed_anew(tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=2)
    pipe.transformer.enable_gradient_checkpointing()
    with pytest.raises(SettingsError, match="since several blocks come together: num_blocks_per_group=1"):
        learned(pipe)
    pipe.transformer.disable_gradient_checkpointing()
    assert learned(pipe)


def test_checkpointing_of_the_users_own_comes_back(tmp_path: Path) -> None:
    """And is set aside for one that suits offloading, which torch's own does not: it would meet what is not there."""
    from torch.utils.checkpoint import checkpoint

    def own(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block, *inputs, use_reentrant=False)

    pipe = NEWER["flux2"](tmp_path / "parts")
    expected = learned(pipe)
    pipe = NEWER["flux2"](tmp_path / "parts")
    leaves_in_files(pipe, tmp_path / "files")
    pipe.transformer.enable_gradient_checkpointing(own)
    for name, factor in learned(pipe).items():
        torch.testing.assert_close(factor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert pipe.transformer._gradient_checkpointing_func is own and pipe.transformer.gradient_checkpointing


@pytest.mark.parametrize("offload", [sequential, leaves_in_files])
def test_no_row_for_a_token_where_the_embedding_comes_and_goes(
    offload: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    offload(pipe, tmp_path / "files")
    with pytest.raises(SettingsError, match="new_token: the text_encoder's weights come a layer at a time"):
        learned(pipe, new_token="dog")


def test_a_token_learns_where_the_text_encoder_comes_as_a_whole(tmp_path: Path) -> None:
    found = []
    for offload in (None, whole):
        pipe = tiny.stable_diffusion(tmp_path / "parts")
        if offload is not None:
            offload(pipe)
        learned(pipe, new_token="dog", text_encoder=True)
        found.append(drawn(pipe))
    assert found[0] == found[1]


class LiveWeights(LiveBytes):
    """Of frozen weights alone, the most bytes at once."""

    def _watch(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            super()._watch(tensor)


def test_checkpointing_holds_one_blocks_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import disk_offload

    peaks: list[int] = []
    step = Optimisation.step

    def measured(*given: Any) -> Any:
        with LiveWeights([]) as memory:
            found = step(*given)
        peaks.append(memory.peak)
        return found

    monkeypatch.setattr(Optimisation, "step", measured)
    pipe = NEWER["flux2"](tmp_path / "parts")
    model = pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, num_single_layers=12)
    size = sum(p.numel() * p.element_size() for p in model.single_transformer_blocks[0].parameters())
    disk_offload(model, tmp_path / "files", execution_device=CPU)
    for checkpointing in (False, True):
        learned(pipe, gradient_checkpointing=checkpointing)
        cd.unload(pipe)
    assert peaks[0] > 12 * size and peaks[3] < 4 * size, (peaks, size)


def test_hooks_of_a_model_in_place_are_in_nobodys_way(tmp_path: Path) -> None:
    """accelerate puts them on what bitsandbytes quantises."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = NEWER["flux2"](tmp_path / "parts")
    expected = learned(pipe)
    pipe = NEWER["flux2"](tmp_path / "parts")
    add_hook_to_module(pipe.transformer, AlignDevicesHook(CPU, io_same_device=True))
    for name, factor in learned(pipe, gradient_checkpointing=True).items():
        torch.testing.assert_close(factor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    check_offloaded(family_of(pipe), CustomizeSettings(), SimpleNamespace(count=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("offload", [sequential, blocks])
def test_processes_do_not_share_what_comes_and_goes(offload: Callable[[Any], None], tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    offload(pipe)
    with pytest.raises(SettingsError, match="2 processes share a batch, and the transformer is offloaded"):
        check_offloaded(family_of(pipe), CustomizeSettings(), SimpleNamespace(count=2))  # type: ignore[arg-type]


def test_what_comes_and_goes_is_said(tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    blocks(pipe)
    family = family_of(pipe)
    size = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    for checkpointing, said in ((False, "gathers all of them"), (True, "one block's at a time")):
        notes = notes_before(family, "joint", CustomizeSettings(gradient_checkpointing=checkpointing))
        assert "Held throughout: 0.00 GB of weights" in notes[-2]
        assert said in notes[-1]
    assert holdings_of(family, "joint", CustomizeSettings()).passing >= size


def test_an_adapter_that_comes_later_is_not_left_out_of_what_is_fetched_ahead(tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    ahead(pipe)
    with pytest.raises(ModelError, match="in which a new adapter is missing: attach or load the adapter first"):
        cd.attach(pipe, rank=1)
    assert cd.adapters(pipe) == {}


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("offload", OFFLOADING)
def test_an_adapter_acts_in_an_offloaded_pipeline(
    offload: Callable[[Any, Path], None], attach_first: bool, tmp_path: Path
) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    cd.attach(pipe, rank=2, init="random")
    expected = drawn(pipe)
    cd.save(pipe, tmp_path / "dog.safetensors")
    pipe = NEWER["flux2"](tmp_path / "parts")
    if attach_first:
        cd.load(pipe, tmp_path / "dog.safetensors")
    offload(pipe, tmp_path / "files")
    if not attach_first:
        cd.load(pipe, tmp_path / "dog.safetensors")
    assert drawn(pipe) == expected == drawn(pipe)
    cd.unload(pipe)
    assert drawn(pipe) != expected


def test_hooks_that_are_out_again_are_in_nobody_s_way(tmp_path: Path) -> None:
    pipe = NEWER["flux2"](tmp_path / "parts")
    cached(pipe)
    pipe.transformer.disable_cache()
    cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)


def test_it_computes_in_the_type_of_weights_that_are_no_whole_numbers() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    model[0].bias = None
    assert computing_dtype(model) == torch.bfloat16
    del model[1]
    with pytest.raises(ModelError, match="no weights of 16 bit or more"):
        computing_dtype(model)


def test_a_part_that_refuses_to_move_stays(tmp_path: Path) -> None:
    """transformers' models in 8 bit of bitsandbytes do."""
    pipe = tiny.stable_diffusion(tmp_path / "parts")

    def refusing(*_: Any) -> None:
        raise ValueError("`.to` is not supported for 8-bit models")

    pipe.text_encoder.to = refusing
    with Idle(family_of(pipe), [pipe.unet]).away():
        pass
    adapter = cd.customize(pipe, tiny.pictures(2), prompt="a photo of V* dog", steps=1, resolution=16)
    assert adapter.modules
