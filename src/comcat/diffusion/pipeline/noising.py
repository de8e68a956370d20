"""How a pipeline's scheduler mixes latents with noise, and what it wants predicted (Eq. 7 of COMCAT, with its ω_t)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import ModelError


class Noising(Protocol):
    """Draws times and says what is seen and wanted at them. Latents and noise: (batch, channels, height, width)."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times, (count,), as the denoiser takes them."""
        ...

    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noisy latents."""
        ...

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict from them."""
        ...

    def weight(self, times: Tensor) -> Tensor:
        """The weight of each one's squared error, (batch,)."""
        ...


class Diffusion:
    """Discrete times, drawn evenly; the target is the noise, the velocity or the clean latents, as the scheduler says.

    With ``snr_gamma`` γ the error is weighted as min-SNR-γ does (Hang et al. 2023): as if the clean latents were
    predicted, with weight min(SNR, γ).
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        from diffusers import DDPMScheduler

        self.scheduler: Any = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        self.snr_gamma = snr_gamma
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                f"the scheduler wants {self.kind!r} predicted, expected 'epsilon', 'v_prediction' or 'sample'"
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.scheduler), (count,), generator=generator)

    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, times)
        return noise if self.kind == "epsilon" else latents

    def weight(self, times: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return torch.ones(len(times), device=times.device)
        kept = self.scheduler.alphas_cumprod.to(times.device)[times].float()  # α², the share of the signal
        snr = kept / (1 - kept)
        wanted = snr.clamp(max=self.snr_gamma)
        # An error of the noise is 1/SNR times that of the clean latents, squared; one of the velocity 1/(SNR + 1).
        return {"epsilon": wanted / snr.clamp(min=1e-8), "v_prediction": wanted / (snr + 1), "sample": wanted}[
            self.kind
        ]


class Flow:
    """Rectified flow: latents and noise on a straight line, the target is its direction (Esser et al. 2024).

    Times are drawn logit-normally, then shifted as the scheduler's table is.
    """

    def __init__(self, scheduler: Any) -> None:
        self.steps = int(scheduler.config.num_train_timesteps)
        shift = scheduler.config.get("flow_shift")
        if shift is not None:  # a solver of diffusion that is told to follow a flow (Sana's)
            even = torch.linspace(1, 1 / self.steps, self.steps)
            self.sigmas: Tensor = shift * even / (1 + (shift - 1) * even)  # (steps,), from 1 down
        else:
            self.sigmas = type(scheduler).from_config(scheduler.config).sigmas.float()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        even = torch.sigmoid(torch.randn(count, generator=generator))
        return self.steps * self.sigmas[(even * self.steps).long().clamp(max=self.steps - 1)]

    def mix(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        share = (times / self.steps).view(-1, 1, 1, 1).to(latents)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def weight(self, times: Tensor) -> Tensor:
        return torch.ones(len(times), device=times.device)


def noising_of(scheduler: Any, snr_gamma: float | None = None) -> Noising:
    """What the scheduler of a pipeline asks for.

    Raises:
        ModelError: if it is of no known kind; expected one with noise levels in ``alphas_cumprod``, or flow matching.
    """
    solver_of_flow = scheduler.config.get("prediction_type") == "flow_prediction" and "flow_shift" in scheduler.config
    if hasattr(scheduler, "alphas_cumprod") and not solver_of_flow:
        return Diffusion(scheduler, snr_gamma)
    if solver_of_flow or (hasattr(scheduler, "scale_noise") and "shift" in scheduler.config):
        if snr_gamma is not None:
            raise ModelError("snr_gamma weighs diffusion's noise levels; this pipeline's scheduler is a flow")
        return Flow(scheduler)
    raise ModelError(
        f"cannot train for {type(scheduler).__name__}; expected a scheduler of diffusion steps (DDPM, DDIM, PNDM, DPM, "
        "Euler …) or of flow matching (FlowMatchEulerDiscreteScheduler)"
    )
