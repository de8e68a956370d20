"""A training step of FLUX.2 [klein] base 4B's transformer on its true shapes, with random weights: ours beside LoRA.

The transformer alone is built, with random weights on the device, in the dtype asked for. Latents and text states are
random: what is timed is the denoiser's forward and backward and AdamW's update, as a run with cached latents and
prompts has them. LoRA (PEFT's own) is tried at the rank that stores as many parameters as ours, on all layers around
attention, and at the rank 16 that is common, on the layers that diffusers' own script for this model trains.

    python benchmarks/adapter_cost.py --model flux2-klein --device cuda --dtype bfloat16 --side 512    # and --side 1024
    python benchmarks/adapter_cost.py --model flux2-klein --smoke                                      # that it runs
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import quartiles, ratio_of_rounds, synchronize, table
from peers import equal_rank
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.measure.memory import LiveBytes

SHAPE: dict[str, Any] = {
    "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32), "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False,
}  # fmt: skip
SOURCE = (
    "the published transformer/config.json of FLUX.2-klein-base-4B, as diffusers' script that converts klein-4b has it"
)
SMOKE: dict[str, Any] = {
    "in_channels": 8, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2),
}  # fmt: skip
TEXT_TOKENS, PIXELS_A_TOKEN = 512, 16
"""What its pipeline reads of a prompt by default; the VAE's factor 8 times the patches' 2."""
DOUBLE = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
AROUND_ATTENTION = rf"transformer_blocks\.\d+\.attn\.({'|'.join(DOUBLE).replace('.', '[.]')})|{SINGLE}"
OFTEN_TRAINED = rf"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out[.]0)|{SINGLE}"


class Subject:
    """The transformer, one batch of tokens, and the error of its prediction."""

    def __init__(self, a: argparse.Namespace) -> None:
        from diffusers import Flux2Transformer2DModel

        self.dtype, self.device = getattr(torch, a.dtype), a.device
        self.config = SHAPE | (SMOKE if a.smoke else {})
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(a.device):
                self.model: Any = Flux2Transformer2DModel(**self.config).requires_grad_(False).train()
        finally:
            torch.set_default_dtype(before)
        if a.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        side = a.side // PIXELS_A_TOKEN
        draw = partial(torch.randn, device=a.device, dtype=self.dtype)
        self.inputs = {
            "hidden_states": draw(1, side * side, self.config["in_channels"]),
            "encoder_hidden_states": draw(1, TEXT_TOKENS, self.config["joint_attention_dim"]),
            "timestep": torch.full((1,), 0.5, device=a.device, dtype=self.dtype),
            "img_ids": _places(range(1), range(side), range(side), range(1)).to(a.device),
            "txt_ids": _places(range(1), range(1), range(1), range(TEXT_TOKENS)).to(a.device),
            "guidance": None,
        }
        self.wanted = draw(1, side * side, self.config["in_channels"])

    def predict(self) -> Tensor:
        return self.model(**self.inputs).sample

    def error(self) -> Tensor:
        return (self.predict().float() - self.wanted.float()).square().mean()


def _places(*axes: range) -> Tensor:
    """Four coordinates a token: picture, row, column, word."""
    return torch.cartesian_prod(*(torch.arange(float(len(axis))) for axis in axes))


class Step:
    """AdamW on the few parameters of one method."""

    def __init__(self, subject: Subject, trained: dict[str, nn.Parameter], undo: Callable[[], object]) -> None:
        self.subject, self.trained, self.undo = subject, trained, undo
        self.optimizer = torch.optim.AdamW(trained.values(), lr=1e-6)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.subject.error().backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()

    def seconds(self) -> float:
        synchronize()
        start = time.perf_counter()
        self()
        synchronize()
        return time.perf_counter() - start

    def peak(self) -> int:
        """The most bytes that a step holds at once, weights and moments included."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.subject.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self()
            synchronize()
            return torch.cuda.max_memory_allocated()
        moments = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        with LiveBytes([*self.subject.model.parameters(), *moments]) as memory:
            self()
        return memory.peak


def ours(subject: Subject, rank: int) -> Step:
    adapter = diffusion.attach(subject.model, rank=rank)
    return Step(subject, adapter.named_parameters(), lambda: diffusion.unload(subject.model))


def lora(subject: Subject, rank: int, modules: str, dtype: torch.dtype = torch.float32) -> Step:
    from peft import LoraConfig

    torch.manual_seed(0)
    subject.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=modules))
    trained = {n: p for n, p in subject.model.named_parameters() if "lora_" in n}
    for parameter in trained.values():
        parameter.requires_grad_(True).data = parameter.data.to(dtype)
    return Step(subject, trained, subject.model.unload_lora)


