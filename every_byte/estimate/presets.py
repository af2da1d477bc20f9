"""What people want to do with a model, each as a `Setup` to start from."""

from dataclasses import replace

from every_byte.estimate.setup import Setup

_TRAINING = Setup(
    dtype="bf16", optimizer="adamw", implementation="fused", attention="sdpa", length=2048
)
_INFERENCE = replace(_TRAINING, task="inference", length=4096)
PRESETS: dict[str, tuple[str, Setup]] = {
    "full": ("Full fine-tuning", _TRAINING),
    "lora": ("LoRA", replace(_TRAINING, rank=16)),
    "qlora": (
        "QLoRA",
        replace(_TRAINING, rank=16, quantised="nf4 double", checkpointing=True),
    ),
    "inference": ("Inference for one", _INFERENCE),
    "serving": ("Serving for many", replace(_INFERENCE, batch=16)),
}
"""By short name: the name in words, and the setup. All compute in BF16 with SDPA, as
transformers loads and runs models of today; AdamW is fused, as transformers' Trainer has it
(``training_args.py``, ``optim="adamw_torch_fused"``). QLoRA checkpoints its layers, as PEFT's
``prepare_model_for_kbit_training`` does by default (``peft/utils/other.py``), and doubly
quantises NF4 (arXiv 2305.14314)."""
