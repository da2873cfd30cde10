"""A Hugging Face `Trainer` script: a tiny GPT-2 from its configuration class, resumed from the last checkpoint.

torchrun --nproc-per-node 2 hugging_face_trainer.py --output_dir out --max_steps 60 --save_steps 10
"""

import pydoc_data.topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


class Blocks(torch.utils.data.Dataset):
    """Blocks of bytes of Python's own documentation."""

    def __init__(self, block_size):
        text = "".join(pydoc_data.topics.topics.values()).encode()[:65536]
        self.blocks = torch.tensor(list(text)).unfold(0, block_size, block_size)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main():
    (training_args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    trainer = Trainer(model=GPT2LMHeadModel(config), args=training_args, train_dataset=Blocks(64))
    last = get_last_checkpoint(training_args.output_dir)
    if last is not None:
        print(f"resuming from {last}")
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    print(f"done at step {trainer.state.global_step}")


if __name__ == "__main__":
    main()
