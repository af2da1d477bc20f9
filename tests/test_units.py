import pytest

from every_byte.units import GiB, KiB, MiB, binary, grouped, mb


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
