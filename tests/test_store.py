"""Saving, loading, stock export, the hub, and the checkpoints of the paper's code."""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import comcat
from comcat import files
from comcat.apply import apply_
from comcat.data import Preprocess
from comcat.errors import ModelError, SettingsError, StoreError
from comcat.files import read_tensors
from comcat.hosts import find_sites
from comcat.models import Origin, origin_of
from comcat.plan import Plan, SitePlan
from comcat.record import Record, Results
from comcat.report import ReportData
from comcat.store import folder as folders
from comcat.store import import_paper, load, load_model, push_to_hub, save, saving
from comcat.store.processor import processor_config

from .models import ranked, tiny_vit

DEIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On models this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHAPE = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16, "patch_size": 8}


def shaken(model: nn.Module) -> nn.Module:
    """Random weights everywhere, biases and norms included, so that nothing is zero or one by chance."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def deit(name: str = "deit_tiny_patch16_224", **changed) -> nn.Module:
    return shaken(timm.create_model(name, **{**DEIT, **changed}))


def uniform(model: nn.Module, rank: int = 5, only=("qk", "vo"), **changed) -> Plan:
    entry = {"keep": rank, **changed}
    return Plan(sites={n: SitePlan(full=s.full_rank, **entry) for n, s in find_sites(model).only(*only).items()})


def mixed(model: nn.Module) -> Plan:
    """Unequal ranks, ranks per head, linear layers, and sites left dense."""
    sites = ranked(find_sites(model))
    entries = {
        n: SitePlan(keep=min(5 if s.kind == "qk" else 4, s.full_rank), full=s.full_rank) for n, s in sites.items()
    }
    qk, vo = (next(n for n, s in sites.items() if s.kind == kind) for kind in ("qk", "vo"))
    entries[qk] = replace(entries[qk], details={"head_ranks": tuple(range(5 - sites[qk].heads + 1, 6))})
    del entries[vo]
    return Plan(sites=entries, made_by={"rule": "uniform", "statistic": "weights", "predicted_loss": None})


def thin(model: nn.Module, plan: Plan | None = None, **record) -> nn.Module:
    plan = uniform(model) if plan is None else plan
    apply_(model, plan)
    model.comcat_record = Record(plan=plan, **record)
    return model


def output(model: nn.Module, size: int = 32) -> torch.Tensor:
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    parameter = next(model.parameters())
    with torch.inference_mode():
        y = model(pictures.to(parameter.dtype))
    y = getattr(y, "logits", y)
    assert not torch.equal(y[0], y[1])
    return y


def leftovers(folder) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model and its folder, never to be changed."""
    torch.manual_seed(0)
    model = deit()
    model = thin(model, mixed(model), settings={"reduce": 0.5, "only": ()}, results={"before": {"top1": 80.0}})
    return model, save(model, tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "small")


def transformers_model(kind: str) -> nn.Module:
    import transformers

    shape = {**SHAPE, "num_hidden_layers": 2, "num_labels": 3, "use_relative_position_bias": kind == "Beit"}
    name = "DeiTForImageClassificationWithTeacher" if kind == "DeiT" else f"{kind}ForImageClassification"
    return shaken(getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**shape)))


# ------------------------------------------------------------------------------------------------- round trips


def test_a_saved_model_loads_with_the_same_outputs_and_record(saved):
    model, folder = saved
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "plan.json"]
    random_state = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(output(loaded), output(model)) and not loaded.training
    record = loaded.comcat_record
    assert record.plan.to_dict() == model.comcat_record.plan.to_dict()
    assert record.settings == {"reduce": 0.5, "only": []} and record.results == Results(before={"top1": 80.0})
    assert replace(Origin.from_dict(record.origin), stored={}) == origin_of(model)
    assert Preprocess.from_dict(record.preprocess).size == (32, 32)


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    again = save(load(saved[1]), tmp_path / "again")
    for name in ("model.safetensors", "plan.json"):
        assert (again / name).read_bytes() == (saved[1] / name).read_bytes()


def test_what_compress_makes_can_be_saved(tmp_path):
    model = deit(num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("cat", "dog")}
    small = comcat.compress(model, statistic="weights", reduce=0.3)
    loaded = load(save(small, tmp_path / "small"))
    assert torch.equal(output(loaded), output(small))
    assert loaded.comcat_record.class_names == ("cat", "dog") and loaded.comcat_record.settings["reduce"] == 0.3


def test_transformers_models_go_round(tmp_path):
    model = transformers_model("Beit")
    model = thin(model, mixed(model))
    assert torch.equal(output(load(save(model, tmp_path / "small")), 16), output(model, 16))


@pytest.mark.parametrize("spec", ["{}", "timm:{}", "hf:{}", "timm:local-dir:{}"])
def test_load_model_takes_a_saved_folder(saved, spec):
    assert torch.equal(output(load_model(spec.format(saved[1]))), output(saved[0]))


def test_load_model_gives_a_saved_folder_in_the_type_asked_for_and_nothing_else(saved):
    model, folder = saved
    assert {p.dtype for p in load_model(folder, dtype=torch.float16).parameters()} == {torch.float16}
    assert {p.dtype for p in load_model(save(copy.deepcopy(model).half(), folder.parent / "half")).parameters()} == {
        torch.float32
    }
    with pytest.raises(ModelError, match="just as it was saved; got num_classes"):
        load_model(folder, num_classes=3)
    with pytest.raises(ModelError, match="got pretrained=False"):
        load_model(folder, pretrained=False)


