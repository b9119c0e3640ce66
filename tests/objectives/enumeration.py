"""Tiny policies over few tokens, so that expectations are sums over every response.

Shape legend: ``S`` all responses, ``T`` tokens of each, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class Language:
    """All responses of ``length`` tokens out of ``vocabulary``; with ``end`` a response stops after that token.

    Shorter responses are padded; ``mask_ST`` says which tokens are there.
    """

    def __init__(self, vocabulary: int, length: int, end: int | None = None) -> None:
        self.vocabulary, self.length = vocabulary, length
        rows, masks = [], []
        for tokens in itertools.product(range(vocabulary), repeat=length):
            stop = length if end is None or end not in tokens else tokens.index(end) + 1
            if any(token != 0 for token in tokens[stop:]):
                continue  # one of the paddings stands for all
            rows.append(tokens)
            masks.append([place < stop for place in range(length)])
        self.responses_ST = torch.tensor(rows)
        self.mask_ST = torch.tensor(masks)

    def __len__(self) -> int:
        return len(self.responses_ST)


class Policy:
    """A softmax of free logits for every prefix, in float64."""

    def __init__(self, language: Language, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.language = language
        self.logits = [
            (
                scale
                * torch.randn(language.vocabulary**t, language.vocabulary, generator=generator, dtype=torch.float64)
            ).requires_grad_()
            for t in range(language.length)
        ]

    def near(self, seed: int, distance: float) -> Policy:
        """Another policy whose logits differ by ``distance`` times normal numbers."""
        other = Policy(self.language, seed, distance)
        for mine, theirs in zip(self.logits, other.logits, strict=True):
            theirs.data += mine.data
        return other

    def all_log_probs_STV(self) -> Tensor:
        """Distribution at each position of each response."""
        prefix_S = torch.zeros(len(self.language), dtype=torch.int64)
        rows = []
        for t in range(self.language.length):
            rows.append(self.logits[t].log_softmax(-1)[prefix_S])
            prefix_S = prefix_S * self.language.vocabulary + self.language.responses_ST[:, t]
        return torch.stack(rows, dim=1)

    def log_probs_ST(self) -> Tensor:
        """Of the tokens of each response; 0 at padding."""
        found_ST = self.all_log_probs_STV().gather(-1, self.language.responses_ST[..., None]).squeeze(-1)
        return torch.where(self.language.mask_ST, found_ST, 0.0)

    def probs_S(self) -> Tensor:
        """Of whole responses; they sum to 1."""
        return self.log_probs_ST().sum(1).exp()

    def gradient(self, scalar: Tensor) -> Tensor:
        """With respect to all logits, flattened."""
        gradients = torch.autograd.grad(scalar, self.logits, materialize_grads=True, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()
