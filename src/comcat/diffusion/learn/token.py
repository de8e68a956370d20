"""A token of its own for the identifier: one more row of each text encoder's embedding, which is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SettingsError
from ...runs.seeding import derive_seed
from ..adapter.records import records, remember
from ..adapter.tokenizers import knows, refresh_tokens
from ..pipeline.families import Family


class LearnedToken:
    """The identifier as a new token in all of a pipeline's tokenizers, belonging to one of its adapters.

    Each embedding begins as that of ``word`` (the mean of its pieces, where it is split). ``parameters`` are the rows,
    float32, by the names that they have in a file. Raises SettingsError if a tokenizer knows the identifier already, or
    nothing of the word.
    """

    def __init__(self, pipe: Any, family: Family, adapter: str, identifier: str, word: str) -> None:
        self.pipe, self.family, self.adapter, self.identifier = pipe, family, adapter, identifier
        self.parameters: dict[str, nn.Parameter] = {}
        self.keys: dict[str, str] = {}
        for component, (tokenizer, encoder) in family.text_encoders().items():
            if knows(tokenizer, identifier):
                raise SettingsError(
                    f"the {component}'s tokenizer has a token {identifier!r} already; choose another identifier"
                )
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if not ids:
                raise SettingsError(
                    f"new_token: the {component}'s tokenizer makes nothing of {word!r}; name another word"
                )
            row = encoder.get_input_embeddings().weight[ids].detach().float().mean(0)
            name = f"{component}.token_embeddings.{identifier}"
            self.keys[name] = component
            self.parameters[name] = nn.Parameter(row.clone())
        self.settle()

    def rows(self) -> dict[str, Tensor]:
        """The embeddings as they are now, by ``component.token``, (width,) each."""
        return {f"{self.keys[n]}.{self.identifier}": p.detach().clone() for n, p in self.parameters.items()}

    def settle(self) -> None:
        """Put the embeddings into the pipeline, as the adapter's."""
        record = records(self.pipe)[self.adapter]
        remember(self.pipe, self.adapter, replace(record, token_embeddings=self.rows(), brought_tokens=True))
        refresh_tokens(self.pipe)

    def learning(self) -> AbstractContextManager[None]:
        """Inside the block the text encoders read the parameters in place of the rows, so that gradients reach them."""
        return self._reading(self.parameters)

    def strangers(self, count: int, seed: int) -> Iterator[AbstractContextManager[None]]:
        """Contexts in which the text encoders read random rows as long and as far apart as those of their words."""
        for number in range(count):
            rows: dict[str, Tensor] = {}
            for name, component in self.keys.items():
                table = self.family.text_encoders()[component][1].get_input_embeddings().weight.detach().float()
                generator = torch.Generator().manual_seed(derive_seed(seed, "stranger", name, number))
                noise = torch.randn(table.shape[1], generator=generator).to(table)
                rows[name] = table.mean(0) + table.std(0) * noise
            yield self._reading(rows)

    @contextmanager
    def _reading(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, row in rows.items():
                tokenizer, encoder = self.family.text_encoders()[self.keys[name]]
                token = tokenizer.convert_tokens_to_ids(self.identifier)
                hook = encoder.get_input_embeddings().register_forward_hook(reading_row(row, token))
                stack.callback(hook.remove)
            yield


def reading_row(parameter: Tensor, token: int) -> Any:
    """A forward hook for an embedding: ``parameter`` (width,) in place of the row of ``token``."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        here = (inputs[0] == token).unsqueeze(-1)  # (batch, tokens, 1)
        return torch.where(here, parameter.to(output), output)

    return hook
