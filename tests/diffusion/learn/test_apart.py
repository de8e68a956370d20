"""Adapters that are told apart read their own prompts and not each other's."""

import pytest
import torch
import torch.nn.functional as F

import comcat.diffusion as cd
from comcat.diffusion.learn.apart import RIDGE
from comcat.diffusion.learn.protection import Protection
from comcat.diffusion.pipeline.families import family_of
from comcat.errors import SettingsError

from .. import tiny

LONG = "a photo of a dog a photo of a dog"  # as many tokens as are read
PROMPTS = {"dog": "a photo of V* dog", "cat": ["a photo of W* cat", "W* cat"]}


@pytest.fixture
def pipe(tmp_path):
    made = tiny.stable_diffusion(tmp_path / "parts")
    for seed, name in enumerate(PROMPTS):
        cd.attach(made, name=name, init="random", seed=seed)
    return made


def tokens(pipe, prompts):
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    with torch.no_grad():
        return F.normalize(family_of(pipe).encode(given)["prompt"].flatten(0, 1).double(), dim=1)


def factors(pipe, name):
    return [f.detach().clone() for t in cd.adapters(pipe)[name].terms.values() for f in (t.k_down, t.v_down)]


def test_the_closed_form_is_the_least_squares_it_stands_for(pipe):
    before = {name: factors(pipe, name) for name in PROMPTS}
    others = [t.q_up.detach().clone() for t in cd.adapters(pipe)["dog"].terms.values()]
    cd.tell_apart(pipe, PROMPTS)
    own, foreign = tokens(pipe, PROMPTS["dog"]), tokens(pipe, PROMPTS["cat"]) / 2**0.5  # two prompts, each half
    moment = own.mT @ own + foreign.mT @ foreign
    ridge = RIDGE * moment.trace() / len(moment) * torch.eye(len(moment)).double()
    rows = torch.cat([own, foreign, ridge.sqrt()])
    for old, new in zip(before["dog"], factors(pipe, "dog"), strict=True):
        wanted = torch.cat([own @ old.double().mT, torch.zeros(len(rows) - len(own), len(old)).double()])
        expected = torch.linalg.lstsq(rows, wanted).solution.mT
        torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-5)
    kept = [t.q_up for t in cd.adapters(pipe)["dog"].terms.values()]
    assert all(map(torch.equal, kept, others))  # what reads the picture stays


def test_each_reads_the_other_s_prompt_less_than_its_own(pipe):
    before = {name: factors(pipe, name) for name in PROMPTS}
    cd.tell_apart(pipe, PROMPTS)
    for name, other in (("dog", "cat"), ("cat", "dog")):
        left = [
            sum((f @ x.float().mT).norm() for f in factors(pipe, name))
            / sum((f @ x.float().mT).norm() for f in before[name])
            for x in (tokens(pipe, PROMPTS[name]), tokens(pipe, PROMPTS[other]))
        ]
        assert left[1] < left[0] < 1.01, left


