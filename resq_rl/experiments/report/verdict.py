"""The result of a comparison in one sentence, and the points to consider for shipping a policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from resq_rl.experiments.results.comparison import Comparison
from resq_rl.experiments.results.entries import BdEntry, Point
from resq_rl.experiments.results.methods import learned_method, method_of

__all__ = ["Choice", "Verdict", "choices_of", "verdict_of"]

Tone = Literal["fewer", "more", "unclear", "none"]

# Points of accuracy (percent) that a policy may lose against the float network.
ALLOWED_LOSSES: Final = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Verdict:
    """The learned policies against a heuristic.

    Attributes:
        sentence: the finding with its interval, or the reason why there is none.
        scope: the accuracies, clips and seeds that the finding covers.
        tone: whether the learned policies need fewer or more bit-operations; unclear where the interval holds 0 or is
            missing, none without a number.
        anchor: key of the heuristic, or an empty string.
        method: key of the learned policies.
    """

    sentence: str
    scope: str
    tone: Tone
    anchor: str
    method: str


def verdict_of(comparison: Comparison) -> Verdict:
    """The first delta of the learned policies that has a value, as a sentence; deltas are in order of importance."""
    method = learned_method(comparison.fronts)
    own, prefix = method_of(method).title, f"{method}_vs_"
    own, first = (own, own) if own.isupper() else (f"the {own}", f"The {own}")
    if comparison.gains:
        return _budget_verdict(comparison, method, first)
    deltas = {name.removeprefix(prefix): e for name, e in comparison.bd_bops.items() if name.startswith(prefix)}
    if not deltas:
        return Verdict("No learned policy was compared with a heuristic.", "", "none", "", method)
    anchor, entry = next(((name, e) for name, e in deltas.items() if e.value is not None), next(iter(deltas.items())))
    title = method_of(anchor).title
    if entry.value is None:
        reason = f"{first} and {title} cannot be compared at equal accuracy: {entry.reason}."
        return Verdict(reason, "", "none", anchor, method)
    amount = f"{abs(entry.value):.1f}% {'fewer' if entry.value < 0 else 'more'} bit-operations than {title}"
    tone: Tone
    if entry.ci95 is None:
        tone = "unclear"
        sentence = f"{first} needs {amount} at equal accuracy, but the interval is unknown: {entry.reason}."
    elif entry.ci95[0] <= 0 <= entry.ci95[1]:
        tone, (low, high) = "unclear", entry.ci95
        interval = f"95% interval from {low:+.1f}% to {high:+.1f}%"
        sentence = f"No clear difference: at equal accuracy {own} needs {amount} ({interval})."
    else:
        tone, (low, high) = "fewer" if entry.value < 0 else "more", sorted(map(abs, entry.ci95))
        sentence = f"At equal accuracy, {own} needs {amount} (95% interval {low:.1f}% to {high:.1f}%)."
    return Verdict(sentence, _scope(comparison, entry, method), tone, anchor, method)


def _budget_verdict(comparison: Comparison, method: str, first: str) -> Verdict:
    """The gain over the baseline that is the most accurate at the budget."""
    baselines = [name.removeprefix(f"{method}_vs_") for name in comparison.gains]
    anchor = max(baselines, key=lambda key: comparison.at_budget[key].accuracy)
    gain = comparison.gains[f"{method}_vs_{anchor}"]
    tone: Tone = "unclear"
    if gain.ci95 is not None and not gain.ci95[0] <= 0 <= gain.ci95[1]:
        tone = "fewer" if gain.points > 0 else "more"
    words = "more" if gain.points > 0 else "less"
    interval = f"95% interval {gain.ci95[0]:+.1f} to {gain.ci95[1]:+.1f}" if gain.ci95 else str(gain.reason)
    sentence = (
        f"{first} is {abs(gain.points):.1f} points {words} accurate than {method_of(anchor).title}, the best baseline, "
        f"under the same budget ({interval})."
    )
    own, title = comparison.at_budget[method], method_of(method).title
    scope = (
        f"Each method runs at the settings that validated as the most accurate, on {comparison.clips} "
        f"{comparison.split} clips ({comparison.frames:,} frames); {title} reaches {own.accuracy:.3f} "
        f"({comparison.accuracy_metric}; {comparison.float_accuracy:.3f} in float), and its most expensive frame costs "
        f"{own.peak_bops:.3f} of W8A8."
    )
    return Verdict(sentence, scope, tone, anchor, method)


def _scope(comparison: Comparison, entry: BdEntry, method: str) -> str:
    points = comparison.fronts.get(method, ())
    seeds = len({point.settings.get("seed") for point in points})
    low, high = entry.accuracy_range or (0.0, 0.0)
    text = (
        f"Averaged over the accuracies from {low:.3f} to {high:.3f} that both reach ({comparison.accuracy_metric}), on "
        f"{comparison.clips} {comparison.split} clips ({comparison.frames:,} frames); keyframes and the policy's own "
        "network are counted."
    )
    static = sum(bool(point.settings.get("static")) for point in points)
    if static:
        text += (
            f" At {static} of {len(points)} points the policy is its beginning: static thresholds per layer, to which "
            "its network added nothing on the validation clips."
        )
    if entry.ci95 is None:
        return text
    if seeds == 1:
        text += " One training seed: the interval is over clips alone, not over training runs."
    elif seeds:
        text += f" {seeds} training seeds; the interval is over clips and seeds."
    return text


@dataclass(frozen=True)
class Choice:
    """The cheapest point of each of two fronts within a limit of accuracy.

    Attributes:
        loss: the limit, in points below the float network.
        heuristic, learned: the points, or None where a front has none within the limit.
    """

    loss: float
    heuristic: Point | None
    learned: Point | None


def choices_of(comparison: Comparison, anchor: str) -> list[Choice]:
    """For each allowed loss, the cheapest point of the heuristic and of the learned policies."""
    return [
        Choice(
            loss,
            _cheapest(comparison.fronts.get(anchor, ()), comparison.float_accuracy, loss),
            _cheapest(comparison.fronts.get(learned_method(comparison.fronts), ()), comparison.float_accuracy, loss),
        )
        for loss in ALLOWED_LOSSES
    ]


def _cheapest(points: Sequence[Point], float_accuracy: float, loss: float) -> Point | None:
    near = [p for p in points if 100 * (float_accuracy - p.accuracy) <= loss]
    return min(near, key=lambda p: p.bops, default=None)
