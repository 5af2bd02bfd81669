"""Hugging Face's Trainer, which makes the optimizer itself.

    python with_trainer.py --output_dir runs/trainer --max_steps 20 --use_cpu
    python with_trainer.py --output_dir runs/trainer --max_steps 40 --use_cpu \
        --resume_from_checkpoint runs/trainer/checkpoint-20

All flags are the Trainer's own, those of FSDP and DeepSpeed included.
"""

from collections.abc import Sequence

import tiny
from transformers import HfArgumentParser, Trainer, TrainingArguments

from sharded_adadiag import AdaDiag, model_factory


def main(argv: Sequence[str] | None = None) -> Trainer:
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(report_to="none", logging_steps=10)
    (args,) = parser.parse_args_into_dataclasses(argv)
    options = {"lr": 3e-3, "refresh_every": 20, "exclude": ["*.k_proj.*"]}
    trainer = Trainer(
        model=tiny.llama(),
        args=args,
        train_dataset=tiny.Counting(),
        optimizer_cls_and_kwargs=(model_factory(AdaDiag), options),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()
