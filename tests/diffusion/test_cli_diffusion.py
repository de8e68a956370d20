"""``comcat customize`` and ``comcat generate`` as a user types them; errors are one line and a non-zero status."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import comcat.diffusion as cd
from comcat.cli import main
from comcat.cli.personal.generate import free_name, parse_adapter
from comcat.errors import SettingsError

from . import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = tiny.stable_diffusion(folder / "parts")
    pipe.save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dog")
    for i, picture in enumerate(tiny.pictures()):
        picture.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def adapter(model, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "dog.safetensors"
    assert customize(model, images, out) == 0
    return out


def customize(model, images, out, *more, prompt="a photo of V* dog"):
    return main(
        ["customize", str(model), "--images", str(images), "--prompt", prompt, "--out", str(out), "--steps", "2", *more]
    )


def generate(model, out, *more):
    return main(["generate", str(model), "--steps", "2", "--out", str(out), *map(str, more)])


def told(capsys):
    """The one line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("comcat: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines)
    return errors[0]


def test_customize_then_generate(model, images, adapter, tmp_path, capsys):
    assert {p.name for p in adapter.parent.iterdir()} == {"dog.safetensors", "dog.run"}
    assert cd.read(adapter).base == str(model)
    out = tmp_path / "pictures"
    arguments = ("--adapter", f"{adapter}:0.8", "--prompt", "V* dog", "--prompt", "a cat", "--count", 2, "--seed", 7)
    assert generate(model, out, *arguments) == 0
    made = [json.loads(Image.open(p).text["comcat"]) for p in sorted(out.iterdir())]
    assert [(m["prompt"], m["number"]) for m in made] == [("a cat", 0), ("a cat", 1), ("V* dog", 0), ("V* dog", 1)]
    assert made[0]["adapters"][0]["name"] == "dog" and made[0]["adapters"][0]["scale"] == 0.8
    assert made[0]["seed"] == 7 and made[0]["model"] == str(model)
    assert "4 pictures generated, 0 were there" in capsys.readouterr().out
    assert generate(model, out, *arguments) == 0
    assert "0 pictures generated, 4 were there" in capsys.readouterr().out
    assert generate(model, out, *arguments[:1], f"{adapter}:0.5", *arguments[2:]) == 1
    assert "made in another way: adapters was" in told(capsys)


def test_offloaded_it_learns_and_draws_the_same(model, images, adapter, tmp_path, capsys):
    out = tmp_path / "dog.safetensors"
    assert customize(model, images, out, "--offload", "--gradient-checkpointing") == 0
    assert "weights come to the device as they compute, one block's at a time" in capsys.readouterr().out
    expected, found = cd.read(adapter).factors, cd.read(out).factors
    for module, factors in expected.items():
        for key, factor in factors.items():
            torch.testing.assert_close(found[module][key], factor, rtol=1e-4, atol=1e-6, msg=f"{module}.{key}")
    drawn = []
    for place, more in (("in place", ()), ("offloaded", ("--offload",))):
        assert generate(model, tmp_path / place, "--adapter", adapter, "--prompt", "V* dog", *more) == 0
        drawn += [p.read_bytes() for p in (tmp_path / place).iterdir()]
    assert len(drawn) == 2 and drawn[0] == drawn[1]


def test_customize_says_what_it_did(model, images, tmp_path, capsys):
    assert customize(model, images, tmp_path / "dog.safetensors", "--seed", "3") == 0
    said = capsys.readouterr().out
    assert "splits the identifier 'V*' into 'v' + '*'" in said
    assert "Learned V* in 2 steps" in said and "report.html" in said
    assert customize(model, images, tmp_path / "dog.safetensors", "--seed", "4") == 1
    assert "seed was 3, now 4" in told(capsys)
    assert customize(model, images, tmp_path / "dog.safetensors", "--seed", "4", "--restart") == 0


def test_values_of_one_block_learn_where_masks_are_white(model, images, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.iterdir():
        Image.new("L", Image.open(path).size, 255).save(masks / path.name)
    out = tmp_path / "dog.safetensors"
    assert customize(model, images, out, "--only", "mid_block:vo", "--masks", str(masks)) == 0
    assert {path.split(".")[1] for path in cd.read(out).factors} == {"mid_block"}
    assert {name for factors in cd.read(out).factors.values() for name in factors} == {"v_down", "out_up"}


def test_recipes_of_the_paper(model, images, tmp_path):
    recipes = Path(__file__).parents[2] / "recipes"
    out = tmp_path / "dog.safetensors"
    given = [
        "--images",
        str(images),
        "--prompt",
        "a photo of V* dog",
        "--out",
        str(out),
        "--steps",
        "2",
        "--resolution",
        "16",
    ]
    assert main(["customize", str(model), "--recipe", str(recipes / "sd14-paper.yaml"), *given]) == 0
    settings = json.loads(cd.read(out).metadata["settings"])
    assert (
        settings["steps"] == 2 and settings["lr"] == 2.5e-3 and settings["init"] == "random" and settings["rank"] == 2
    )
    assert any(".attn1" in path for path in cd.read(out).factors)  # self-attention is in the paper's 6 MB
    recipe = ("--recipe", recipes / "sd14-paper-pictures.yaml", "--count", 3, "--prompt", "V* dog")
    assert generate(model, tmp_path / "pictures", *recipe) == 0
    made = [json.loads(Image.open(p).text["comcat"]) for p in (tmp_path / "pictures").iterdir()]
    assert len(made) == 3 and all(m["guidance"] == 7.0 and m["steps"] == 2 for m in made)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "a photo of a dog"}, "does not contain the identifier 'V*'"),
        ({"images": "absent"}, "no pictures at"),
        ({"out": "dog.txt"}, "ends in .safetensors"),
        ({"model": "absent/"}, "there is no folder"),
        ({"more": ["--where", "joint"]}, "joint"),
        ({"more": ["--only", "vo", "mid_blok"]}, "only='mid_blok' chooses no attention"),
        ({"more": ["--masks", "absent"]}, "no pictures at"),
        ({"more": ["--device", "cuda:99"]}, "--device 'cuda:99', which cannot be used"),
    ],
)
def test_customize_refuses(change, said, model, images, tmp_path, capsys):
    place = {"model": model, "images": images, "out": tmp_path / "dog.safetensors", **change}
    more = place.pop("more", [])
    prompt = place.pop("prompt", "a photo of V* dog")
    assert customize(place["model"], place["images"], place["out"], *more, prompt=prompt) == 1
    assert said in told(capsys)


