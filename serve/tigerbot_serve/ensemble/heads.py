"""The two trained probabilities: p_div on the creative member, p_dev on the factual one.

A folder holds `heads.safetensors` ({head}.w1 (hidden, d), {head}.b1, {head}.w2 (1, hidden), {head}.b2; hidden 0 has
only w2 (1, d) and b2) and `heads.json` (format_version, layer, hidden, size, temperature and bias of each head, hashes
of what they were trained on, and its quantisation). Heads on another model's states are silent nonsense, and int8 moves
states, so these must match. p_dev
reads d + 1 numbers: the state, and the lingering surprise of the token that was fed (`tigerbot.surprise`).

Legend: R rows, d the members' width (input of the output matrix), h the head's hidden width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tigerbot.errors import ModelError

FORMAT_VERSION = 2
NAMES = ("p_div", "p_dev")


class Head:
    """p = sigmoid((relu(h w1 + b1) w2 + b2) / temperature + bias)."""

    def __init__(self, tensors: dict[str, Tensor], temperature: float, bias: float) -> None:
        self._w1_hd, self._b1_h = tensors.get("w1"), tensors.get("b1")
        self._w2_1h, self._b2 = tensors["w2"], tensors["b2"].reshape(1)
        self._temperature, self._bias = temperature, bias

    @property
    def width(self) -> int:
        return (self._w2_1h if self._w1_hd is None else self._w1_hd).shape[1]

    def folded(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """w1, b1, w2, b2 of the same head with a temperature of 1 and a bias of 0."""
        return self._w1_hd, self._b1_h, self._w2_1h / self._temperature, self._b2 / self._temperature + self._bias

    def __call__(self, hidden_Rd: Tensor) -> Tensor:
        """Probabilities (R,), float32."""
        inner_Rh = hidden_Rd.float()
        if self._w1_hd is not None:
            inner_Rh = torch.relu(torch.nn.functional.linear(inner_Rh, self._w1_hd, self._b1_h))
        score_R = torch.nn.functional.linear(inner_Rh, self._w2_1h, self._b2)[:, 0]
        return torch.sigmoid(score_R / self._temperature + self._bias)


class Heads:
    """Both heads of a folder: alone, and as one.

    Together they are block-diagonal: a step's two states and the surprise side by side go through one product a layer,
    whose zeros cost less than the kernels that two heads would need.
    """

    def __init__(self, p_div: Head, p_dev: Head) -> None:
        self.p_div, self.p_dev = p_div, p_dev
        w1_div, b1_div, w2_div, b2_div = p_div.folded()
        w1_dev, b1_dev, w2_dev, b2_dev = p_dev.folded()
        self._w1 = self._b1 = None
        if w1_div is not None and w1_dev is not None and b1_div is not None and b1_dev is not None:
            self._w1, self._b1 = torch.block_diag(w1_div, w1_dev), torch.cat([b1_div, b1_dev])
        self._w2, self._b2 = torch.block_diag(w2_div, w2_dev), torch.cat([b2_div, b2_dev])

    def both(self, creative_Rd: Tensor, factual_Rd: Tensor, surprise_R: Tensor) -> tuple[Tensor, Tensor]:
        """p_div and p_dev of the same sequences, (R,) each."""
        inner = torch.cat([creative_Rd.float(), factual_Rd.float(), surprise_R[:, None]], dim=1)
        if self._w1 is not None:
            inner = torch.nn.functional.linear(inner, self._w1, self._b1).relu_()
        p_div_R, p_dev_R = torch.nn.functional.linear(inner, self._w2, self._b2).sigmoid_().unbind(dim=1)
        return p_div_R, p_dev_R


def load_heads(folder: str | Path, hashes: dict[str, str], width: int, device: str = "cpu") -> Heads:
    """The heads in a folder.

    Args:
        hashes: creative_hash, factual_hash, tokenizer_hash and quantisation of what is served.
        width: the members' hidden width.

    Raises:
        ModelError: a file is missing, the format is newer, or they were trained on other models.
    """
    folder = Path(folder)
    about = check_heads(folder, hashes)
    tensors = {name: tensor.float().to(device) for name, tensor in load_file(folder / "heads.safetensors").items()}
    heads = Heads(*(_head(folder, tensors, about, name) for name in NAMES))
    for name, head, given in (("p_div", heads.p_div, width), ("p_dev", heads.p_dev, width + 1)):
        if head.width != given:
            raise ModelError(f"{name} reads {head.width} numbers, the members give {given}", where=str(folder))
    return heads


def check_heads(folder: str | Path, hashes: dict[str, str]) -> dict:
    """What a heads folder says of itself, if they belong to these models.

    Raises:
        ModelError: a file is missing, the format is newer, or they were trained on other models.
    """
    folder = Path(folder)
    for name in ("heads.json", "heads.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"has no {name}", where=str(folder), fix="name the folder that a heads job wrote")
    about = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"format_version is {version}, this release reads {FORMAT_VERSION}",
            where=str(folder / "heads.json"),
            fix="upgrade the server, or train the heads again",
        )
    made_for = {"quantisation": "none"} | about
    for name, served in hashes.items():
        if made_for.get(name) != served:
            raise ModelError(
                f"heads of another model: {name} is {made_for.get(name)}, served is {served}",
                where=str(folder),
                fix="train heads on these members, with the dtype they are served in",
            )
    if about.get("layer", -1) != -1:
        raise ModelError(
            f"heads read layer {about['layer']}, the engine gives the last",
            where=str(folder),
            fix="train with layer: -1",
        )
    return about


def _head(folder: Path, tensors: dict[str, Tensor], about: dict, name: str) -> Head:
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    wanted = {"w1", "b1", "w2", "b2"} if about.get("hidden") else {"w2", "b2"}
    if set(own) != wanted:
        raise ModelError(
            f"{name} has {sorted(own)}, wants {sorted(wanted)}",
            where=str(folder / "heads.safetensors"),
            fix="train again",
        )
    scale = about.get(name, {})
    return Head(own, float(scale.get("temperature", 1.0)), float(scale.get("bias", 0.0)))
