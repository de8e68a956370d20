"""Adapters on disk: what comes back, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import comcat.diffusion as diffusion
from comcat.errors import SettingsError, StoreError
from comcat.files import write_tensors

from ..denoisers import CASES, Case, unet

UNET = CASES["sd1"]
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    """A file for the tiny UNet of Stable Diffusion 1.x."""
    model = UNET.model()
    diffusion.attach(model, init="random", rank=2)
    about = {"identifier": "V*", "prompt": "a photo of V* dog", "base": "tiny/sd1", "metadata": {"steps": "500"}}
    return diffusion.save(model, tmp_path / "dog.safetensors", dtype=torch.float32, **about)  # type: ignore[arg-type]


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Path:
    """Change what a file says, with the hash that goes with it."""
    tensors, metadata = content(path)
    metadata.pop("sha256", None)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    return path


def as_format_1(path: Path) -> Path:
    """As comcat wrote files before they had a hash and told the heads."""
    tensors, metadata = content(path)
    kept = {k: v for k, v in metadata.items() if k not in ("sha256", "heads")} | {"comcat_adapter": "1"}
    save_file(tensors, path, metadata=kept)
    return path


@torch.no_grad()
def test_round_trip(case: Case, tmp_path: Path) -> None:
    model = case.model()
    adapter = diffusion.attach(model, where="all", init="random", rank=3, alpha=2.0)
    expected, factors = case.run(model), {k: v.clone() for k, v in adapter.named_parameters().items()}
    path = diffusion.save(model, tmp_path / "new folder" / "dog.safetensors", dtype=torch.float32)
    assert os.listdir(path.parent) == ["dog.safetensors"]
    diffusion.unload(model)
    loaded = diffusion.load(model, path)
    assert loaded.name == "dog" and loaded.rank == 3 and not any(f.requires_grad for f in loaded.parameters())
    assert all(factor.equal(factors[key]) for key, factor in loaded.named_parameters().items())
    assert list(loaded.named_parameters()) == list(factors)
    assert case.run(model).equal(expected)


def test_what_a_file_says_of_itself(dog: Path) -> None:
    file = diffusion.read(dog)
    assert (file.identifier, file.prompt, file.base, file.rank) == ("V*", "a photo of V* dog", "tiny/sd1", 2)
    assert file.own_metadata == {"steps": "500"} and file.metadata["comcat_adapter"] == "2"
    assert set(file.factors[CROSS]) == {"q_up", "k_down", "v_down", "out_up"} and file.alphas[CROSS] == 2.0
    model = UNET.model()
    assert file.parameters == diffusion.find_adaptable(model).parameters(2)
    diffusion.load(model, dog)
    again = diffusion.save(
        model, dog.with_name("again.safetensors"), name="dog", dtype=torch.float32, metadata={"by": "me"}
    )
    metadata = dict(diffusion.read(again).metadata)
    assert metadata.pop("sha256") != file.metadata["sha256"]
    assert metadata == {k: v for k, v in file.metadata.items() if k != "sha256"} | {"by": "me"}
    assert diffusion.read(diffusion.save(model, again, name="dog")).factors[CROSS]["q_up"].dtype is torch.float16


@torch.no_grad()
def test_factors_take_the_dtype_of_the_weights_beside_them(dog: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        adapter = diffusion.load(UNET.model(dtype), dog)
        assert {f.dtype for f in adapter.parameters()} == {dtype}


@torch.no_grad()
def test_names_and_scales(dog: Path) -> None:
    model = UNET.model()
    assert diffusion.load(model, str(dog), name="rex", scale=0.25).scale == 0.25
    half = UNET.run(model)
    diffusion.set_scale(model, rex=1.0)
    assert not UNET.run(model).equal(half)
    other = rewrite(dog, lambda t, m: m.pop("identifier"))
    diffusion.load(model, other)
    assert list(diffusion.adapters(model)) == ["rex", "dog"]
    with pytest.raises(SettingsError, match="an adapter called 'dog' already"):
        diffusion.load(model, other)
    with pytest.raises(SettingsError, match="got nan"):
        diffusion.load(model, other, name="third", scale=float("nan"))


@torch.no_grad()
def test_ranks_may_differ_by_module(dog: Path) -> None:
    def wider(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        for name in ("q_up", "k_down", "v_down"):
            tensors[f"{CROSS}.{name}"] = tensors[f"{CROSS}.{name}"].repeat_interleave(2, dim=0)
        tensors[f"{CROSS}.out_up"] = tensors[f"{CROSS}.out_up"].repeat_interleave(2, dim=1)

    plain, model = UNET.model(), UNET.model()
    diffusion.load(plain, dog)
    adapter = diffusion.load(model, rewrite(dog, wider))
    assert adapter.rank == 4 and {t.rank for t in adapter.terms.values()} == {2, 4}
    # every channel came twice, and alpha / rank halved: the same terms
    assert torch.allclose(UNET.run(model), UNET.run(plain), atol=1e-5)


def test_an_identifier_calls_one_concept(dog: Path) -> None:
    model = UNET.model()
    diffusion.load(model, dog)
    cat = dog.with_name("cat.safetensors")
    cat.write_bytes(dog.read_bytes())
    with pytest.raises(
        SettingsError, match=r"'dog' answers to 'V\*' already, and so would .*train one of them with another"
    ):
        diffusion.load(model, cat)
    rewrite(cat, lambda t, m: m.update(identifier="v*"))  # the tokenizer does not tell them apart either
    with pytest.raises(SettingsError, match="answers to"):
        diffusion.load(model, cat)
    with pytest.raises(SettingsError, match=r"cannot be called 'W\*': no token was learned with it"):
        diffusion.load(model, cat, rename_identifier="W*")
    rewrite(cat, lambda t, m: m.update(identifier="sks"))
    diffusion.load(model, cat)


def test_an_adapter_of_a_shallower_model_is_told(tmp_path: Path) -> None:
    shallow, deep = unet(layers_per_block=1), unet(layers_per_block=2)
    for only, warned in (([], True), (["qk"], False)):
        diffusion.attach(shallow, init="random")
        about = {"settings": json.dumps({"only": only})}
        path = diffusion.save(shallow, tmp_path / "dog.safetensors", metadata=about)
        diffusion.unload(shallow)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            diffusion.load(shallow, path)
            diffusion.unload(shallow)
            assert not said
            acting = len(diffusion.load(deep, path).terms)
            diffusion.unload(deep)
        told = [str(one.message) for one in said if "with less attention" in str(one.message)]
        assert len(told) == warned
        assert not told or f"it acts in {acting} of {len(diffusion.find_adaptable(deep).only('cross'))}" in told[0]


def test_a_model_of_another_shape(dog: Path) -> None:
    for other, expected in (
        (unet(cross_attention_dim=20), r"\(4 of its 4 modules\): .*attn2.k_down is \(4, 12\), expected \(4, 20\)"),
        (unet(block_out_channels=(16, 32)), r"out_up is \(8, 4\), expected \(16, 4\)"),
        (unet(attention_head_dim=(8, 16)), "attn2 is for 2 heads, and there are 8"),
        (CASES["sdxl"].model(), r"unet\.down_blocks\.0\..*attn2: there is no such attention"),
        (CASES["sd3"].model(), r"SD3Transformer2DModel \(4 of its 4 modules\): .*: the model has no unet"),
    ):
        before = dict(other.attn_processors)
        with pytest.raises(
            StoreError, match=f"which was trained on tiny/sd1, does not fit this model with a .*{expected}"
        ):
            diffusion.load(other, dog)
        assert other.attn_processors == before and diffusion.adapters(other) == {}


def test_a_refused_attention_says_why(dog: Path) -> None:
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    model = UNET.model()
    other = CustomDiffusionAttnProcessor2_0(hidden_size=8, cross_attention_dim=12)
    model.set_attn_processor(dict.fromkeys(model.attn_processors, other))
    with pytest.raises(StoreError, match="attn2: Custom Diffusion's own weights compute this attention"):
        diffusion.load(model, dog)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "a factor is gone": (lambda t, m: t.pop(f"{CROSS}.k_down"), "attn2: q_up has no k_down"),
    "an alpha is gone": (lambda t, m: t.pop(f"{CROSS}.alpha"), "attn2.alpha is missing"),
    "an alpha is alone": (lambda t, m: t.update({"unet.x.alpha": torch.ones(())}),
        "unet.x has an alpha, but no factors"),
    "something foreign": (lambda t, m: t.update({f"{CROSS}.bias": torch.ones(2)}), r"attn2.bias \(2,\) is unexpected"),
    "not a number": (lambda t, m: t[f"{CROSS}.q_up"].fill_(float("nan")), "attn2.q_up holds NaN or infinity"),
    "two ranks": (
        lambda t, m: t.update({f"{CROSS}.q_up": t[f"{CROSS}.q_up"][:2]}),
        "attn2: its factors have 2 and 4 channels, expected one number"
    ),
    "no rank": (lambda t, m: m.pop("rank"), "its rank is None, expected a number"),
    "a rank of many digits": (lambda t, m: m.update(rank="9" * 5000), "its rank is '999.*expected a number"),
    "another format": (lambda t, m: m.update(comcat_adapter="7"), "is of format 7, expected 2"),
    "no heads": (lambda t, m: m.pop("heads"), "does not say how many heads each attention has"),
    "heads of something else": (lambda t, m: m.update(heads='{"unet.x":2}'), "does not say how many heads"),
    "an alpha of 1e30": (lambda t, m: t.update({f"{CROSS}.alpha": torch.tensor(1e30)}),
        r"attn2.alpha: got 1.*e\+30, expected"),
    "an alpha of 0": (lambda t, m: t.update({f"{CROSS}.alpha": torch.zeros(())}),
        "attn2.alpha: got 0.0, expected a number above 0"),
    "a negative alpha": (lambda t, m: t.update({f"{CROSS}.alpha": torch.tensor(-2.0)}),
        "attn2.alpha: got -2.0, expected"),
    "integer factors": (
        lambda t, m: t.update({f"{CROSS}.q_up": t[f"{CROSS}.q_up"].long()}),
        "q_up is torch.int64, expected a floating type"
    ),
    "complex factors": (
        lambda t, m: t.update({f"{CROSS}.q_up": t[f"{CROSS}.q_up"].to(torch.complex64)}),
        "q_up is torch.complex64, expected"
    ),
    "a complex alpha": (
        lambda t, m: t.update({f"{CROSS}.alpha": torch.tensor(2 + 1j)}), "alpha is torch.complex64, expected a floating"
    ),
    "no factors": (lambda t, m: t.clear() or t.update({}), "it holds no factors"),
    "a stream that is not there": (
        lambda t, m: t.update({f"{CROSS}.add_k_down": t[f"{CROSS}.k_down"].clone()}), "add_k_down has no place there"
    ),
    "a word of two rows": (
        lambda t, m: t.update({"text_encoder.token_embeddings.V*": torch.ones(2, 3)}),
        r"V\* is \(2, 3\), expected one row"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_and_changes_nothing(dog: Path, kind: str) -> None:
    change, message = DAMAGE[kind]
    model = UNET.model()
    before = dict(model.attn_processors)
    with pytest.raises(StoreError, match=message):
        diffusion.load(model, rewrite(dog, change))
    assert model.attn_processors == before and diffusion.adapters(model) == {}


def test_files_that_are_something_else(dog: Path, tmp_path: Path) -> None:
    model = UNET.model()
    with pytest.raises(StoreError, match="there is no adapter"):
        diffusion.load(model, tmp_path / "none.safetensors")
    with pytest.raises(StoreError, match="there is no adapter"):
        diffusion.read(tmp_path)
    dog.write_bytes(dog.read_bytes()[:2000])
    with pytest.raises(StoreError, match="it is damaged or no safetensors file"):
        diffusion.read(dog)
    dog.write_text("hello")
    with pytest.raises(StoreError, match="is damaged or no safetensors file"):
        diffusion.read(dog)
    for key, kind in (
        ("unet.mid_block.attn2.to_q.lora_A.weight", "is a LoRA, not an adapter"),
        ("lora_unet_mid_block.lora_down.weight", "is a LoRA"),
        ("unet.mid_block.attn2.to_q.lokr_w1", "is a LoKr or LoHa"),
        ("mid_block.attn2.processor.to_k_custom_diffusion.weight", "is Custom Diffusion's"),
        ("model.weight", "is no adapter of comcat's: it holds 1 tensor, model.weight"),
    ):
        save_file({key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
        with pytest.raises(StoreError, match=kind):
            diffusion.read(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "dogg"}, "no adapter called 'dogg'; did you mean 'dog'"),
        ({"dtype": torch.int8}, "got dtype torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "got dtype torch.float8_e4m3fn, expected one of torch.float16"),
        ({"dtype": "float16"}, "got dtype 'float16', expected one of torch.float16"),
        ({"identifier": ""}, "got identifier ''"),
        ({"metadata": {"rank": "3"}}, "metadata: 'rank' is comcat's own"),
        ({"metadata": {"steps": 3}}, "metadata: 'steps' is a int, expected text"),
        (
            {"token_embeddings": {"V*": torch.ones(3, dtype=torch.int64)}},
            r"'V\*' is a torch.int64, expected",
        ),
        ({"token_embeddings": {"V*": [1.0, 2.0]}}, r"'V\*' is a list, expected a tensor of a floating type"),
        ({"token_embeddings": {"V*": torch.ones(2, 3)}}, r"token_embeddings: 'V\*' is \(2, 3\), expected one row"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = UNET.model()
    diffusion.attach(model, name="dog")
    with pytest.raises(SettingsError, match=message):
        diffusion.save(model, tmp_path / "x.safetensors", **{"name": "dog", **settings})
    assert not os.listdir(tmp_path)
    diffusion.read(diffusion.save(model, tmp_path / "x.safetensors", name="dog"))  # nothing of it is remembered


def test_a_failed_save_leaves_what_was_there(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dog.read_bytes()
    model = UNET.model()
    adapter = diffusion.attach(model, init="random")
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = 1e6
    with pytest.raises(StoreError, match=r"q_up holds what torch.float16 cannot; choose dtype=torch.float32"):
        diffusion.save(model, dog)
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = float("nan")
    with pytest.raises(StoreError, match="q_up holds NaN or infinity"):
        diffusion.save(model, dog, dtype=torch.float32)
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = 0.0

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="no space left on device; what was there is unchanged"):
        diffusion.save(model, dog)
    assert dog.read_bytes() == before and os.listdir(dog.parent) == [dog.name]


def test_the_header_is_plain_json(dog: Path) -> None:
    data = dog.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert f"{CROSS}.q_up" in header and header["__metadata__"]["identifier"] == "V*"


def test_copies_know_what_they_carry(dog: Path) -> None:
    model = UNET.model()
    diffusion.load(model, dog)
    copied = copy.deepcopy(model)
    diffusion.unload(model)
    assert diffusion.adapters(copied)["dog"].record.prompt == "a photo of V* dog"


def test_20_of_20_flipped_data_bits_are_noticed(dog: Path) -> None:
    whole = dog.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for number in range(20):
        place = start + number * (len(whole) - start) // 20
        flipped = bytearray(whole)
        flipped[place] ^= 1 << number % 8
        dog.write_bytes(flipped)
        with pytest.raises(StoreError, match="is damaged: its content is not what was written"):
            diffusion.read(dog)


def test_bits_that_flip_in_the_header_are_noticed(dog: Path) -> None:
    """Names, shapes, metadata, and the hash itself."""
    whole = dog.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    for place in chance.sample(range(header), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << chance.randrange(8)
        dog.write_bytes(flipped)
        with pytest.raises(StoreError):
            diffusion.read(dog)


def test_a_file_of_the_first_format_still_loads(dog: Path) -> None:
    model = UNET.model()
    diffusion.load(model, dog)
    expected = UNET.run(model)
    diffusion.unload(model)
    diffusion.load(model, as_format_1(dog))
    assert UNET.run(model).equal(expected)


@pytest.mark.parametrize("first_format", [False, True])
def test_a_file_for_4_heads_does_not_load_into_2_of_equal_width(tmp_path: Path, first_format: bool) -> None:
    four: Any = unet(attention_head_dim=4)
    diffusion.attach(four, init="random", rank=2)
    dog = diffusion.save(four, tmp_path / "dog.safetensors")
    said = (
        "its rank is 2, and with the heads here it would be 4"
        if first_format
        else "attn2 is for 4 heads, and there are 2"
    )
    model = UNET.model()
    with pytest.raises(StoreError, match=said):
        diffusion.load(model, as_format_1(dog) if first_format else dog)
    assert diffusion.adapters(model) == {}


def test_escapes_in_metadata_and_names_never_reach_a_terminal(dog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from comcat.cli import main

    red = "\x1b[31mV*\x07\x9b2J\u202e"
    path = rewrite(dog, lambda t, m: m.update({"identifier": red, "base": red, red: "x"}))
    assert diffusion.read(path).identifier == r"\x1b[31mV*\x07\x9b2J\u202e"
    assert main(["inspect", str(path)]) == 0
    assert main(["inspect", str(rewrite(path, lambda t, m: t.update({f"unet.{red}.bias": torch.ones(2)})))]) == 1
    printed = "".join(capsys.readouterr())
    assert "\\x1b[31mV*" in printed and not {"\x1b", "\x07", "\x9b", "\u202e"} & set(printed)
    model = UNET.model()
    diffusion.attach(model, name="dog")
    for about in ({"identifier": red}, {"prompt": red}, {"base": red}, {"metadata": {"by": red}}):
        with pytest.raises(SettingsError, match="control characters"):
            diffusion.save(model, dog, name="dog", **about)  # type: ignore[arg-type]


def test_channels_of_the_first_format_that_are_no_multiple_of_the_heads(dog: Path) -> None:
    other = unet(attention_head_dim=(8, 16))
    with pytest.raises(StoreError, match=r"has 4 channels, which are no multiple of the [0-9]+ heads"):
        diffusion.load(other, as_format_1(dog))