def test_load_model_finds_what_a_killed_save_left(saved):
    folder = saved[1]
    folder.rename(folder.with_name(f".{folder.name}.comcat-before"))
    try:
        assert torch.equal(output(load_model(folder)), output(saved[0]))
    finally:
        folder.with_name(f".{folder.name}.comcat-before").rename(folder)


def test_load_model_hands_names_of_others_down():
    with pytest.raises(ModelError, match="got '', expected"):
        load_model("")
    with pytest.raises(ModelError, match="did you mean 'timm'"):
        load_model("tim:deit_small_patch16_224")
    assert comcat.load_model("timm:vit_tiny_patch16_224", pretrained=False, **DEIT).num_classes == DEIT["num_classes"]


def test_dtypes_are_kept_or_changed_on_request(saved, tmp_path):
    half = copy.deepcopy(saved[0]).to(torch.bfloat16)
    half.head.float()
    folder = save(half, tmp_path / "small")
    loaded = load(folder)
    expected = {name: t.dtype for name, t in half.state_dict().items()}
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == expected
    assert {p.dtype for p in load(folder, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(SettingsError, match=r"dtype: got torch\.int8"):
        load(folder, dtype=torch.int8)
    with pytest.raises(SettingsError, match="device: got 'gpu7'"):
        load(folder, device="gpu7")


def test_shared_and_scattered_tensors(saved, tmp_path):
    model = copy.deepcopy(saved[0])
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    weight = model.blocks[0].mlp.fc1.last.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    loaded = load(save(model, tmp_path / "small"))
    assert torch.equal(output(loaded), output(model))


def test_a_wrapped_model_is_saved_without_its_wrapper(saved, tmp_path):
    model = nn.DataParallel(copy.deepcopy(saved[0]))
    assert torch.equal(output(load(save(model, tmp_path / "small"))), output(saved[0]))


def test_a_report_goes_beside_the_model_and_goes_again(saved, tmp_path):
    report = ReportData(
        title="Small", model="deit", created="2026-01-01T00:00:00+00:00", command=None, settings={}, environment={},
        before={"parameters": 2.0}, after={"parameters": 1.0}, agreement={}, predicted_loss=None, measured_loss=None,
        sites=(), spectra=(), notes=(),
    )  # fmt: skip
    folder = save(saved[0], tmp_path / "small", report=report)
    assert "<html" in (folder / "report.html").read_text() and load(folder)
    save(saved[0], folder)
    assert not (folder / "report.html").exists()


# -------------------------------------------------------------------------------------- what cannot be saved


def test_saving_needs_to_know_what_was_done(tmp_path):
    model = deit()
    with pytest.raises(StoreError, match=r"comcat\.compress.*plan=plan"):
        save(model, tmp_path / "small")
    plan = mixed(model)
    handle = apply_(model, plan)
    with pytest.raises(SettingsError, match="one of them"):
        save(model, tmp_path / "small", plan=plan, record=Record(plan=plan))
    folder = save(model, tmp_path / "small", plan=plan)
    assert torch.equal(output(load(folder)), output(model))
    handle.revert()
    with pytest.raises(StoreError, match=r"not what its plan makes.*stands as it was before"):
        save(model, tmp_path / "small", plan=plan)
    assert load(folder).comcat_record.plan.to_dict() == plan.to_dict()


def test_an_origin_that_cannot_be_told_can_be_given(tmp_path, caplog):
    model = deit()
    origin = origin_of(model)

    class Mine(timm.models.VisionTransformer):
        """An architecture that timm cannot build by name."""

    model.__class__, model.pretrained_cfg = Mine, {}
    thin(model)
    folder = save(model, tmp_path / "small")
    assert "cannot build" in caplog.text and "into=model" in caplog.text
    with pytest.raises(ModelError, match=r"into=model"):
        load(folder)
    folder = save(model, tmp_path / "small", origin=origin)
    assert torch.equal(output(load(folder)), output(model))


def test_a_head_exchanged_after_compression_is_noticed(tmp_path):
    model = load_model("timm:vit_tiny_patch16_224", pretrained=False, **DEIT)
    model = thin(shaken(model), origin=origin_of(model).to_dict())
    model.reset_classifier(7)
    assert output(load(save(model, tmp_path / "small"))).shape == (2, 7)


def test_settings_must_be_plain_data(saved, tmp_path):
    model = copy.deepcopy(saved[0])
    model.comcat_record = replace(model.comcat_record, results={"nan": float("nan"), "n": torch.tensor(3)})
    assert load(save(model, tmp_path / "small")).comcat_record.results.others == {"nan": "nan", "n": 3}
    model.comcat_record = replace(model.comcat_record, settings={"deep": {"teacher": nn.Linear(1, 1)}})
    with pytest.raises(StoreError, match=r"settings\.deep\.teacher of the model's record is a Linear"):
        save(model, tmp_path / "small")


# --------------------------------------------------------------------------------------------- damaged folders


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.json"])
def test_a_flipped_bit_is_found_and_both_hashes_told(copied, name):
    content = bytearray((copied / name).read_bytes())
    place = content.index(b"reduce") if name == "config.json" else len(content) // 2
    content[place] ^= 1
    (copied / name).write_bytes(bytes(content))
    with pytest.raises(StoreError, match=rf"{name} is damaged.*[0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
        load(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.json"])
def test_a_missing_or_empty_file_is_named(copied, name):
    (copied / name).write_bytes(b"")
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        load(copied)
    (copied / name).unlink()
    with pytest.raises(StoreError, match=name):
        load(copied)


def test_people_may_edit_the_card(copied):
    (copied / "README.md").write_text("mine")
    assert load(copied)


def rewrite(folder, **changed) -> None:
    """Change a config so that its hashes are right again."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    folders.write_config(folder, "config.json", {**config, **changed})


def test_a_newer_format_asks_for_a_newer_comcat(copied):
    rewrite(copied, format=2, comcat_version="9.9")
    with pytest.raises(StoreError, match=r"comcat 9\.9 in format 2.*up to 1: upgrade"):
        load(copied)


def test_plans_and_weights_that_do_not_fit(copied, saved):
    plan = saved[0].comcat_record.plan
    name, entry = next(iter(plan.sites.items()))
    Plan(sites={**plan.sites, name: replace(entry, keep=3, details={})}).save(copied / "plan.json")
    rewrite(copied)
    with pytest.raises(StoreError, match=r"small: the weights do not fit: .* is \(\d+,.*\), expected"):
        load(copied)
    Plan(sites={name: replace(entry, full=64)}).save(copied / "plan.json")
    rewrite(copied)
    with pytest.raises(StoreError, match=r"the plan does not fit deit_tiny.*full rank of 64, the model has 8"):
        load(copied)
    (copied / "plan.json").write_text("{}")
    rewrite(copied)
    with pytest.raises(StoreError, match=r"plan\.json: not a plan"):
        load(copied)
    rewrite(copied, origin={"library": "timm"})
    with pytest.raises(StoreError):
        load(copied)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architecture": "deit_tiny_patch16_224"}, "local-dir folder of timm.*'deit_tiny_patch16_224'.*load_model"),
        ({"model_type": "vit"}, "transformers folder.*'vit'.*load_model"),
        ({"a": 1}, "names no comcat_version"),
        ([1], "names no comcat_version"),
        (None, "has no config.json"),
    ],
)
def test_foreign_folders_are_told_from_ours(tmp_path, config, reason):
    (tmp_path / "weights.bin").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=reason):
        load(tmp_path)


def test_a_wrong_path_suggests_the_nearest(saved, tmp_path):
    with pytest.raises(StoreError, match="did you mean 'small'"):
        load(saved[1].with_name("smal"))
    with pytest.raises(StoreError, match="is a file"):
        load(saved[1] / "plan.json")
    with pytest.raises(SettingsError, match="revision: got 'main'"):
        load(saved[1], revision="main")


# --------------------------------------------------------------------------------------------- whole or not at all


def test_only_our_folders_are_replaced(saved, tmp_path):
    model = saved[0]
    empty, foreign, file = tmp_path / "empty", tmp_path / "foreign", tmp_path / "file"
    empty.mkdir()
    assert load(save(model, empty))
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"not written by comcat \(it holds thesis\.tex\)"):
        save(model, foreign)
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    file.touch()
    with pytest.raises(StoreError, match="is a file"):
        save(model, file)
    with pytest.raises(StoreError, match="overwrite=True"):
        save(model, empty, overwrite=False)
    with pytest.raises(StoreError, match="cannot save to"):
        save(model, file / "below")


def test_files_of_others_and_links_survive(saved, tmp_path):
    folder = tmp_path / "small"
    save(saved[0], folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.log").write_text("b")
    folder.chmod(0o750)
    (tmp_path / "link").symlink_to(folder)
    save(saved[0], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load(folder)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "logs" / "a.log").read_text() == "b"
    assert folder.stat().st_mode & 0o777 == 0o750 and not leftovers(folder)
    assert {p.stat().st_mode & 0o777 for p in folder.glob("*.*s*n")} == {0o640}  # JSON and safetensors


@pytest.fixture
def quick(saved, monkeypatch):
    """Saves that skip the comparison with a model built again, which takes no part in writing."""
    model, _ = saved
    found = saving.structure_of(model, None, model.comcat_record)
    monkeypatch.setattr(saving, "structure_of", lambda *args: found)
    return copy.deepcopy(model)


def marked(model: nn.Module, value: int) -> nn.Module:
    with torch.no_grad():
        model.norm.bias.fill_(value)
    model.comcat_record = replace(model.comcat_record, results={"mark": value})
    return model


def mark(folder) -> int:
    """The mark of a folder that is whole and of one piece."""
    from comcat.store.loading import check_files, read_config

    config = read_config(folder)
    check_files(folder, config)
    (value,) = set(read_tensors(folder / "model.safetensors")["norm.bias"].tolist())
    assert config["results"] == {"mark": value}
    return int(value)


@pytest.mark.parametrize(
    "where", ["write_tensors", "model_card", "write_config", "_sync", "_swap", "_carry_over", "a full disk"]
)
def test_a_failed_save_leaves_the_old_model_whole(quick, tmp_path, monkeypatch, where):
    folder = save(marked(quick, 1), tmp_path / "small")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if where == "a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        else:
            module = {"_sync": files, "_swap": files, "_carry_over": folders}.get(where, saving)
            monkeypatch.setattr(module, where, fail)
        with pytest.raises(StoreError, match=r"cannot.*unchanged"):
            save(marked(quick, 2), folder)
        with pytest.raises(StoreError):
            save(quick, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert mark(folder) == 1 and load(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_killed_at_any_moment_the_old_or_the_new_model_is_there(quick, tmp_path):
    folder = save(marked(quick, 0), tmp_path / "small")
    moments = random.Random(0)
    seen, kills = set(), 0
    while kills < 20 or len(seen) == 1:  # some saves must get through, however slow the machine
        kills += 1
        child = os.fork()
        if not child:
            try:
                for value in range(mark(folder) + 1, 10**6):
                    save(marked(quick, value), folder)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.01, 0.1) * max(1, kills - 20))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(mark(folder))
    save(marked(quick, -1), folder)
    assert mark(folder) == -1 and load(folder)
    assert not leftovers(folder)


def test_without_an_atomic_exchange_two_renames_do(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    folder = save(marked(quick, 1), tmp_path / "small")
    save(marked(quick, 2), folder)
    assert mark(folder) == 2 and not leftovers(folder)
    before = tmp_path / ".small.comcat-before"
    folder.rename(before)  # as a kill between the two leaves it
    assert load(folder).norm.bias[0] == 2
    with pytest.raises(StoreError, match="overwrite=True"):
        save(quick, folder, overwrite=False)
    assert mark(folder) == 2 and not before.exists()

    def fail(source, target, rename=os.rename):
        if str(target) == str(folder) and ".tmp" in str(source):
            raise OSError(5, "no luck" if before.exists() else "Directory not empty") from None
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(StoreError, match="unchanged"):
        save(marked(quick, 3), folder)
    monkeypatch.undo()
    assert mark(folder) == 2


# ---------------------------------------------------------------------------------------------------- the card


def front_matter(folder) -> dict:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return {**yaml.safe_load(front), "text": text}


def test_the_card_says_what_was_done(saved, tmp_path):
    model = copy.deepcopy(saved[0])
    origin = replace(origin_of(model), source="timm:deit_tiny_patch16_224.fb_in1k")
    results = {
        "before": {"top1": 79.8, "latency_s": 0.002},
        "after": {"top1": 79.25, "latency_s": None},
        "agreement": {"agreement": 98.5, "cosine": 0.5, "count": 360.0},
        "judged_on": "360 pictures of digits:test",
        "measured_loss": 0.0125,
        "mine": {"note": "x"},
    }
    model.comcat_record = replace(model.comcat_record, results=results)
    card = front_matter(save(model, tmp_path / "small", origin=origin))
    assert card["library_name"] == "comcat" and card["base_model"] == "timm/deit_tiny_patch16_224.fb_in1k"
    assert card["pipeline_tag"] == "image-classification" and card["license"] == "apache-2.0"
    parameters = sum(p.numel() for p in model.parameters())
    before = sum(p.numel() for p in deit().parameters())
    assert f"{parameters:,} parameters instead of {before:,}" in card["text"]
    assert "| Top-1 accuracy | 79.80\N{NO-BREAK SPACE}% | 79.25\N{NO-BREAK SPACE}% |" in card["text"]
    assert "| QK products, rank | 2 | 5 | 8 |" in card["text"] and "| mine.note | x |" in card["text"]
    assert 'comcat.load("small")' in card["text"] and "| reduce | 0.5 |" in card["text"]
    assert "| Same prediction | 98.50\N{NO-BREAK SPACE}% |" in card["text"]
    assert "| Rise of the loss by compression, measured | 0.0125 nats |" in card["text"]
    assert "Accuracy was measured on 360 pictures of digits:test." in card["text"]
    assert "not measured" not in card["text"] and "agreement." not in card["text"]


def test_a_card_without_numbers_says_so(tmp_path):
    folder = save(thin(deit(num_classes=0)), tmp_path / "small")
    card = front_matter(folder)
    assert "base_model" not in card and card["pipeline_tag"] == "image-feature-extraction"
    assert "not measured" in card["text"] and "## Numbers" not in card["text"]


def test_the_card_of_what_no_picture_has_seen_says_so(tmp_path):
    model = comcat.compress(tiny_vit(), reduce=0.3, statistic="weights")
    assert "by the weights alone, a weak guide" in front_matter(save(model, tmp_path / "small"))["text"]
    model = comcat.compress(tiny_vit(), [torch.randn(2, 3, 32, 32)], reduce=0.3)
    assert "weak guide" not in front_matter(save(model, tmp_path / "small"))["text"]


# ----------------------------------------------------------------------------------------------------- the hub


def test_a_repository_is_downloaded_without_anything_else(saved, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return str(saved[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(output(load("someone/small", revision="v1", token="t")), output(saved[0]))
    ((repo_id, options),) = calls
    assert repo_id == "someone/small" and options["revision"] == "v1" and options["token"] == "t"
    assert set(options["allow_patterns"]) >= {"model.safetensors", "plan.json", "config.json"}
    assert not any("*" in pattern for pattern in options["allow_patterns"])


def test_a_repository_out_of_reach_is_told():
    with pytest.raises(StoreError, match=r"no folder 'some/where', and the hub's some/where at 'v1' cannot be had"):
        load("some/where", revision="v1")


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    pushed = {}

    class HfApi:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            if repo_id == "not/mine":
                raise PermissionError("403 Forbidden\nmore")
            pushed.update(repo_id=repo_id, private=private, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, folder_path, repo_id, commit_message, allow_patterns):
            pushed.update(message=commit_message, names=sorted(allow_patterns), to=repo_id)
            pushed["loaded"] = load(folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return pushed


def test_a_folder_and_a_model_go_to_the_hub(saved, copied, hub):
    (copied / "secrets.txt").write_text("x")
    assert push_to_hub(copied, "me/small", private=True, token="t") == "https://hub/me/small"
    assert hub["private"] and hub["exist_ok"] and hub["token"] == "t" and hub["to"] == hub["repo_id"] == "me/small"
    assert hub["names"] == ["README.md", "config.json", "model.safetensors", "plan.json"]
    push_to_hub(saved[0], "me/other", commit_message="hello")
    assert torch.equal(output(hub["loaded"]), output(saved[0]))
    assert not hub["private"] and hub["message"] == "hello" and hub["to"] == "me/other"


def test_what_cannot_be_pushed(copied, hub, tmp_path):
    with pytest.raises(StoreError, match="expected 'user/repo'"):
        push_to_hub(copied, "small")
    with pytest.raises(StoreError, match="no folder"):
        push_to_hub(tmp_path / "nowhere", "me/small")
    with pytest.raises(StoreError, match=r"not/mine: PermissionError: 403 Forbidden$"):
        push_to_hub(copied, "not/mine")
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="damaged"):
        push_to_hub(copied, "me/small")


# ------------------------------------------------------------------------------------------------ stock exports


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: deit(), 32),
        (lambda: deit("deit_tiny_distilled_patch16_224", qkv_bias=False), 32),
        (lambda: deit(attn_drop_rate=0.1, img_size=(32, 32)), 32),
        (lambda: transformers_model("ViT"), 16),
        (lambda: transformers_model("DeiT"), 16),
        (lambda: transformers_model("Dinov2"), 16),
        (lambda: transformers_model("Beit"), 16),
    ],
    ids=["timm", "timm-distilled", "timm-dropout", "ViT", "DeiT", "DINOv2", "BEiT"],
)
def test_plain_transformers_loads_a_stock_export(make, size, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = make()
    dense = output(model, size)
    model = thin(model)
    folder = save(model, tmp_path / "stock", stock=True)
    stock = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert stock.config.head_dim == 5 and type(stock).__module__.startswith("transformers.")
    assert not any(type(m).__module__.startswith("comcat") for m in stock.modules())
    expected = output(model, size)
    torch.testing.assert_close(output(stock, size), expected, atol=1e-5, rtol=0)
    assert (expected - dense).abs().max() > 1e-3  # the rank matters
    assert AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", (40, 30))).pixel_values[0].shape == (
        3,
        size,
        size,
    )


def test_a_stock_export_is_told_from_a_saved_model(tmp_path, hub):
    model = deit()
    names = ("one", "two", "three", "four", "five")
    model = thin(model, class_names=names).half()
    folder = save(model, tmp_path / "small", stock=True)
    with pytest.raises(StoreError, match=r"stock export.*load_model"):
        load(folder)
    stock = load_model(f"hf:{folder}", dtype=torch.float16)
    assert {p.dtype for p in stock.parameters()} == {torch.float16} and stock.config.id2label[1] == "two"
    assert front_matter(folder)["library_name"] == "transformers"
    save(model, folder)
    assert not {"comcat.json", "preprocessor_config.json"} & {p.name for p in folder.iterdir()} and load(folder)
    save(model, folder, stock=True)
    with pytest.raises(StoreError, match="stock export"):  # the hub of these tests loads what it gets
        push_to_hub(folder, "me/stock")
    assert "comcat.json" in hub["names"] and "preprocessor_config.json" in hub["names"]


def narrow(model: nn.Module, other: dict[str, int] | None = None, units: int = 32) -> Plan:
    """All feed-forwards with as many hidden units, but for some."""
    sites = find_sites(model).only("units")
    keep = dict.fromkeys(sites, units) | (other or {})
    return Plan(sites={n: SitePlan(form="units", keep=keep[n], full=s.full) for n, s in sites.items()})


def both(model: nn.Module, units: int = 32) -> Plan:
    return Plan(sites={**uniform(model).sites, **narrow(model, units=units).sites})


def fitted(model: nn.Module, plan: Plan, size: int) -> nn.Module:
    """Compressed with pictures, so that biases are refitted."""
    pictures = [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(3))]
    return comcat.compress(model, pictures, plan=plan, statistic="activation")


@pytest.mark.parametrize("make_plan", [narrow, both], ids=["units", "units-and-ranks"])
@pytest.mark.parametrize(
    ("kind", "units"),
    [("ViT", 20), ("DeiT", 20), ("Beit", 20), ("Dinov2", 48)],
)
def test_plain_transformers_loads_fewer_hidden_units(kind, units, make_plan, tmp_path):
    from transformers import AutoModelForImageClassification

    model = transformers_model(kind)
    small = fitted(model, make_plan(model, units=units), 16)
    folder = save(small, tmp_path / "stock", stock=True)
    stock = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert not any(type(m).__module__.startswith("comcat") for m in stock.modules())
    assert {s.full for s in find_sites(stock).only("units").values()} == {units}
    torch.testing.assert_close(output(stock, 16), output(small, 16), atol=1e-5, rtol=0)
    assert (output(small, 16) - output(model, 16)).abs().max() > 1e-3
    text = front_matter(folder)["text"]
    assert "fewer hidden units" in text and ("narrower heads" in text) == (make_plan is both)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("deit_tiny_patch16_224", {}),
        ("vit_small_patch14_dinov2", {"patch_size": 8}),  # layer scale, no class of transformers that is it
        ("vit_giant_patch14_dinov2", {"patch_size": 8}),  # gated, in one packed layer
        ("eva02_tiny_patch14_224", {"patch_size": 8}),
        ("vit_tiny_patch16_224", {"num_classes": 0}),
    ],
)
def test_plain_timm_loads_fewer_hidden_units(name, changed, tmp_path):
    """Whatever timm has that no class of transformers is; attention keeps its width there."""
    model = deit(name, **changed)
    small = fitted(model, narrow(model, units=21), 32)
    folder = save(small, tmp_path / "stock", stock=True)
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert not any(type(m).__module__.startswith("comcat") for m in stock.modules())
    torch.testing.assert_close(output(stock), output(small), atol=1e-5, rtol=0)
    assert (output(small) - output(model)).abs().max() > 1e-3
    card = front_matter(folder)
    assert card["library_name"] == "timm" and "timm.create_model" in card["text"]
    assert "structured-pruning" in card["tags"] and "low-rank" not in card["tags"]
    torch.testing.assert_close(output(load_model(folder)), output(small), atol=1e-5, rtol=0)


def test_units_and_one_rank_of_timm_load_in_plain_transformers(tmp_path):
    from transformers import AutoModelForImageClassification

    model = deit()
    small = fitted(model, both(model), 32)
    stock = AutoModelForImageClassification.from_pretrained(save(small, tmp_path / "stock", stock=True)).eval()
    assert (stock.config.head_dim, stock.config.intermediate_size) == (5, 32)
    torch.testing.assert_close(output(stock), output(small), atol=1e-5, rtol=0)


def test_ranks_equal_gives_what_a_stock_checkpoint_holds(tmp_path):
    """One rank for all products, one width for all feed-forwards."""
    from transformers import AutoModelForImageClassification

    model = transformers_model("ViT")
    small = comcat.compress(model, [torch.randn(8, 3, 16, 16)], reduce=0.2, ranks="equal", statistic="activation")
    entries = small.comcat_record.plan.sites
    assert len({e.keep for n, e in entries.items() if n.endswith(":units")}) == 1
    assert len({e.keep for n, e in entries.items() if n.endswith((":qk", ":vo"))}) <= 1
    stock = AutoModelForImageClassification.from_pretrained(save(small, tmp_path / "stock", stock=True)).eval()
    torch.testing.assert_close(output(stock, 16), output(small, 16), atol=1e-5, rtol=0)


def test_a_width_that_the_config_cannot_say_is_refused(tmp_path):
    model = transformers_model("Dinov2")
    small = fitted(model, narrow(model, units=32), 16)
    with pytest.raises(StoreError, match=r"whole numbers for mlp_ratio.*multiples of 24.*got 32.*multiple=24"):
        save(small, tmp_path / "stock", stock=True)
    assert not list(tmp_path.iterdir())


def test_a_bias_that_refitting_created_is_refused_where_the_class_has_none(tmp_path):
    model = deit("vit_tiny_patch16_224", proj_bias=False)
    assert model.blocks[0].mlp.fc2.bias is None
    without = copy.deepcopy(model)
    small = fitted(model, narrow(model), 32)
    with pytest.raises(StoreError, match=r"created a bias of blocks\.0\.mlp\.fc2, where VisionTransformer has none"):
        save(small, tmp_path / "stock", stock=True)
    assert not list(tmp_path.iterdir())
    by_weights = thin(without, narrow(without))  # nothing is known of the units' means, so the bias is zero
    stock = timm.create_model(f"local-dir:{save(by_weights, tmp_path / 'stock', stock=True)}", pretrained=True).eval()
    torch.testing.assert_close(output(stock), output(by_weights), atol=1e-5, rtol=0)


def drop(plan: Plan, name: str) -> Plan:
    return Plan(sites={k: v for k, v in plan.sites.items() if k != name})


@pytest.mark.parametrize(
    ("changed", "make_plan", "reason"),
    [
        ({}, lambda m: uniform(m, only=("qk", "vo", "linear")), r"blocks\.0\.mlp\.fc1 is a linear layer"),
        ({}, mixed, r"blocks\.0\.mlp\.fc1 is a linear layer"),
        ({}, lambda m: drop(uniform(m), "blocks.1.attn:vo"), r"blocks\.1\.attn:vo stays at its full rank 8"),
        ({}, lambda m: uniform(m, form="matrix"), r"blocks\.0\.attn:qk has the form 'matrix'"),
        (
            {},
            lambda m: Plan(sites={n: replace(e, keep=6 - n.count("vo")) for n, e in uniform(m).sites.items()}),
            r"blocks\.0\.attn:vo has rank 5, but blocks\.0\.attn:qk has 6",
        ),
        ({}, lambda m: Plan(sites={}), "the plan shrinks nothing"),
        (
            {},
            lambda m: narrow(m, {"blocks.1.mlp:units": 40}),
            r"blocks\.1\.mlp:units keeps 40 .* but blocks\.0\.mlp:units keeps 32",
        ),
        ({}, lambda m: drop(narrow(m), "blocks.1.mlp:units"), r"blocks\.1\.mlp:units keeps 96 .* ranks='equal'"),
        ({"qk_norm": True}, lambda m: uniform(m, only=("vo",)), r"blocks\.0\.attn:qk keeps its width: q_norm"),
        ({"init_values": 1.0}, uniform, r"blocks\.0\.ls1 scales"),
        ({"global_pool": "avg"}, uniform, "pools by 'avg'"),
        ({"num_classes": 0}, uniform, "head is no linear layer"),
    ],
)
def test_stock_exports_that_cannot_be_are_refused_with_the_reason(changed, make_plan, reason, tmp_path):
    model = deit("vit_tiny_patch16_224", **changed)
    model = thin(model, make_plan(model))
    with pytest.raises(StoreError, match=reason):
        save(model, tmp_path / "stock", stock=True)
    assert not list(tmp_path.iterdir())


def test_classes_that_do_not_read_head_dim_are_refused(tmp_path):
    import transformers

    config = transformers.CLIPVisionConfig(**SHAPE, num_hidden_layers=1)
    model = thin(transformers.CLIPVisionModel(config).eval())
    with pytest.raises(StoreError, match=r"CLIPVisionModel.*head_dim"):
        save(model, tmp_path / "stock", stock=True)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_image_processor_does_what_the_preprocessing_does(mode, tmp_path):
    from transformers import AutoImageProcessor

    preprocess = Preprocess(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_pct=0.8, crop_mode=mode)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(preprocess)))
    gradient = torch.arange(60 * 90 * 3).reshape(60, 90, 3) % 255
    picture = Image.fromarray(gradient.to(torch.uint8).numpy()).resize((80, 50))
    values = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values[0]
    assert (values - preprocess(picture)).abs().mean() < 0.02  # two libraries' resizing differs by a level or so


def test_preprocessing_that_no_stock_processor_knows(tmp_path):
    known = {"size": (32, 32), "mean": (0.5,), "std": (0.5,)}
    for changed in ({"crop_mode": "border"}, {"channels": 1}, {"size": (32, 16)}):
        assert processor_config(Preprocess(**{**known, **changed})) is None


# ------------------------------------------------------------------------------------- the paper's checkpoints


class Selected(nn.Module):
    """What the paper's code wraps around every layer whose rank it selected."""

    def __init__(self, layer: nn.Module, *alphas: str) -> None:
        super().__init__()
        self.selected_rank_layer = layer
        for name in alphas:
            self.register_parameter(name, nn.Parameter(torch.ones(3)))

    def forward(self, x, **unused):
        return self.selected_rank_layer(x)


class PaperAttention(nn.Module):
    """Attention as the paper's code computes it, after its description: every projection with a bias of its own."""

    def __init__(self, width: int, heads: int, qk: int, vo: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.w_qs, self.w_ks = (nn.Linear(width, heads * qk, bias=bias) for _ in range(2))
        self.w_vs, self.proj = nn.Linear(width, heads * vo, bias=bias), nn.Linear(heads * vo, width, bias=bias)

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.w_qs, self.w_ks, self.w_vs))
        weights = (q @ k.mT * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PaperLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int, between: bool = False) -> None:
        super().__init__()
        self.first_factor, self.last_factor = nn.Linear(inputs, rank, bias=between), nn.Linear(rank, outputs)

    def forward(self, x):
        return self.last_factor(self.first_factor(x))


def paper_model(base: nn.Module, *, bias: bool = True, head: bool = True) -> nn.Module:
    """``base`` as the paper's code has it: ranks 12 and 15 over three heads, 6 in fc1; block 1's fc2 is dense."""
    model = copy.deepcopy(base)
    for block in model.blocks:
        block.attn = Selected(PaperAttention(24, 3, 4, 5, bias), "qk_rank_alpha", "vp_rank_alpha")
        block.mlp.fc1 = Selected(PaperLinear(24, 96, 6, between=bias), "rank_alpha")
    model.blocks[0].mlp.fc2 = Selected(PaperLinear(96, 24, 7))
    if head:
        model.head = Selected(PaperLinear(24, 5, 4))
    return shaken(model)


RANKS = "12,15,6,7,12,15,6,24,4"


@pytest.fixture
def paper(tmp_path):
    base = deit()
    model = paper_model(base)
    args = argparse.Namespace(model="deit_small_patch16_224", lr=5e-4)
    torch.save({"model": model.state_dict(), "args": args, "epoch": 3}, tmp_path / "checkpoint.pth")
    (tmp_path / "ranks.txt").write_text(RANKS + "\n")
    return base, model, tmp_path / "checkpoint.pth", tmp_path / "ranks.txt"


@pytest.mark.parametrize("listed", [True, False])
def test_a_paper_checkpoint_gives_the_same_outputs(paper, listed, tmp_path):
    base, expected, checkpoint, ranks = paper
    before = copy.deepcopy(base.state_dict())
    model = import_paper(checkpoint, ranks if listed else None, base)
    torch.testing.assert_close(output(model), output(expected), atol=1e-5, rtol=1e-5)
    plan = {name: entry.keep for name, entry in model.comcat_record.plan.sites.items()}
    assert plan["blocks.1.attn:qk"] == 4 and plan["blocks.1.attn:vo"] == 5
    assert plan["blocks.0.mlp.fc2"] == 7 and "blocks.1.mlp.fc2" not in plan
    assert plan.get("head", 4) == 4
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    loaded = load(save(model, tmp_path / "small"))
    assert torch.equal(output(loaded), output(model))


def test_paper_checkpoints_without_biases_distilled_dense_or_from_data_parallelism(tmp_path):
    base = deit("deit_tiny_distilled_patch16_224")
    expected = paper_model(base, bias=False, head=False)
    state = dict(expected.state_dict())
    attention = base.blocks[0].attn  # left dense: the paper's code keeps three projections there
    state = {k: v for k, v in state.items() if not k.startswith("blocks.0.attn.")}
    for kind in ("weight", "bias"):
        parts = attention.qkv.get_parameter(kind).detach().chunk(3)
        state |= {f"blocks.0.attn.{n}.{kind}": t for n, t in zip(("w_qs", "w_ks", "w_vs"), parts, strict=True)}
        state[f"blocks.0.attn.proj.{kind}"] = attention.proj.get_parameter(kind).detach()
    expected.blocks[0].attn = attention
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "checkpoint.pth")
    (tmp_path / "ranks.txt").write_text("24,24,6,7,13,15,6,24")  # 13 over three heads is 4 in each
    model = import_paper(tmp_path / "checkpoint.pth", tmp_path / "ranks.txt", base)
    torch.testing.assert_close(output(model), output(expected), atol=1e-5, rtol=1e-5)
    assert "blocks.0.attn:qk" not in model.comcat_record.plan.sites


class Evil:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_a_checkpoint_that_would_run_code_is_refused(paper, tmp_path):
    base, model, checkpoint, ranks = paper
    torch.save({"model": model.state_dict(), "args": Evil(tmp_path / "pwned")}, checkpoint)
    with pytest.raises(StoreError, match=r"refused: it holds \w+\.system, and only tensors"):
        import_paper(checkpoint, ranks, base)
    assert not (tmp_path / "pwned").exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("12,15,6", "lists 3 ranks, expected 8 for the blocks and up to 1"),
        (RANKS.replace("12", "15", 1), r"blocks\.0\.attn:qk: the ranks file says 15.*have 12 \(4 in each of 3 heads\)"),
        (RANKS.replace("7", "8"), r"blocks\.0\.mlp\.fc2: the ranks file says 8, but the weights have 7"),
        (RANKS[:-1] + "3", "head: the ranks file says 3"),
        ("a,b", "no list of ranks"),
        ("", "no list of ranks"),
    ],
)
def test_ranks_that_do_not_fit_the_weights(paper, text, reason):
    base, _, checkpoint, ranks = paper
    ranks.write_text(text)
    with pytest.raises(StoreError, match=reason):
        import_paper(checkpoint, ranks, base)
    with pytest.raises(StoreError, match="cannot be read"):
        import_paper(checkpoint, ranks.with_name("none.txt"), base)


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


