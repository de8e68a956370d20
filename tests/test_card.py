"""On a CUDA card models become small as they do on a CPU, and compute there what they compute here."""

import copy

import pytest
import torch

import comcat
from comcat.measure.latency import measure_latency
from comcat.modules.lowrank import LowRankAttention

from .models import pictures, tiny_vit

pytestmark = pytest.mark.gpu

WAYS = {
    "default": {"reduce": 0.3, "multiple": 1},
    "ranks of heads": {"reduce": 0.3, "multiple": 1, "forms": "ranks", "per_head": True},
    "weights": {"reduce": 0.3, "multiple": 1, "statistic": "weights"},
    "in turn": {"reduce": 0.3, "multiple": 1, "sequential": True},
    "with tokens": {"reduce": 0.3, "multiple": 1, "budget": "macs", "forms": "ranks,units,tokens"},
}


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Convolutions in full float32, as a CPU has them."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def far(a, b):
    return float((a.float().cpu() - b.float().cpu()).norm() / b.float().cpu().norm())


def images(count=6):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_compress(way):
    here = comcat.compress(tiny_vit(), pictures(), **WAYS[way])
    there = comcat.compress(tiny_vit().cuda(), pictures(), **WAYS[way])
    assert all(p.is_cuda for p in there.parameters())
    keeps = [{n: e.keep for n, e in m.comcat_record.plan.sites.items()} for m in (here, there)]
    assert keeps[0].keys() == keeps[1].keys()
    if keeps[0] == keeps[1]:  # two choices may be equally good
        assert far(there(images().cuda()), here(images())) < 1e-3
    low = copy.deepcopy(there).to(torch.bfloat16)
    assert far(low(images().cuda().bfloat16()), there(images().cuda())) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("how", ["similar", "grid", "drop"])
def test_merged_tokens(how):
    model = tiny_vit(depth=4)
    plan = comcat.merge(model, pictures(), keep=0.75, how=how)
    comcat.apply_(model, plan)
    there = copy.deepcopy(model).cuda()
    assert far(there(images().cuda()), model(images())) < 1e-3
    low = there.half()
    assert low(images().cuda().half()).isfinite().all()


def test_saved_and_loaded_there(tmp_path):
    small = comcat.compress(tiny_vit().cuda(), pictures(), reduce=0.3, multiple=1)
    comcat.save(small, tmp_path / "small")
    again = comcat.load(tmp_path / "small", device="cuda")
    with torch.no_grad():
        assert torch.equal(again(images().cuda()), small(images().cuda()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(16, 32), (16, 48), (32, 48), (48, 64), (64, 16), (3, 8), (5, 5), (8, 8)])
def test_two_widths(ranks, dtype):
    """The result is that of float32 on a CPU, whatever the memory held before."""
    torch.manual_seed(0)
    here = LowRankAttention(48, 48, 6, *ranks, scale=0.25).eval()
    there = copy.deepcopy(here).to("cuda", dtype)
    for tokens in (17, 65, 197):
        x = torch.randn(4, tokens, 48)
        mask = torch.randn(4, 1, 1, tokens)
        for m in (None, mask):
            poison = torch.full((2**26,), float("nan"), device="cuda")
            del poison
            found = there(x.to("cuda", dtype), None if m is None else m.to("cuda", dtype))
            assert far(found, here(x, m)) < (1e-4 if dtype == torch.float32 else 0.03)


def test_two_widths_give_gradients():
    torch.manual_seed(0)
    here = LowRankAttention(48, 48, 3, 8, 16, scale=0.25)
    there = copy.deepcopy(here).to("cuda", torch.bfloat16)
    x = torch.randn(2, 17, 48)
    for module, y in ((here, x), (there, x.to("cuda", torch.bfloat16))):
        module(y).float().square().sum().backward()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        assert far(q.grad, p.grad) < 0.05


def test_compiled():
    small = comcat.compress(tiny_vit().cuda(), pictures(), reduce=0.3, multiple=1)
    with torch.no_grad():
        assert far(torch.compile(small)(images().cuda()), small(images().cuda())) < 1e-4


def test_time_is_measured_there(tmp_path):
    model = tiny_vit(embed_dim=96, depth=2).cuda()
    found = measure_latency(model, comcat.find_sites(model), images(1).cuda(), batch=8, quick=True, cache=tmp_path)
    assert found.facts["device"] == torch.cuda.get_device_name() and found.whole > 0
    assert found.facts["measured_now"] == found.facts["parts"] > 4
