"""IBTM: Information-Bottleneck inspired Token Merging (DESIGN 3.2).

A site's mask is the previous site's mask moved one step down the gradient of the information bottleneck's bound. The soft
mask w = sigmoid(g) weighs tokens in their averages; the hard mask merges informative tokens last.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..constants import constant
from ..information import ib_step_matrix
from ..tokens import Route, bipartite, less, similarity, unit
from .base import Merger, Tokens
from .controls import even_runs
from .products import NormProducts, with_vector
from .tome import threshold_mask

MASK_CLUSTERS = 128  # C and L stay in float: with 256, merged mobilevit_s in int8 is 0.31 of fp32 instead of 0.28


class IBStep(nn.Module):
    """One gradient step of a site's mask logits, without labels.

    Buffers, refreshed from training data by `finetune` (all zero, hence no step, until then): centroids C [A, D] of
    pooled features (A: the number of classes, at most MASK_CLUSTERS), likelihood Q [A, classes], prior pi [classes], and
    step L [A, A], which follows from Q and pi.
    Learned: eta > 0, the step length, from 1 / (2 beta sqrt(D)): LayerNormed tokens have length sqrt(D) and v carries
    2 beta, so the first step moves logits by about the spread of psi, well inside the sigmoid. The labels enter only
    through the buffers.
    """

    centroids: Tensor
    likelihood: Tensor
    prior: Tensor
    step: Tensor

    def __init__(self, dim: int, classes: int, clusters: int | None = None, beta: float = 10.0) -> None:
        super().__init__()
        clusters = clusters or max(2, min(MASK_CLUSTERS, classes))
        self.beta, self.conditional = beta, True
        self.log_eta = nn.Parameter(torch.tensor(-math.log(2 * beta * math.sqrt(dim))))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.register_buffer("centroids", torch.zeros(clusters, dim))
        self.register_buffer("likelihood", torch.zeros(clusters, classes))
        self.register_buffer("prior", torch.zeros(classes))
        self.register_buffer("step", torch.zeros(clusters, clusters))

    @property
    def eta(self) -> Tensor:
        return torch.exp(self.log_eta)

    def pooled(self, normed: Tensor | NormProducts, mass: Tensor) -> Tensor:
        """x~ [B, D]: the LayerNormed tokens [B, N, D] averaged with mass w s [B, N], L2-normalised.

        Any multiple stands for the average: normalising drops the difference.
        """
        if isinstance(normed, NormProducts):
            return unit(normed.mean(mass))
        batch, count, width = normed.shape
        return unit((mass.reshape(batch, 1, count) @ normed).reshape(batch, width))

    def forward(self, normed: Tensor | NormProducts, logits: Tensor, size: Tensor) -> Tensor:
        """g - eta <z_n, v> for LayerNormed tokens [B, N, D], logits g [B, N] and sizes [B, N] -> [B, N].

        v is `information.ib_gradient` on the sphere, sums written as matrix products, which every delegate takes.
        """
        x = self.pooled(normed, torch.sigmoid(logits) * size)
        if isinstance(normed, NormProducts):
            return logits - normed.along(self._gradient(x, mean_free=True), self.eta)
        return logits - with_vector(normed, self._gradient(x) * self.eta)

    def _gradient(self, x: Tensor, mean_free: bool = False) -> Tensor:
        """v [B, D] at x~ [B, D]; mean_free: less its mean, where x~ has none."""
        scaled = (2 * self.beta) * self.centroids  # 2 beta C and beta |C|^2 are constants of an exported graph
        squares = (scaled * self.centroids) @ constant("ones", x.shape[-1], like=x)
        if mean_free:
            scaled = scaled - scaled.mean(-1, keepdim=True)
        near = F.linear(x, scaled, -0.5 * squares.reshape(-1))
        phi = torch.softmax(near, -1)
        psi = F.linear(phi, self.step)
        if self.conditional:
            psi = psi + near  # log phi but for a constant, which the next line takes away
        v = (phi * (psi - (phi * psi) @ constant("ones", phi.shape[-1], like=x))) @ scaled
        return v - ((v * x) @ constant("ones", x.shape[-1], like=x)) * x

    @torch.no_grad()
    def load_statistics(self, centroids: Tensor, likelihood: Tensor, prior: Tensor) -> None:
        """Set C [A, D], Q [A, classes] and pi [classes], and L from them."""
        self.centroids.copy_(centroids)
        self.likelihood.copy_(likelihood)
        self.prior.copy_(prior)
        self.step.copy_(ib_step_matrix(likelihood, prior))


class IBTM(Merger):
    """The mask module of a site: soft mask, hard mask, and the straight-through decision.

    lambda > 0 (log_lambda) protects informative tokens: score = cosine - lambda sigmoid(g of the one to disappear).
    theta (threshold) gives decisions a gradient in training; the count is fixed. Where convolutions follow on the merged
    map, pairs chosen by content cost more than they save (docs/LOG.md, 2026-11-25): there runs of neighbours merge, the
    same in every line, and the mask only weighs.
    """

    ignores_mean = True

    def __init__(self, dim: int, classes: int = 0, *, soft_weights: bool = True) -> None:
        super().__init__(dim, classes)
        self.soft_weights = soft_weights
        self.information = IBStep(dim, max(classes, 2))
        self.first_logits: nn.Linear | None = nn.Linear(dim, 1)
        nn.init.zeros_(self.first_logits.weight)
        nn.init.zeros_(self.first_logits.bias)
        self.log_lambda: nn.Parameter | None = nn.Parameter(torch.tensor(math.log(0.1)))
        self.threshold: nn.Parameter | None = nn.Parameter(torch.tensor(0.9))

    def settle(self, *, first: bool, attention: bool, convolved: bool) -> None:
        if not first:
            self.first_logits = None
        if convolved:
            self.log_lambda = self.threshold = None

    def prepare(self, tokens: Tokens) -> Tokens:
        normed, logits = self._normed(tokens)
        if tokens.logits is not None:
            logits = tokens.logits
        logits = self.information(normed, logits, tokens.size)
        mask = torch.sigmoid(logits)
        weight = mask.clamp_min(1e-4) if self.soft_weights else None
        penalty = None if self.log_lambda is None else mask
        return tokens.with_(logits=logits, weight=weight, penalty=penalty)

    def _normed(self, tokens: Tokens) -> tuple[Tensor | NormProducts, Tensor]:
        """The LayerNormed tokens, and the logits of a site that is handed none."""
        first, norm = self.first_logits, self.information.norm
        # only where comparisons follow: elsewhere Core ML computes the mask in half precision, which squares overflow
        squares = tokens.squares if tokens.summary is None and self.log_lambda is not None else None
        if squares is not None and torch.compiler.is_exporting():
            products = NormProducts(tokens.z, squares, norm.eps, None if first is None else first.weight)
            return products, tokens.size * 0.0 if products.of_vector is None else products.of_vector + first.bias  # type: ignore[union-attr]
        normed = norm(tokens.z if tokens.summary is None else tokens.summary())
        return normed, tokens.size * 0.0 if first is None else first(normed).reshape(normed.shape[:2])

    def route(self, tokens: Tokens, keep: int) -> Route:
        if self.threshold is None:
            return even_runs(tokens, keep)
        scores = similarity(tokens.metric)
        if tokens.penalty is not None and self.log_lambda is not None:
            scores = less(scores, tokens.penalty, torch.exp(self.log_lambda))
        soft = threshold_mask(scores, self.threshold) if self.training else None
        return bipartite(scores, keep, prefix=tokens.prefix, ordered=tokens.ordered, soft=soft)