ATTENTION, FC1 = "blocks.0.attn.selected_rank_layer", "blocks.0.mlp.fc1.selected_rank_layer"


def zeros(**shapes):
    """A change of a checkpoint: weights of its first attention become zeros of other shapes."""
    return lambda s: {**s, **{f"{ATTENTION}.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: without(s, f"{ATTENTION}.w_ks.weight"), rf"lacks {ATTENTION}\.w_ks\.weight"),
        (lambda s: without(s, "norm.weight"), r"norm\.weight is missing; is base the right"),
        (lambda s: {**s, "norm.weight": torch.zeros(7)}, r"norm\.weight is \(7,\), expected \(24,\)"),
        (lambda s: {**s, "dist_token": torch.zeros(1)}, "no place for: dist_token"),
        (zeros(w_qs=(13, 24)), r"w_qs\.weight is \(13, 24\), expected.*3 heads"),
        (zeros(w_qs=(15, 24)), "w_qs has 15 rows and w_ks 12"),
        (zeros(w_qs=(27, 24), w_ks=(27, 24)), r"weights have 27 \(9 in each"),
        (zeros(proj=(24, 12)), r"proj\.weight is \(24, 12\), expected \(24, 15\)"),
        (lambda s: {**s, f"{FC1}.last_factor.weight": torch.zeros(96, 5)}, "do not multiply"),
        (lambda s: {**s, f"{FC1}.middle_factor.weight": torch.zeros(1)}, "no place for: .*middle_factor"),
        (lambda s: {k: v for k, v in s.items() if "selected" not in k}, "no checkpoint of COMCAT's published code"),
        (lambda s: {"epoch": 3}, r"holds no weights.*'epoch' \(int\)"),
        (lambda s: [1], "holds no weights.*a list"),
    ],
)
def test_checkpoints_that_do_not_fit(paper, change, reason):
    base, model, checkpoint, ranks = paper
    torch.save(change(dict(model.state_dict())), checkpoint)
    with pytest.raises(StoreError, match=reason):
        import_paper(checkpoint, ranks, base)


