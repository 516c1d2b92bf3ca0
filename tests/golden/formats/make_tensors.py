"""Files of `torch.save` with tensors of every type and layout, and the numbers in them.

python tests/golden/formats/make_tensors.py        needs torch; made with 2.14.1
"""

from pathlib import Path

import numpy as np
import torch

PLACE = Path(__file__).parent / "tensors"
TYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


def main():
    PLACE.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = torch.randn(10, 8)
    content = {
        **{name: (torch.randn(4, 6) * 3).to(getattr(torch, name)) for name in TYPES},
        "whole": base,
        "transposed": base.T,
        "part": base[2:5, 1:8:3],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "k": torch.tensor(2**40 + 1),
        "nested": {"a": torch.ones(2), "list": [torch.ones(1), 5]},
        "number": 3,
        "half": 2.5,
        "text": "Größe",
        "pair": (1, 2),
        "nothing": None,
        "type": torch.float32,
        "device": torch.device("cpu"),
        "size": base.shape,
    }
    torch.save(content, PLACE / "types.pt")
    torch.save(torch.nn.Linear(3, 4).state_dict(), PLACE / "protocol_4.pt", pickle_protocol=4)
    torch.save(torch.nn.Linear(3, 4), PLACE / "module.pt")
    torch.save({"a": base}, PLACE / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.ones(2), PLACE / "bare.pt")
    torch.save({"a": torch.ones(2, 1).expand(2, 50)}, PLACE / "expanded.pt")
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, PLACE / "complex.pt")
    found = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    arrays = {name: tensor.detach().float().numpy() for name, tensor in found.items()}
    np.savez(PLACE / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
