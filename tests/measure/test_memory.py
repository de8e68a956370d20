"""Peak memory."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from comcat.measure import count_parameters, peak_memory

from .models import Cached, Calls, timm_vit


def test_peak_memory_by_hand():
    x = torch.randn(4, 256)
    size = x.numel() * 4
    relus = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU())
    assert peak_memory(relus, x) == 3 * size  # the example, and a result made from the one before
    assert peak_memory(nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True)), x) == 2 * size
    assert peak_memory(nn.Sequential(nn.Flatten(), nn.Unflatten(1, (16, 16))), x) == size  # views
    assert peak_memory(Calls(lambda t: [t + 1, t + 2, t + 3]), x) == 4 * size
    assert peak_memory(Calls(lambda t: (t.repeat(1, 8)[:, :1] + 1).relu()), x) == 9 * size + 16
    linear = nn.Linear(256, 64)
    weights = count_parameters(linear) * 4
    assert peak_memory(linear, x) == weights + size + 4 * 64 * 4


def test_peak_memory_counts_shared_weights_once_and_grows_with_the_batch():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    apart = peak_memory(model, torch.randn(2, 32))
    model[1].weight = model[0].weight
    assert apart - peak_memory(model, torch.randn(2, 32)) == 32 * 32 * 4
    vit = timm_vit()
    held = count_parameters(vit) * 4
    one, four = (peak_memory(vit, torch.randn(batch, 3, 32, 32)) - held for batch in (1, 4))
    assert 3.5 * one < four <= 4 * one


def test_tables_built_once_are_held_throughout():
    model = Cached().eval()
    assert peak_memory(model, torch.randn(4, 2)) == 8 + 8 + 32 + 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda_leaves_out_what_others_hold():
    model, x = nn.Sequential(nn.ReLU(), nn.ReLU()).cuda(), torch.randn(1024, 1024, device="cuda")
    alone = peak_memory(model, x)
    other = torch.empty(1 << 26, device="cuda")
    assert peak_memory(model, x) == alone == 3 * x.numel() * 4
    del other


KEPT = """
import resource
import torch
from comcat.measure.memory import memory_kept

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB: 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = pages()
with memory_kept():
    pages()
    inside = pages()
print(before, inside, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own allocator")
def test_what_is_freed_is_kept_for_the_next_tensor():
    said = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True).stdout
    before, inside, after = map(int, said.split())
    assert inside < 100 < min(before, after)  # of thousands, where the system gives no huge pages