def test_a_rank_above_the_width_of_a_head(paper):
    base, model, checkpoint, _ = paper
    torch.save(zeros(w_qs=(27, 24), w_ks=(27, 24))(dict(model.state_dict())), checkpoint)
    with pytest.raises(StoreError, match=r"blocks\.0\.attn:qk: got rank 9, expected 1 to 8"):
        import_paper(checkpoint, base=base)


def test_checkpoints_that_are_none(paper, tmp_path):
    base, _, checkpoint, ranks = paper
    with pytest.raises(StoreError, match="no checkpoint"):
        import_paper(tmp_path / "none.pth", ranks, base)
    content = checkpoint.read_bytes()
    for damaged in (content[: len(content) // 2], b"not a checkpoint", b""):
        checkpoint.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged or no checkpoint"):
            import_paper(checkpoint, ranks, base)


def test_a_base_that_is_another_architecture(paper):
    _, _, checkpoint, ranks = paper
    with pytest.raises(StoreError, match=r"w_qs\.weight is \(12, 24\), expected.*192"):
        import_paper(checkpoint, ranks, "timm:deit_tiny_patch16_224")
    with pytest.raises(ModelError, match="did you mean"):
        import_paper(checkpoint, ranks, "timm:deit_tiny_patch16_225")
    biasless = deit(qkv_bias=False)
    with pytest.raises(StoreError, match=r"trained query bias.*qkv_bias=True"):
        import_paper(checkpoint, ranks, biasless)
