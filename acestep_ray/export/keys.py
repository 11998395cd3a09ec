"""Keys of LoRA files, in the spellings of the programs that write them, as a module's name and a part of its LoRA.

A key is `PREFIX MODULE SUFFIX`. Prefixes are the wrappers that the model was in when it was saved; they stack, as in
`transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.default.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from acestep_ray.export.names import flattened, is_module, unflattened


class LoraKey(NamedTuple):
    """What a key means."""

    module: str
    """With dots, without the prefixes of programs; unchanged where no ACE-Step v1 transformer has the module."""
    part: str
    """`lora_A`, `lora_B`, `lora_magnitude_vector`, `dora_scale` or `alpha`."""


_SUFFIXES = (
    # PEFT and diffusers; `default` is the adapter's name where PEFT was given none.
    (r"\.lora_A(\.default)?(\.weight)?", "lora_A"),
    (r"\.lora_B(\.default)?(\.weight)?", "lora_B"),
    (r"\.lora_magnitude_vector(\.default)?(\.weight)?", "lora_magnitude_vector"),
    (r"\.magnitude(\.weight)?", "lora_magnitude_vector"),
    # kohya's trainers, ComfyUI, OneTrainer, LyCORIS.
    (r"\.lora_down(\.default)?(\.weight)?", "lora_A"),
    (r"\.lora_up(\.default)?(\.weight)?", "lora_B"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.alpha", "alpha"),
    # diffusers before PEFT.
    (r"(\.lora(_linear_layer)?|_lora)\.down(\.weight)?", "lora_A"),
    (r"(\.lora(_linear_layer)?|_lora)\.up(\.weight)?", "lora_B"),
)
_SUFFIX = re.compile(
    "(?P<module>.+?)(?:" + "|".join(f"(?P<s{i}>{suffix})" for i, (suffix, _) in enumerate(_SUFFIXES)) + ")"
)

# Wrappers, by name; where modules are written with underscores, so are they.
_WRAPPERS = (
    "lora_unet",
    "lora_transformer",
    "lora_dit",
    "lora",
    "lycoris",
    "base_model.model",
    "base_model",
    "model.diffusion_model",
    "diffusion_model",
    "transformer",
    "model",
    "dit",
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
_PREFIX = re.compile("(?:" + "|".join(f"{flattened(name)}_" for name in _WRAPPERS) + ")")
_DOTTED_PREFIX = re.compile(
    r"(?:(?:lora_unet|lora_transformer|lora_dit|lycoris)[_.]|(?:"
    + "|".join(re.escape(name) for name in _WRAPPERS)
    + r")\.)+"
)
# torch.compile, FSDP and activation checkpointing also wrap modules inside the model.
_WRAPPED_INSIDE = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# diffusers' attention processors: `attn.processor.to_out_lora.down.weight` is a LoRA of `attn.to_out.0`.
_PROCESSOR = re.compile(r"[._]processor(?=[._]to_)")


def parse_key(key: str) -> LoraKey | None:
    """What a key of a LoRA file means; None for one that no LoRA has."""
    match = _SUFFIX.fullmatch(key)
    if match is None:
        return None
    part = next(part for i, (_, part) in enumerate(_SUFFIXES) if match[f"s{i}"] is not None)
    return LoraKey(module_name(match["module"]), part)


def module_name(written: str) -> str:
    """The module that a program's name for it means, `lora_unet_speaker_embedder` → `speaker_embedder`."""
    if is_module(written):
        return written
    inside = _PROCESSOR.sub("", _WRAPPED_INSIDE.sub("", written))
    for name in (inside, f"{inside}.0") if inside.endswith("to_out") else (inside,):
        # Each prefix may also be the begin of a module's name: the first rest that is a module is meant.
        rest: str | None = flattened(name)
        while rest is not None:
            if is_module(module := unflattened(rest)):
                return module
            match = _PREFIX.match(rest)
            rest = rest[match.end() :] if match else None
    return _DOTTED_PREFIX.sub("", written, count=1) if _DOTTED_PREFIX.match(written) else written


_OTHER_MODELS: Sequence[tuple[str, str]] = (
    (
        r"(^|[._])lora_te\d?_|(^|\.)text_(encoder|model)",
        "an image model's text encoder (Stable Diffusion, SDXL, Flux)",
    ),
    (r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]", "Flux"),
    (r"(^|[._])joint_blocks[._]", "Stable Diffusion 3"),
    (
        r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]",
        "Stable Diffusion or SDXL",
    ),
    (
        r"(^|[._])layers[._]\d+[._](self_attn|cross_attn|mlp)[._]([qkvo]_proj|to_(q|k|v|out)|(gate|up|down)_proj)",
        "ACE-Step 1.5 or a language model",
    ),
    (r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]", "Wan"),
)


def other_model(modules: Iterable[str]) -> str | None:
    """The model that module names are known to be from, where it is none of ACE-Step v1."""
    modules = list(modules)
    for pattern, model in _OTHER_MODELS:
        if any(re.search(pattern, name) for name in modules):
            return model
    return None
