"""Words and columns of a page with their explanations, for hovering and for the glossary."""

from typing import NamedTuple

from analysis.tables.titles import TITLES


class Term(NamedTuple):
    """A heading, its explanation, and how its numbers are formatted."""

    heading: str
    meaning: str
    form: str = ".3g"


SPECTRUM = {
    "entropy_energy_normalized": Term(
        "entropy / ln\u00a0r",
        "Entropy of the energy shares σᵢ² / Σσ², divided by ln r: 1 for a flat spectrum, 0 for one direction.",
        ".3f",
    ),
    "effective_rank_energy": Term(
        "effective rank (energy)",
        "e to the entropy of the energy shares: about how many directions carry the update. At most r.",
        ".2f",
    ),
    "effective_rank_roy_vetterli": Term(
        "effective rank (Roy–Vetterli)",
        "The same with shares σᵢ / Σσ. Weak directions count more, so it is larger. Other tools may mean this one.",
        ".2f",
    ),
    "stable_rank": Term("stable rank", "‖ΔW‖² (Frobenius) / σ₁²: 1 for one direction, r for a flat spectrum.", ".2f"),
    "top1_energy": Term(TITLES["top1_energy"], "Share of the update's energy in its strongest direction.", ".1%"),
    "frobenius": Term("‖ΔW‖ (Frobenius)", "Size of the update: root of the sum of its squared entries.", ".3g"),
}
PER_TASK = {
    "orthonormality": Term("orthonormality residual", "Largest entry of |XᵀX − I| over the task's adapters.", ".1e"),
    "protection": Term(
        "protection residual", "Largest entry of |FᵀX|: how far adapters reach into protected inputs.", ".1e"
    ),
    "mean_fraction": Term(
        "inputs protected, mean", "Share of the input directions that are protected, mean over layers.", ".1%"
    ),
    "max_fraction": Term("inputs protected, most", "The same in the layer with the most.", ".1%"),
    "prepare": Term("prepare (s)", "Seconds before training: passes over the data, initialisation.", ".1f"),
    "train": Term("train (s)", "Seconds of training.", ".1f"),
    "optimizer": Term("of it in step()", "Share of the training time inside the optimizer.", ".1%"),
    "finish": Term("finish (s)", "Seconds after training: merging, growing the memory, saving.", ".1f"),
    "evaluate": Term("evaluate (s)", "Seconds of evaluation on all tasks.", ".1f"),
    "steps": Term("steps", "Steps of the optimizer.", ".0f"),
}
TESTS = {
    "metric": Term("metric", "What is compared. Shares lie between 0 and 1, cosines between −1 and 1."),
    "value": Term("value", "The number for these updates, all layers together.", ".3f"),
    "chance": Term("chance", "Its mean for updates with the same spectra in random directions.", ".3f"),
    "z": Term("z", "(value − chance) / standard deviation under chance.", ".1f"),
    "p": Term(
        "p", "Probability that random updates reach this value; two-sided for cosines. For this row alone.", ".1e"
    ),
    "below": Term("layers", "Layers that are beyond chance on their own: p below 0.05 after Holm's adjustment.", ".0f"),
    "layers": Term("of", "Layers that were tested.", ".0f"),
}
LEAKAGE = {
    "total": Term("all layers", "Share of the update's energy that acts on inputs protected before it.", ".1e"),
    "worst": Term("worst layer", "The largest share of one layer.", ".1e"),
    "layer": Term("which", "The layer with the largest share."),
    "chance": Term("random", "Share that an update in random directions would have.", ".3f"),
}
ANSWERS = {
    "kl": Term(
        "KL (nats)", "KL divergence of the answers' distributions, before from after: 0 where nothing changed.", ".3f"
    ),
    "top1_change": Term("answers that change", "Share of positions whose most likely answer differs.", ".1%"),
    "loss_before": Term("loss before", "Cross entropy of the text or labels in nats, before the later tasks.", ".3f"),
    "loss_after": Term("loss after", "The same after the later tasks.", ".3f"),
    "loss_change": Term("change of the loss", "Mean of the examples' own differences. Above 0 is forgetting.", "+.3f"),
}
DRIFT = {
    "value": Term("drift", "Σ|ΔW x|² / Σ|W x|²: what the update adds to the layer's outputs on this data.", ".2%"),
    "over_random": Term(
        "over random", "The same over that of an update of its size in random directions. Above 1: it acts here.", ".2f"
    ),
}
GENERAL = {
    "update": Term("update, ΔW", "The change of a layer's weights by one task, ΔW = left rightᵀ."),
    "direction": Term(
        "direction",
        "A pair of singular vectors of ΔW: an input direction that it reads and an output direction that it writes.",
    ),
    "energy": Term("energy", "Squared singular values σ²; their sum is ‖ΔW‖²."),
    "beyond": Term(
        "beyond chance",
        "p is below 0.05 after Holm's adjustment for all pairs, metrics and layers of the page's set of adapters. "
        "For updates in random directions this happens in at most 5 % of the pages.",
    ),
    "interval": Term(
        "interval",
        "Range that holds the number of new examples of the same kind with 95 % confidence, by resampling examples.",
    ),
    "nat": Term("nat", "Unit of entropy and loss with the natural logarithm: 1 nat is 1.44 bits."),
}


def glossary() -> dict[str, Term]:
    """All terms by heading, each once."""
    groups = (GENERAL, ANSWERS, DRIFT, SPECTRUM, TESTS, LEAKAGE, PER_TASK)
    return {term.heading: term for group in groups for term in group.values()}
