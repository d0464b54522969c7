"""Both orders of the colours: a judge that prefers a colour is found out, and its preference cancels.

A pair is asked about twice, the second time with red and green exchanged:

    p        probability of the first answer to the pair as it is
    q        the same from the exchanged pair: 1 minus its answer, of a yes/no question its answer
    answer   (p + q) / 2
    bias     p - q: of a red/green question above 0 where the judge prefers red

bank     each order has a judgement bank of its own, so a bank that was filled with one order serves as the first, what
         is known of either is never asked again, and the bias can be told from the disk at any time
"""
import torch
import torch.nn as nn

from data.bank import Bank, fill_bank
from relations import MODALITIES, NAMES


class _Around(nn.Module):
    """A judge (judge.AnyJudge) that asks another one, and sees what that one sees."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge
        self.size = judge.size
        self.grid = judge.grid


class OtherOrder(_Around):
    """A judge that answers about a pair by asking another judge about the exchanged pair."""

    def digest(self):
        """As judge.AnyJudge.digest."""
        return f"{self.judge.digest()}, colours exchanged"

    def ask(self, rgb, pts, names=None, modalities=None):
        """As judge.Judge.ask: (B, P, M), the q of the module docstring."""
        prob = self.judge.ask(rgb, pts.flip(-2), names, modalities)
        keeps = torch.tensor([row.yes_no for row in MODALITIES.values()], device=prob.device)
        return torch.where(keeps, prob, 1 - prob)


class BothOrders(_Around):
    """A judge whose answer is the mean over both orders of the colours that another judge gives."""

    @property
    def orders(self):
        """The judges of either order."""
        return self.judge, OtherOrder(self.judge)

    def digest(self):
        """As judge.AnyJudge.digest."""
        return f"{self.judge.digest()}, both orders"

    def ask(self, rgb, pts, names=None, modalities=None):
        """As judge.Judge.ask: (B, P, M); NaN where either order is not known."""
        p, q = (judge.ask(rgb, pts, names, modalities) for judge in self.orders)
        return (p + q) / 2


class OrdersBank:
    """The banks of both orders, as one. first, other  data.bank.Bank of a judge and of its OtherOrder."""

    def __init__(self, first, other):
        self.banks = first, other

    @property
    def folder(self):
        """The folders of both, as text."""
        return " and ".join(str(bank.folder) for bank in self.banks)

    def fill(self, *args, **kwargs):
        """As Bank.fill, with the mean answers."""
        (pts, p), (_, q) = [bank.fill(*args, **kwargs) for bank in self.banks]
        return pts, (p + q) / 2

    def fill_together(self, *args, **kwargs):
        """As Bank.fill_together, with the mean answers."""
        (pts, p), (_, q) = [bank.fill_together(*args, **kwargs) for bank in self.banks]
        return pts, (p + q) / 2

    def bias(self):
        """Colour bias over all pairs that lie in both banks: dict modality -> (pairs, mean p - q, mean |p - q|)."""
        first, other = (bank.entries() for bank in self.banks)
        answers = [(first[key][1], other[key][1]) for key in sorted(first.keys() & other.keys())]
        gaps = [p[:len(q)] - q[:len(p)] for p, q in answers]
        found = {}
        for m, gap in zip(NAMES, torch.cat([torch.empty(0, len(NAMES)), *gaps]).unbind(-1), strict=True):
            gap = gap[gap.isfinite()]
            if len(gap):
                found[m] = len(gap), float(gap.mean()), float(gap.abs().mean())
        return found

    def describe(self):
        """What was asked and known, as Bank.describe, and the bias."""
        asked, known = (sum(getattr(bank, name) for bank in self.banks) for name in ("asked", "known"))
        said = "; ".join(f"{m} {mean:+.3f}, {size:.3f} ({n})" for m, (n, mean, size) in self.bias().items())
        return (f"{asked} pairs asked, {known} already known, each in one of two orders; "
                f"colour bias, mean p - q, mean |p - q| (pairs in the bank): {said or 'not known'}")


def open_bank(folder, judge, both_orders=False):
    """The judgement bank of a judge: a Bank, or the OrdersBank of both orders of the colours."""
    first = Bank(folder, judge)
    return OrdersBank(first, Bank(folder, OtherOrder(judge))) if both_orders else first


def fill_banks(folder, images, judge, pairs, device, both_orders=False):
    """As bank.fill_bank, or that of one order after the other: the bank, as open_bank."""
    first = fill_bank(folder, images, judge, pairs, device)
    return OrdersBank(first, fill_bank(folder, images, OtherOrder(judge), pairs, device)) if both_orders else first
