"""Names of a JiT's tensors in files of other programs, and which of those tensors make up one of ours.

Our names are those of the authors' code. The authors' checkpoints add the prefix `net.`, and wrappers of torch add
theirs. The diffusers proposal (huggingface/diffusers #13098, since 2026-06-28) splits and renames some tensors; older
folders keep `attn.qkv` and the norms' old names. Each tensor is recognised on its own, so any mixture of names works.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from jitscale.errors import CheckpointError

POSITIONS = "pos_embed"  # (1, N, C): a fixed table that the settings determine; other programs store it, we do not

# Prefixes that torch.compile and DistributedDataParallel add, and prefixes that other programs use for the network.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
_NETWORK = re.compile(r"(?:net|transformer)\.")
# Our name -> the proposal's, in a block and outside of blocks; the rest of the name is the same.
_IN_BLOCKS = {
    "attn.q_norm.": "attn.norm_q.",
    "attn.k_norm.": "attn.norm_k.",
    "attn.proj.": "attn.to_out.0.",
    "adaLN_modulation.1.": "adaLN_modulation.",
}
_OUTSIDE = {
    "final_layer.norm_final.": "norm_final.",
    "final_layer.linear.": "linear_final.",
    "final_layer.adaLN_modulation.1.": "adaLN_modulation_final.",
}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
_WHOLE, _SPLIT = (
    "attn.qkv.",
    ("attn.to_q.", "attn.to_k.", "attn.to_v."),
)  # the rows of the first are the rows of the others, one after the other


def own_names(path: Path, stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Our names of the tensors `stored` in the file `path`, each with the stored tensors whose rows make it up.

    Raises a CheckpointError that names the key if a tensor is there twice, or a part of one is missing.
    """
    found: dict[str, dict[int, str]] = {}
    for name in stored:
        own, part = _own(name)
        parts = found.setdefault(own, {})
        if part in parts:
            what = f"{path}: {parts[part]} and {name} are the same tensor, with and without the prefixes of a wrapper"
            raise CheckpointError(f"{what} or under two names; store the weights of one network")
        parts[part] = name
    for own, parts in found.items():
        if own.find(_WHOLE) >= 0 and set(parts) not in ({0}, {1, 2, 3}):
            what = f"{path}: {own} is made of {', '.join(sorted(parts.values()))}"
            raise CheckpointError(f"{what}, but must be {_WHOLE[:-1]} alone or all of to_q, to_k and to_v")
    return {own: tuple(parts[number] for number in sorted(parts)) for own, parts in found.items()}


def diffusers_names(own: str) -> tuple[str, ...]:
    """The proposal's name of our tensor `own`, or the names of the three equal parts of its rows."""
    block = _BLOCK.fullmatch(own)
    if block and block[2].startswith(_WHOLE):
        return tuple(block[1] + split + block[2].removeprefix(_WHOLE) for split in _SPLIT)
    before, inner, names = (block[1], block[2], _IN_BLOCKS) if block else ("", own, _OUTSIDE)
    return (before + _renamed(inner, names),)


def _own(name: str) -> tuple[str, int]:
    """Our name, and the part of that tensor: 0 is the whole, 1 to 3 are thirds of its rows."""
    bare = _WRAPPERS.sub("", name)
    while _NETWORK.match(bare):
        bare = _NETWORK.sub("", bare, count=1)
    block = _BLOCK.fullmatch(bare)
    before, inner, names = (block[1], block[2], _IN_BLOCKS) if block else ("", bare, _OUTSIDE)
    for part, split in enumerate(_SPLIT, 1):
        if block and inner.startswith(split):
            return before + _WHOLE + inner.removeprefix(split), part
    if inner.startswith(tuple(names)):  # our name already; checked first, because their name may be a prefix of it
        return before + inner, 0
    return before + _renamed(inner, {theirs: ours for ours, theirs in names.items()}), 0


def _renamed(name: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