def test_generate_refuses(model, adapter, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert generate(model, out) == 1
    assert "got no prompt" in told(capsys)
    assert generate(model, out, "--prompt", "V*", "--adapter", tmp_path / "absent.safetensors") == 1
    assert "there is no adapter" in told(capsys)
    assert generate(model, out, "--prompt", "V*", "--adapter", f"{adapter}:much") == 1
    assert "expected FILE or FILE:SCALE" in told(capsys)
    assert generate(model, out, "--prompt", "V*", "--adapter", adapter, "--adapter", adapter) == 1
    assert "answers to 'V*' already" in told(capsys)
    assert generate("owner/absent", out, "--prompt", "V*") == 1
    assert "the hub cannot be reached" in told(capsys)
    assert not out.exists()


def test_what_is_wrong_with_other_files_is_said_before_the_pipeline_opens(model, images, adapter, tmp_path, capsys):
    out, absent = tmp_path / "pictures", "owner/absent"
    (tmp_path / "file").write_text("in the way")
    for more, said in (
        (["--adapter", tmp_path / "absent.safetensors"], "there is no adapter"),
        (["--adapter", images], "there is no adapter"),
        (["--adapter", f"{adapter}:nan"], "got nan as an adapter's scale"),
        (["--prompt", "a \udcff dog"], "none of Unicode"),
        (["--out", tmp_path / "file" / "below"], "nothing can be written"),
    ):
        assert generate(absent, out, "--prompt", "V*", *more) == 1
        assert said in told(capsys)
    dog = tmp_path / "dog.safetensors"
    assert customize(absent, tmp_path / "none", dog) == 1
    assert "no pictures at" in told(capsys)
    assert customize(absent, images, dog, prompt="a photo of a dog") == 1
    assert "does not contain the identifier" in told(capsys)
    assert customize(absent, images, tmp_path / "dog.pt") == 1
    assert "ends in .safetensors" in told(capsys)


@pytest.mark.parametrize("part", ["scheduler", "unet"])
def test_a_folder_without_a_part(part, model, tmp_path, capsys):
    folder = tmp_path / "incomplete"
    shutil.copytree(model, folder)
    shutil.rmtree(folder / part)
    assert generate(folder, tmp_path / "out", "--prompt", "a dog") == 1
    assert f"lacks its {part}" in told(capsys)
    (folder / "model_index.json").unlink()
    assert generate(folder, tmp_path / "out", "--prompt", "a dog") == 1
    assert "no saved pipeline" in told(capsys)


def test_an_adapter_for_another_model(adapter, tmp_path, capsys):
    other = tiny.stable_diffusion(tmp_path / "parts", unet=tiny.unet(block_out_channels=(4, 8)))
    other.save_pretrained(tmp_path / "other")
    assert generate(tmp_path / "other", tmp_path / "out", "--prompt", "V*", "--adapter", adapter) == 1
    assert "does not fit" in told(capsys)


def test_prompts_from_a_file_and_a_note(model, adapter, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red dog\na cat\n")
    assert generate(model, tmp_path / "out", "--prompts", file, "--adapter", adapter) == 0
    assert "No prompt contains 'V*'" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_adapter_arguments(tmp_path):
    assert parse_adapter("a/dog.safetensors:0.8")[1] == 0.8 and parse_adapter("dog.safetensors")[1] == 1.0
    assert str(parse_adapter("a/dog.safetensors:0.8")[0]) == "a/dog.safetensors"
    with pytest.raises(SettingsError):
        parse_adapter("dog:x")
    assert free_name("dog", []) == "dog" and free_name("dog", ["dog", "dog-2"]) == "dog-3"
