"""LoRA with peft: only the adapters are trained, and their matrices are rotated.

    python with_peft.py --output_dir runs/peft --max_steps 20 --use_cpu
    python with_peft.py --output_dir runs/peft --max_steps 40 --use_cpu \
        --resume_from_checkpoint runs/peft/checkpoint-20
"""

from collections.abc import Sequence

import tiny
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments

from sharded_adadiag import AdaDiag, model_factory


def main(argv: Sequence[str] | None = None) -> Trainer:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(report_to="none", logging_steps=10)
    (args,) = parser.parse_args_into_dataclasses(argv)
    adapters = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"lr": 1e-2, "refresh_every": 20}
    trainer = Trainer(
        model=get_peft_model(tiny.llama(), adapters),
        args=args,
        train_dataset=tiny.Counting(),
        optimizer_cls_and_kwargs=(model_factory(AdaDiag), options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()
