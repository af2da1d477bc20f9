import pytest

from every_byte.units import GB, MB, GiB, KiB, MiB, binary, grouped, mb, short, unit


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (KiB, "1024 bytes"),  # a unit begins above its first multiple, as in PyTorch
        (KiB + 512, "1.50 KiB"),
        (20 * MiB, "20.00 MiB"),
        (GiB, "1024.00 MiB"),
        (6 * GiB, "6.00 GiB"),
    ],
)
def test_binary_is_written_as_pytorch_writes_it(nbytes: int, text: str) -> None:
    assert binary(nbytes) == text


def test_decimal_units() -> None:
    assert mb(204_032_512) == "204.03 MB"
    assert grouped(204_032_512) == "204,032,512"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (0, "0"),
        (-512, "-512 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (204_032_040, "204 MB"),
        (999_600_000, "1.00 GB"),
        (1_037_597_184, "1.04 GB"),
        (99_960_000_000, "100 GB"),
        (1_234_567_000_000, "1,235 GB"),
    ],
)
def test_three_digits(nbytes: int, said: str) -> None:
    assert short(nbytes) == said


def test_a_gain_has_its_sign() -> None:
    assert (short(1_500, plus=True), short(-1_500, plus=True)) == ("+1.50 kB", "-1.50 kB")


def test_a_unit_begins_where_three_digits_would_not_do() -> None:
    assert unit(0) == unit(999_499) == (1000, "kB")
    assert unit(999_500) == unit(-834_632_192) == (MB, "MB")
    assert unit(999_500_000) == unit(10**13) == (GB, "GB")
