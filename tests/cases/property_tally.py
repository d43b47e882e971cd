"""What random cases were made of: how often each option came up, and each pair of options that can meet."""

import collections
import itertools

FEWEST_OF_A_PAIR, ENOUGH_CASES = 20, 2000


class Tally:
    """How often every option and every pair of options of different dimensions came up."""

    def __init__(self):
        self.cases = 0
        self.finite_differences = 0
        self.at_a_kink = 0
        self.options = collections.Counter()
        self.pairs = collections.Counter()
        self.dimensions: dict[str, set[str]] = {}

    def add(self, used):
        self.cases += 1
        named = sorted({(dimension, value) for dimension, value in used.items() if value})
        for dimension, value in named:
            self.dimensions.setdefault(dimension, set()).add(value)
        self.options.update({value for _, value in named})
        self.pairs.update({frozenset(pair) for pair in itertools.combinations({value for _, value in named}, 2)})

    def take_in(self, other):
        """Counts what `other` counted as well."""
        self.cases += other.cases
        self.finite_differences += other.finite_differences
        self.at_a_kink += other.at_a_kink
        self.options += other.options
        self.pairs += other.pairs
        for dimension, values in other.dimensions.items():
            self.dimensions.setdefault(dimension, set()).update(values)

    def rare_pairs(self):
        """Pairs that can be chosen together, and how often they were, from the rarest."""
        values = sorted((value, dimension) for dimension, found in self.dimensions.items() for value in found)
        pairs = {
            frozenset((one, other))
            for (one, first), (other, second) in itertools.combinations(values, 2)
            if one != other and first != second and not excluded({first: one, second: other})
        }
        return sorted((self.pairs[pair], sorted(pair)) for pair in pairs)

    def share(self, *options):
        return sum(self.options[option] for option in options) / self.cases

    def report(self):
        lines = [
            f"{self.cases} accepted cases, {self.finite_differences} also against finite differences "
            f"({self.at_a_kink} more lie on a kink)"
        ]
        lines += [f"  {name:28} {count / self.cases:6.1%}" for name, count in sorted(self.options.items())]
        rarest = ", ".join(f"{' + '.join(pair)}: {count}" for count, pair in self.rare_pairs()[:5])
        return "\n".join([*lines, f"rarest pairs: {rarest}"])

    def check(self):
        """Asserts what the shares of enough cases must be."""
        if self.cases < ENOUGH_CASES:
            return
        assert self.share("more than one block") >= 0.25, self.report()
        assert self.share("transposed", "sliced", "expanded") >= 0.25, self.report()
        few = [(count, pair) for count, pair in self.rare_pairs() if count < FEWEST_OF_A_PAIR]
        assert not few, f"{few}\n{self.report()}"


def excluded(pair):
    """Whether two choices cannot meet: margins and ignored rows need labels, some choices belong to one option."""
    values = set(pair.values())
    if "probabilities" in values:
        labels_only = {"margin", "margins", "slope", "fallback", "scale before the margin", "ignored rows", "labels"}
        return bool(labels_only & pair.keys())
    # What is learned is a tensor, and uint8 has no room for the classes of several blocks.
    not_per_row = {"no smoothing", "label smoothing"}
    if ("learned label_smoothing" in values and values & not_per_row) or values == {"uint8", "more than one block"}:
        return True
    cosine_only = {"slope", "fallback", "scale before the margin"}
    if "additive margin" in values:
        return bool(cosine_only & pair.keys())
    return False
