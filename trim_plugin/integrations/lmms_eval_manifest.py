"""What lmms-eval reads when it looks for models: the entry point `lmms_eval.models`. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

MODEL = "llama_vision_trimmed"


def manifests() -> list[Any]:
    """The model's manifest, for lmms-eval's registry (0.6 and later)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL, simple_class_path="trim_plugin.integrations.lmms_eval.LlamaVisionTrimmed")]
