"""What an adapter costs on Stable Diffusion's true shapes, with random weights: bytes stored, a training step's time
and memory, inference.

The goals: stored at rank 2 in float16, at most 1.7 MB for cross-attention and 3.3 MB with self-attention. A training
step at most 0.8× Custom Diffusion's and 0.4× DreamBooth's as published (prior preservation, pictures and prompts
encoded at every step; the paper: 0.81 and 0.38), at most 1.0× LoRA's with the same cache, and no more memory than
LoRA's at equal bytes. Inference at most 1.05× the plain model's, fused 1.02×.

All methods take turns on one pipeline, round after round; a ratio is of one round, and its median and quartiles are
reported. On a CPU pictures are small (``--side 64``: 8×8 latents). On a GPU: ``--device cuda --side 512 --dtype
bfloat16``, and with ``--model sdxl --side 1024``. ``--model flux2-klein`` measures the transformer's training step
alone (``benchmarks/card/flux2.py``).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, parser, quartiles, ratio_of_rounds, synchronize, table, write
from peers import (
    ATTENTION,
    EncodingSource,
    Kind,
    Method,
    cached_source,
    comcat_all,
    comcat_plain,
    custom_diffusion,
    dreambooth,
    equal_rank,
    lora,
    peak_of_step,
)
from PIL import Image

import comcat.diffusion as diffusion
from comcat.diffusion.digits.vocabulary import make_tokenizer
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import Family, family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.diffusion.pipeline.residence import frozen
from comcat.runs.processes import Processes
from comcat.runs.watching import LossWatch

IDENTIFIER, PROMPT, CLASS_PROMPT = "V*", "a photo of V* dog", "a photo of a dog"
UNETS: dict[str, dict[str, Any]] = {
    "sd14": {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SMOKE = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4, "norm_num_groups": 8}
GOALS = {"cross": 1.7e6, "all": 3.3e6}


def build(a: argparse.Namespace) -> Any:
    """The pipeline with random weights, on the device and in the dtype asked for."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    smoke = a.smoke
    with torch.device(a.device):  # billions of random weights take minutes on a CPU
        unet = UNet2DConditionModel(**UNETS[a.model] | (SMOKE if smoke else {}))
        vae = AutoencoderKL(**VAE | ({"block_out_channels": (8,) * 4, "norm_num_groups": 4} if smoke else {}))
    words = "a photo of dog".split()
    tokenizer = make_tokenizer(words, identifiers=[IDENTIFIER], length=77)

    def text(shape: dict[str, int], kind: Any = CLIPTextModel) -> Any:
        shape = shape | ({"num_hidden_layers": 1, "intermediate_size": 64} if smoke else {})
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        }
        config = CLIPTextConfig(
            **shape, **ids, vocab_size=len(tokenizer) if smoke else 49408, max_position_embeddings=77,
            projection_dim=shape["hidden_size"],
        )  # fmt: skip
        with torch.device(a.device):
            return kind(config)

    beta: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
    }
    if a.model == "sd14":
        pipe: Any = StableDiffusionPipeline(
            vae=vae, text_encoder=text(CLIP_L), tokenizer=tokenizer, unet=unet,
            scheduler=PNDMScheduler(skip_prk_steps=True, **beta),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    else:
        pipe = StableDiffusionXLPipeline(
            vae=vae, text_encoder=text(CLIP_L), text_encoder_2=text(CLIP_G, CLIPTextModelWithProjection),
            tokenizer=tokenizer,
            tokenizer_2=make_tokenizer(words, identifiers=[IDENTIFIER], length=77), unet=unet,
            scheduler=EulerDiscreteScheduler(**beta),
        )  # fmt: skip
    return pipe.to(device=a.device, dtype=getattr(torch, a.dtype))


def stored(pipe: Any) -> dict[str, dict[str, float]]:
    """Size of the adapter's file at rank 2 in float16, beside the goal."""
    found = {}
    for where in ("cross", "all"):
        with tempfile.TemporaryDirectory() as folder:
            adapter = diffusion.attach(pipe, rank=2, where=where)
            path = diffusion.save(pipe, Path(folder) / "adapter.safetensors", identifier=IDENTIFIER, prompt=PROMPT)
            found[where] = {
                "bytes": path.stat().st_size,
                "parameters": sum(p.numel() for p in adapter.parameters()),
                "goal": GOALS[where],
            }
            diffusion.unload(pipe)
    return found


def contenders(family: Family, sizes: dict[str, dict[str, float]]) -> dict[str, tuple[Callable[..., Method], str]]:
    """Name → how it is set up, and how its steps are fed: cached, or as published."""
    crossing = r".*\.attn2\.to_(q|k|v|out\.0)"
    cross, both = (int(sizes[w]["parameters"]) for w in ("cross", "all"))
    ranks = {
        "cross": equal_rank(family.denoiser, crossing, cross),
        "small": equal_rank(family.denoiser, ATTENTION, cross),
        "all": equal_rank(family.denoiser, ATTENTION, both),
    }
    return {
        "comcat": (comcat_plain, "cached"),
        "comcat, all attention": (comcat_all, "cached"),
        f"LoRA rank {ranks['small']}, all attention, bytes as comcat": (partial(lora, rank=ranks["small"]), "cached"),
        f"LoRA rank {ranks['cross']}, cross-attention, bytes as comcat": (partial(lora, rank=ranks["cross"],
            modules=crossing), "cached"),
        f"LoRA rank {ranks['all']}, all attention, bytes as comcat on all": (partial(lora, rank=ranks["all"]),
            "cached"),
        "Custom Diffusion as published": (partial(custom_diffusion, token=IDENTIFIER), "published"),
        "DreamBooth as published": (dreambooth, "published"),
    }  # fmt: skip


def training(pipe: Any, a: argparse.Namespace, sizes: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Seconds of steps by method, in rounds, and the peak memory of one."""
    family = family_of(pipe)
    image = Image.effect_noise((a.side, a.side), 64).convert("RGB")
    concept, prior = Kind([image], PROMPT, 1, 1.0), Kind([image], CLASS_PROMPT, 1, 1.0)
    methods = {
        n: m
        for n, m in contenders(family, sizes).items()
        if a.only is None or any(o.lower() in n.lower() for o in a.only)
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": None} for name in methods}
    with frozen(family):
        cached = cached_source(family, [concept], a.side, 0, live_text=False)
        for turn in range(a.rounds):
            for name, (set_up, feeding) in methods.items():
                method = set_up(family, seed=0)
                source = cached if feeding == "cached" else EncodingSource(family, [concept, prior], a.side, 0)
                run = Optimisation(
                    family, noising_of(pipe.scheduler), method.trained, source,
                    CustomizeSettings(steps=10**6, lr=1e-6, checkpoint_every=0),
                    Processes(cpu=family.device.type == "cpu"),
                )  # fmt: skip
                run.step(run.progress.step, LossWatch())  # the optimizer's moments come with the first
                found[name]["seconds"].append([_seconds(run) for _ in range(a.repeats)])
                if turn == 0:
                    found[name]["peak_bytes"] = _peak(run, family, feeding, method)
                    found[name]["parameters"] = sum(p.numel() for p in method.trained.values())
                method.undo.close()
                for parameter in method.trained.values():
                    parameter.requires_grad_(False)
                    parameter.grad = None
                del run, method
            print(
                f"round {turn + 1}: " + ", ".join(f"{n} {min(f['seconds'][-1]):.3f} s" for n, f in found.items()),
                flush=True,
            )
    return found


def _seconds(run: Optimisation) -> float:
    run.optimizer.zero_grad(set_to_none=True)
    synchronize()
    start = time.perf_counter()
    run.step(run.progress.step, LossWatch())
    synchronize()
    return time.perf_counter() - start


def _peak(run: Optimisation, family: Family, feeding: str, method: Method) -> int:
    """Of one step: on a GPU the allocator's peak, without what a method does not need; on a CPU storages alive."""
    if family.device.type != "cuda":
        return peak_of_step(run, family, encoding=feeding == "published", live_text=method.live_text)
    idle = (
        []
        if feeding == "published"
        else [m for n, m in family.pipe.components.items() if n in ("vae", "text_encoder", "text_encoder_2")]
    )
    for module in idle:
        module.to("cpu")
    run.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run.step(run.progress.step, LossWatch())
    synchronize()
    peak = torch.cuda.max_memory_allocated()
    for module in idle:
        module.to(family.device)
    return peak


def inference(pipe: Any, a: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of one call of the denoiser with classifier-free guidance (batch 2): plain, with an adapter, fused; in
    rounds.
    """
    family = family_of(pipe)
    side = a.side // pipe.vae_scale_factor
    with torch.no_grad():
        conditions = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in family.encode([PROMPT]).items()}
        conditions |= {
            k: v.to(family.device).repeat(2, 1) for k, v in family.framing((a.side,) * 2, (0, 0), a.side).items()
        }
        latents = torch.randn(2, 4, side, side, device=family.device, dtype=conditions["prompt"].dtype)
        times = torch.full((2,), 500, device=family.device)
        call = partial(family.predict, latents, times, conditions)
        seconds: dict[str, list[float]] = {"plain": [], "adapter": [], "fused": []}
        for _ in range(a.rounds):
            for state in seconds:
                if state != "plain":
                    diffusion.attach(pipe, rank=2, init="random")
                if state == "fused":
                    diffusion.fuse(pipe)
                call()
                seconds[state] += interleaved({"call": call}, a.repeats)["call"]
                if state == "fused":
                    diffusion.unfuse(pipe)
                if state != "plain":
                    diffusion.unload(pipe)
    return seconds


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    p = parser(__doc__)
    p.add_argument("--model", default="sd14", choices=[*UNETS, "flux2-klein"])
    p.add_argument("--side", type=int, default=64, help="pixels")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--repeats", type=int, default=2, help="steps (calls) of each method in a round; the fastest counts")
    p.add_argument("--only", nargs="*", help="of the training methods, those whose names contain one of these")
    p.add_argument("--rank", type=int, default=2, help="of ours; flux2-klein alone")
    p.add_argument("--gradient-checkpointing", action="store_true", help="flux2-klein alone")
    p.add_argument("--threads", type=int)
    p.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
    p.add_argument("--name", default=None)
    a = p.parse_args(arguments)
    if a.smoke and a.model == "sdxl":
        p.error("--smoke is for sd14 and flux2-klein")
    if a.threads:
        torch.set_num_threads(a.threads)
    result = of_transformer(a) if a.model == "flux2-klein" else of_pipeline(a)
    if not all(math.isfinite(r["seconds"]) for r in result["training"].values()):
        raise SystemExit("a time is no number")
    if not a.no_write:
        write(a.name or f"adapter-cost-{a.model}-{a.side}", result)
    return result


def of_transformer(a: argparse.Namespace) -> dict[str, Any]:
    from card.flux2 import cost

    return cost(a)


def of_pipeline(a: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of Stable Diffusion."""
    pipe = build(a)
    sizes = stored(pipe)
    for where, size in sizes.items():
        print(f"stored, {where}: {size['bytes'] / 1e6:.3f} MB (goal {size['goal'] / 1e6} MB)", flush=True)
    steps = training(pipe, a, sizes)
    best = {name: [min(turn) for turn in found["seconds"]] for name, found in steps.items()}
    rows: dict[str, Any] = {}
    for name, found in steps.items():
        against = {ours: ratio_of_rounds(best[ours], best[name]) for ours in best if ours.startswith("comcat")}
        rows[name] = {
            "seconds": statistics.median(best[name]), "peak_bytes": found["peak_bytes"],
            "parameters": found["parameters"],
            "rounds": best[name], "of_this": against,
        }  # fmt: skip
    shown = [
        [n, r["seconds"], f"{r['peak_bytes'] / 1e6:.0f}", f"{r['parameters']:,}",
         *(quartiles(v) for v in r["of_this"].values())]
        for n, r in rows.items()
    ]  # fmt: skip
    print()
    table(
        ["training step", "seconds", "memory MB", "trained", *(f"{n} takes" for n in best if n.startswith("comcat"))],
        shown,
    )
    seconds = inference(pipe, a)
    calls = {
        s: {"seconds": statistics.median(v), "of_plain": ratio_of_rounds(v, seconds["plain"])}
        for s, v in seconds.items()
    }
    print()
    table(
        ["inference", "seconds", "of plain"],
        [[s, c["seconds"], quartiles(c["of_plain"], 3)] for s, c in calls.items()],
    )  # fmt: skip
    return {
        "model": a.model, "side": a.side, "dtype": a.dtype, "rounds": a.rounds, "repeats": a.repeats, "smoke": a.smoke,
        "stored": sizes, "training": rows, "inference": calls,
    }  # fmt: skip


if __name__ == "__main__":
    main()
