"""The coder: compiled and plain agree on every distribution, and a damaged stream is refused."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpq_convert.core import rans as plain
from rpq_convert.kernels import rans


@st.composite
def codes(draw):
    """Codes of any distribution: none, one symbol, few, all, even or skewed."""
    count = draw(st.sampled_from([0, 1, 7, 8, 9, 300, 2000]))
    symbols = draw(st.lists(st.integers(0, 255), min_size=1, max_size=256, unique=True))
    power = draw(st.floats(0, 8))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    share = (1.0 + np.arange(len(symbols))) ** -power
    return torch.from_numpy(generator.choice(symbols, count, p=share / share.sum()).astype(np.uint8))


@settings(deadline=None, max_examples=60)
@given(codes())
@example(torch.zeros(0, dtype=torch.uint8))
@example(torch.arange(256, dtype=torch.uint8).repeat(9))
def test_both_coders_give_the_codes_back(values):
    stream, frequencies = rans.encode(values)
    assert frequencies.dtype == torch.int16 and int(frequencies.sum(dtype=torch.int64)) == 1 << plain.PRECISION
    assert torch.equal(rans.decode(stream, frequencies, tuple(values.shape)), values)
    assert np.array_equal(plain.encode(values.numpy(), frequencies.numpy()), stream.numpy())
    assert np.array_equal(plain.decode(stream.numpy(), frequencies.numpy(), len(values)), values.numpy())
    padded = torch.nn.functional.pad(stream, (0, 5))
    assert torch.equal(rans.decode(padded, frequencies, tuple(values.shape)), values)


def test_a_stream_has_segments_and_takes_the_bits_of_its_codes(monkeypatch):
    values = (torch.randn(2_100_000, generator=torch.Generator().manual_seed(0)) * 4 + 128).round().to(torch.uint8)
    stream, frequencies = rans.encode(values.reshape(-1, 100))
    assert len(plain.segments(len(values))) == 3
    assert torch.equal(rans.decode(stream, frequencies, (21_000, 100)).reshape(-1), values)
    counts = np.bincount(values.numpy(), minlength=256)
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0] / len(values))).sum()) / 8
    assert entropy < len(stream) < entropy * 1.001
    assert abs(
        plain.code_bits(counts, frequencies.numpy()) / 8 + plain.overhead(len(values)) - len(stream)
    ) < 1e-4 * len(stream)


@pytest.mark.parametrize("rate, count", [(4.0, 12345), (0.5, 100), (7.3, 1 << 21), (3.3333, 99999)])
def test_the_least_rate_has_room_and_no_more(rate, count):
    used = plain.stream_bytes(rate, count)
    found = plain.rate_of(used, count)
    assert plain.stream_bytes(found, count) >= used
    assert found <= max(rate, 8 * plain.overhead(count) / count) + 2e-4


@pytest.fixture
def coded():
    values = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 3 + 100).round().to(torch.uint8)
    return values, *rans.encode(values)


def test_damaged_streams_are_refused(coded):
    values, stream, frequencies = coded
    shape = tuple(values.shape)
    for cut in (0, 10, plain.overhead(5000), len(stream) - 2, len(stream) - 1):
        with pytest.raises(ValueError, match="stream"):
            rans.decode(stream[:cut], frequencies, shape)
    with pytest.raises(ValueError, match="too few"):
        rans.decode(stream, frequencies, (1 << 40,))  # before anything is allocated
    with pytest.raises(ValueError, match="do not fit its length"):
        rans.decode(torch.cat([stream, torch.ones(1, dtype=torch.uint8)]), frequencies, shape)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        wrong = stream.clone()
        at = int(torch.randint(len(stream), (), generator=generator))
        wrong[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        with pytest.raises(ValueError, match="damaged"):
            rans.decode(wrong, frequencies, shape)
    for changed in ({0: -1}, {0: int(frequencies[0]) + 1}, {100: 0}):
        wrong = frequencies.clone()
        for symbol, value in changed.items():
            wrong[symbol] = value
        with pytest.raises(ValueError, match="frequencies must"):
            rans.decode(stream, wrong, shape)


def test_any_bytes_end_in_codes_or_an_error(coded):
    """Nothing that a stream says makes the decoder read beyond it."""
    _, _, frequencies = coded
    generator = torch.Generator().manual_seed(3)
    for size in (36, 100, 4000):
        stream = torch.randint(256, (size,), generator=generator, dtype=torch.uint8)
        stream[:4] = torch.tensor([(size - 36) // 2 % 256, (size - 36) // 512, 0, 0])
        with pytest.raises(ValueError, match="damaged"):
            rans.decode(stream, frequencies, (3000,))
