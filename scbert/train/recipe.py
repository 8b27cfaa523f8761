"""The choices that can move a score: what the published scripts do, and what is sound."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Switches between what the published code does and what is sound, one for each choice that can move a score.

    The defaults are `Recipe.sound()`; `Recipe.published()` behaves as the published scripts do.
    """

    sampling: str = "epoch"
    """"epoch": each cell once; "bootstrap": with replacement, which meets 63 % of the cells (published)."""
    leftover_steps: str = "step"
    """What becomes of an epoch's last, incomplete accumulation: a "step", or a "leak" into the next (published)."""
    lr_schedule: str = "per_step"
    """"per_step": linear warm-up over a tenth of the steps, then cosine to zero; "per_epoch": warm restarts."""
    optimizer: str = "adamw"
    """"adamw", or "adam" without weight decay (published)."""
    trainable_layers: str | tuple[int, ...] = "all"
    """Fine-tuning: "all", "last", "head" (frozen encoder), or layer numbers; published (-2,), the last but one."""
    redraw_features: bool = False
    """Redraw random features every 1,000 steps of fine-tuning too (published); pretraining always does."""
    key_stabiliser: str = "head"
    """"head", or "batch" as published, see `ScBertConfig`."""
    select_by: str = "macro_f1"
    """What chooses the best epoch on validation cells: "macro_f1", "loss", or "accuracy" (published)."""
    report_on: str = "test"
    """"test": cells that chose nothing; "validation": the cells that chose the epoch (published)."""
    class_weight: str | None = None
    """None, or "balanced"."""
    thin: float = 1.0
    """Fine-tuning: least share of its counts that a cell keeps, drawn anew in each epoch; 1: all, always (published)."""
    head: str = "sound"
    """"sound", or "published", see `AnnotationHead`; they differ where only expressed genes enter the encoder."""
    until_converged: bool = True
    """Fine-tuning: go on, to twice the epochs, where it still learns, and try another head where it does not (published: no)."""
    scale_loss_by_accumulation: bool = True
    """Divide the loss by the number of accumulated batches (published: in pretraining only)."""

    def __post_init__(self):
        allowed = {
            "sampling": ("epoch", "bootstrap"),
            "leftover_steps": ("step", "leak"),
            "lr_schedule": ("per_step", "per_epoch"),
            "optimizer": ("adamw", "adam"),
            "key_stabiliser": ("head", "batch"),
            "select_by": ("macro_f1", "loss", "accuracy"),
            "report_on": ("test", "validation"),
            "class_weight": (None, "balanced"),
            "head": ("sound", "published"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Recipe.{name} must be one of {values}, not {getattr(self, name)!r}.")
        if isinstance(self.trainable_layers, str) and self.trainable_layers not in ("all", "last", "head"):
            raise ValueError(
                f"Recipe.trainable_layers must be 'all', 'last', 'head' or layer numbers, not {self.trainable_layers!r}."
            )

        if not 0 < self.thin <= 1:
            raise ValueError(f"Recipe.thin must be a share above 0 and up to 1, not {self.thin!r}.")

    @classmethod
    def sound(cls) -> "Recipe":
        """Return the default recipe."""
        return cls()

    @classmethod
    def published(cls) -> "Recipe":
        """Return the switches of the published scripts (commit 262fd4b, fine-tuning).

        Not switches, and so not covered: clipping (`clip_norm` of `pretrain`, 100 there), redraws counted in optimiser
        steps instead of forward passes, and the library size, see `scbert.preprocess.tokenize`.
        """
        return cls(
            sampling="bootstrap",
            leftover_steps="leak",
            lr_schedule="per_epoch",
            optimizer="adam",
            trainable_layers=(-2,),
            redraw_features=True,
            key_stabiliser="batch",
            select_by="accuracy",
            report_on="validation",
            head="published",
            until_converged=False,
            scale_loss_by_accumulation=False,
        )


def make_optimizer(recipe: Recipe, parameters, learning_rate: float):
    """Return the recipe's optimiser of these parameters, those that learn."""
    import torch

    chosen = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    return chosen([parameter for parameter in parameters if parameter.requires_grad], lr=learning_rate)


def learning_rate_at(step: int, n_steps: int, steps_per_epoch: int, peak: float, schedule: str) -> float:
    """Return the learning rate of an optimiser step, counted from 0.

    ``"per_step"``: linear warm-up over the first tenth, then half a cosine down to zero.
    ``"per_epoch"``: the published warm restarts. Constant within an epoch; cycles of 15, 25, 45, ... epochs, each
    five epochs of linear warm-up from peak / 100 and a cosine back to it, the peak shrinking by 0.9 a cycle.
    """
    if schedule == "per_step":
        warm_up = max(1, n_steps // 10)
        if step < warm_up:
            return peak * (step + 1) / warm_up
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up)))
    low, warm_up, cycle, position = peak / 100, 5, 15, step // steps_per_epoch
    while position >= cycle:
        position -= cycle
        cycle = (cycle - warm_up) * 2 + warm_up
        peak *= 0.9
    if position < warm_up:
        return low + (peak - low) * position / warm_up
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (position - warm_up) / (cycle - warm_up)))