def contenders(subject: Subject, rank: int) -> dict[str, Callable[[], Step]]:
    step = ours(subject, rank)
    size = sum(p.numel() for p in step.trained.values())
    step.undo()
    equal = equal_rank(subject.model, AROUND_ATTENTION, size)
    about = f"LoRA rank {equal}, around attention, bytes as comcat"
    return {
        "comcat": partial(ours, subject, rank),
        about: partial(lora, subject, equal, AROUND_ATTENTION),
        f"{about}, in the base's type": partial(lora, subject, equal, AROUND_ATTENTION, subject.dtype),
        "LoRA rank 16, layers of diffusers' script": partial(lora, subject, 16, OFTEN_TRAINED),
    }


def stored_bytes(trained: dict[str, nn.Parameter]) -> int:
    """Size of a safetensors file of them in 16 bit."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stored.safetensors"
        save_file({k: p.detach().to("cpu", torch.float16).contiguous() for k, p in trained.items()}, path)
        return path.stat().st_size


def training(subject: Subject, a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of steps by method, in rounds, the peak memory of one, and what is stored."""
    methods = contenders(subject, a.rank)
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in methods}
    for turn in range(a.rounds):
        for name, set_up in methods.items():
            step = set_up()
            step()  # the optimizer's moments and the kernels' choices come with the first
            found[name]["rounds"].append(min(step.seconds() for _ in range(a.repeats)))
            if turn == 0:
                found[name] |= {
                    "peak_bytes": step.peak(), "parameters": sum(p.numel() for p in step.trained.values()),
                    "stored_bytes": stored_bytes(step.trained),
                    "trained_in": str(next(iter(step.trained.values())).dtype).removeprefix("torch."),
                }  # fmt: skip
            step.undo()
            del step
        print(f"round {turn + 1}: " + ", ".join(f"{n} {f['rounds'][-1]:.3f} s" for n, f in found.items()), flush=True)
    for row in found.values():
        row["seconds"] = statistics.median(row["rounds"])
        row["of_this"] = {"comcat": ratio_of_rounds(found["comcat"]["rounds"], row["rounds"])}
        row["memory_of_this"] = {"comcat": found["comcat"]["peak_bytes"] / row["peak_bytes"]}
    return found


@torch.no_grad()
def inference(subject: Subject, a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of one call of the denoiser: plain, and with an adapter that says something; in rounds."""
    seconds: dict[str, list[float]] = {"plain": [], "adapter": []}
    for _ in range(a.rounds):
        for state, found in seconds.items():
            if state == "adapter":
                diffusion.attach(subject.model, rank=a.rank, init="random")
            subject.predict()
            found.append(min(_timed(subject.predict) for _ in range(a.repeats)))
            if state == "adapter":
                diffusion.unload(subject.model)
    return {
        s: {"seconds": statistics.median(v), "of_plain": ratio_of_rounds(v, seconds["plain"])}
        for s, v in seconds.items()
    }


def _timed(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def cost(a: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one size of picture."""
    subject = Subject(a)
    weights = sum(p.numel() for p in subject.model.parameters())
    print(f"{weights / 1e9:.3f} billion weights, pictures of {a.side} pixels, {a.dtype}", flush=True)
    rows, calls = training(subject, a), inference(subject, a)
    print()
    table(
        ["training step", "seconds", "memory MB", "trained", "stored MB", "comcat takes", "comcat's memory"],
        [[n, f"{r['seconds']:.4f}", f"{r['peak_bytes'] / 1e6:.0f}", f"{r['parameters']:,}", r["stored_bytes"] / 1e6,
          quartiles(r["of_this"]["comcat"]), r["memory_of_this"]["comcat"]] for n, r in rows.items()],
    )  # fmt: skip
    print()
    table(
        ["inference", "seconds", "of plain"],
        [[s, f"{c['seconds']:.4f}", quartiles(c["of_plain"], 3)] for s, c in calls.items()],
    )
    return {
        "model": a.model, "side": a.side, "dtype": a.dtype, "rounds": a.rounds, "repeats": a.repeats, "smoke": a.smoke,
        "rank": a.rank, "gradient_checkpointing": a.gradient_checkpointing, "shape": subject.config,
        "shape_from": "tiny shapes" if a.smoke else SOURCE, "weights": weights, "text_tokens": TEXT_TOKENS,
        "batch": 1, "stored": {"joint": {"bytes": rows["comcat"]["stored_bytes"]}},
        "training": rows, "inference": calls,
    }  # fmt: skip
