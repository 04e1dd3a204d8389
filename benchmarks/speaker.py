"""A real speaker encoder (resemblyzer's LSTM) at 8, 5.34 and 4 bits: cosine of its embeddings with the dense model's.

    pip install --no-deps resemblyzer
    python benchmarks/speaker.py [BITS ...]

A few weights of its first layer, up to 61, meet quiet channels; small weights meet loud ones. Inputs are mel spectrograms of synthetic
speech (pulses and noise through formants), at four loudnesses. int8 is the round-to-nearest one with a scale for every row.
"""

import copy
import math
import sys

import torch
from real_models import package_file
from torch import Tensor, nn

import rpq_convert as rpq
from rpq_convert.report.text import means

RATE, MELS, FRAMES = 16_000, 40, 160
LOUDNESS = (1, 10, 100, 1000)  # of mel power


class Encoder(nn.Module):
    """resemblyzer.VoiceEncoder without its audio code."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(MELS, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        found = self.linear(self.lstm(x)[1][0][-1]).relu()
        return nn.functional.normalize(found, dim=1)


def encoder() -> nn.Module:
    model = Encoder().eval()
    state = torch.load(package_file("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=False)[
        "model_state"
    ]
    model.load_state_dict(state, strict=False)
    return model


def mel_filters() -> Tensor:
    """Return triangular filters [mels, frequencies] on Slaney's scale."""
    top = 15 + math.log(RATE / 2000) / (math.log(6.4) / 27)
    mel = torch.linspace(0, top, MELS + 2)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    at = torch.linspace(0, RATE / 2, 201)
    low, mid, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
    return torch.minimum((at - low) / (mid - low), (high - at) / (high - mid)).clamp_min(0) * 2 / (high - low)


def speech(speakers: int, seed: int) -> Tensor:
    """Return mel spectrograms [speakers, frames, mels]."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=g))

    found = []
    for _ in range(speakers):
        pitch, tract, wave, length = draw(80, 250), draw(0.85, 1.2), [], 0
        while length < 165 * FRAMES:
            n = int(draw(1200, 4500))
            at, kind = torch.fft.rfftfreq(n, 1 / RATE), draw(0, 1)
            formants = [f * tract for f in (draw(300, 900), draw(900, 2400), 2600, 3600)]
            gain = (
                sum(1 / (1 + ((at - f) / b) ** 2) for f, b in zip(formants, (60, 90, 150, 250)))
                / (1 + (at / 500) ** 2) ** 0.5
            )
            noise = torch.randn(n, generator=g)
            pulses = (torch.arange(n) * pitch * draw(0.9, 1.1) / RATE).floor().diff(prepend=torch.zeros(1)) > 0
            source, gain = (noise, (at / 8000) ** 2) if kind < 0.35 else (pulses.float(), gain)
            part = torch.fft.irfft(torch.fft.rfft(source) * gain, n=n)
            loud = 1e-3 if kind < 0.15 else 10 ** draw(-0.5, 0)
            wave.append(part / part.std() * torch.hann_window(n) * loud)
            length += n
        whole = torch.cat(wave)[: 165 * FRAMES]
        whole = whole * 10**-1.5 / whole.square().mean().sqrt() + 2e-5 * torch.randn(len(whole), generator=g)
        power = torch.stft(whole, 400, 160, window=torch.hann_window(400), return_complex=True).abs().square()
        found.append((mel_filters() @ power).T[:FRAMES])
    return torch.stack(found)


def int8(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            step = parameter.data.abs().amax(1, keepdim=True) / 127
            parameter.data = (parameter.data / step).round() * step
    return model


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    dense, test = encoder(), speech(48, 1)
    data = [speech(16, 100 + i) * loud for i, loud in enumerate(LOUDNESS)]
    rows = {"int8": int8(copy.deepcopy(dense))}
    for bits in map(float, sys.argv[1:] or ("8", "5.34", "4")):
        for calibration in (None, data):
            model = copy.deepcopy(dense)
            report = rpq.convert(model, bits=bits, calibration=calibration)
            rows[f"{bits:g} bits{', calibrated' * (calibration is not None)}"] = model
            print(f"{bits:g} bits: {means(report)}", flush=True)
    print("| | " + " | ".join(f"x {loud}" for loud in LOUDNESS) + " |\n|---|" + "---|" * len(LOUDNESS))
    for name, model in rows.items():
        cosines = [(model(test * loud) * dense(test * loud)).sum(1) for loud in LOUDNESS]
        print(
            f"| {name} | " + " | ".join(f"{float(c.mean()):.4f} (least {float(c.min()):.4f})" for c in cosines) + " |"
        )


if __name__ == "__main__":
    main()
