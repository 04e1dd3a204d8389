"""Fits that are the same on every processor, and their digests. Run as a program, it prints the digests that it finds.

python tests/support/reproducible_fits.py [NAME ...]
"""

import hashlib
import json
import sys

import torch

import rpq_convert as rpq

QUICK = {
    "8 bits": ({"preset": "8bit"}, "c1072af71558"),
    "4 bits": ({"preset": "4bit"}, "7810b83e9f10"),
    "sub-vectors of 8": ({"dim": 8, "axis": "in"}, "c793bd72c056"),
    "rotated": ({"bits": 4, "storage": "bytes", "rotation": 32}, "0ac1e0664ef1"),
    "entropy-coded": ({"bits": 3.2}, "86a479266f5f"),
    "outliers": ({"bits": 4, "outliers": 0.02}, "a6ed9d56fbf1"),
    "random": ({"bits": 4, "fit": "random"}, "3079a1790d35"),
}
MORE = {  # compiled for half a minute each
    "5 bits": ({"preset": "5bit"}, "e441a3ef44dc"),
    "2 bits": ({"preset": "2bit"}, "d7c9d1d77047"),
    "a size": ({"target_size": "150KB", "sensitivity": "shape"}, "7b8e3ae85e30"),
}


def net():
    """Return a model whose weights are whole numbers of thousandths, cubed: the same everywhere, with ties and long tails."""
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(320, 256), torch.nn.Embedding(300, 96), torch.nn.Conv2d(8, 32, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.randint(-1000, 1001, p.shape, generator=generator).double() / 1000) ** 3)
    return model


def digest(options):
    """Return the sha256 of a converted model's tensors and measured errors, its first digits."""
    model = net()
    report = rpq.convert(model, **options, reproducible=True, progress=False)
    found = hashlib.sha256(json.dumps([(r.name, r.error, r.worst) for r in report.rows]).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    known = QUICK | MORE
    print(json.dumps({name: digest(known[name][0]) for name in sys.argv[1:] or known}))
