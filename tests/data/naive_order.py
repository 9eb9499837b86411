"""The order of rows, written out: whole lists instead of arithmetic on numbers."""

import hashlib
import math
from fractions import Fraction

from mosaicjax.data.order import order_seed

WORD = 2**64


def mixed(key):
    key = (key + 0x9E3779B97F4A7C15) % WORD
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) % WORD
    return key ^ (key >> 31)


def shuffled(count, key):
    """A Feistel network over two digits, walked along until it lands inside; as a list."""
    tens = next(i for i in range(count + 1) if i * i >= count)
    units = -(-count // tens)

    def once(number):
        ten, unit = divmod(number, units)
        for turn in range(6):
            noise = mixed((mixed(key) + (unit if turn % 2 == 0 else ten) + turn * 2**40) % WORD) >> 16
            if turn % 2 == 0:
                ten = (ten + noise) % tens
            else:
                unit = (unit + noise) % units
        return ten * units + unit

    result = []
    for number in range(count):
        number = once(number)
        while number >= count:
            number = once(number)
        result.append(number)
    return result


def naive_order(rows, seq, seed, epoch, domain="", window=64):
    """One epoch of rows: places in windows, rows of a window's places in turn, then what is left over."""
    base = order_seed(seed, domain)
    longest = max(1, min(2**18 // seq, rows // 128))
    count = rows // longest
    sizes = [rows // count + (place < rows % count) for place in range(count)]
    firsts = [sum(sizes[:place]) for place in range(count)]
    each = rows // count
    key = (base << 32) + epoch
    order = shuffled(count, key)
    inner = {place: shuffled(each, (mixed(key) + place) % WORD) for place in range(count)}
    windows = max(1, count // window)
    small, larger = divmod(count, windows)
    result, at = [], 0
    for number in range(windows):
        size = small + (number < larger)
        for turn in range(each):
            result += [firsts[place] + inner[place][turn] for place in order[at : at + size]]
        at += size
    left = rows % count
    result += [firsts[place] + each for place in (shuffled(left, key) if left else [])]
    return result


def naive_domains(weights, seed, samples):
    """The domain of each sample: numbers a golden section apart, shared among the domains."""
    total = sum(weights)
    near = round(total * (5**0.5 - 1) / 2)

    def unevenness(step):
        ratio, quotients = Fraction(step, total), 0
        while True:
            quotients += math.floor(ratio)
            if ratio.denominator == 1:
                return quotients
            ratio = 1 / (ratio - math.floor(ratio))

    steps = [i for i in range(1, total + 1) if math.gcd(i, total) == 1 and abs(i - near) <= 64]
    steps.sort(key=lambda i: (unevenness(i), abs(i - near), i))
    offset = int.from_bytes(hashlib.blake2b(f"domains/{seed}".encode(), digest_size=8).digest(), "big")
    numbers = [(steps[0] * sample + offset) % total for sample in range(samples)]
    return [next(i for i in range(len(weights)) if number < sum(weights[: i + 1])) for number in numbers]
