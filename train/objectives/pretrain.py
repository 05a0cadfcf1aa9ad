"""Next-token prediction: the mean cross-entropy over all tokens that count."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from train.batch import TokenBatch
from train.objective import Models, Objective, Role, Term


@dataclasses.dataclass(frozen=True)
class Pretrain(Objective):
    """-log p(next token), in nats, plus z_loss * logsumexp^2 of the logits (PaLM, section 5)."""

    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits; 1e-4 where it is used."""

    batch: ClassVar = TokenBatch
    roles: ClassVar = {"policy": Role()}

    def weights(self, batch: TokenBatch) -> dict[str, jax.Array]:
        return {"tokens": jnp.sum(batch.loss_mask)}

    def __call__(
        self, models: Models, batch: TokenBatch, weights: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Term]]:
        sums = models.cross_entropy("policy", batch, self.z_loss)
        terms = {"loss": Term(sums.cross_entropy, sums.tokens), "accuracy": Term(sums.correct, sums.tokens)}
        if self.z_loss:
            terms["z_loss"] = Term(sums.loss - sums.cross_entropy, sums.tokens)
        return sums.loss / jnp.maximum(weights["tokens"], 1), terms