def test_the_prompts_that_the_adapters_were_taught_with_are_known(pipe, tmp_path):
    for name, word in (("dog", "V*"), ("cat", "W*")):
        cd.save(pipe, tmp_path / f"{name}.safetensors", name=name, identifier=word, prompt=f"a photo of {word}")
    cd.tell_apart(pipe, {"dog": "a photo of V*", "cat": "a photo of W*"})
    wanted = factors(pipe, "dog")
    cd.unload(pipe)
    for name in PROMPTS:
        cd.load(pipe, tmp_path / f"{name}.safetensors", name=name)
    cd.tell_apart(pipe)
    for found, expected in zip(factors(pipe, "dog"), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # files are float16


def test_what_was_protected_stays_so(pipe):
    protected = ["a red bird"]
    for adapter in cd.adapters(pipe).values():
        Protection(family_of(pipe), adapter, protected).apply()
    before = factors(pipe, "dog")
    cd.tell_apart(pipe, PROMPTS, protect=protected)
    directions = Protection(family_of(pipe), cd.adapters(pipe)["dog"], protected).directions
    for old, new in zip(before, factors(pipe, "dog"), strict=True):
        assert not torch.allclose(old, new) and (new @ directions.mT).abs().max() < 1e-4


@pytest.mark.parametrize("words", [(), ("a photo of a red dog", "a photo of bird", "a photo of o n e")])
def test_nobody_need_say_again_what_was_protected(pipe, tmp_path, words):
    """Nor when the adapters come from files, which are rounded to 16 bit."""
    read = {}
    for name, adapter in cd.adapters(pipe).items():
        own = tokens(pipe, PROMPTS[name]) if words else None
        protection = Protection(family_of(pipe), adapter, ["a red bird"], words=words, own=own)
        protection.apply()
        whole = torch.eye(protection.directions.shape[1])
        shared = protection.directions.mT @ protection.directions
        read[name] = shared if words else whole - shared
        cd.save(pipe, tmp_path / f"{name}.safetensors", name=name)
    cd.unload(pipe)
    for name in PROMPTS:
        cd.load(pipe, tmp_path / f"{name}.safetensors", name=name)
    before = {name: factors(pipe, name) for name in PROMPTS}
    cd.tell_apart(pipe, PROMPTS)
    for name in PROMPTS:
        for old, new in zip(before[name], factors(pipe, name), strict=True):
            assert not torch.allclose(old, new, rtol=1e-2)
            assert (new - new @ read[name]).norm() < 2e-3 * old.norm()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (None, "'dog' knows no prompt"),
        ({"dog": "V*"}, "'cat' knows no prompt"),
        (["dog", "cat"], "expected them by adapter's name"),
        ({"dog": f"{LONG} V*", "cat": f"{LONG} W*"}, "reads .* of 'dog' as .* of 'cat'"),
        ({"dog": "V*", "catt": "W*"}, "no adapter called 'catt'.*'cat'"),
        ({"dog": "a V*", "cat": ["W*", "a V*"]}, "have the prompt 'a V\\*' in common"),
        ({"dog": [], "cat": "W*"}, "'dog': got none"),
        ({"dog": 3, "cat": "W*"}, "got 3 .*expected a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart(pipe, prompts, said):
    before = factors(pipe, "dog") + factors(pipe, "cat")
    with pytest.raises(SettingsError, match=said):
        cd.tell_apart(pipe, prompts)
    assert all(map(torch.equal, before, factors(pipe, "dog") + factors(pipe, "cat")))


def test_self_attention_reads_no_text(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    cd.attach(pipe, name="dog")
    cd.attach(pipe, name="cat", where="all")
    with pytest.raises(SettingsError, match="telling adapter 'cat' apart: only cross-attention"):
        cd.tell_apart(pipe, PROMPTS)


def test_once_and_the_file_says_so(pipe, tmp_path):
    cd.tell_apart(pipe, PROMPTS)
    for name in PROMPTS:
        cd.save(pipe, tmp_path / f"{name}.safetensors", name=name)
    assert cd.read(tmp_path / "cat.safetensors").own_metadata == {"told_apart_from": '["a photo of V* dog"]'}
    with pytest.raises(SettingsError, match=r"'dog' was told apart before, from .*W\* cat.*load what was taught"):
        cd.tell_apart(pipe, PROMPTS)
    cd.unload(pipe)
    for name in PROMPTS:
        cd.load(pipe, tmp_path / f"{name}.safetensors", name=name)
    before = factors(pipe, "cat")
    with pytest.raises(SettingsError, match="'dog' was told apart before"):
        cd.tell_apart(pipe, PROMPTS)
    assert all(map(torch.equal, before, factors(pipe, "cat")))


def test_a_prompt_must_call_its_adapter_and_two_must_be_there(pipe, tmp_path):
    cd.save(pipe, tmp_path / "dog.safetensors", name="dog", identifier="V*")
    with pytest.raises(SettingsError, match=r"'a dog', which does not contain the identifier 'V\*'"):
        cd.tell_apart(pipe, {"dog": "a dog", "cat": "W* cat"})
    cd.unload(pipe, "cat")
    with pytest.raises(SettingsError, match="got 1 adapter to tell apart, expected two or more"):
        cd.tell_apart(pipe, {"dog": "V* dog"})


def test_prompts_that_are_not_given_are_those_of_the_teaching(pipe, tmp_path):
    cd.save(pipe, tmp_path / "dog.safetensors", name="dog", prompt=PROMPTS["dog"])
    cd.save(pipe, tmp_path / "cat.safetensors", name="cat")
    cd.tell_apart(pipe, {"cat": PROMPTS["cat"]})
    found = factors(pipe, "dog")
    cd.unload(pipe)
    for name in PROMPTS:
        cd.load(pipe, tmp_path / f"{name}.safetensors", name=name)
    cd.tell_apart(pipe, PROMPTS)
    for old, new in zip(found, factors(pipe, "dog"), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-2, atol=1e-3)  # files are float16
