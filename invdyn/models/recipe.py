"""How a model is trained unless a command says otherwise: the `training` mapping of a model config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from invdyn.config import Config


class TrainingRecipe(Config):
    """Optimisation settings; flags of the train command override them one by one.

    Attributes:
        batch_size: rows per step over all workers.
        learning_rate: peak learning rate of Adam.
        num_epochs: passes over the training split.
        schedule: "constant", or "cosine" from the peak to zero.
        warmup_fraction: share of all steps over which the learning rate rises from zero to the peak.
        ema_decay: decay of the moving average of the weights that is kept as the model; null keeps the weights.
        weight_decay: decoupled weight decay (AdamW).
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        base_fraction: share of all steps that train the "mlp" base of a flow, before it is fixed and the flow learns
            what it leaves; each part has a schedule of its own. Models without such a base have one part.
        student_steps: of a flow that needs few steps, trained after the run from its samples (`RUN_DIR/student`): its
            number of Euler steps; null trains none.
        seed: of the weights, the order of the rows and the noise.
    """

    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    num_epochs: int = Field(default=100, ge=1)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: float = Field(default=0.02, ge=0, lt=1)
    ema_decay: float | None = Field(default=0.999, gt=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    base_fraction: float = Field(default=0.5, gt=0, lt=1)
    student_steps: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
