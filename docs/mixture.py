"""Draws mixture.png: one channel of long-tailed features, as batch normalization and as the compound layer model it.

python docs/mixture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from cbn_ext import CompoundBatchNorm1d

HEAD, TAIL = "#4c72b0", "#dd8452"
COMPONENTS = ["#55a868", "#c44e52", "#8172b3", "#937860"]


def density(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """N(x; mean, var), broadcast."""
    return torch.exp(-((x - mean) ** 2) / (2 * var)) / torch.sqrt(2 * torch.pi * var)


def main() -> None:
    """Fit both layers to 10,000 values, 8% of them from the rare classes, by their running averages, and draw."""
    torch.manual_seed(0)
    frequent = torch.cat([torch.randn(6000) * 0.6 - 0.9, torch.randn(3200) * 0.5 + 0.9])
    rare = torch.cat([torch.randn(500) * 0.25 + 3.2, torch.randn(300) * 0.3 + 4.6])
    values = torch.cat([frequent, rare])[:, None]
    compound, batch = CompoundBatchNorm1d(1), torch.nn.BatchNorm1d(1)
    for _ in range(400):
        sample = values[torch.randint(len(values), (2048,))]
        compound(sample), batch(sample)

    x = torch.linspace(-3.2, 6.2, 600)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axis in axes:
        bins = torch.linspace(-3.2, 6.2, 95).numpy()
        weights = [torch.full_like(part, 1 / (len(values) * (bins[1] - bins[0]))).numpy() for part in (frequent, rare)]
        axis.hist(
            [frequent.numpy(), rare.numpy()], bins, weights=weights, stacked=True, color=[HEAD, TAIL], alpha=0.45,
            label=["frequent classes", "rare classes"],
        )  # fmt: skip
        axis.set_xlabel("feature")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].plot(x, density(x, batch.running_mean, batch.running_var), color="black", label="its one Gaussian")
    axes[0].set_title("Batch normalization")
    for m in range(compound.num_components):
        prior, mean, var = (t[m, 0] for t in (compound.running_prior, compound.running_mean, compound.running_var))
        axes[1].plot(x, prior * density(x, mean, var), color=COMPONENTS[m], label=f"component {m + 1}")
    axes[1].set_title("Compound batch normalization, M = 4")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_name("mixture.png"), dpi=110)


if __name__ == "__main__":
    main()
