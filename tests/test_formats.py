"""Short forms of numbers, times and texts."""

from deltify.utils.formats import duration, flat, gib, rounded, short


def test_lengths_are_in_units_of_1024():
    lengths = (512, 1024, 1536, 65536, 2**20, 700, 2500)
    assert list(map(short, lengths)) == ["512", "1k", "1.5k", "64k", "1M", "700", "2.44k"]


def test_numbers_have_three_digits():
    numbers = (0, 0.19442, -1.9531, 999, 1000, 16384, 250e6, 1.23e9, -15_000)
    assert list(map(rounded, numbers)) == ["0", "0.194", "-1.95", "999", "1k", "16.4k", "250M", "1.23B", "-15k"]


def test_durations_are_short():
    times = (5, 600, 3 * 3600 + 300, 50 * 3600, 47.99 * 3600)
    assert list(map(duration, times)) == ["5 s", "10 min", "3 h 05 min", "2 d 2 h", "47 h 59 min"]


def test_sizes_and_lines():
    assert gib(3 * 2**30) == "3.0 GiB" and gib(300 * 2**20) == "300 MiB"
    assert flat("a\n\n b\t") == "a b"
