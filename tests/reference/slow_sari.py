"""SARI written out, one n-gram at a time, with fractions: slow and obvious."""

from fractions import Fraction


def slow_sari(source: list[str], answer: list[str], references: list[list[str]]) -> float:
    """SARI of tokenized texts in [0, 1]."""
    total = Fraction(0)
    for n in (1, 2, 3, 4):
        before, after = grams(source, n), grams(answer, n)
        wanted = [gram for reference in references for gram in grams(reference, n)]
        total += keep(before, after, wanted, len(references)) + delete(before, after, wanted, len(references))
        total += add(before, after, wanted)
    return float(total / 12)


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def keep(before: list, after: list, wanted: list, repeats: int) -> Fraction:
    """F of precision, the mean over kinds of kept n-grams, and recall, over n-grams that the references keep."""
    shares, hits, possible = [], 0, 0
    for gram in set(before):
        kept = repeats * min(before.count(gram), after.count(gram))
        hits += min(kept, wanted.count(gram))
        possible += min(repeats * before.count(gram), wanted.count(gram))
        if kept:
            shares.append(Fraction(min(kept, wanted.count(gram)), kept))
    precision = sum(shares) / Fraction(len(shares)) if shares else Fraction(1)
    return f_value(precision, Fraction(hits, possible) if possible else Fraction(1))


def delete(before: list, after: list, wanted: list, repeats: int) -> Fraction:
    """Precision alone: the mean over kinds of deleted n-grams of the share that the references lack too."""
    shares = []
    for gram in set(before):
        deleted = repeats * max(0, before.count(gram) - after.count(gram))
        if deleted:
            shares.append(Fraction(max(0, deleted - wanted.count(gram)), deleted))
    return sum(shares) / Fraction(len(shares)) if shares else Fraction(1)


def add(before: list, after: list, wanted: list) -> Fraction:
    """F over kinds of n-grams that the source lacks."""
    given, needed = set(after) - set(before), set(wanted) - set(before)
    hits = len(given & needed)
    precision = Fraction(hits, len(given)) if given else Fraction(1)
    return f_value(precision, Fraction(hits, len(needed)) if needed else Fraction(1))


def f_value(precision: Fraction, recall: Fraction) -> Fraction:
    return 2 * precision * recall / (precision + recall) if precision + recall else Fraction(0)
